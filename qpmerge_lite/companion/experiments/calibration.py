"""How much a merge, and what is said of it, depend on the calibration set: its size, its draw, how
it is chosen and where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ... import datafree, methods
from ...assess import audit, layer_moments
from ...bases import build
from ...diagnostic import OPTIMISM, optimism
from ...engine.views import Table
from ...programme import programme
from ...solve import Factored
from ..suites import Suite, training
from .benchmark import FAMILIES, kept
from .population import scrambled

POOL = 256  # examples per task that a rule chooses from, and the largest calibration set
HELD = 64  # examples per task behind the pool that judge a merge without labels
SIZE = 16  # of the calibration sets that are drawn and chosen
KINDS = 3  # every third layer covers all kinds of layers of a block

Batches = dict[str, list[dict]]


def _features(suite: Suite, batch: dict) -> Tensor:
    """Features of the base, centred: (N, d) float64."""
    with torch.no_grad():
        z = suite.base(**batch).double()
    return z - z.mean(0)


def _leverage(suite, task, batch, draw, n):
    z = _features(suite, batch)
    second = z.mT @ z
    ridge = 1e-3 * second.diagonal().mean() * torch.eye(z.shape[1], dtype=z.dtype)
    return (
        (z @ torch.linalg.inv(second + ridge) * z).sum(1).argsort(descending=True, stable=True)[:n]
    )


def _centres(suite, task, batch, draw, n):
    """Greedy k-centre: each next example is the one farthest from those chosen."""
    z, chosen = _features(suite, batch), [0]
    near = (z - z[0]).norm(dim=1)
    while len(chosen) < n:
        chosen.append(int(near.argmax()))
        near = torch.minimum(near, (z - z[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)


def _balanced(suite, task, batch, draw, n):
    """Classes in turn, by the labels of the training split."""
    rows = suite.data[task]["train"]
    drawn = torch.randperm(len(rows), generator=training.seeded(draw, task, "calibration"))[:POOL]
    labels = torch.as_tensor(rows["label"])[drawn].tolist()
    turn = [labels[:i].count(label) for i, label in enumerate(labels)]
    return torch.tensor(turn).argsort(stable=True)[:n]


def _most(suite, task, batch, draw, n):
    """The longest texts; the pictures with most ink."""
    amount = batch["attention_mask"] if "attention_mask" in batch else batch["pixels"]
    return amount.flatten(1).sum(1).argsort(descending=True, stable=True)[:n]


RULES: dict[str, Callable] = {
    "random": lambda suite, task, batch, draw, n: torch.arange(n),
    "balanced": _balanced,
    "leverage": _leverage,
    "centres": _centres,
    "most": _most,
}


def selected(suite: Suite, rule: str, draw: int, tasks: list[str], n: int = SIZE) -> Batches:
    """n examples per task that a key of ``RULES`` chooses from the pool of a draw; only
    ``balanced`` looks at labels."""
    found = {}
    for task, (batch,) in suite.calibration(POOL, seed=draw, batch_size=POOL, tasks=tasks).items():
        chosen = RULES[rule](suite, task, batch, draw, n)
        found[task] = [training.trim({k: v[chosen] for k, v in batch.items()})]
    return found


def foreign(suite: Suite, domain: str, draw: int, tasks: list[str], n: int = SIZE) -> Batches:
    """n examples per task from its ``own`` data, ``another`` task's (the next one's), all tasks
    ``mixed``, or its own ``scrambled``."""
    own = suite.calibration(n, seed=draw, tasks=tasks)
    following = dict(zip(tasks, tasks[1:] + tasks[:1]))
    if domain == "mixed":
        parts = [
            batch
            for batches in suite.calibration(n // len(tasks), seed=draw, tasks=tasks).values()
            for batch in batches
        ]
        return dict.fromkeys(tasks, parts)
    change = {
        "own": lambda t: own[t],
        "another": lambda t: own[following[t]],
        "scrambled": lambda t: [
            scrambled(b, training.seeded(draw, t, "scrambled")) for b in own[t]
        ],
    }
    return {task: change[domain](task) for task in tasks}


FACTORS: dict[str, Callable[[Suite, int | str, int, list[str]], Batches]] = {
    "size": lambda suite, size, draw, tasks: suite.calibration(size, seed=draw, tasks=tasks),
    "selection": selected,
    "domain": foreign,
    "experts": lambda suite, count, draw, tasks: suite.calibration(SIZE, seed=draw, tasks=tasks),
}


def judge(suite: Suite, state: dict, draw: int, tasks: list[str], split: str) -> dict:
    """Normalised accuracy on a split, and captured energy of the output on examples behind the pool
    of a draw."""
    held = suite.calibration(HELD, seed=draw, skip=POOL, tasks=tasks)
    energy = audit(suite.base, state, {t: suite.experts[t] for t in tasks}, held)["output"]
    return {"accuracy": suite.normalised(state, split, tasks)["mean"], "output": energy}


def study(
    suite: Suite,
    factor: str,
    levels: list,
    draws: int,
    merge: dict,
    tasks: int = 4,
    split: str = "test",
) -> list[dict]:
    """One row for every level of a key of ``FACTORS`` and every draw, kept: level, draw, and what
    :func:`judge` finds.

    Args:
        merge: options of ``methods.qp``; with ``rank``, of ``methods.sketched``.
        tasks: the first so many are merged; where the factor is ``experts``, its levels say how
            many.
    """

    def row(level, draw):
        names = suite.tasks[: level if factor == "experts" else tasks]
        call = methods.sketched if "rank" in merge else methods.qp
        made = call(
            suite.base,
            {t: suite.experts[t] for t in names},
            FACTORS[factor](suite, level, draw, names),
            **merge,
        )
        return {"level": level, "draw": draw} | judge(suite, made.state_dict, draw, names, split)

    return kept(
        suite,
        "sensitivity",
        [factor, levels, draws, merge, tasks, split, SIZE, POOL, HELD],
        lambda: [row(level, draw) for level in levels for draw in range(draws)],
    )


def rivals(suite: Suite, tasks: int = 4, split: str = "test") -> dict[str, dict]:
    """What :func:`judge` finds of other methods with their own defaults, on the first draw,
    kept."""
    names = suite.tasks[:tasks]
    calls = {
        "soup": datafree.soup,
        "task arithmetic": partial(datafree.task_arithmetic, scale=0.3),
        "TIES": datafree.ties,
        "RegMean": methods.regmean,
        "RegMean++": methods.regmean_plus_plus,
        "QP rows": partial(methods.qp, basis="rows"),
        "QP elements": partial(methods.qp, basis="elements"),
    }

    def make():
        calibration, experts = (
            suite.calibration(SIZE, seed=0, tasks=names),
            {t: suite.experts[t] for t in names},
        )
        return {
            label: judge(suite, call(suite.base, experts, calibration).state_dict, 0, names, split)
            for label, call in calls.items()
        }

    return kept(suite, "rivals", [tasks, split, SIZE, POOL, HELD, sorted(calls)], make)


def gaps(
    suite: Suite, sizes: list[int], draws: int, ridge: float, held: int = 256, tasks: int = 4
) -> list[dict]:
    """Optimism, measured and predicted from the calibration set alone, kept: means over every third
    layer, on the experts' own inputs.

    Returns: a row for every size, draw and family: ``in_sample`` and ``disjoint`` captured energy,
        the latter on ``held`` other examples, and one prediction for every key of
        ``diagnostic.OPTIMISM``. Tables are left out: they have nothing to say of tokens they have
        not seen.
    """
    names = suite.tasks[:tasks]
    experts = {t: suite.experts[t] for t in names}

    def moments(n, draw, skip, folds, layers):
        batches = suite.calibration(n, seed=draw, skip=skip, tasks=names)
        return {
            k: v
            for k, v in layer_moments(suite.base, experts, batches, layers, folds=folds).items()
            if not isinstance(v[0], Table)
        }

    def make():
        found, layers = [], list(moments(1, 0, 0, 1, None))[::KINDS]
        for draw in range(draws):
            others = {
                k: m.pool() for k, (_, m, _) in moments(held, draw, max(sizes), 1, layers).items()
            }
            for size in sizes:
                chosen = moments(size, draw, 0, 8, layers)
                for family in FAMILIES:
                    rows = [
                        _gap(*chosen[k][1:], others[k], family, ridge, 1 / tasks) for k in layers
                    ]
                    found.append(
                        {"size": size, "draw": draw, "family": family}
                        | {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}
                    )
        return found

    return kept(suite, "gaps", [sizes, draws, ridge, held, tasks, KINDS, FAMILIES], make)


def _gap(moments, updates, held, family, ridge, prior) -> dict[str, float]:
    pooled = moments.pool()
    basis = build(family, updates, pooled)
    update = basis.combine(
        Factored(programme(pooled, basis)).path((ridge,), basis.arithmetic(prior))[0]
    )
    predicted = {
        by: optimism(moments, updates, family, ridge, by=by, prior=prior) for by in OPTIMISM
    }
    return {"in_sample": pooled.captured(update), "disjoint": held.captured(update)} | predicted
