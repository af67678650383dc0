"""Correlations of energies and accuracies, and their intervals over the problems that they were
measured in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..intervals import Interval, jackknife

LEVEL = (0.025, 0.975)
FEWEST = 3  # merges of a group, below which they are not correlated
# problems, up to which draws of a bootstrap are all of one problem more often than the level leaves
# out: its interval would be their range
FEW_PROBLEMS = 3


def spearman(x, y) -> float:
    """Spearman's ρ, ties sharing their mean rank; 0 where one side does not vary, as it then orders
    nothing."""
    from scipy.stats import rankdata

    return pearson(rankdata(x), rankdata(y))


def pearson(x, y) -> float:
    """Pearson's r; 0 where one side does not vary."""
    x = np.asarray(x, dtype=float) - np.mean(x)
    y = np.asarray(y, dtype=float) - np.mean(y)
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def inside(table, predictor: str, measure=spearman, target: str = "accuracy"):
    """The correlation within every problem, as a ``pandas.Series`` by problem; merges without the
    predictor are left out, and problems with fewer than three."""
    present = table.dropna(subset=[predictor])
    size = present.groupby("problem")[predictor].transform("size")
    problems = present[size >= FEWEST].groupby("problem")
    return problems[[predictor, target]].apply(
        lambda merges: measure(merges[predictor], merges[target])
    )


def bootstrap_interval(draws) -> Interval:
    """The 95 % interval of bootstrap draws (D,)."""
    low, high = np.quantile(draws, LEVEL)
    return Interval(float(low), float(high))


def bootstrap(values, draws: int, seed: int) -> tuple[float, Interval | None]:
    """Mean of values, one per problem (or several of a cluster averaged before), and its 95 %
    interval over problems drawn whole; Student's t over problems where there are ``FEW_PROBLEMS``
    or fewer."""
    values, generator = np.asarray(values, dtype=float), np.random.default_rng(seed)
    if len(values) <= FEW_PROBLEMS:
        return jackknife(len(values), lambda kept: float(values[kept].mean()))
    means = values[generator.integers(len(values), size=(draws, len(values)))].mean(1)
    return float(values.mean()), bootstrap_interval(means)


def mean_correlation(values, draws: int, seed: int) -> tuple[float, Interval | None]:
    """:func:`bootstrap` of correlations (N,), one per problem; the interval stays within minus one
    and one."""
    mean, interval = bootstrap(values, draws, seed)
    return mean, _between_minus_one_and_one(interval)


def _between_minus_one_and_one(interval: Interval | None) -> Interval | None:
    """The part of an interval in which a correlation can lie."""
    return interval and Interval(max(interval.low, -1.0), min(interval.high, 1.0))


def over_problems(
    problems: Sequence[np.ndarray], value: Callable, draws: int, seed: int
) -> tuple[float, Interval | None]:
    """A correlation of the rows of problems and its 95 % interval, problems drawn whole; with
    ``FEW_PROBLEMS`` or fewer, by leaving out one at a time.

    Args:
        problems: rows (N_i,) of every problem.
        value: rows (N,) -> the correlation of these.
    """

    def of(chosen):
        return float(value(np.concatenate([problems[place] for place in chosen])))

    count = len(problems)
    if count <= FEW_PROBLEMS:
        whole, interval = jackknife(count, of)
        return whole, _between_minus_one_and_one(interval)
    generator = np.random.default_rng(seed)
    resampled = [of(generator.integers(count, size=count)) for _ in range(draws)]
    return of(range(count)), bootstrap_interval(resampled)


def rank_correlation(
    frame, energy: str, draws: int, seed: int, within: bool
) -> tuple[float, Interval | None]:
    """Spearman's ρ of captured energy and normalised accuracy with a 95 % interval, the base left
    out, problems resampled whole (of one problem, its merges), see :func:`over_problems`.

    Args:
        energy: a column of the frame.
        draws: bootstrap samples.
        within: correlate inside every problem and average, so that only methods are compared; else
            pool all merges.
    """
    merges = frame[frame.method != "base"]
    if merges.problem.nunique() > 1:
        if within:
            return mean_correlation(inside(merges, energy), draws, seed)
        return pooled(merges, energy, None, draws, seed)
    pairs, generator = merges[[energy, "accuracy"]].to_numpy(), np.random.default_rng(seed)
    resampled = []
    for _ in range(draws):
        chosen = pairs[generator.integers(len(pairs), size=len(pairs))]
        resampled.append(spearman(chosen[:, 0], chosen[:, 1]))
    return spearman(merges[energy], merges.accuracy), bootstrap_interval(resampled)


def pooled(
    table, predictor: str, by: str | None, draws: int, seed: int, measure=spearman
) -> tuple[float, Interval | None]:
    """The correlation over all merges of a table, or averaged over the groups of a column
    (``experts``, ``kind``), with an interval as of :func:`over_problems`."""
    present = table.dropna(subset=[predictor])
    energies, accuracies = present[predictor].to_numpy(), present.accuracy.to_numpy()
    groups = np.zeros(len(present))
    if by:
        groups = present[by].astype("category").cat.codes.to_numpy()
    problems = list(present.groupby("problem").indices.values())

    def value(rows):
        of_groups = []
        for group in np.unique(groups[rows]):
            members = rows[groups[rows] == group]
            if len(members) >= FEWEST:
                of_groups.append(measure(energies[members], accuracies[members]))
        return np.mean(of_groups)

    return over_problems(problems, value, draws, seed)


def permutation(table, predictor: str, draws: int, seed: int) -> float:
    """p value of the mean within-problem Spearman's ρ being as large by chance: accuracies permuted
    within problems."""
    generator = np.random.default_rng(seed)
    problems = [
        merges[[predictor, "accuracy"]].to_numpy() for _, merges in table.groupby("problem")
    ]
    actual = np.mean([spearman(pairs[:, 0], pairs[:, 1]) for pairs in problems])
    as_large = 0
    for _ in range(draws):
        shuffled = [spearman(pairs[:, 0], generator.permutation(pairs[:, 1])) for pairs in problems]
        as_large += int(np.mean(shuffled) >= actual)
    return (1 + as_large) / (1 + draws)
