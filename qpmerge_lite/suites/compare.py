"""Methods side by side on a suite: each tuned as its authors tune it, on validation data, and touched once by test data."""
from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import methods
from ..records import read_json, write_json
from ..sequential import TARGETS
from . import Suite, load, training


@dataclass(frozen=True)
class Entry:
    """One row of a comparison: how it is called, and the options it is chosen from on the validation split (one: no choice)."""

    label: str
    call: Callable
    grid: Callable[[int], list[dict]]  # of the number of experts

    def tuned(self, suite: Suite, calibration) -> tuple[methods.Merge, dict]:
        """The merge with the highest mean normalised validation accuracy, and its options."""
        grid = self.grid(len(suite.experts))
        if len(grid) == 1:
            return self.call(suite.base, suite.experts, calibration, **grid[0]), grid[0]
        score = lambda state: suite.normalised(state, "validation")["mean"]
        return methods.tune(self.call, grid, score, suite.base, suite.experts, calibration)[:2]


def _base(base, experts, calibration=None):
    return methods.Merge(dict(base.state_dict()))


def _tilted(k: int) -> list[dict]:
    """Soup weights: uniform, or one expert counted twice or not at all."""
    raw = [[1.0] * k] + [[c if i == j else 1.0 for i in range(k)] for j in range(k) for c in (0.0, 2.0)]
    return [{"weights": [w / sum(r) for w in r]} for r in raw]


SCALES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
ALPHAS = [{"alpha": a} for a in (0.5, 0.9, 0.95, 1.0)]
FAMILIES = ("layer", "rows", "rotated_rows", "rotated_columns", "elements")

ENTRIES = {
    "base": Entry("base", _base, lambda k: [{}]),
    "soup": Entry("uniform soup", methods.soup, lambda k: [{}]),
    "weighted_soup": Entry("weighted soup", methods.soup, _tilted),
    "task_arithmetic": Entry("task arithmetic", methods.task_arithmetic, lambda k: [{"scale": s} for s in (1 / k, *SCALES)]),
    "ties": Entry("TIES", methods.ties, lambda k: [{"density": d, "scale": s} for d in (0.1, 0.2, 0.4) for s in (0.5, 0.8, 1.0, 1.3, 1.7, 2.1, 2.5)]),
    "dare": Entry("DARE", methods.dare, lambda k: [{"drop": p, "scale": s} for p in (0.2, 0.5, 0.8) for s in (1 / k, 0.1, 0.2, 0.3, 0.4)]),
    "regmean": Entry("RegMean", methods.regmean, lambda k: ALPHAS),
    "regmean_plus_plus": Entry("RegMean++", methods.regmean_plus_plus, lambda k: ALPHAS),
    **{f"qp_{f}": Entry(f"QP {f.replace('_', ' ')}", methods.qp, lambda k, f=f: [{"basis": f, "targets": t} for t in TARGETS]) for f in FAMILIES},
}
HEURISTICS = ("soup", "weighted_soup", "task_arithmetic", "ties", "dare")


def _fingerprint(suite: Suite) -> str:
    """Hash of the experts and of every source file a merge or its evaluation depends on."""
    package = Path(methods.__file__).parent
    sources = sorted([*package.glob("*.py"), *Path(__file__).parent.glob("*.py")])
    skip = {"cli.py", "book.py", "plots.py", "claims.py", "regression.py", "records.py"}
    code = hashlib.sha256(b"".join(p.read_bytes() for p in sources if p.name not in skip)).hexdigest()
    return code + "".join(training.digest(*e.values()) for e in (*suite.experts.values(), *suite.heads.values()))


def result(suite: Suite, name: str, size: int) -> dict:
    """One method on one suite, from the cache or computed and kept.

    Args:
        name: a key of ``ENTRIES``.
        size: calibration examples per task, drawn from the training split with the suite's seed.
    Returns: method, seed, options chosen, accuracy and normalised accuracy by task on the test split, per-layer table, seconds.
    """
    entry = ENTRIES[name]
    facts = [_fingerprint(suite), suite.tier, suite.seed, name, entry.grid(len(suite.experts)), size]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    path = training.cache_folder() / f"{suite.name}-{suite.tier}" / "merges" / f"{name}-{key[:16]}.json"
    if path.exists():
        return read_json(path)
    started = time.perf_counter()
    merge, options = entry.tuned(suite, suite.calibration(size))
    seconds = time.perf_counter() - started
    found = {"method": name, "label": entry.label, "seed": suite.seed, "options": options, "seconds": seconds, "table": merge.table,
             "accuracy": suite.evaluate(merge.state_dict), "normalised": suite.normalised(merge.state_dict)}
    write_json(path, found)
    return found


def compare(name: str, seeds: int, size: int, tier="smoke", device="cpu", first_seed=0, entries=tuple(ENTRIES)) -> list[dict]:
    """Results of all entries and of the experts themselves over seeds; suites are loaded one at a time."""
    found = []
    for seed in range(first_seed, first_seed + seeds):
        suite = load(name, tier, seed, device, progress=False)
        own = {t: suite.evaluate(suite.experts[t], "test", [t])[t] for t in suite.tasks}
        found.append({"method": "experts", "label": "experts", "seed": seed, "options": {}, "table": [], "accuracy": own,
                      "normalised": {**dict.fromkeys(suite.tasks, 1.0), "mean": 1.0}, "seconds": 0.0})
        found += [result(suite, entry, size) for entry in entries]
    return found


def describe(options: dict) -> str:
    """Options in a few words: numbers rounded, lists of weights by their extremes."""
    short = lambda v: f"{v:.3g}" if isinstance(v, float) else f"{min(v):.3g} to {max(v):.3g}" if isinstance(v, list) else str(v)
    return ", ".join(f"{k} {short(v)}" for k, v in options.items() if k != "basis")


def frame(results: list[dict]):
    """Test results as a ``pandas.DataFrame``: one row per seed, method and task, ``mean`` among the tasks."""
    import pandas as pd

    rows = []
    for r in results:
        mean = sum(r["accuracy"].values()) / len(r["accuracy"])
        for task, normalised in r["normalised"].items():
            rows.append({"seed": r["seed"], "method": r["method"], "label": r["label"], "task": task, "normalised": normalised,
                         "accuracy": r["accuracy"].get(task, mean)})
    return pd.DataFrame(rows)


def seed_interval(values, level: float = 0.95) -> tuple[float, tuple[float, float]]:
    """Mean over seeds and its Student-t interval; for paired differences pass the differences."""
    import numpy as np
    from scipy import stats

    values = np.asarray(values, dtype=float)
    mean, half = values.mean(), stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(mean), (float(mean - half), float(mean + half))
