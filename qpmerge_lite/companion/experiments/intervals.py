"""Means and shares with their intervals, and how they are recorded."""

from __future__ import annotations

from collections.abc import Callable
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


def jackknife(
    count: int, value: Callable[[list[int]], float], level: float = 0.95
) -> tuple[float, Interval | None]:
    """A statistic of a few units and its interval by leaving out one unit at a time, with Student's
    t, None for one unit; of a mean it is :func:`seed_interval`'s.

    Args:
        count: units there are.
        value: places of some units -> the statistic of these.
    """
    import numpy as np
    from scipy import stats

    everyone = list(range(count))
    if count == 1:
        return value(everyone), None
    without = [value(everyone[:place] + everyone[place + 1 :]) for place in everyone]
    deviations = np.asarray(without) - np.mean(without)
    error = float(np.sqrt((count - 1) / count * np.square(deviations).sum()))
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    whole = value(everyone)
    return whole, Interval(whole - half, whole + half)


def relative_spread(values) -> float:
    """Standard deviation of values over their mean; 0 for one value, which shows no spread."""
    import numpy as np

    values = np.asarray(values, dtype=float)
    return float(values.std(ddof=1) / values.mean()) if len(values) > 1 else 0.0


def pooled_spread(groups, level: float = 0.95) -> tuple[float, Interval]:
    """Standard deviation inside groups of values, taken to be the same in all, and its chi-square
    interval; one group has to have at least two values."""
    import numpy as np
    from scipy.stats import chi2

    groups = [np.asarray(values, dtype=float) for values in groups]
    freedom = sum(len(values) - 1 for values in groups)
    squares = sum(float(np.square(values - values.mean()).sum()) for values in groups)
    deviation = (squares / freedom) ** 0.5
    tails = ((1 + level) / 2, (1 - level) / 2)
    low, high = (deviation * float(freedom / chi2.ppf(tail, freedom)) ** 0.5 for tail in tails)
    return deviation, Interval(low, high)


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
