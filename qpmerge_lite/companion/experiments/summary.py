"""Results of a comparison as tables and records: what validation chose, ranks, intervals over what
was repeated, and paired differences."""

from __future__ import annotations

from collections import Counter

from .baselines import BASELINES, ENTRIES, FAMILIES, HEURISTICS
from .intervals import relative_spread, seed_interval

CHOSEN = "chosen (on how many seeds)"
CEILINGS = ("experts", "multitask")  # no merges: what merges are compared to


def frame(results: list[dict]):
    """Test results as a ``pandas.DataFrame``: one row per seed, method and task, ``mean`` among the
    tasks, and the validation score."""
    import pandas as pd

    rows = []
    for result in results:
        accuracy = result["accuracy"]
        mean = sum(accuracy.values()) / len(accuracy)
        for task, normalised in result["normalised"].items():
            rows.append(
                {
                    "seed": result["seed"],
                    "method": result["method"],
                    "label": result["label"],
                    "task": task,
                    "normalised": normalised,
                    "accuracy": accuracy.get(task, mean),
                    "validation": result["validation"],
                }
            )
    return pd.DataFrame(rows)


def units(results: list[dict]):
    """What intervals are taken over, ``seed`` or ``task``, and its rows of :func:`frame`: the means
    of seeds, or the tasks where there is one seed."""
    table = frame(results)
    if table.seed.nunique() > 1:
        return "seed", table[table.task == "mean"]
    return "task", table[table.task != "mean"]


def ranks(results: list[dict]):
    """Place of every merge among all merges of a seed (of a task where there is one seed), 1 the
    best, as a ``pandas.DataFrame`` with a column per method."""
    unit, rows = units(results)
    merges = rows[~rows.method.isin(CEILINGS)]
    accuracy = merges.pivot(index=unit, columns="method", values="normalised")
    return accuracy.rank(axis=1, ascending=False)


# ------------------------------------------------------------------------------- options


def at_grid_edge(result: dict) -> list[str]:
    """Options chosen at an end of their grid, where a wider one might have done better.

    α = 1, RegMean unshrunk, and the programme's two priors are no such ends.
    """
    if result["method"] not in ENTRIES:
        return []
    grid = ENTRIES[result["method"]].grid(len(result["accuracy"]), result["seed"])
    edges = []
    for name, value in result["options"].items():
        if not isinstance(value, float) or name == "prior" or (name, value) == ("alpha", 1.0):
            continue
        values = [options[name] for options in grid]
        if value in (min(values), max(values)):
            edges.append(name)
    return edges


def choices(results: list[dict]):
    """What every tuned method chose, as a ``pandas.DataFrame`` with one row each: its distinct
    choices, the most frequent first, in brackets on how many seeds; * marks an end of its grid.

    Words of one choice are joined by spaces that no line breaks at.
    """
    import pandas as pd

    counted: dict[str, Counter] = {}
    for result in results:
        edges = at_grid_edge(result)
        chosen = [
            _choice(name, value, list(result["accuracy"])) + "*" * (name in edges)
            for name, value in result["options"].items()
            if name not in ("basis", "scope", "seed")
        ]
        if chosen:
            counted.setdefault(result["label"], Counter())[", ".join(chosen)] += 1
    return pd.Series({label: _counted(times) for label, times in counted.items()}).to_frame(CHOSEN)


def _counted(times: Counter) -> str:
    """Words and how often each occurs, on one line."""
    parts = (f"{words} ({count})" for words, count in times.most_common())
    return "; ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)


def _choice(name: str, value, tasks: list[str]) -> str:
    """One option in words."""
    if name == "weights":
        return "uniform" if len(set(value)) == 1 else f"more {tasks[value.index(max(value))]}"
    if isinstance(value, bool):
        return name if value else f"not {name}"
    return f"{name} {value:.3g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------- records


def summarise(records, name: str, results: list[dict]):
    """Record, under ids that begin with ``name``, every method's accuracy and rank, the picks of
    validation, and paired differences.

    What takes a method that is not among the results is left out. Intervals are taken over seeds,
    or over tasks where there is one seed, as the notes of the records say.

    Returns: labels by method; normalised accuracy as a ``pandas.DataFrame``, a row per seed (mean
        over tasks) or task and a column per method, best first; and (mean, interval) by method.
    """
    unit, rows = units(results)
    labels = dict(zip(rows.method, rows.label))
    means = rows.pivot(index=unit, columns="method", values="normalised").drop(columns="experts")
    means = means[means.mean().sort_values(ascending=False).index]
    intervals = {method: seed_interval(means[method]) for method in means}
    picks = _picks(rows.groupby("method").validation.mean())

    def record(id, mean_and_interval):
        mean, interval = mean_and_interval
        records.record(f"{name}.{id}", mean, n=len(means), interval=interval, note=f"over {unit}s")

    raw = rows[rows.method == "experts"].accuracy
    record("experts.raw", seed_interval(raw))
    _record_margin(records, name, raw, unit)
    for method, mean_and_interval in intervals.items():
        record(f"{method}.accuracy", mean_and_interval)
    for method, places in ranks(results).items():
        record(f"{method}.rank", seed_interval(places))
    for id, method in picks.items():
        records.record(f"{name}.{id}.label", labels[method])
        record(f"{id}.accuracy", intervals[method])
    for id, first, second in _pairs(picks):
        if {first, second} <= set(means):
            record(id, seed_interval(means[first] - means[second]))
    return labels, means, intervals


def _record_margin(records, name: str, raw, unit: str) -> None:
    """Record the margin within which two merges count as equally accurate: how much the experts'
    own accuracy differs from seed to seed. No merge has a part in it."""
    margin = relative_spread(raw) if unit == "seed" else 0.0
    note = "standard deviation of the experts' accuracy over seeds, over its mean; 0 for one seed"
    records.record(f"{name}.margin", margin, n=len(raw), note=note)


def _picks(validation) -> dict[str, str]:
    """Id of a group of methods -> the one of them with the highest validation score; groups that
    are not among the scores are left out."""
    groups = {
        "best_heuristic": HEURISTICS,
        "best_neighbour": BASELINES,
        "best_qp": [f"qp_{family}" for family in FAMILIES],
    }
    picks = {}
    for id, group in groups.items():
        present = [method for method in group if method in validation]
        if present:
            picks[id] = validation[present].idxmax()
    return picks


def _pairs(picks: dict[str, str]) -> list[tuple[str, str | None, str | None]]:
    """(id, method, method subtracted from it) of the differences that are recorded; None for a pick
    that there is not."""
    heuristic, baseline = picks.get("best_heuristic"), picks.get("best_neighbour")
    rivals = {"best_heuristic": heuristic, "best_neighbour": baseline, "regmean": "regmean"}
    programmes = {f"qp_{family}": f"qp_{family}" for family in (*FAMILIES, "weights")}
    programmes["best_qp"] = picks.get("best_qp")
    pairs = []
    for programme, method in programmes.items():
        for rival, other in rivals.items():
            pairs.append((f"{programme}.minus_{rival}", method, other))
    return [
        *pairs,
        ("soup.minus_base", "soup", "base"),
        ("regmean.minus_soup", "regmean", "soup"),
        ("best_neighbour.minus_best_heuristic", baseline, heuristic),
        ("qp_elements.minus_regmean_plus_plus", "qp_elements", "regmean_plus_plus"),
        ("qp_rotated_rows.minus_qp_rows", "qp_rotated_rows", "qp_rows"),
    ]


def regret(merges, by: str | None = None) -> float:
    """Accuracy that is lost against the best merge of every problem, mean over problems.

    Args:
        merges: a ``pandas.DataFrame`` with a row per merge, ``problem`` and ``accuracy`` among its
            columns.
        by: the column whose highest value picks a merge; None takes the average merge.
    """
    accuracies = merges.groupby("problem").accuracy
    if by is None:
        return float((accuracies.max() - accuracies.mean()).mean())
    picked = merges.loc[merges.groupby("problem")[by].idxmax()].set_index("problem").accuracy
    return float((accuracies.max() - picked).mean())
