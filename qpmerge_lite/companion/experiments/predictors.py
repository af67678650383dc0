"""What others predict merges by, beside the captured energies of ``population``, and how well any
columns predict the merges of a task that was left out.

Metrics of pairs of experts are those of *Demystifying Mergeability* (arXiv:2601.22285), 19 of its
28: of the others three are gradients of inputs, which texts have none of, and six say the same as
one that is here (an angle and its cosine, a share and what is left of it, an overlap and its
square). Its gradients take labels; here the expert's own predictions stand for them.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, cross_entropy

from ... import datafree
from ..suites import Suite, load, training
from . import judging, statistics
from .cache import kept
from .intervals import Interval
from .trial.correlations import bootstrap_interval

TOP = 10  # singular directions whose spans are compared
TESTED = 256  # most test examples of a task that soups of two experts are judged on
COMPARED = ("cosine", "distance", "dot", "ratio")  # of two vectors
PAIRS = (
    *(f"vectors.{name}" for name in COMPARED),
    *(f"ranks.{name}" for name in ("effective", "stable", "ratio", "by_layer")),
    *(f"subspaces.{name}" for name in ("values", "left", "right", "last")),
    *(f"activations.{name}" for name in COMPARED),
    *(f"gradients.{name}" for name in COMPARED if name != "ratio"),
)
# by the name that records have, the columns of ``frame`` that each reads
PREDICTORS = {
    "output": (statistics.PRIMARY,),
    "head": ("head.disjoint",),
    "divergence": ("divergence.disjoint",),
    "agreement": ("agreement.disjoint",),
    "pairs": PAIRS,
    "gradients": ("gradients.distance",),
    "obvious": ("experts", "size", "norm", "distance", "label"),
}
LABELS = {
    "output": "energy of the output",
    "head": "energy as heads see it",
    "divergence": "captured divergence",
    "agreement": "equal predictions",
    "pairs": "pairwise metrics",
    "gradients": "distance of gradients",
    "obvious": "size and method",
}
RIDGE = 1.0  # of regressions, on ranks from -1/2 to 1/2, as in ``statistics.unexplained``
OF_TWO = ("output", "pairs", "gradients")  # what a soup of two experts is predicted by
DIGITS = 9  # to which predictions are told apart
ROUNDING = 1e-18  # a product of variances that is no more is that of a constant


def compared(two: Tensor) -> dict[str, float]:
    """Cosine, distance, dot product and ratio of lengths, the shorter over the longer, of two
    vectors (2, n)."""
    lengths, dot = two.norm(dim=1), two[0] @ two[1]
    return {
        "cosine": float(dot / lengths.prod()),
        "distance": float((two[0] - two[1]).norm()),
        "dot": float(dot),
        "ratio": float(lengths.min() / lengths.max()),
    }


def _effective_rank(values: Tensor) -> float:
    """Exponential of the entropy of singular values (r,) as shares of their sum."""
    return float(torch.special.entr(values / values.sum()).sum().exp())


def _ranks(updates: dict[str, Tensor], flat: Tensor) -> dict[str, float]:
    """Ranks of two task vectors (2, P) as a matrix, and the effective one parameter by parameter,
    from (2, …), by length of the updates."""
    values = torch.linalg.svdvals(flat)
    layers = [update.flatten(1) for update in updates.values()]
    of_layers = [_effective_rank(torch.linalg.svdvals(layer)) for layer in layers]
    lengths = [float(layer.norm(dim=1).sum()) for layer in layers]
    return {
        "effective": _effective_rank(values),
        "stable": float(values.sum().square() / values.square().sum()),
        "ratio": float(values[1] / values[0]),
        "by_layer": float(np.average(of_layers, weights=lengths)),
    }


def _overlap(first: Tensor, second: Tensor) -> float:
    """Root mean squared cosine of the principal angles between the spans of orthonormal rows
    (k, n): 1 for equal spans."""
    return float((first @ second.mT).norm() / len(first) ** 0.5)


def _subspaces(decomposed: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Overlap of two experts' updates in every matrix, mean over matrices: cosine of their singular
    values, spans of the first left and right singular vectors and of the last right ones.

    Args:
        decomposed: of every matrix (2, m, r), (2, r) and (2, r, n), as ``torch.linalg.svd`` gives
            them.
    """
    overlaps: dict[str, list[float]] = {"values": [], "left": [], "right": [], "last": []}
    for U, S, Vh in decomposed:
        k = min(TOP, S.shape[1])
        overlaps["values"].append(float(cosine_similarity(S[0], S[1], dim=0)))
        overlaps["left"].append(_overlap(U[0, :, :k].mT, U[1, :, :k].mT))
        overlaps["right"].append(_overlap(Vh[0, :k], Vh[1, :k]))
        overlaps["last"].append(_overlap(Vh[0, -k:], Vh[1, -k:]))
    return {name: sum(values) / len(values) for name, values in overlaps.items()}


def gradient(suite: Suite, task: str, batches: list[dict]) -> Tensor:
    """Gradient (P,) of an expert's mean cross-entropy on unlabelled batches of its own task, with
    the classes that it predicts as labels, by all parameters of the encoder."""
    classify, names = suite.classifiers()[task], dict(suite.base.named_parameters())
    state = {name: value.detach().clone() for name, value in suite.experts[task].items()}
    learnt = [state[name].requires_grad_() for name in names]
    with training.autocast(suite.device, suite.precision):
        parts = [functional_call(suite.base, state, (), batch) for batch in batches]
    logits = classify(torch.cat(parts).to(suite.heads[task]["weight"]))
    loss = cross_entropy(logits, logits.detach().argmax(1))
    gradients = torch.autograd.grad(loss, learnt)
    return torch.cat([part.double().flatten() for part in gradients])


def _activations(suite: Suite, batches: dict[str, list[dict]]) -> Tensor:
    """Mean feature (K, K, d) of every expert, first axis, on every task's batches."""
    means = []
    for state in suite.experts.values():
        own = [judging.features(suite, state, batches[task]) for task in suite.tasks]
        means.append(torch.stack([features.double().mean(0) for features in own]))
    return torch.stack(means)


def _named(kinds: dict[str, dict[str, float]]) -> dict[str, float]:
    """Metrics by kind as one dictionary, those of ``PAIRS`` and in its order."""
    kinds_and_names = (name.split(".") for name in PAIRS)
    return {f"{kind}.{name}": kinds[kind][name] for kind, name in kinds_and_names}


def measured_pairs(suite: Suite) -> dict[str, dict[str, float]]:
    """Every pair of tasks, ``a+b`` in the suite's order -> the metrics of its experts, ``PAIRS``;
    no label is read."""
    batches = suite.calibration(judging.AUDITED)
    updates = datafree.task_vectors(suite.base, suite.experts)
    flat = torch.cat([update.flatten(1) for update in updates.values()], 1)
    matrices = [update for update in updates.values() if update.dim() == 3]
    decomposed = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    activations = _activations(suite, batches)
    gradients = torch.stack([gradient(suite, task, batches[task]) for task in suite.tasks])
    metrics = {}
    for places in combinations(range(len(suite.tasks)), 2):
        two = list(places)
        of_pair = {name: update[two] for name, update in updates.items()}
        parts = [(U[two], S[two], Vh[two]) for U, S, Vh in decomposed]
        kinds = {
            "vectors": compared(flat[two]),
            "ranks": _ranks(of_pair, flat[two]),
            "subspaces": _subspaces(parts),
            "activations": compared(activations[two][:, two].mean(1)),
            "gradients": compared(gradients[two]),
        }
        metrics["+".join(suite.tasks[place] for place in two)] = _named(kinds)
    return metrics


def measured_soups(suite: Suite) -> dict[str, dict[str, float]]:
    """Every pair of tasks, as in :func:`measured_pairs` -> normalised ``accuracy`` of the soup of
    its two experts, mean over both tasks, and its captured energy as ``statistics.PRIMARY``."""
    judge, soups = judging.Judge(suite, TESTED), {}
    for tasks in combinations(suite.tasks, 2):
        experts = {task: suite.experts[task] for task in tasks}
        state = datafree.soup(suite.base, experts).state_dict
        place = (judging.DISJOINT, judging.AUDITED)
        ends = [judge.ends(state, task, judge.disjoint[task], place) for task in tasks]
        left = sum(end["output"] for end in ends) / sum(end["output_base"] for end in ends)
        accuracies = [judge.accuracy(state, task, "test")[0] for task in tasks]
        soups["+".join(tasks)] = {"accuracy": sum(accuracies) / 2, statistics.PRIMARY: 1 - left}
    return soups


def pairs(name: str, seed: int, tier="smoke", device="cpu") -> list[dict]:
    """An experiment as of ``evidence``: a row per pair of tasks, with the ``metrics`` of its
    experts as of :func:`measured_pairs` and their ``soup`` as of :func:`measured_soups`; cached."""
    suite = load(name, tier, seed, device, progress=False)

    def make():
        return {"metrics": measured_pairs(suite), "soups": measured_soups(suite)}

    measured = kept(suite, "pairs", [judging.AUDITED, TOP, TESTED], make)
    return [
        {
            "suite": name,
            "seed": seed,
            "pair": pair,
            "metrics": metrics,
            "soup": measured["soups"][pair],
        }
        for pair, metrics in measured["metrics"].items()
    ]


def _over_pairs(metrics: dict[tuple, dict], row: dict, name: str) -> float:
    """Mean of a metric, by seed and pair, over all pairs of the tasks of a merge."""
    pairs_of_tasks = combinations(row["tasks"], 2)
    return np.mean([metrics[row["seed"], "+".join(pair)][name] for pair in pairs_of_tasks])


def frame(rows: list[dict], of_pairs: list[dict]):
    """``statistics.frame`` of one suite's merges with more columns: ``tasks`` of the problem, and
    every metric of ``PAIRS`` as a mean over its pairs.

    Args:
        of_pairs: rows of :func:`pairs`, of the same seeds.
    """
    metrics = {(pair["seed"], pair["pair"]): pair["metrics"] for pair in of_pairs}
    columns = {name: [_over_pairs(metrics, row, name) for row in rows] for name in PAIRS}
    return statistics.frame(rows).assign(tasks=[tuple(row["tasks"]) for row in rows], **columns)


def frame_of_two(of_pairs: list[dict]):
    """Soups of two experts, from rows of :func:`pairs`, as a ``pandas.DataFrame`` with a row per
    seed and pair, which is a problem by itself: the columns that :func:`left_out` needs, energy and
    metrics."""
    import pandas as pd

    rows = []
    for row in of_pairs:
        pair = row["pair"]
        place = {"problem": f"{row['seed']} {pair}", "tasks": tuple(pair.split("+"))}
        rows.append(place | row["soup"] | row["metrics"])
    return pd.DataFrame(rows)


def _design(table, columns) -> np.ndarray:
    """Columns of a table as regressors (merges, …): numbers as ranks from -1/2 to 1/2, words as
    indicators."""
    import pandas as pd

    parts = []
    for column in columns:
        if pd.api.types.is_numeric_dtype(table[column]):
            parts.append(table[[column]].rank(pct=True).to_numpy() - 0.5)
        else:
            parts.append(pd.get_dummies(table[column]).to_numpy(dtype=float))
    return np.column_stack(parts)


def _regressed(X: np.ndarray, y: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Predictions for the unseen rows (N,) of a ridge regression on the others."""
    centre, mean = X[~unseen].mean(0), y[~unseen].mean()
    Z = X[~unseen] - centre
    weights = np.linalg.solve(Z.T @ Z + RIDGE * np.eye(Z.shape[1]), Z.T @ (y[~unseen] - mean))
    return np.round(mean + (X[unseen] - centre) @ weights, DIGITS)


def left_out(table, columns):
    """Accuracy predicted from columns of a table as of :func:`frame`, one task left out at a time:
    a ``pandas.DataFrame`` with a row per task and merge of a problem with that task.

    The regression of a task sees problems without it only; a task that is in every problem, or in
    none, is passed over.
    """
    import pandas as pd

    X, y, folds = _design(table, columns), table.accuracy.to_numpy(), []
    for task in sorted(set().union(*table.tasks)):
        unseen = np.array([task in tasks for tasks in table.tasks])
        if not unseen.all():
            predicted = _regressed(X, y, unseen)
            plain = table.loc[unseen, ["problem", "accuracy"]]
            folds.append(plain.assign(task=task, predicted=predicted))
    return pd.concat(folds)


def _moments(folds) -> np.ndarray:
    """Sums (tasks, 6, problems) over merges of 1, x, y, x², y² and xy, for predictions x and
    accuracies y around their means in the task."""
    columns = folds[["predicted", "accuracy"]]
    around = columns - columns.groupby(folds.task).transform("mean")
    x, y = around.predicted, around.accuracy
    terms = folds[["task", "problem"]].assign(n=1.0, x=x, y=y, xx=x * x, yy=y * y, xy=x * y)
    sums = terms.groupby(["task", "problem"])[["n", "x", "y", "xx", "yy", "xy"]].sum()
    table = sums.unstack(fill_value=0.0)
    return table.to_numpy().reshape(len(table), 6, -1)


def _correlations(moments: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson's r within a task's merges, mean over tasks, (D,), where problems are taken so many
    times, (D, problems); 0 for a task whose predictions do not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(moments @ counts.T, 1, 0)
    spread = (n * xx - x * x) * (n * yy - y * y)
    varied = spread > ROUNDING
    r = np.where(varied, (n * xy - x * y) / np.sqrt(np.where(varied, spread, 1.0)), 0.0)
    return r.sum(0) / (n > 0).sum(0)


def _order(folds) -> np.ndarray:
    """Spearman's ρ of predictions and accuracies of every problem (P,), mean over the tasks that
    were left out."""
    correlations = folds.groupby(["problem", "task"])[["predicted", "accuracy"]].apply(
        lambda merges: statistics.spearman(merges.predicted, merges.accuracy)
    )
    return correlations.groupby("problem").mean().to_numpy()


def _estimate(draws: np.ndarray) -> tuple[float, Interval]:
    """The first of some values (1 + D,) with the 95 % interval of the others."""
    return float(draws[0]), bootstrap_interval(draws[1:])


def _resampled(table, draws: int, seed: int) -> np.ndarray:
    """How often every problem is taken, (1 + draws, problems): each once, then in bootstrap
    samples of whole problems."""
    problems = table.problem.nunique()
    drawn = np.random.default_rng(seed).multinomial(problems, [1 / problems] * problems, draws)
    return np.vstack([np.ones(problems, dtype=int), drawn])


def leave_one_task_out(table, draws: int, seed: int) -> dict[str, dict]:
    """How well the ``PREDICTORS`` predict one suite's merges in problems with a task of which no
    problem was seen.

    Args:
        table: as of :func:`frame`.
        draws: bootstrap samples of whole problems; the regressions stay as they are.
    Returns: predictor -> (value, interval) of ``alone``, Pearson's r over a task's merges, mean
        over tasks; ``added``, how much it rises if the predictor joins all others; ``order``,
        Spearman's ρ inside problems of the predictor alone. ``all`` has those of all together.
    """
    columns = list(dict.fromkeys(name for names in PREDICTORS.values() for name in names))
    counts = _resampled(table, draws, seed)

    def scored(chosen):
        """Correlations (1 + D,) of some columns, and their ranks inside problems."""
        folds = left_out(table, chosen)
        return _correlations(_moments(folds), counts), _order(folds)

    joint, order = scored(columns)
    together = {"alone": _estimate(joint), "order": statistics.bootstrap(order, draws, seed)}
    estimates = {"all": together}
    for name, own in PREDICTORS.items():
        alone, order = scored(own)
        others, _ = scored([column for column in columns if column not in own])
        estimates[name] = {
            "alone": _estimate(alone),
            "added": _estimate(joint - others),
            "order": statistics.bootstrap(order, draws, seed),
        }
    return estimates


def soups_left_out(table, draws: int, seed: int) -> dict[str, dict]:
    """The setting of the metrics' authors, merges of two by one method, on the soups of
    :func:`frame_of_two`: predictor -> (value, interval) of ``soups``, Pearson's r over the pairs
    with a task that was left out, mean over tasks; intervals over pairs."""
    counts, estimates = _resampled(table, draws, seed), {}
    for name in OF_TWO:
        moments = _moments(left_out(table, PREDICTORS[name]))
        estimates[name] = {"soups": _estimate(_correlations(moments, counts))}
    return estimates


def record(records, name: str, found: dict[str, dict], merges: int):
    """Record what :func:`leave_one_task_out` or :func:`soups_left_out` found for a suite under
    ``trial.predictors.<name>.<predictor>``; its values as a ``pandas.DataFrame``, a row per
    predictor.

    Args:
        records: ``Records.record``, or anything called like it.
    """
    import pandas as pd

    notes = {
        "alone": "Pearson's r on merges of a task left out, mean over tasks; over problems",
        "added": "rise of that r if added to all other predictors; over problems",
        "order": "Spearman's rho within problems, a task left out; over problems",
        "soups": "Pearson's r on soups of two with a task left out, mean over tasks; over pairs",
    }
    table = {}
    for predictor, values in found.items():
        for measure, (value, interval) in values.items():
            id = f"trial.predictors.{name}.{predictor}.{measure}"
            records(id, value, n=merges, interval=interval, note=f"{notes[measure]} (bootstrap)")
        label = LABELS.get(predictor, "all together")
        table[label] = {measure: value for measure, (value, _) in values.items()}
    return pd.DataFrame(table).T
