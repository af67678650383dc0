"""Results of a comparison as tables, and intervals over what was repeated."""

from __future__ import annotations


def frame(results: list[dict]):
    """Test results as a ``pandas.DataFrame``: one row per seed, method and task, ``mean`` among the
    tasks, and the validation score."""
    import pandas as pd

    rows = []
    for r in results:
        mean = sum(r["accuracy"].values()) / len(r["accuracy"])
        for task, normalised in r["normalised"].items():
            rows.append(
                {
                    "seed": r["seed"],
                    "method": r["method"],
                    "label": r["label"],
                    "task": task,
                    "normalised": normalised,
                    "accuracy": r["accuracy"].get(task, mean),
                    "validation": r["validation"],
                }
            )
    return pd.DataFrame(rows)


def seed_interval(values, level: float = 0.95) -> tuple[float, tuple[float, float] | None]:
    """Mean over seeds and its Student-t interval, None for one seed; for paired differences pass
    the differences."""
    import numpy as np
    from scipy import stats

    values = np.asarray(values, dtype=float)
    if len(values) == 1:
        return float(values[0]), None
    mean, half = (
        values.mean(),
        stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5,
    )
    return float(mean), (float(mean - half), float(mean + half))


def units(results: list[dict]):
    """What intervals are taken over, and its rows of :func:`frame`: the means of seeds, or the
    tasks where there is one seed."""
    found = frame(results)
    unit = "seed" if found.seed.nunique() > 1 else "task"
    return unit, found[(found.task == "mean") == (unit == "seed")]


def ranks(results: list[dict]):
    """Place of every merge among all merges of a seed (or task, see ``summarise``), 1 the best, as
    a ``pandas.DataFrame`` with a column per method."""
    unit, found = units(results)
    merges = found[~found.method.isin(("experts", "multitask"))]
    return merges.pivot(index=unit, columns="method", values="normalised").rank(
        axis=1, ascending=False
    )


def record_mean(record, id: str, values, *, n: int | None = None, note: str = "", of=seed_interval):
    """Record the mean of values with its interval, and return both.

    Args:
        record: ``Records.record``, or anything called like it.
        values: one per seed, draw, problem or other unit that was repeated; of paired methods the
            differences.
        n: samples behind the values where that is not how many they are.
        of: gives mean and interval of the values; Student's t unless told otherwise.
    """
    mean, interval = of(values)
    record(id, mean, n=len(values) if n is None else n, interval=interval, note=note)
    return mean, interval


def record_share(record, id: str, hits: int, of: int, note: str = "") -> float:
    """Record a share with its 95 % Clopper–Pearson interval, ``hits`` out of ``of`` independent
    trials, and return the share."""
    from scipy.stats import binomtest

    interval = tuple(binomtest(int(hits), of).proportion_ci())
    return record(id, hits / of, n=of, interval=interval, note=note)


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
