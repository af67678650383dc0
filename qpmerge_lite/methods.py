r"""Methods that solve layers on calibration inputs, and tuning:
``method(base, experts, calibration, **options) -> Merge``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from typing import TypeVar

from torch import Tensor

from .engine.recipes import Recipe
from .errors import MergeError
from .merge import Merge
from .options import function, score_of
from .sequential import merge_sequentially, merge_together
from .solvers import QP, FeatCal, RegMean, Sketched
from .spectral.essential import esm, esm_at_scales

# fields of a Recipe that are options of qp too
OF_RECIPE = ("inputs", "targets", "folds", "scope", "layers", "anchor")
SolverType = TypeVar("SolverType")


def qp(
    base,
    experts,
    calibration,
    *,
    inputs="merged",
    targets="own",
    folds=4,
    scope="all",
    blocks=None,
    layers=None,
    anchor=None,
    products="activations",
    activations=None,
    group=None,
    progress=False,
    **solver,
) -> Merge:
    """The merge programme through all layers, or some; ``solver`` takes the fields of :class:`QP`.

    Args:
        anchor: state dict of any merge. The ridge then runs from it (λ → ∞) to the programme over a
            basis that contains it.
        base, experts, calibration, inputs, targets, folds, scope, blocks, layers, products,
            activations, group, progress: as in :func:`merge_sequentially`.
    """
    return merge_sequentially(
        base,
        experts,
        calibration,
        _made(QP, solver),
        inputs=inputs,
        targets=targets,
        folds=folds,
        scope=scope,
        blocks=blocks,
        layers=layers,
        anchor=anchor,
        products=products,
        activations=activations,
        group=group,
        progress=progress,
    )


def _qp_recipe(**options) -> Recipe:
    """How :func:`qp` makes a merge: ``options`` are fields of Recipe and of QP."""
    of_recipe = {name: options[name] for name in OF_RECIPE if name in options}
    of_solver = {name: value for name, value in options.items() if name not in OF_RECIPE}
    return Recipe(_made(QP, of_solver), **of_recipe)


def _made(solver: type[SolverType], options: dict) -> SolverType:
    """A solver with the given fields, or a MergeError naming one that it does not have."""
    known = list(signature(solver).parameters)
    for name in options:
        if name not in known:
            raise MergeError(f"{name}: unknown option; {solver.__name__} takes {', '.join(known)}")
    return solver(**options)


def regmean(
    base, experts, calibration, *, alpha=0.95, blocks=None, group=None, progress=False
) -> Merge:
    """RegMean (arXiv:2212.09849): ``(Σ C'_t/N_t)⁻¹ Σ C'_t/N_t W_t``, ``C' = αC + (1-α) diag C``, on
    every expert's own inputs.

    Weights of dense layers only; biases, norms and embeddings are averaged.
    """
    recipe = _regmean_recipe(alpha=alpha)
    options = {"blocks": blocks, "group": group, "progress": progress}
    return _one(base, experts, calibration, recipe, **options)


def _one(base, experts, calibration, recipe: Recipe, **options) -> Merge:
    """One merge by a recipe; ``options`` are those of :func:`merge_together`."""
    return merge_together(base, experts, calibration, {"merge": recipe}, **options)["merge"]


def _regmean_recipe(**solver) -> Recipe:
    """How :func:`regmean` makes a merge."""
    return Recipe(_made(RegMean, solver), "expert", "propagated", "weights", folds=1)


def regmean_plus_plus(
    base, experts, calibration, *, alpha=0.95, blocks=None, group=None, progress=False
) -> Merge:
    """RegMean++ (arXiv:2508.03121): RegMean on the merged model's block inputs, the expert running
    within the block."""
    recipe = _regmean_plus_plus_recipe(alpha=alpha)
    options = {"blocks": blocks, "group": group, "progress": progress}
    return _one(base, experts, calibration, recipe, **options)


def _regmean_plus_plus_recipe(**solver) -> Recipe:
    """How :func:`regmean_plus_plus` makes a merge."""
    return Recipe(_made(RegMean, solver), "block", "propagated", "weights", folds=1)


def lot(base, experts, calibration, *, blocks=None, group=None, progress=False) -> Merge:
    """LOT Merging (arXiv:2505.23859): layer-wise feature drift on every expert's own inputs,
    ``W_0 + (Σ Δ_t C_t) (Σ C_t)⁺``.

    The programme over single entries with no ridge. Biases are folded into their layers; the
    authors' treatment of them is not known to us.
    """
    return qp(
        base,
        experts,
        calibration,
        basis="elements",
        ridge=0.0,
        prior=0.0,
        inputs="expert",
        folds=1,
        scope="dense",
        blocks=blocks,
        products="float64",
        group=group,
        progress=progress,
    )


def featcal(
    base,
    experts,
    calibration,
    *,
    ridge=0.05,
    anchor=0.66,
    blocks=None,
    group=None,
    progress=False,
) -> Merge:
    """FeatCal (arXiv:2605.13030): in forward order, a ridge regression of each layer to a quarter
    own and three quarters propagated targets.

    The authors' constants: ridge 0.05, anchor ``2.2 · 0.3`` times the sum of the updates. Their
    reduced weight of all but the class token in the last block is not applied here, biases are
    folded into their layers, and what no layer covers is averaged.
    """
    recipe = _featcal_recipe(ridge=ridge, anchor=anchor)
    options = {"blocks": blocks, "group": group, "progress": progress}
    return _one(base, experts, calibration, recipe, **options)


def _featcal_recipe(**solver) -> Recipe:
    """How :func:`featcal` makes a merge."""
    return Recipe(_made(FeatCal, solver), targets=0.25, scope="dense", folds=1)


def sketched(
    base,
    experts,
    calibration,
    *,
    inputs="merged",
    targets="own",
    scope="all",
    blocks=None,
    group=None,
    progress=False,
    **solver,
) -> Merge:
    """The unrestricted programme through all layers from sketches of what they read; ``solver``
    takes the fields of :class:`Sketched`."""
    return merge_sequentially(
        base,
        experts,
        calibration,
        _made(Sketched, solver),
        inputs=inputs,
        targets=targets,
        folds=1,
        scope=scope,
        blocks=blocks,
        group=group,
        progress=progress,
    )


RECIPES: dict[Callable[..., Merge], Callable[..., Recipe]] = {
    qp: _qp_recipe,
    regmean: _regmean_recipe,
    regmean_plus_plus: _regmean_plus_plus_recipe,
    featcal: _featcal_recipe,
}
# merges in one pass, each with forwards of its own; any number on the experts' own inputs
TOGETHER = 4


def many(
    method: Callable[..., Merge], grid: Iterable[dict], base, experts, calibration=None
) -> Iterator[Merge]:
    """Merges of one method with several sets of options, in their order; those of a pass share the
    experts' forwards.

    Args:
        method: any of this package's, or one that is called like them.
        grid: keyword arguments of the method.
    """
    grid = _grid(method, grid)
    if method is esm and all(options.keys() <= {"scale"} for options in grid):
        scales = [options.get("scale", 1.0) for options in grid]
        yield from esm_at_scales(base, experts, calibration, scales)
        return
    if method not in RECIPES:
        for options in grid:
            yield method(base, experts, calibration, **options)
        return
    recipes = [RECIPES[method](**options) for options in grid]
    alone = all(recipe.inputs == "expert" for recipe in recipes)
    for batch in batched(recipes, len(recipes) if alone else TOGETHER):
        by_name = {str(place): recipe for place, recipe in enumerate(batch)}
        yield from merge_together(base, experts, calibration, by_name).values()


def batched(items: list, size: int) -> Iterator[list]:
    """Lists of at most ``size`` of the items."""
    for start in range(0, len(items), max(size, 1)):
        yield items[start : start + size]


def _grid(method, grid) -> list[dict]:
    """A grid of options that the method takes, or a MergeError."""
    function("method", method)
    kind = type(grid).__name__
    if isinstance(grid, (str, bytes, Mapping, Tensor)) or not isinstance(grid, Iterable):
        raise MergeError(
            f"grid: expected a list of options such as [{{'scale': 0.3}}], found {kind} {grid!r}"
        )
    grid = list(grid)
    for options in grid:
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            raise MergeError(f"grid: expected options such as {{'scale': 0.3}}, found {options!r}")
        try:
            signature(method).bind(None, None, None, **options)
        except TypeError as error:
            raise MergeError(f"grid: options {options} do not fit the method: {error}") from error
    return grid


def tune(
    method: Callable[..., Merge],
    grid: Iterable[dict],
    score: Callable[[dict], float],
    base,
    experts,
    calibration=None,
    *,
    note: Callable[[Merge], None] | None = None,
    first: Callable[[dict], float] | None = None,
) -> tuple[Merge, dict, list[float | None]]:
    """The merge with the highest ``score`` of its state dict over a grid of options, those options,
    and all scores.

    Args:
        method, grid: as of :func:`many`.
        score: must look at validation data only. Ties go to the earlier entry.
        note: called with every merge of the grid.
        first: a cheaper score, for example on some of the validation data, for a first round: only
            the better half by it is scored by ``score``, and the others have None as their score.
            That half of the merges is held in memory until then.
    Raises: MergeError for an empty grid, NonFinite for a score that is not a number.
    """
    function("score", score)
    grid = _grid(method, grid)
    merges = _noted(many(method, grid, base, experts, calibration), note)
    candidates = enumerate(merges) if first is None else _better_half(merges, grid, first)
    best: tuple[Merge, dict] | None = None
    highest = -math.inf
    scores: list[float | None] = [None] * len(grid)
    for place, merge in candidates:
        score_now = score_of(f"options {grid[place]}", score(merge.state_dict))
        scores[place] = score_now
        if best is None or score_now > highest:
            best, highest = (merge, grid[place]), score_now
    if best is None:
        raise MergeError("grid: expected at least one set of options, found none")
    return *best, scores


def _noted(merges: Iterator[Merge], note: Callable[[Merge], None] | None) -> Iterator[Merge]:
    """The merges, each shown to ``note`` when its turn is over."""
    for merge in merges:
        yield merge
        if note is not None:
            note(merge)


def _better_half(
    merges: Iterator[Merge], grid: list[dict], first: Callable[[dict], float]
) -> list[tuple[int, Merge]]:
    """The half of the merges of a grid with the higher ``first`` score, rounded up, with their
    places; of equals the earlier ones."""
    function("first", first)
    scores: list[float] = []
    best: dict[int, Merge] = {}
    for place, merge in enumerate(merges):
        scores.append(score_of(f"options {grid[place]}", first(merge.state_dict)))
        best[place] = merge
        if len(best) > (len(grid) + 1) // 2:
            worst = min(best, key=lambda place: (scores[place], -place))
            del best[worst]
    return list(best.items())
