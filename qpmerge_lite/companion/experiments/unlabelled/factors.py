"""What each part of the merge that is chosen without labels matters: one of its choices changed at
a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ....choice.automatic import PRIOR, RIDGE, Candidates
from ....engine.recipes import Recipe
from ....methods import batched
from ....sequential import merge_together
from ....solvers import QP
from ....spectral.triplets import tsv_merge
from ...suites import Suite, load
from ..cache import kept

SOLVER = {"basis": ("elements",), "ridge": RIDGE, "prior": PRIOR, "penalty": "diagonal"}
PASS = {"targets": 0.5, "inputs": "merged", "folds": 1}
# factor -> level -> what it changes, of the solver's fields, the recipe's, or the calibration size
FACTORS: dict[str, dict[str, dict]] = {
    "nothing": {"the programme": {}},
    "basis": {
        name.replace("_", " "): {"basis": (name,)}
        for name in ("layer", "rows", "rotated_rows", "rotated_columns")
    },
    "prior": {f"{prior:g}": {"prior": prior} for prior in (0.66, 1.0, 2.0, 8.0)},
    "targets": {f"{beta:g}": {"targets": beta} for beta in (0.0, 0.25, 0.75, 1.0)},
    "ridge": {f"{ridge:g}": {"ridge": ridge} for ridge in (0.01, 0.03, 0.3, 1.0)}
    | {"cross-fitted": {"ridge": "cross-fitted", "folds": 4}},
    "penalty": {"mean": {"penalty": "mean"}},
    "weights": {"energy": {"weights": "energy"}},
    "inputs": {"expert": {"inputs": "expert"}},
    "calibration": {f"{size}": {"size": size} for size in (16, 256)},
    "anchor": {"TSV-M": {"anchor": True}},
}
MIXTURES = {
    "a little of both": {"half": 0.7, "tsv": 0.1, "iso": 0.1},
    "more of both": {"half": 0.4, "tsv": 0.2, "iso": 0.2},
    "TSV-M only": {"half": 0.7, "tsv": 0.2},
    "Iso-C only": {"half": 0.7, "iso": 0.2},
    "both, no programme": {"tsv": 0.35, "iso": 0.35},
    "none, shorter": {"half": 0.85},
}


def factors(name: str, seed: int, tier="smoke", device="cpu", *, size: int) -> list[dict]:
    """An experiment as of ``evidence``: a row for every level of every factor.

    Args:
        size: calibration examples per task where it is not the factor.
    Returns: rows with ``seed``, ``factor``, ``level``, how many ``coefficients`` were solved for
        (None for mixtures) and ``test``, normalised accuracy as a mean over tasks.
    """
    suite = load(name, tier, seed, device, progress=False)
    entry = kept(suite, "factors", [size], lambda: {"rows": measured(suite, size)})
    return entry["rows"]


def measured(suite: Suite, size: int) -> list[dict]:
    """The rows of :func:`factors`."""
    rows = []

    def add(factor: str, level: str, state: Mapping[str, Tensor], coefficients: int | None):
        test = suite.normalised(dict(state))["mean"]
        place = {"suite": suite.name, "seed": suite.seed, "factor": factor, "level": level}
        rows.append(place | {"coefficients": coefficients, "test": test})

    levels = [(factor, level) for factor, of_factor in FACTORS.items() for level in of_factor]
    by_size: dict[int, list[tuple[str, str]]] = {}
    for factor, level in levels:
        by_size.setdefault(FACTORS[factor][level].get("size", size), []).append((factor, level))
    anchor = tsv_merge(suite.base, suite.experts).state_dict
    for examples, places in by_size.items():
        inputs = suite.calibration(examples)
        for batch in batched(places, 4):
            solved = {
                f"{factor}: {level}": recipe(FACTORS[factor][level], anchor)
                for factor, level in batch
            }
            merges = merge_together(suite.base, suite.experts, inputs, solved)
            for (factor, level), merge in zip(batch, merges.values(), strict=True):
                add(factor, level, merge.state_dict, sum(row["p"] for row in merge.table))
    tried = Candidates(suite.base, suite.experts, suite.calibration(size))
    for level, weights in MIXTURES.items():
        add("mixture", level, tried.blend(weights).state_dict, None)
    return rows


def recipe(change: Mapping, anchor: Mapping[str, Tensor]) -> Recipe:
    """How the programme is made with one of its choices changed.

    Args:
        change: a level of ``FACTORS``.
        anchor: state dict that stands in for the prior where that is the change.
    """
    solver = SOLVER | {key: value for key, value in change.items() if key in (*SOLVER, "weights")}
    options = PASS | {key: value for key, value in change.items() if key in PASS}
    if change.get("anchor"):
        return Recipe(QP(**solver | {"prior": None}), **options, anchor=anchor)
    return Recipe(QP(**solver), **options)
