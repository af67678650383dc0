"""How much a merge, and what is said of it, depend on the calibration set: its size, its draw, how
it is chosen and where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ... import datafree, methods
from ...assess import audit, layer_moments
from ...bases import build
from ...diagnostic import OPTIMISM, optimism
from ...engine.views import Table
from ...moments import Moments, Pooled
from ...programme import programme
from ...solve import Factored
from ..suites import Suite, load, training
from .baselines import FAMILIES, qp_label
from .benchmark import kept
from .merge_specs import scrambled

POOL = 256  # examples per task that a rule chooses from, and the largest calibration set
HELD_OUT = 64  # examples per task behind the pool that judge a merge without labels
SIZE = 16  # of the calibration sets that are drawn and chosen
KINDS = 3  # every third layer covers all kinds of layers of a block

Batches = dict[str, list[dict]]


# -------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Pool:
    """The examples of a task that a rule chooses from: the first ``POOL`` of a draw, as one
    ``batch``."""

    suite: Suite
    task: str
    draw: int
    batch: dict[str, Tensor]

    def features(self) -> Tensor:
        """Features of the base, centred: (N, d) float64."""
        with torch.no_grad():
            features = self.suite.base(**self.batch).double()
        return features - features.mean(0)

    def labels(self) -> list[int]:
        """Labels of the training split, in the order of the batch."""
        rows = self.suite.data[self.task]["train"]
        generator = training.seeded(self.draw, self.task, "calibration")
        drawn = torch.randperm(len(rows), generator=generator)[:POOL]
        return torch.as_tensor(rows["label"])[drawn].tolist()


def _first(pool: Pool, n: int) -> Tensor:
    """The first ones of the draw."""
    return torch.arange(n)


def _balanced(pool: Pool, n: int) -> Tensor:
    """Classes in turn, by the labels of the training split."""
    labels = pool.labels()
    turn = [labels[:place].count(label) for place, label in enumerate(labels)]
    return torch.tensor(turn).argsort(stable=True)[:n]


def _leverage(pool: Pool, n: int) -> Tensor:
    """The highest leverage in a ridge regression on the base's features."""
    z = pool.features()
    second = z.mT @ z
    ridge = 1e-3 * second.diagonal().mean() * torch.eye(z.shape[1], dtype=z.dtype)
    leverage = (z @ torch.linalg.inv(second + ridge) * z).sum(1)
    return leverage.argsort(descending=True, stable=True)[:n]


def _centres(pool: Pool, n: int) -> Tensor:
    """Greedy k-centre: each next example is the one farthest from those chosen."""
    z, chosen = pool.features(), [0]
    distance = (z - z[0]).norm(dim=1)
    while len(chosen) < n:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (z - z[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)


def _most(pool: Pool, n: int) -> Tensor:
    """The longest texts; the pictures with most ink."""
    name = "attention_mask" if "attention_mask" in pool.batch else "pixels"
    amount = pool.batch[name].flatten(1).sum(1)
    return amount.argsort(descending=True, stable=True)[:n]


# rule -> the n examples that it chooses from a pool, as places in its batch
RULES: dict[str, Callable[[Pool, int], Tensor]] = {
    "random": _first,
    "balanced": _balanced,
    "leverage": _leverage,
    "centres": _centres,
    "most": _most,
}


# ---------------------------------------------------------------------- calibration sets


def drawn(suite: Suite, size: int, draw: int, tasks: list[str]) -> Batches:
    """``size`` examples per task of a draw."""
    return suite.calibration(size, seed=draw, tasks=tasks)


def for_experts(suite: Suite, count: int, draw: int, tasks: list[str]) -> Batches:
    """``SIZE`` examples per task of a draw, however many experts there are."""
    return drawn(suite, SIZE, draw, tasks)


def selected(suite: Suite, rule: str, draw: int, tasks: list[str], n: int = SIZE) -> Batches:
    """n examples per task that a key of ``RULES`` chooses from the pool of a draw; only
    ``balanced`` looks at labels."""
    calibration = {}
    pools = suite.calibration(POOL, seed=draw, batch_size=POOL, tasks=tasks)
    for task, (batch,) in pools.items():
        places = RULES[rule](Pool(suite, task, draw, batch), n)
        chosen = {name: value[places] for name, value in batch.items()}
        calibration[task] = [training.trim(chosen)]
    return calibration


def foreign(suite: Suite, domain: str, draw: int, tasks: list[str], n: int = SIZE) -> Batches:
    """n examples per task from its ``own`` data, ``another`` task's (the next one's), all tasks
    ``mixed``, or its own ``scrambled``."""
    if domain == "mixed":
        mixed = []
        for batches in drawn(suite, n // len(tasks), draw, tasks).values():
            mixed += batches
        return dict.fromkeys(tasks, mixed)
    own = drawn(suite, n, draw, tasks)
    if domain == "another":
        return {task: own[other] for task, other in zip(tasks, tasks[1:] + tasks[:1])}
    if domain == "scrambled":
        for task, batches in own.items():
            generators = [training.seeded(draw, task, "scrambled") for _ in batches]
            own[task] = [scrambled(*pair) for pair in zip(batches, generators)]
    return own


# factor of a study -> the calibration set of one of its levels, a draw and tasks
FACTORS: dict[str, Callable[[Suite, int | str, int, list[str]], Batches]] = {
    "size": drawn,
    "selection": selected,
    "domain": foreign,
    "experts": for_experts,
}


# ------------------------------------------------------------------------------- studies


def judge(suite: Suite, state: dict, draw: int, tasks: list[str], split: str) -> dict:
    """Normalised accuracy on a split, and captured energy of the output on examples behind the pool
    of a draw."""
    held_out = suite.calibration(HELD_OUT, seed=draw, skip=POOL, tasks=tasks)
    experts = {task: suite.experts[task] for task in tasks}
    energy = audit(suite.base, state, experts, held_out)["output"]
    return {"accuracy": suite.normalised(state, split, tasks)["mean"], "output": energy}


def study(
    suite: Suite,
    factor: str,
    levels: list,
    draws: int,
    merge: dict,
    tasks: int = 4,
    *,
    split: str = "test",
) -> list[dict]:
    """One row for every level of a key of ``FACTORS`` and every draw, cached: level, draw, and what
    :func:`judge` finds.

    Args:
        merge: options of ``methods.qp``; with ``rank``, of ``methods.sketched``.
        tasks: the first so many are merged; where the factor is ``experts``, its levels say how
            many.
    """
    call = methods.sketched if "rank" in merge else methods.qp

    def row(level, draw):
        names = suite.tasks[: level if factor == "experts" else tasks]
        calibration = FACTORS[factor](suite, level, draw, names)
        experts = {task: suite.experts[task] for task in names}
        state = call(suite.base, experts, calibration, **merge).state_dict
        return {"level": level, "draw": draw} | judge(suite, state, draw, names, split)

    def make():
        return [row(level, draw) for level in levels for draw in range(draws)]

    settings = [factor, levels, draws, merge, tasks, split, SIZE, POOL, HELD_OUT]
    return kept(suite, "sensitivity", settings, make)


def rivals(suite: Suite, tasks: int = 4, *, split: str = "test") -> dict[str, dict]:
    """What :func:`judge` finds of other methods with their own defaults, on the first draw,
    cached."""
    names = suite.tasks[:tasks]
    calls = {
        "soup": datafree.soup,
        "task arithmetic": partial(datafree.task_arithmetic, scale=0.3),
        "TIES": datafree.ties,
        "RegMean": methods.regmean,
        "RegMean++": methods.regmean_plus_plus,
        qp_label("rows"): partial(methods.qp, basis="rows"),
        qp_label("elements"): partial(methods.qp, basis="elements"),
    }

    def make():
        calibration = drawn(suite, SIZE, 0, names)
        experts = {task: suite.experts[task] for task in names}
        judged = {}
        for label, call in calls.items():
            state = call(suite.base, experts, calibration).state_dict
            judged[label] = judge(suite, state, 0, names, split)
        return judged

    return kept(suite, "rivals", [tasks, split, SIZE, POOL, HELD_OUT, sorted(calls)], make)


# --------------------------------------------------- what the evidence has many seeds of

ELEMENTS = {"basis": "elements", "targets": "own"}
ROWS = ELEMENTS | {"basis": "rows"}


class Factor(NamedTuple):
    """What is varied: its name in tables, and the arguments of :func:`study`."""

    name: str
    factor: str
    levels: list
    draws: int
    merge: dict


def sensitivity(
    name: str, seed: int, tier="smoke", device="cpu", *, draws: int, few: int, tasks: int
) -> list[dict]:
    """An experiment as of ``evidence``: merges under one change of the calibration set at a time.

    Args:
        draws: of the plain calibration set; ``few`` of every other.
    Returns: rows of suite, seed, factor, level, draw, accuracy and output; ``draw`` is the factor
        of plain random draws.
    """
    rules = [rule for rule in RULES if rule != "random"]
    varied = (
        Factor("draw", "size", [SIZE], draws, ELEMENTS),
        Factor("sizes", "size", [4, 64, 256], few, ELEMENTS),
        Factor("selection", "selection", rules, few, ELEMENTS),
        Factor("domain", "domain", ["another", "mixed", "scrambled"], few, ELEMENTS),
        Factor("experts", "experts", [2, 8], 1, ELEMENTS),
        Factor("rows", "size", [SIZE], few, ROWS),
    )
    suite = load(name, tier, seed, device, progress=False)
    rows = []
    for one in varied:
        place = {"suite": name, "seed": seed, "factor": one.name}
        rows += [place | row for row in study(suite, *one[1:], tasks)]
    return rows


def other_methods(name: str, seed: int, tier="smoke", device="cpu", *, tasks: int) -> list[dict]:
    """An experiment as of ``evidence``: :func:`rivals` as rows of suite, seed, label, accuracy and
    output."""
    suite = load(name, tier, seed, device, progress=False)
    place = {"suite": name, "seed": seed}
    return [place | {"label": label, **row} for label, row in rivals(suite, tasks).items()]


def sketches(
    name: str, seed: int, tier="smoke", device="cpu", *, ranks: list, ridge: float, tasks: int
) -> list[dict]:
    """An experiment as of ``evidence``: the programme from sketches of several ranks, two draws of
    64 examples each; rows of suite, seed, rank, draw, accuracy and output."""
    suite = load(name, tier, seed, device, progress=False)
    rows = []
    for rank in ranks:
        place = {"suite": name, "seed": seed, "rank": rank}
        measured = study(suite, "size", [64], 2, {"rank": rank, "ridge": ridge}, tasks)
        rows += [place | row for row in measured]
    return rows


def optimism_gaps(
    name: str,
    seed: int,
    tier="smoke",
    device="cpu",
    *,
    sizes: list,
    draws: int,
    ridge: float,
    tasks: int,
) -> list[dict]:
    """An experiment as of ``evidence``: :func:`gaps` as rows with their suite and seed."""
    suite = load(name, tier, seed, device, progress=False)
    place = {"suite": name, "seed": seed}
    return [place | row for row in gaps(suite, sizes, draws, ridge, tasks=tasks)]


# ------------------------------------------------------------------------------ optimism


def gaps(
    suite: Suite, sizes: list[int], draws: int, ridge: float, *, held_out: int = 256, tasks: int = 4
) -> list[dict]:
    """Optimism, measured and predicted from the calibration set alone, cached: means over every
    third layer, on the experts' own inputs.

    Returns: a row for every size, draw and family: ``in_sample`` and ``disjoint`` captured energy,
        the latter on ``held_out`` other examples, and one prediction for every key of
        ``diagnostic.OPTIMISM``. Tables are left out: they have nothing to say of tokens they have
        not seen.
    """
    names = suite.tasks[:tasks]

    def make():
        rows, layers = [], list(_gathered(suite, names, 1, draw=0, folds=1))[::KINDS]
        for draw in range(draws):
            others = _gathered(
                suite, names, held_out, draw=draw, folds=1, skip=max(sizes), layers=layers
            )
            disjoint = {layer: moments.pool() for layer, (moments, _) in others.items()}
            for size in sizes:
                chosen = _gathered(suite, names, size, draw=draw, folds=8, layers=layers)
                problems = [_LayerProblem(*chosen[layer], disjoint[layer]) for layer in layers]
                for family in FAMILIES:
                    of_layers = [problem.gap(family, ridge, 1 / tasks) for problem in problems]
                    place = {"size": size, "draw": draw, "family": family}
                    rows.append(place | _means(of_layers))
        return rows

    settings = [sizes, draws, ridge, held_out, tasks, KINDS, FAMILIES]
    return kept(suite, "gaps", settings, make)


def _gathered(suite, names, n, *, draw, folds, skip=0, layers=None) -> dict[str, tuple]:
    """Layer -> moments and updates of the named tasks, on n examples per task behind the first
    ``skip`` of a draw."""
    experts = {task: suite.experts[task] for task in names}
    batches = suite.calibration(n, seed=draw, skip=skip, tasks=names)
    gathered = layer_moments(suite.base, experts, batches, layers, folds=folds)
    return {
        layer: (moments, updates)
        for layer, (view, moments, updates) in gathered.items()
        if not isinstance(view, Table)
    }


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means of every column."""
    means = {}
    for name in rows[0]:
        means[name] = sum(row[name] for row in rows) / len(rows)
    return means


@dataclass(frozen=True)
class _LayerProblem:
    """One layer on its calibration examples, with updates (K, m, n), and on disjoint ones."""

    moments: Moments
    updates: Tensor
    disjoint: Pooled

    def gap(self, family: str, ridge: float, prior: float) -> dict[str, float]:
        """Captured energies of the optimum over a family, and the optimism that is predicted."""
        pooled = self.moments.pool()
        basis = build(family, self.updates, pooled)
        factored = Factored(programme(pooled, basis))
        coefficients = factored.path((ridge,), basis.arithmetic(prior))[0]
        update = basis.combine(coefficients)
        row = {
            "in_sample": pooled.captured(update),
            "disjoint": self.disjoint.captured(update),
        }
        for by in OPTIMISM:
            row[by] = optimism(self.moments, self.updates, family, ridge, by=by, prior=prior)
        return row
