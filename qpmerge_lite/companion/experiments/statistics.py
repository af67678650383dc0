"""The diagnostic on trial: what ``book/questions.yml`` asks of the population, as numbers with
intervals over its problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .intervals import Interval
from .merge_specs import BAD
from .trial.correlations import bootstrap as bootstrap
from .trial.correlations import bootstrap_interval
from .trial.correlations import inside as inside
from .trial.correlations import mean_correlation as mean_correlation
from .trial.correlations import pearson as pearson
from .trial.correlations import permutation as permutation
from .trial.correlations import pooled as pooled
from .trial.correlations import rank_correlation as rank_correlation
from .trial.correlations import spearman as spearman

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
        "trivial": (float(trivial), bootstrap_interval(trivial_draws)),
        "with": (float(both), bootstrap_interval(both_draws)),
        "increment": (float(both - trivial), bootstrap_interval(both_draws - trivial_draws)),
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
    """:func:`frame` of the rows that have ``bases``, the programme's, with a column ``rho,
    <aggregator>`` for every way of making one number of what a merge's basis captures layer by
    layer."""
    solved = [row for row in rows if "bases" in row]
    table = frame(solved)
    for name, aggregate in AGGREGATORS.items():
        table[f"rho, {name}"] = [_of_basis(row["bases"], aggregate) for row in solved]
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


def outdone(losses, rule: str = PRIMARY) -> int:
    """How many of the labelled validation sets of ``LABELS`` lose more on average than a rule."""
    most = losses[rule].mean()
    return sum(bool(losses[f"{count} labels"].mean() > most) for count in LABELS)


def misjudged(table, **predictors: str):
    """The table with a column for every named predictor: how many of its problem's merges a merge
    overtakes if ordered by it and not by accuracy, as a share."""
    problems, columns = table.groupby("problem"), {}
    actual = problems["accuracy"].rank(pct=True)
    for name, predictor in predictors.items():
        columns[name] = problems[predictor].rank(pct=True) - actual
    return table.assign(**columns)
