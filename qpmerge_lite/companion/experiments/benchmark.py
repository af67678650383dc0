"""Methods side by side on a suite: each tuned on validation data, and touched once by test data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ... import datafree, gradient, methods
from ...assess import audit
from ...merge import Merge
from ..suites import Suite, is_public, load, multitask, plan
from .cache import kept as kept
from .summary import frame as frame
from .summary import ranks, seed_interval, units


@dataclass(frozen=True)
class Entry:
    """One row of a comparison: how it is called, and the options it is chosen from on the
    validation split."""

    label: str
    call: Callable
    grid: Callable[[int, int], list[dict]]  # of the number of experts and the seed
    heads: bool = False  # whether the call takes the tasks' heads

    def bound(self, suite: Suite) -> Callable:
        """The call, with the suite's heads where it takes them."""
        return partial(self.call, heads=suite.classifiers()) if self.heads else self.call

    def tuned(
        self, suite: Suite, calibration, tables: list | None = None
    ) -> tuple[Merge, dict, list[float]]:
        """The merge with the highest mean normalised validation accuracy, its options, and that
        accuracy for every entry of the grid.

        ``tables`` takes the table of every merge of the grid.
        """
        score = lambda state: suite.normalised(state, "validation")["mean"]
        grid, call = (
            plan(suite.tier).spread(self.grid(len(suite.experts), suite.seed)),
            self.bound(suite),
        )
        if self.call is gradient.fisher:  # the options of its grid do not change the gradients
            call = partial(
                call,
                known=gradient.information(
                    suite.base,
                    suite.experts,
                    calibration,
                    heads=suite.classifiers(),
                    seed=suite.seed,
                ),
            )

        note = None if tables is None else lambda merge: tables.append(merge.table)
        return methods.tune(call, grid, score, suite.base, suite.experts, calibration, note)


def _base(base, experts, calibration=None):
    return Merge(dict(base.state_dict()))


def _tilted(k: int) -> list[dict]:
    """Soup weights: uniform, or one expert counted twice."""
    raw = [[1.0] * k] + [[2.0 if i == j else 1.0 for i in range(k)] for j in range(k)]
    return [{"weights": [w / sum(r) for w in r]} for r in raw]


def _product(**options) -> list[dict]:
    """All combinations of the values given for each option."""
    grid: list[dict] = [{}]
    for name, values in options.items():
        grid = [{**g, name: v} for g in grid for v in values]
    return grid


_once = lambda k, seed: [{}]
FAMILIES = ("layer", "rows", "rotated_rows", "rotated_columns", "elements")
HEURISTICS = ("soup", "weighted_soup", "task_arithmetic", "ties", "dare")
NEIGHBOURS = (
    "fisher",
    "tsv_merge",
    "iso_c",
    "wudi",
    "adamerging",
    "featcal",
    "lot",
    "regmean",
    "regmean_plus_plus",
)
ANCHOR = 0.66  # FeatCal's anchor, in units of the sum of the updates
ALPHAS = (0.5, 0.9, 0.95, 1.0)
ENTRIES = {
    "base": Entry("base", _base, _once),
    "soup": Entry("uniform soup", datafree.soup, _once),
    "weighted_soup": Entry("weighted soup", datafree.soup, lambda k, seed: _tilted(k)),
    "task_arithmetic": Entry(
        "task arithmetic",
        datafree.task_arithmetic,
        lambda k, seed: _product(scale=(0.05, 0.1, 1 / k, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0)),
    ),
    "ties": Entry(
        "TIES",
        datafree.ties,
        lambda k, seed: _product(density=(0.05, 0.2, 0.4), scale=(0.2, 0.35, 0.5, 0.7, 1.0)),
    ),
    "dare": Entry(
        "DARE",
        datafree.dare,
        lambda k, seed: _product(drop=(0.1, 0.5, 0.9), scale=(0.1, 1 / k, 0.3), seed=(seed,)),
    ),
    "fisher": Entry(
        "Fisher",
        gradient.fisher,
        lambda k, seed: _product(normalise=(False, True), seed=(seed,)),
        heads=True,
    ),
    "tsv_merge": Entry(
        "TSV-M", datafree.tsv_merge, lambda k, seed: _product(scale=(0.2, 0.35, 0.5, 0.7, 1.0))
    ),
    "iso_c": Entry(
        "Iso-C",
        datafree.iso_c,
        lambda k, seed: _product(scale=(0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5)),
    ),
    "wudi": Entry(
        "WUDI",
        datafree.wudi,
        lambda k, seed: [
            {"rate": 1e-5, "scale": 1.0},
            *_product(rate=(1e-4, 1e-3), scale=(0.35, 0.7)),
        ],
    ),
    "adamerging": Entry(
        "AdaMerging",
        gradient.adamerging,
        lambda k, seed: [
            {"scale": s, "rate": r, "seed": seed}
            for s, r in ((0.1, 2e-3), (0.1, 1e-2), (0.3, 2e-2))
        ],
        heads=True,
    ),
    "featcal": Entry(
        "FeatCal",
        methods.featcal,
        lambda k, seed: _product(ridge=(0.05, 0.25), anchor=(0.25, ANCHOR, 1.2)),
    ),
    "lot": Entry("LOT", methods.lot, _once),
    "regmean": Entry("RegMean", methods.regmean, lambda k, seed: _product(alpha=ALPHAS)),
    "regmean_plus_plus": Entry(
        "RegMean++", methods.regmean_plus_plus, lambda k, seed: _product(alpha=ALPHAS)
    ),
    **{
        f"qp_{f}": Entry(
            f"QP {f.replace('_', ' ')}",
            methods.qp,
            lambda k, seed, f=f: _product(
                basis=(f,), targets=("own", "propagated"), prior=(1 / k, ANCHOR)
            ),
        )
        for f in FAMILIES
    },
    "qp_weights": Entry(
        "QP weights only",
        methods.qp,
        lambda k, seed: _product(
            basis=("elements",),
            targets=("own", "propagated"),
            prior=(1 / k, ANCHOR),
            scope=("weights",),
        ),
    ),
}


def judged(
    suite: Suite, name: str, label: str, merge: Merge, options: dict, scores: list[float]
) -> dict:
    """A chosen merge on the test split: the one time that a method and seed touch it."""
    accuracy = suite.evaluate(merge.state_dict)
    return {
        "method": name,
        "label": label,
        "seed": suite.seed,
        "options": options,
        "scores": scores,
        "validation": max(scores),
        "accuracy": accuracy,
        "normalised": suite.over_experts(accuracy),
    }


def energies(suite: Suite, state: dict, size: int) -> dict:
    """Captured energies of any merge on the calibration examples and on as many disjoint ones.

    Returns: ``in_sample`` and ``disjoint``, each with the mean over ``layers`` that have residual
        energy and that of the ``output``; see ``assess.audit``.
    """
    found = {}
    for where, skip in (("in_sample", 0), ("disjoint", size)):
        audited = audit(suite.base, state, suite.experts, suite.calibration(size, skip=skip))
        layers = [share for share in audited["layers"].values() if share is not None]
        found[where] = {"layers": sum(layers) / len(layers), "output": audited["output"]}
    return found


def again(suite: Suite, name: str, size: int) -> Merge:
    """The merge that :func:`result` chose, made again from its options and held."""
    if ("merge", name, size) not in suite._held:
        call, options = ENTRIES[name].bound(suite), result(suite, name, size)["options"]
        suite._held["merge", name, size] = call(
            suite.base, suite.experts, suite.calibration(size), **options
        )
    return suite._held["merge", name, size]


def result(suite: Suite, name: str, size: int) -> dict:
    """One method on one suite, kept.

    Args:
        name: a key of ``ENTRIES``.
        size: calibration examples per task, drawn from the training split with the suite's seed.
    Returns: method, seed, options chosen, validation scores over the grid, accuracy and normalised
        accuracy by task on the test split, captured energies, seconds; of a programme also
        ``tables``, layer by layer, of every entry of the grid.
    """
    entry = ENTRIES[name]

    def make():
        started, tables = time.perf_counter(), [] if entry.call is methods.qp else None
        merge, options, scores = entry.tuned(suite, suite.calibration(size), tables)
        found = judged(suite, name, entry.label, merge, options, scores) | {
            "seconds": time.perf_counter() - started
        }
        return found | {"captured": energies(suite, merge.state_dict, size), "tables": tables}

    return kept(suite, name, [entry.grid(len(suite.experts), suite.seed), size], make, entry.call)


def variant(suite: Suite, size: int, **options) -> dict:
    """One programme with the given options of ``methods.qp``, kept: validation accuracy, table, and
    its audit on disjoint examples."""

    def make():
        merge = methods.qp(suite.base, suite.experts, suite.calibration(size), **options)
        audited = audit(
            suite.base, merge.state_dict, suite.experts, suite.calibration(size, skip=size)
        )
        return {
            "validation": suite.normalised(merge.state_dict, "validation")["mean"],
            "table": merge.table,
            "audit": audited,
        }

    return kept(suite, "variant", [size, options], make)


def own_accuracy(suite: Suite, split: str = "test") -> dict[str, float]:
    """Accuracy of every expert on its own task."""
    suite.over_experts(dict.fromkeys(suite.tasks, 1.0), split)
    return {t: suite._ceilings[t, split] for t in suite.tasks}


def ceilings(suite: Suite) -> list[dict]:
    """Results of the experts themselves and, where experts are trained here, of one encoder trained
    on all tasks at once, as of :func:`result`; kept."""

    def make():
        found = {"experts": ("experts", own_accuracy(suite))}
        if not is_public(suite.name, suite.tier):
            joint, state = multitask(suite)
            found["multitask"] = "multi-task training", joint.evaluate(state)
        return [
            {
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
            for name, (label, accuracy) in found.items()
        ]

    return kept(suite, "ceilings", [], make)


def compare(
    name: str,
    seeds: int,
    size: int,
    tier="smoke",
    device="cpu",
    first_seed=0,
    entries=tuple(ENTRIES),
) -> list[dict]:
    """Results of all entries and of the ceilings over seeds; suites are loaded one at a time.

    What needs heads is left out where a suite has none.
    """
    found = []
    for seed in range(first_seed, first_seed + seeds):
        suite = load(name, tier, seed, device, progress=False)
        found += ceilings(suite)
        found += [
            result(suite, entry, size)
            for entry in entries
            if not ENTRIES[entry].heads or all(suite.heads.values())
        ]
    return found


def at_grid_edge(found: dict) -> list[str]:
    """Options chosen at an end of their grid, where a wider one might have done better; α = 1,
    RegMean unshrunk, and the programme's two priors are no such ends."""
    if found["method"] not in ENTRIES:
        return []
    grid = ENTRIES[found["method"]].grid(len(found["accuracy"]), found["seed"])
    return [
        k
        for k, v in found["options"].items()
        if isinstance(v, float)
        and (k, v) != ("alpha", 1.0)
        and k != "prior"
        and v in (min(g[k] for g in grid), max(g[k] for g in grid))
    ]


def choices(results: list[dict]):
    """What every tuned method chose, as a ``pandas.DataFrame``: one column per seed; * marks an end
    of its grid."""
    import pandas as pd

    def words(result, name, value):
        if name == "weights":
            return (
                "uniform"
                if len(set(value)) == 1
                else f"more {list(result['accuracy'])[value.index(max(value))]}"
            )
        plain = (name if value else f"not {name}") if isinstance(value, bool) else str(value)
        return (
            f"{name} {value:.3g}{'*' * (name in at_grid_edge(result))}"
            if isinstance(value, float)
            else plain
        )

    table: dict[str, dict] = {}
    for r in results:
        said = ", ".join(
            words(r, k, v) for k, v in r["options"].items() if k not in ("basis", "scope", "seed")
        )
        if said:
            table.setdefault(f"seed {r['seed']}", {})[r["label"]] = said
    return pd.DataFrame(table)


def summarise(records, name: str, results: list[dict]):
    """Record, under ids that begin with ``name``, every method's accuracy and rank, the picks of
    validation, and paired differences.

    What takes a method that is not among the results is left out. Intervals are taken over seeds,
    or over tasks where there is one seed, as the notes of the records say.

    Returns: labels by method; normalised accuracy as a ``pandas.DataFrame``, a row per seed (mean
        over tasks) or task and a column per method, best first; and (mean, interval) by method.
    """
    unit, overall = units(results)
    labels = dict(zip(overall.method, overall.label))
    means = overall.pivot(index=unit, columns="method", values="normalised").drop(columns="experts")
    means = means[means.mean().sort_values(ascending=False).index]
    intervals = {m: seed_interval(means[m]) for m in means}
    validation = overall.groupby("method").validation.mean()
    picks = {
        "best_heuristic": HEURISTICS,
        "best_neighbour": NEIGHBOURS,
        "best_qp": [f"qp_{f}" for f in FAMILIES],
    }
    present = {id: [m for m in methods if m in validation] for id, methods in picks.items()}
    picks = {id: validation[methods].idxmax() for id, methods in present.items() if methods}

    def keep(id, mean_and_interval):
        records.record(
            f"{name}.{id}",
            mean_and_interval[0],
            n=len(means),
            interval=mean_and_interval[1],
            note=f"over {unit}s",
        )

    keep("experts.raw", seed_interval(overall[overall.method == "experts"].accuracy))
    for m, found in intervals.items():
        keep(f"{m}.accuracy", found)
    for m, places in ranks(results).items():
        keep(f"{m}.rank", seed_interval(places))
    for id, m in picks.items():
        records.record(f"{name}.{id}.label", labels[m])
        keep(f"{id}.accuracy", intervals[m])
    for id, first, second in _pairs(picks):
        if {first, second} <= set(means):
            keep(id, seed_interval(means[first] - means[second]))
    return labels, means, intervals


def _pairs(picks: dict[str, str]) -> list[tuple[str, str, str]]:
    """(id, method, method subtracted from it) of the differences that are recorded."""
    rivals = {**{id: m for id, m in picks.items() if id != "best_qp"}, "regmean": "regmean"}
    programmes = {
        **{f"qp_{f}": f"qp_{f}" for f in (*FAMILIES, "weights")},
        "best_qp": picks.get("best_qp"),
    }
    return [
        *(
            (f"{p}.minus_{id}", m, other)
            for p, m in programmes.items()
            for id, other in rivals.items()
        ),
        ("soup.minus_base", "soup", "base"),
        ("regmean.minus_soup", "regmean", "soup"),
        (
            "best_neighbour.minus_best_heuristic",
            picks.get("best_neighbour"),
            picks.get("best_heuristic"),
        ),
        ("qp_elements.minus_regmean_plus_plus", "qp_elements", "regmean_plus_plus"),
        ("qp_rotated_rows.minus_qp_rows", "qp_rotated_rows", "qp_rows"),
    ]
