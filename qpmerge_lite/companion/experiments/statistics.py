"""The diagnostic on trial: what ``book/questions.yml`` asks of the population, as numbers with
intervals over its problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .population import BAD

PRIMARY = "output.disjoint"
AGGREGATORS: dict[str, Callable] = {
    "mean": lambda v, e: np.mean(v),
    "median": lambda v, e: np.median(v),
    "minimum": lambda v, e: np.min(v),
    "last": lambda v, e: v[-1],
    "energy-weighted mean": lambda v, e: np.average(v, weights=e),
}
LABELS = (8, 16, 32, 64, 128, 256)  # in all, spread evenly over the tasks of a problem
LEVEL = (0.025, 0.975)


def frame(rows: list[dict]):
    """Merges of ``population.population`` as a ``pandas.DataFrame``: one row each, energies and
    trivial predictors as columns."""
    import pandas as pd

    plain = (
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
    return pd.DataFrame(
        [
            {k: r[k] for k in plain}
            | r["energies"]
            | r["trivial"]
            | {
                "targets": r["options"].get("inputs") or r["options"].get("targets"),
                "basis": r["options"].get("basis"),
            }
            for r in rows
        ]
    )


def by_task(rows: list[dict]):
    """The same with one row per merge and task, whose ``problem`` is that of problem and task;
    ``cluster`` is the problem's."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "suite": r["suite"],
                "cluster": r["problem"],
                "problem": f"{r['problem']} {t}",
                "accuracy": v["accuracy"],
                PRIMARY: v["output"],
            }
            for r in rows
            for t, v in r["tasks"].items()
        ]
    )


def spearman(x, y) -> float:
    """Spearman's ρ, ties sharing their mean rank; 0 where one side does not vary, as it then orders
    nothing."""
    from scipy.stats import rankdata

    return pearson(rankdata(x), rankdata(y))


def pearson(x, y) -> float:
    """Pearson's r; 0 where one side does not vary."""
    x, y = (np.asarray(z, dtype=float) - np.mean(z) for z in (x, y))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def inside(table, predictor: str, measure=spearman, target: str = "accuracy"):
    """The correlation within every problem, as a ``pandas.Series`` by problem; merges without the
    predictor are left out, and problems with fewer than three."""
    kept = table.dropna(subset=[predictor])
    kept = kept[kept.groupby("problem")[predictor].transform("size") >= 3]
    return kept.groupby("problem")[[predictor, target]].apply(
        lambda g: measure(g[predictor], g[target])
    )


def bootstrap(values, draws: int, seed: int) -> tuple[float, tuple[float, float]]:
    """Mean of values, one per problem (or several of a cluster averaged before), and its 95 %
    interval over problems drawn whole."""
    values, generator = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = values[generator.integers(len(values), size=(draws, len(values)))].mean(1)
    return float(values.mean()), tuple(map(float, np.quantile(means, LEVEL)))


def rank_correlation(
    frame, energy: str, draws: int, seed: int, within: bool
) -> tuple[float, tuple[float, float]]:
    """Spearman's ρ of captured energy and normalised accuracy with a 95 % interval, the base left
    out, problems resampled whole (of one problem, its merges).

    Args:
        energy: a column of the frame. draws: bootstrap samples.
        within: correlate inside every problem and average, so that only methods are compared; else
            pool all merges.
    """
    merges = frame[frame.method != "base"]
    if merges.problem.nunique() > 1:
        return (
            bootstrap(inside(merges, energy), draws, seed)
            if within
            else pooled(merges, energy, None, draws, seed)
        )
    value, generator, pairs = (
        spearman(merges[energy], merges.accuracy),
        np.random.default_rng(seed),
        merges[[energy, "accuracy"]].to_numpy(),
    )
    found = [
        spearman(*pairs[generator.integers(len(pairs), size=len(pairs))].T) for _ in range(draws)
    ]
    return value, tuple(map(float, np.quantile(found, LEVEL)))


def pooled(
    table, predictor: str, by: str | None, draws: int, seed: int, measure=spearman
) -> tuple[float, tuple[float, float]]:
    """The correlation over all merges of a table, or averaged over the groups of a column
    (``experts``, ``kind``), problems resampled whole."""
    kept = table.dropna(subset=[predictor])
    columns = [
        kept[predictor].to_numpy(),
        kept.accuracy.to_numpy(),
        kept[by].astype("category").cat.codes.to_numpy() if by else np.zeros(len(kept)),
    ]
    places = list(kept.groupby("problem").indices.values())

    def value(rows):
        x, y, group = (c[rows] for c in columns)
        return np.mean(
            [
                measure(x[group == g], y[group == g])
                for g in np.unique(group)
                if (group == g).sum() >= 3
            ]
        )

    generator = np.random.default_rng(seed)
    found = [
        value(
            np.concatenate([places[i] for i in generator.integers(len(places), size=len(places))])
        )
        for _ in range(draws)
    ]
    return float(value(np.arange(len(kept)))), tuple(map(float, np.quantile(found, LEVEL)))


def permutation(table, predictor: str, draws: int, seed: int) -> float:
    """p value of the mean within-problem Spearman's ρ being as large by chance: accuracies permuted
    within problems."""
    generator, groups = (
        np.random.default_rng(seed),
        [g[[predictor, "accuracy"]].to_numpy() for _, g in table.groupby("problem")],
    )
    mean = lambda shuffle: np.mean([spearman(g[:, 0], shuffle(g[:, 1])) for g in groups])
    actual = mean(lambda y: y)
    return float(
        (1 + sum(mean(generator.permutation) >= actual for _ in range(draws))) / (1 + draws)
    )


def _design(table, extra: Sequence[str]):
    """Predictors by merge: trivial ones as ranks with their squares, families as indicators, and
    what is asked for, as ranks."""
    import pandas as pd

    ranks = lambda columns: np.column_stack([table[c].rank(pct=True) - 0.5 for c in columns])
    trivial = ranks(("experts", "size", "cosine", "norm", "distance"))
    families = pd.get_dummies(table.label).to_numpy(dtype=float)
    return np.column_stack([trivial, trivial**2, families, *([ranks(extra)] if extra else [])])


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


def increment(table, predictor: str, draws: int, seed: int) -> dict[str, tuple]:
    """Share of the variance of accuracy explained out of problem: by ``trivial`` predictors,
    ``with`` the given one too, and the ``increment``; with intervals."""
    without, joint = unexplained(table), unexplained(table, (predictor,))
    total = (
        table.groupby("problem")
        .accuracy.apply(lambda y: float(np.square(y - table.accuracy.mean()).sum()))
        .loc[without.index]
    )
    generator = np.random.default_rng(seed)
    shares = lambda i: np.array(
        [
            1 - without.iloc[i].sum() / total.iloc[i].sum(),
            1 - joint.iloc[i].sum() / total.iloc[i].sum(),
        ]
    )
    resampled = np.array(
        [shares(generator.integers(len(total), size=len(total))) for _ in range(draws)]
    )
    value = shares(np.arange(len(total)))
    ends = lambda column: tuple(map(float, np.quantile(column, LEVEL)))
    return {
        "trivial": (float(value[0]), ends(resampled[:, 0])),
        "with": (float(value[1]), ends(resampled[:, 1])),
        "increment": (float(value[1] - value[0]), ends(resampled[:, 1] - resampled[:, 0])),
    }


def aggregated(rows: list[dict]):
    """:func:`frame` with a column ``<form>, <aggregator>`` for every way of making one number of
    the layers' energies."""
    table = frame(rows)
    for form in ("static", "layers"):
        for name, function in AGGREGATORS.items():
            table[f"{form}, {name}"] = [
                function(
                    list(r["layers"][form].values()),
                    [r["layers"]["energy"].get(k, 0.0) for k in r["layers"][form]],
                )
                for r in rows
            ]
    return table


def halves(table, seed: int):
    """The table's problems in two halves, by chance."""
    problems = np.random.default_rng(seed).permutation(np.sort(table.problem.unique()))
    first = table.problem.isin(problems[: len(problems) // 2])
    return table[first], table[~first]


def _labelled(rows: list[dict], count: int, seed: int, draws: int) -> np.ndarray:
    """Mean normalised accuracy (merges, draws) of a problem's merges on so many labelled examples
    in all, the same for all of them."""
    generator, scored = np.random.default_rng(seed), []
    for task in rows[0]["tasks"]:
        found = [row["tasks"][task] for row in rows]
        bits = np.stack(
            [np.frombuffer(v["validation"].encode(), dtype=np.uint8) - ord("0") for v in found]
        )
        each = max(1, count // len(rows[0]["tasks"]))
        chosen = np.stack([generator.permutation(bits.shape[1])[:each] for _ in range(draws)])
        scored.append(bits[:, chosen].mean(2) / np.array([[v["expert"]] for v in found]))
    return np.mean(scored, 0)


def regrets(rows: list[dict], seed: int, scores=(PRIMARY,), draws: int = 200):
    """Accuracy lost against the best merge of every problem, as a ``pandas.DataFrame``: a row per
    problem, a column per rule.

    Rules: the highest of every one of the given scores; a merge drawn at ``random`` (expected
    loss); the ``fixed`` method that was best on the other problems, never one made to be bad; and
    labelled validation sets of ``LABELS`` examples in all (expected over draws, ties to the first).
    """
    import pandas as pd

    table, found = frame(rows), {}
    for problem, places in table.groupby("problem").indices.items():
        accuracy = table.accuracy.to_numpy()[places]
        loss = accuracy.max() - accuracy
        found[problem] = {
            s: float(loss[np.nanargmax(table[s].to_numpy(dtype=float)[places])]) for s in scores
        }
        found[problem] |= {
            "random": float(loss.mean()),
            "fixed": _fixed(table, problem, places, loss),
        }
        for count in LABELS:
            scored = _labelled([rows[i] for i in places], count, seed, draws)
            found[problem][f"{count} labels"] = float(loss[scored.argmax(0)].mean())
    return pd.DataFrame(found).T


def _fixed(table, problem: str, places, loss) -> float:
    """Expected loss of the label that is best, relative to the mean of its problem, over the
    suite's other problems.

    Nobody would make the merges that are made to be bad: they are left out.
    """
    table, here = table[table.kind != BAD], table.kind.to_numpy()[places] != BAD
    labels, loss, suite = (
        table.label.reindex(places[here]).to_numpy(),
        loss[here],
        table.suite[places[here][0]],
    )
    others = table[(table.problem != problem) & (table.suite == suite)]
    relative = others.accuracy - others.groupby("problem").accuracy.transform("mean")
    merit = relative.groupby(others.label).mean().reindex(np.unique(labels)).dropna()
    return float(loss[labels == merit.idxmax()].mean())


def worth(losses, rule: str = PRIMARY) -> int:
    """The smallest labelled validation set of ``LABELS`` that loses no more on average than a rule;
    0 when the smallest already does, twice the largest when none does."""
    enough = [n for n in LABELS if losses[f"{n} labels"].mean() <= losses[rule].mean()]
    return 0 if enough and enough[0] == LABELS[0] else enough[0] if enough else 2 * LABELS[-1]


def misjudged(table, **predictors: str):
    """The table with a column for every named predictor: how many of its problem's merges a merge
    overtakes if ordered by it and not by accuracy, as a share."""
    rank = lambda column: table.groupby("problem")[column].rank(pct=True)
    actual = rank("accuracy")
    return table.assign(
        **{name: rank(predictor) - actual for name, predictor in predictors.items()}
    )
