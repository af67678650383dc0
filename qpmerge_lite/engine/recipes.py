"""How a merge of a pass is made, and what is known of it while it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import MergeError, MissingLayer
from ..moments import Moments
from ..options import flag, number, one_of, whole, words
from .layers import SCOPES
from .lockstep import Stream
from .survey import Survey
from .views import View

PRODUCTS = ("activations", "float64")
INPUTS = ("merged", "expert", "block")
TARGETS = {"own": 1.0, "blend": 0.5, "propagated": 0.0}
Solver = Callable[..., tuple[Tensor, dict]]


class LayerMoments(NamedTuple):
    """What a programme needs to know of one layer.

    Attributes:
        view: how the layer's module is ``y = W x``.
        moments: sums over what it reads.
        updates: residual updates (K, g, m, n).
    """

    view: View
    moments: Moments
    updates: Tensor


@dataclass(frozen=True)
class Recipe:
    """How one merge of a pass is made.

    Attributes:
        solver: ``(moments, updates (K, g, m, n)) -> (update (g, m, n), table row)``, e.g.
            ``solvers.QP``; an attribute ``full_energy = False`` says that it can do without the
            off-diagonal of M. The moments are valid during the call: their memory is used for the
            next layer. None solves nothing, and keeps all moments.
        inputs: layers read what the ``merged`` prefix produces, each ``expert``'s own stream
            (RegMean), or the merged prefix up to the block and the expert within it (``block``,
            RegMean++).
        targets: ``own`` (the expert's outputs on its own stream), ``propagated`` (its layer applied
            to the merged stream), ``blend``, or the weight β in [0, 1] of own targets. Without
            effect unless inputs are merged.
        scope: ``all``: dense layers with their bias folded in, convolutions, norms and embeddings;
            ``dense``: dense layers with their bias, and norms; ``weights``: the weights of dense
            layers only. What no layer covers is averaged and listed.
        folds: number of folds of sequences, each held out in turn for cross-fitting.
        layers: names of the only layers to solve, the others being averaged, or one name; all by
            default. Any name of a shared module will do. A tuple once the recipe is made.
        anchor: state dict of another merge, which stands in for the average where no layer is
            solved; the solver is given its update (g, m, n) of every layer as a third argument.
        full_energy: whether all of M is kept, not only its diagonal; what the solver says by
            default.
    """

    solver: Solver | None
    inputs: str = "merged"
    targets: str | float = "own"
    scope: str = "all"
    folds: int = 4
    layers: Iterable[str] | None = None
    anchor: Mapping[str, Tensor] | None = None
    full_energy: bool | None = None

    def __post_init__(self):
        if self.solver is not None and (isinstance(self.solver, type) or not callable(self.solver)):
            raise MergeError(
                f"solver: expected a function or an object such as QP(), found {self.solver!r}"
            )
        one_of("inputs", self.inputs, INPUTS)
        one_of("scope", self.scope, SCOPES)
        if isinstance(self.targets, str):
            one_of("targets (or a number in [0, 1])", self.targets, TARGETS)
        else:
            number("targets", self.targets, 0, 1)
        whole("folds", self.folds, 1)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(words("layers", self.layers)))
        if self.full_energy is not None:
            flag("full_energy", self.full_energy)

    @property
    def own_weight(self) -> float:
        """The weight β of own targets; on an expert's own inputs both targets agree."""
        beta = TARGETS[self.targets] if isinstance(self.targets, str) else float(self.targets)
        return beta if self.inputs == "merged" else 0.0

    @property
    def keeps_full_energy(self) -> bool:
        """Whether all of M is needed."""
        if self.full_energy is not None:
            return self.full_energy
        return getattr(self.solver, "full_energy", True)


@dataclass(frozen=True)
class PassOptions:
    """What holds for all merges of a pass.

    Attributes:
        blocks: paths of the lists whose members are blocks, for ``inputs="block"``; all outermost
            lists by default.
        products: precision of products of activations: that of the ``activations``, at least
            float32, or ``float64``.
        activations: bytes that paused forwards may hold. Where they would hold more, some wait in
            front of blocks only and run these again for every layer: the same merge, bit for bit.
            By default half a GiB, or what the layers of one block read together, if that is more.
        group: of ``torch.distributed``, whose processes share the forwards; by default this process
            runs them all, whether or not there are others.
    Raises: MergeError for ``products`` or ``activations`` that are none of these.
    """

    blocks: str | Iterable[str] | None = None
    products: str = "activations"
    activations: float | None = None
    group: torch.distributed.ProcessGroup | None = None

    def __post_init__(self):
        one_of("products", self.products, PRODUCTS)
        if self.activations is not None:
            number("activations", self.activations, low=0)


@dataclass
class Making:
    """One merge in the making: its weights so far, and what is known about its layers."""

    name: str
    recipe: Recipe
    views: dict[str, View]
    state: dict[str, Tensor]
    anchor: dict[str, Tensor] | None
    table: list[dict] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    solved: set[str] = field(default_factory=set)
    moments: dict[str, LayerMoments] = field(default_factory=dict)

    @property
    def stream(self) -> Stream:
        """Whose inputs its layers read: a key of the forwards."""
        return "expert" if self.recipe.inputs == "expert" else (self.recipe.inputs, self.name)


def looks_at(device: torch.device) -> bool:
    """Whether values may be looked at on the way: elsewhere than on the CPU the host would wait for
    them."""
    return device.type == "cpu"


def plain(row: dict) -> dict:
    """A table row with numbers for tensors, None for those that are not defined."""
    numbers = {}
    for key, value in row.items():
        number = value.item() if isinstance(value, Tensor) else value
        numbers[key] = None if isinstance(value, Tensor) and number != number else number
    return numbers


def check_recipes(recipes) -> None:
    """MergeError for anything but a mapping of names to recipes."""
    if not isinstance(recipes, Mapping) or not recipes:
        raise MergeError(
            "recipes: expected a mapping of names to Recipe, found "
            f"{type(recipes).__name__} {recipes!r}"
        )
    for name, recipe in recipes.items():
        if not isinstance(recipe, Recipe):
            raise MergeError(
                f"recipes: {name!r}: expected a Recipe, found {type(recipe).__name__}; "
                "pass Recipe(solver)"
            )


def is_solution(answer, base: Tensor) -> bool:
    """Whether a solver returned an update of the shape of W (g, m, n), and a table row."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        return False
    update, facts = answer
    return isinstance(update, Tensor) and update.shape == base.shape and isinstance(facts, Mapping)


def shown(answer) -> str:
    """What a solver returned, for messages."""
    if isinstance(answer, tuple):
        return f"({', '.join(shown(part) for part in answer)})"
    return f"Tensor {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__


def with_known_layers(recipe: Recipe, known: Survey) -> Recipe:
    """The recipe, naming layers as a survey does.

    Raises: MissingLayer; MergeError for a layer that cannot be solved on these batches.
    """
    views = known.views_in(recipe.scope)
    wanted = set(views)
    if recipe.layers is not None:
        layers = [known.paths.get(name, name) for name in recipe.layers]
        recipe, wanted = replace(recipe, layers=layers), set(layers)
    for name in sorted(wanted - views.keys()):
        raise MissingLayer(
            f"layer {name!r}: not among the layers of scope {recipe.scope!r}, which are "
            f"{sorted(views)}"
        )
    for name, message in known.refusals.items():
        if name in wanted:
            raise MergeError(message)
    return recipe
