"""What the definition module of a suite has to say, checked and with its defaults filled in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from torch import Tensor, nn

from ...errors import MergeError
from .training import Recipe

Weights = dict[str, Tensor]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class SuiteSpec:
    """A suite as its definition module declares it.

    Every attribute is read from the module: from the name in capitals where it is a constant, from
    the same name where it is a function.

    Attributes:
        tasks: names of the tasks, in order.
        n_classes: task -> number of labels.
        manifest: name of the manifest that the sources are checked against; None where ``base`` and
            ``data`` check what they read.
        recipe: how experts are trained; None where they are public checkpoints.
        base: ``base()`` gives the encoder and the SHA-256 of its weights; its blocks are the
            ``nn.ModuleList`` with most parameters.
        data: ``data(task, seed)`` gives a ``datasets.DatasetDict`` with splits train, validation
            and test, a ``label`` column beside the inputs.
        collate: columns of some rows to the keyword arguments of ``encoder.forward``, which returns
            features (B, d).
        recipes: task -> recipe, of the tasks that have one of their own.
        layers: names of the layers in which experts may be trained alone.
        layer_recipe: how experts of one layer are trained; None where there are no ``layers``.
        alike: calibration sentences of like length that a CPU takes at a time; None where inputs
            are no sentences.
        chunk: public checkpoints only; examples evaluated at a time.
        experts: public checkpoints only; ``experts(task)`` gives the state dict of the expert and
            that of its head, which is empty where a task has none.
        complete: where there are no heads; ``complete(encoder, expert, batch)`` gives the batch
            with what the expert adds to unlabelled arguments.
        score: where there are no heads; ``score(task, encoder, state, batches, labels)`` gives the
            quality of the encoder under a state dict.
    """

    tasks: Sequence[str]
    n_classes: Mapping[str, int]
    manifest: str | None
    recipe: Recipe | None
    base: Callable[[], tuple[nn.Module, str]]
    data: Callable
    collate: Callable[[dict], Batch]
    recipes: Mapping[str, Recipe]
    layers: tuple[str, ...]
    layer_recipe: Recipe | None
    alike: int | None
    chunk: int
    experts: Callable[[str], tuple[Weights, Weights]] | None
    complete: Callable | None
    score: Callable | None

    @classmethod
    def of(cls, module: ModuleType) -> SuiteSpec:
        """The specification that a definition module declares.

        Raises: MergeError naming the module and what it lacks.
        """
        required = ["TASKS", "N_CLASSES", "MANIFEST", "RECIPE", "base", "data", "collate"]
        if getattr(module, "RECIPE", None) is None:
            required += ["CHUNK", "experts"]
        if getattr(module, "LAYERS", ()):
            required.append("LAYER_RECIPE")
        lacking = [name for name in required if not hasattr(module, name)]
        if lacking:
            raise MergeError(
                f"{module.__name__}: expected a suite that defines {', '.join(required)}, "
                f"found no {', '.join(lacking)}; see SuiteSpec"
            )
        recipe = module.RECIPE
        return cls(
            tasks=module.TASKS,
            n_classes=module.N_CLASSES,
            manifest=module.MANIFEST,
            recipe=recipe,
            base=module.base,
            data=module.data,
            collate=module.collate,
            recipes=getattr(module, "RECIPES", {}),
            layers=getattr(module, "LAYERS", ()),
            layer_recipe=getattr(module, "LAYER_RECIPE", None),
            alike=getattr(module, "ALIKE", None),
            chunk=module.CHUNK if recipe is None else recipe.chunk,
            experts=getattr(module, "experts", None),
            complete=getattr(module, "complete", None),
            score=getattr(module, "score", None),
        )

    @property
    def is_public(self) -> bool:
        """Whether experts are public checkpoints rather than trained here."""
        return self.recipe is None

    @property
    def precision(self) -> str:
        """Precision of matrix products in training and evaluation."""
        return "float32" if self.recipe is None else self.recipe.precision

    def recipe_of(self, task: str, layer: str | None = None) -> Recipe | None:
        """How the expert of a task is trained, in one layer alone where that is named."""
        if layer is None:
            return self.recipes.get(task, self.recipe)
        if self.layer_recipe is None:
            raise MergeError(
                f"{task}: expected a suite with LAYERS and a LAYER_RECIPE to train {layer!r} "
                "alone, found none; leave the layer out"
            )
        return replace(self.layer_recipe, layer=layer)
