"""Methods side by side on a suite: each tuned on validation data, and touched once by test data.

The methods are entries of ``baselines``; tables and records of their results are made by
``summary``.
"""

from __future__ import annotations

import time

from ... import methods
from ...assess import audit
from ...merge import Merge
from ..suites import Suite, is_public, load, multitask
from .baselines import ANCHOR as ANCHOR
from .baselines import ENTRIES
from .baselines import FAMILIES as FAMILIES
from .baselines import HEURISTICS as HEURISTICS
from .cache import kept as kept


def judged(
    suite: Suite, name: str, label: str, merge: Merge, options: dict, scores: list[float | None]
) -> dict:
    """A chosen merge on the test split: the one time that a method and seed touch it."""
    accuracy = suite.evaluate(merge.state_dict)
    return {
        "method": name,
        "label": label,
        "seed": suite.seed,
        "options": options,
        "scores": scores,
        "validation": max(score for score in scores if score is not None),
        "accuracy": accuracy,
        "normalised": suite.over_experts(accuracy),
    }


def energies(suite: Suite, state: dict, size: int) -> dict:
    """Captured energies of any merge on the calibration examples and on as many disjoint ones.

    Returns: ``in_sample`` and ``disjoint``, each with the mean over ``layers`` that have residual
        energy and that of the ``output``, both as ``assess.audit`` defines them.
    """
    captured = {}
    for where, skip in (("in_sample", 0), ("disjoint", size)):
        audited = suite.auditor(size, skip)(state)
        layers = [share for share in audited["layers"].values() if share is not None]
        captured[where] = {"layers": sum(layers) / len(layers), "output": audited["output"]}
    return captured


def chosen_merge(suite: Suite, name: str, size: int) -> Merge:
    """The merge that :func:`result` chose, recomputed from its options; once for a suite."""

    def recompute():
        call, options = ENTRIES[name].bound(suite), result(suite, name, size)["options"]
        return call(suite.base, suite.experts, suite.calibration(size), **options)

    return suite.cached(("merge", name, size), recompute)


def result(suite: Suite, name: str, size: int) -> dict:
    """One method on one suite, cached.

    Args:
        name: a key of ``ENTRIES``.
        size: calibration examples per task, drawn from the training split with the suite's seed.
    Returns: method, seed, options chosen, validation scores over the grid (None for entries that a
        first round dropped, see ``Entry.tuned``), accuracy and normalised accuracy by task on the
        test split, captured energies, seconds; of a programme also ``tables``, layer by layer, of
        every entry of the grid.
    """
    entry = ENTRIES[name]

    def make():
        started, tables = time.perf_counter(), [] if entry.call is methods.qp else None
        merge, options, scores = entry.tuned(suite, suite.calibration(size), tables)
        row = judged(suite, name, entry.label, merge, options, scores)
        row["seconds"] = time.perf_counter() - started
        return row | {"captured": energies(suite, merge.state_dict, size), "tables": tables}

    return kept(suite, name, [entry.grid(len(suite.experts), suite.seed), size], make, entry.call)


def variant(suite: Suite, size: int, **options) -> dict:
    """One programme with the given options of ``methods.qp``, cached: validation accuracy, table,
    and its audit on disjoint examples."""

    def make():
        merge = methods.qp(suite.base, suite.experts, suite.calibration(size), **options)
        disjoint = suite.calibration(size, skip=size)
        return {
            "validation": suite.normalised(merge.state_dict, "validation")["mean"],
            "table": merge.table,
            "audit": audit(suite.base, merge.state_dict, suite.experts, disjoint),
        }

    return kept(suite, "variant", [size, options], make)


def own_accuracy(suite: Suite, split: str = "test") -> dict[str, float]:
    """Accuracy of every expert on its own task."""
    return {task: suite.expert_accuracy(task, split) for task in suite.tasks}


def _ceiling(suite: Suite, name: str, label: str, accuracy: dict[str, float]) -> dict:
    """A row like those of :func:`result` for a model that nothing was chosen for."""
    return {
        "method": name,
        "label": label,
        "seed": suite.seed,
        "options": {},
        "scores": [1.0],
        "validation": 1.0,
        "accuracy": accuracy,
        "normalised": suite.over_experts(accuracy),
        "seconds": 0.0,
    }


def ceilings(suite: Suite) -> list[dict]:
    """Rows like those of :func:`result`, cached, of the experts themselves and, where experts are
    trained here, of one encoder trained on all tasks at once."""

    def make():
        rows = [_ceiling(suite, "experts", "experts", own_accuracy(suite))]
        if not is_public(suite.name, suite.tier):
            joint, state = multitask(suite)
            accuracy = joint.evaluate(state)
            rows.append(_ceiling(suite, "multitask", "multi-task training", accuracy))
        return rows

    return kept(suite, "ceilings", [], make)


def comparison(name: str, seed: int, tier="smoke", device="cpu", *, size: int, entries=None):
    """An experiment as of ``evidence``: results of the ceilings and of entries on one suite and
    seed.

    Args:
        size: calibration examples per task.
        entries: keys of ``ENTRIES``, all by default; what needs heads is left out where a suite has
            none.
    """
    suite = load(name, tier, seed, device, progress=False)
    has_heads = all(suite.heads.values())
    possible = [entry for entry in entries or ENTRIES if has_heads or not ENTRIES[entry].heads]
    return [*ceilings(suite), *(result(suite, entry, size) for entry in possible)]
