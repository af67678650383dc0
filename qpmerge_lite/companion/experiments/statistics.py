"""The diagnostic on trial: what ``book/questions.yml`` asks of the population, as numbers with
intervals over its problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .intervals import Interval, jackknife
from .merge_specs import BAD

PRIMARY = "output.disjoint"


def _mean(energies, weights) -> float:
    return np.mean(energies)


def _median(energies, weights) -> float:
    return np.median(energies)


def _minimum(energies, weights) -> float:
    return np.min(energies)


def _last(energies, weights) -> float:
    return energies[-1]


def _weighted_mean(energies, weights) -> float:
    return np.average(energies, weights=weights)


# ways of making one number of the captured energies of layers and their residual energies
AGGREGATORS: dict[str, Callable] = {
    "mean": _mean,
    "median": _median,
    "minimum": _minimum,
    "last": _last,
    "energy-weighted mean": _weighted_mean,
}
LABELS = (8, 16, 32, 64, 128, 256)  # in all, spread evenly over the tasks of a problem
LEVEL = (0.025, 0.975)
FEWEST = 3  # merges of a group, below which they are not correlated
# problems, up to which the bootstrap's outer draws are all of one problem and more likely than the
# level: its interval would be the range of the problems
FEW_PROBLEMS = 3
COLUMNS = (
    "suite",
    "problem",
    "seed",
    "experts",
    "kind",
    "label",
    "method",
    "size",
    "source",
    "accuracy",
)


def frame(rows: list[dict]):
    """Merges of ``population.population`` as a ``pandas.DataFrame``: one row each, energies and
    trivial predictors as columns."""
    import pandas as pd

    table = []
    for row in rows:
        options = row["options"]
        chosen = {
            "targets": options.get("inputs") or options.get("targets"),
            "basis": options.get("basis"),
        }
        plain = {column: row[column] for column in COLUMNS}
        table.append(plain | row["energies"] | row["trivial"] | chosen)
    return pd.DataFrame(table)


def by_task(rows: list[dict]):
    """Merges of ``population.population`` as a ``pandas.DataFrame`` with one row per merge and
    task, whose ``problem`` is that of problem and task; ``cluster`` is the problem's."""
    import pandas as pd

    table = []
    for row in rows:
        for task, values in row["tasks"].items():
            table.append(
                {
                    "suite": row["suite"],
                    "cluster": row["problem"],
                    "problem": f"{row['problem']} {task}",
                    "accuracy": values["accuracy"],
                    PRIMARY: values["output"],
                }
            )
    return pd.DataFrame(table)


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


def _interval(draws) -> Interval:
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
    return float(values.mean()), _interval(means)


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
    return of(range(count)), _interval(resampled)


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
            value, interval = bootstrap(inside(merges, energy), draws, seed)
            return value, _between_minus_one_and_one(interval)
        return pooled(merges, energy, None, draws, seed)
    pairs, generator = merges[[energy, "accuracy"]].to_numpy(), np.random.default_rng(seed)
    resampled = []
    for _ in range(draws):
        chosen = pairs[generator.integers(len(pairs), size=len(pairs))]
        resampled.append(spearman(chosen[:, 0], chosen[:, 1]))
    return spearman(merges[energy], merges.accuracy), _interval(resampled)


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


def _ranks(table, columns) -> np.ndarray:
    """Columns of a table as ranks from -1/2 to 1/2: (merges, columns)."""
    return np.column_stack([table[column].rank(pct=True) - 0.5 for column in columns])


def _design(table, extra: Sequence[str]):
    """Predictors by merge: trivial ones as ranks with their squares, families as indicators, and
    what is asked for, as ranks."""
    import pandas as pd

    trivial = _ranks(table, ("experts", "size", "cosine", "norm", "distance"))
    families = pd.get_dummies(table.label).to_numpy(dtype=float)
    parts = [trivial, trivial**2, families]
    if extra:
        parts.append(_ranks(table, extra))
    return np.column_stack(parts)


def unexplained(table, extra: Sequence[str] = (), ridge: float = 1.0):
    """Squared errors of accuracy predicted for every problem by a ridge regression on the others,
    as a ``pandas.Series`` by problem (summed)."""
    import pandas as pd

    X, y, errors = _design(table, extra), table.accuracy.to_numpy(), {}
    for problem, rows in table.groupby("problem").indices.items():
        others = np.setdiff1d(np.arange(len(table)), rows)
        centre, mean = X[others].mean(0), y[others].mean()
        Z = X[others] - centre
        weights = np.linalg.solve(Z.T @ Z + ridge * np.eye(Z.shape[1]), Z.T @ (y[others] - mean))
        errors[problem] = float(np.square(y[rows] - mean - (X[rows] - centre) @ weights).sum())
    return pd.Series(errors)


def increment(table, predictor: str, draws: int, seed: int) -> dict[str, tuple[float, Interval]]:
    """Share of the variance of accuracy explained out of problem: by ``trivial`` predictors,
    ``with`` the given one too, and the ``increment``; with intervals."""
    import pandas as pd

    without, joint = unexplained(table), unexplained(table, (predictor,))
    mean, total = table.accuracy.mean(), {}
    for problem, accuracy in table.groupby("problem").accuracy:
        total[problem] = float(np.square(accuracy - mean).sum())
    total = pd.Series(total).loc[without.index]

    def shares(problems):
        """Shares explained of some problems: by trivial predictors, and with the given one."""
        variance = total.iloc[problems].sum()
        return (
            1 - without.iloc[problems].sum() / variance,
            1 - joint.iloc[problems].sum() / variance,
        )

    generator, count = np.random.default_rng(seed), len(total)
    resampled = [shares(generator.integers(count, size=count)) for _ in range(draws)]
    trivial, both = shares(np.arange(count))
    trivial_draws, both_draws = np.array(resampled).T
    return {
        "trivial": (float(trivial), _interval(trivial_draws)),
        "with": (float(both), _interval(both_draws)),
        "increment": (float(both - trivial), _interval(both_draws - trivial_draws)),
    }


def aggregated(rows: list[dict]):
    """:func:`frame` with a column ``<form>, <aggregator>`` for every way of making one number of
    the layers' energies."""
    table = frame(rows)
    for form in ("static", "layers"):
        for name, aggregate in AGGREGATORS.items():
            table[f"{form}, {name}"] = [_aggregated(row["layers"], form, aggregate) for row in rows]
    return table


def _aggregated(layers: dict[str, dict], form: str, aggregate: Callable) -> float:
    residual = [layers["energy"].get(name, 0.0) for name in layers[form]]
    return aggregate(list(layers[form].values()), residual)


def captured_by_bases(rows: list[dict]):
    """:func:`frame` of ``basis_capture.of_population`` with a column ``rho, <aggregator>`` for
    every way of making one number of what a merge's basis captures layer by layer."""
    table = frame(rows)
    for name, aggregate in AGGREGATORS.items():
        table[f"rho, {name}"] = [_of_basis(row["bases"], aggregate) for row in rows]
    return table


def _of_basis(layers: dict[str, dict], aggregate: Callable) -> float:
    captured = [layer["rho"] for layer in layers.values()]
    return float(aggregate(captured, [layer["energy"] for layer in layers.values()]))


def halves(table, seed: int):
    """The table's problems in two halves, by chance."""
    problems = np.random.default_rng(seed).permutation(np.sort(table.problem.unique()))
    first = table.problem.isin(problems[: len(problems) // 2])
    return table[first], table[~first]


def _right(row: dict, task: str) -> np.ndarray:
    """Which validation examples (N,) of a task a merge gets right, 1 for yes and 0 for no."""
    digits = np.frombuffer(row["tasks"][task]["validation"].encode(), dtype=np.uint8)
    return digits - ord("0")


def _labelled(rows: list[dict], count: int, seed: int, draws: int) -> np.ndarray:
    """Mean normalised accuracy (merges, draws) of a problem's merges on so many labelled examples
    in all, the same for all of them."""
    generator, tasks, scores = np.random.default_rng(seed), rows[0]["tasks"], []
    each = max(1, count // len(tasks))
    for task in tasks:
        right = np.stack([_right(row, task) for row in rows])
        experts = np.array([[row["tasks"][task]["expert"]] for row in rows])
        chosen = np.stack([generator.permutation(right.shape[1])[:each] for _ in range(draws)])
        scores.append(right[:, chosen].mean(2) / experts)
    return np.mean(scores, 0)


def regrets(rows: list[dict], seed: int, scores=(PRIMARY,), draws: int = 200):
    """Accuracy lost against the best merge of every problem, as a ``pandas.DataFrame``: a row per
    problem, a column per rule.

    Rules: the highest of every one of the given scores; a merge drawn at ``random`` (expected
    loss); the ``fixed`` method that was best on the other problems, never one made to be bad; and
    labelled validation sets of ``LABELS`` examples in all (expected over draws, ties to the first).
    """
    import pandas as pd

    table, losses = frame(rows), {}
    for problem, places in table.groupby("problem").indices.items():
        accuracy = table.accuracy.to_numpy()[places]
        loss, of_rule = accuracy.max() - accuracy, {}
        for score in scores:
            values = table[score].to_numpy(dtype=float)[places]
            of_rule[score] = float(loss[np.nanargmax(values)])
        of_rule["random"] = float(loss.mean())
        of_rule["fixed"] = _fixed(table, problem, places, loss)
        merges = [rows[place] for place in places]
        for count in LABELS:
            scored = _labelled(merges, count, seed, draws)
            of_rule[f"{count} labels"] = float(loss[scored.argmax(0)].mean())
        losses[problem] = of_rule
    return pd.DataFrame(losses).T


def _fixed(table, problem: str, places, loss) -> float:
    """Expected loss of the label that is best, relative to the mean of its problem, over the
    suite's other problems.

    Nobody would make the merges that are made to be bad: they are left out.
    """
    sensible = table.kind.to_numpy()[places] != BAD
    places, loss = places[sensible], loss[sensible]
    table = table[table.kind != BAD]
    labels, suite = table.label.reindex(places).to_numpy(), table.suite[places[0]]
    others = table[(table.problem != problem) & (table.suite == suite)]
    relative = others.accuracy - others.groupby("problem").accuracy.transform("mean")
    merit = relative.groupby(others.label).mean().reindex(np.unique(labels)).dropna()
    return float(loss[labels == merit.idxmax()].mean())


def worth(losses, rule: str = PRIMARY) -> str:
    """The smallest labelled validation set of ``LABELS`` that loses no more on average than a rule,
    in words where it lies outside of those."""
    most = losses[rule].mean()
    enough = [count for count in LABELS if losses[f"{count} labels"].mean() <= most]
    if not enough:
        return f"more than {LABELS[-1]}"
    return f"{LABELS[0]} or fewer" if enough[0] == LABELS[0] else str(enough[0])


def misjudged(table, **predictors: str):
    """The table with a column for every named predictor: how many of its problem's merges a merge
    overtakes if ordered by it and not by accuracy, as a share."""
    problems, columns = table.groupby("problem"), {}
    actual = problems["accuracy"].rank(pct=True)
    for name, predictor in predictors.items():
        columns[name] = problems[predictor].rank(pct=True) - actual
    return table.assign(**columns)
