"""Means and shares with their intervals, and how they are recorded."""

from __future__ import annotations

from typing import NamedTuple


class Interval(NamedTuple):
    """The two ends of an interval."""

    low: float
    high: float


def seed_interval(values, level: float = 0.95) -> tuple[float, Interval | None]:
    """Mean over seeds and its Student-t interval, None for one seed; for paired differences pass
    the differences."""
    import numpy as np
    from scipy import stats

    values = np.asarray(values, dtype=float)
    if len(values) == 1:
        return float(values[0]), None
    mean = values.mean()
    quantile = stats.t.ppf((1 + level) / 2, len(values) - 1)
    half = quantile * values.std(ddof=1) / len(values) ** 0.5
    return float(mean), Interval(float(mean - half), float(mean + half))


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
