"""Existing methods as points of the programme: where they lie, what their calibration data would
allow, and the way from them to the optimum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ... import datafree
from ...assess import certify, layer_moments
from ...bases import build
from ...diagnostic import captured_energy
from ...gradient import fisher_weights
from ...moments import Pooled
from ...programme import programme
from ...solve import Factored, minimise
from ..suites import Suite
from . import benchmark
from .single_layer import HEADS

METHODS = (*benchmark.HEURISTICS[:1], *benchmark.HEURISTICS[2:], *benchmark.NEIGHBOURS)
STARTS = ("soup", "ties", "tsv_merge", "wudi")
RIDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
MEMBERS = (
    "layer",
    "groups",
    "rows",
    "rotated_rows",
    "columns",
    "rotated_columns",
    "singular",
    "elements",
)


def _each(scales, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One coefficient per expert, for all parameters."""
    return {
        k: torch.as_tensor(scales, dtype=v.dtype).expand(len(v)).reshape(-1, *[1] * (v.dim() - 1))
        for k, v in vectors.items()
    }


def _ties(vectors, density, scale) -> dict[str, Tensor]:
    """λ over the number of kept entries that agree with the elected sign."""
    flat = torch.cat([v.flatten(1) for v in vectors.values()], 1)
    least = flat.abs().sort(dim=1).values[:, flat.shape[1] - int(density * flat.shape[1]) - 1]
    kept = {k: v * (v.abs() >= least.reshape(-1, *[1] * (v.dim() - 1))) for k, v in vectors.items()}
    majority = sum(float(v.sum(0).sign().sum()) for v in kept.values())
    shares = {}
    for k, v in kept.items():
        sign = v.sum(0).sign()
        agree = (v.sign() == torch.where(sign == 0, 1.0 if majority > 0 else -1.0, sign)) & (v != 0)
        shares[k] = scale * agree / agree.sum(0).clamp(min=1)
    return shares


def _dare(vectors, drop, scale, seed) -> dict[str, Tensor]:
    """λ/(1 - p) on the entries that the seed keeps."""
    generator, masks = torch.Generator().manual_seed(seed), {k: [] for k in vectors}
    for i in range(len(next(iter(vectors.values())))):
        for k in sorted(vectors):
            masks[k].append(torch.rand(vectors[k][i].shape, generator=generator) >= drop)
    return {k: scale * torch.stack(m) / (1 - drop) for k, m in masks.items()}


def _stock(vectors) -> dict[str, Tensor]:
    """r/K, with r from the mean cosine between updates."""
    shares = {}
    for k, v in vectors.items():
        unit, count = normalize(v.flatten(1), dim=1), len(v)
        cosine = float((unit @ unit.T).sum() - count) / (count * (count - 1))
        shares[k] = _each(cosine / (1 + (count - 1) * cosine), {k: v})[k]
    return shares


def _greedy(suite: Suite, vectors):
    """One over the number of chosen experts for each of them."""
    merge = datafree.greedy_soup(
        suite.base, suite.experts, score=lambda state: suite.normalised(state, "validation")["mean"]
    )
    name = max(vectors, key=lambda k: vectors[k].numel())
    wanted = (merge.state_dict[name].double() - suite.base.state_dict()[name].double()).flatten()
    shares = torch.linalg.lstsq(vectors[name].flatten(1).T, wanted).solution
    chosen = (shares > shares.max() / 2).double()
    return merge, _each(chosen / chosen.sum(), vectors)


def represented(suite: Suite, size: int):
    """Every method with coefficients ``c_k`` per expert, or expert and entry, derived here and not
    by the method.

    Yields: name, the method's merge as validation tuned it, ``c_k`` (K, …) by parameter.
    """
    vectors = datafree.task_vectors(suite.base, suite.experts)
    options = lambda name: benchmark.result(suite, name, size)["options"]
    merge = lambda name: benchmark.again(suite, name, size)
    yield "soup", merge("soup"), _each(1 / len(suite.experts), vectors)
    yield (
        "weighted_soup",
        merge("weighted_soup"),
        _each(options("weighted_soup")["weights"], vectors),
    )
    yield "greedy_soup", *_greedy(suite, vectors)
    yield (
        "task_arithmetic",
        merge("task_arithmetic"),
        _each(options("task_arithmetic")["scale"], vectors),
    )
    yield "model_stock", datafree.model_stock(suite.base, suite.experts), _stock(vectors)
    yield "ties", merge("ties"), _ties(vectors, **options("ties"))
    yield "dare", merge("dare"), _dare(vectors, **options("dare"))
    F = fisher_weights(
        suite.base,
        suite.experts,
        suite.calibration(size),
        heads=suite.classifiers(),
        **options("fisher"),
    )
    yield "fisher", merge("fisher"), {k: f / f.sum(0) for k, f in F.items()}
    adapted = merge("adamerging")
    yield (
        "adamerging",
        adapted,
        {
            row["layer"]: _each(row["lambda"], {"": vectors[row["layer"]]})[""]
            for row in adapted.table
        },
    )


def _relative(pairs) -> float:
    """``‖difference‖ / ‖of‖`` over all (difference, of)."""
    off, of = (sum(float(z.square().sum()) for z in column) for column in zip(*pairs))
    return (off / of) ** 0.5


def _slerp_error(base, pair: dict[str, dict[str, Tensor]]) -> float:
    """SLERP halfway between two experts as ``(2s - 1) W_0 + s Δ_1 + s Δ_2`` beside W_0,
    ``s = sin(φ/2)/sin φ``."""
    state, made, pairs = base.state_dict(), datafree.slerp(base, pair).state_dict, []
    for k, (first, second) in datafree.task_vectors(base, pair).items():
        origin = state[k].double()
        cosine = torch.cosine_similarity(
            (origin + first).flatten(), (origin + second).flatten(), 0
        ).clamp(-1, 1)
        s = 0.5 if cosine > 0.9995 else float((cosine.acos() / 2).sin() / cosine.acos().sin())
        update = made[k].double() - origin
        pairs.append(((2 * s - 1) * origin + s * first + s * second - update, update))
    return _relative(pairs)


def _regmean_error(suite: Suite, size: int) -> float:
    """RegMean against the optimum over single entries of every dense layer, its α as a ridge
    towards the diagonal of every task's Gram matrix."""
    alpha, made = (
        benchmark.result(suite, "regmean", size)["options"]["alpha"],
        benchmark.again(suite, "regmean", size).state_dict,
    )
    pairs = []
    for view, moments, updates in layer_moments(
        suite.base, suite.experts, suite.calibration(size), scope="weights", folds=1
    ).values():
        pooled = moments.shrink(updates, alpha).pool()
        update = view.matrix(made) - view.matrix(suite.base.state_dict())
        pairs.append(
            (minimise(programme(pooled, build("elements", updates, pooled))).d - update, update)
        )
    return _relative(pairs)


def representation_errors(suite: Suite, size: int) -> dict[str, float]:
    """Method -> relative error of ``W_0 + Σ_k c_k ∘ Δ_k`` against the method's own weights, over
    all parameters."""
    base, vectors, errors = (
        suite.base.state_dict(),
        datafree.task_vectors(suite.base, suite.experts),
        {},
    )
    for name, merge, shares in represented(suite, size):
        updates = {k: merge.state_dict[k].double() - base[k].double() for k in shares}
        errors[name] = _relative(
            ((shares[k] * vectors[k]).sum(0) - u, u) for k, u in updates.items()
        )
    errors["slerp"] = _slerp_error(suite.base, dict(list(suite.experts.items())[:2]))
    return errors | {"regmean": _regmean_error(suite, size)}


def dominance(suite: Suite, size: int, name: str):
    """A method against programmes over bases that contain it, in all dense layers on the experts'
    own inputs, ridge zero.

    Returns: ``pandas.DataFrame``, a row per layer; captured energy of the ``method``, of its update
        ``alone`` (best scale), of it beside the updates of a ``layer``, beside their ``rows``, and
        of all ``elements``.
    """
    import pandas as pd

    state, rows = benchmark.again(suite, name, size).state_dict, {}
    for layer, (view, moments, updates) in suite.layers(size).items():
        if view.matrix(state).shape[0] > 1:  # norms
            continue
        pooled, update = moments.pool(), view.matrix(state) - view.matrix(suite.base.state_dict())
        wider = torch.cat([updates, update[None]])
        spans = {
            "alone": ("layer", update[None]),
            "layer": ("layer", wider),
            "rows": ("rows", wider),
            "elements": ("elements", updates),
        }
        rows[layer] = {"method": pooled.captured(update)} | {
            k: captured_energy(programme(pooled, build(family, D, pooled)))
            for k, (family, D) in spans.items()
        }
    return pd.DataFrame(rows).T


def membership(suite: Suite, size: int, name: str, layer: str) -> dict[str, float]:
    """Family -> share of the squared norm of a method's update that lies in the span of the family,
    in one layer's weights."""
    state = benchmark.again(suite, name, size).state_dict
    if ("layer", layer, size) not in suite._held:
        found = layer_moments(
            suite.base, suite.experts, suite.calibration(size), (layer,), scope="weights", folds=1
        )
        suite._held["layer", layer, size] = found[layer]
    view, moments, updates = suite._held["layer", layer, size]
    pooled, D = moments.pool(), view.matrix(state) - view.matrix(suite.base.state_dict())
    plain = Pooled(
        torch.eye(D.shape[-1]).to(D)[None], D, D @ D.mT, float(D.square().sum()) / 2
    )  # white inputs: outputs are weights
    labels = torch.arange(D.shape[1]) // (D.shape[1] // HEADS)
    return {
        f: captured_energy(
            programme(plain, build(f, updates, pooled, groups=labels if f == "groups" else None))
        )
        for f in MEMBERS
    }


def certificates(suite: Suite, name: str, size: int) -> dict[str, float]:
    """Layer -> calibration loss of a method above the optimum over single entries, as a fraction of
    the residual energy; kept.

    A layer is judged on what the merge's own earlier layers send it, against the experts' outputs.
    """

    def make():
        state = benchmark.again(suite, name, size).state_dict
        layers = layer_moments(
            suite.base,
            suite.experts,
            suite.calibration(size),
            along=state,
            folds=1,
            full_energy=False,
        )
        return {layer: found["gap"] for layer, found in certify(layers, suite.base, state).items()}

    return benchmark.kept(suite, "certificate", [name, size], make)


def path(suite: Suite, name: str, size: int) -> dict:
    """The ridge path from a method (λ → ∞) to the programme over single entries (λ = 0), on the
    experts' own inputs; kept.

    Returns: ``points``, one per ridge and one for the method, with ``calibration`` and ``disjoint``
        captured energy (mean over layers) and ``validation`` accuracy; ``chosen``, by disjoint
        energy and by validation, with test accuracy, beside the two ends.
    """

    def make():
        start, base = benchmark.again(suite, name, size).state_dict, suite.base.state_dict()
        states: dict[str, dict] = {str(r): dict(start) for r in RIDGES} | {"inf": dict(start)}
        for view, moments, _ in suite.layers(size).values():
            pooled, update = moments.pool(), view.matrix(start) - view.matrix(base)
            prog = programme(pooled, build("elements", update[None], pooled))
            for ridge, d in zip(RIDGES, Factored(prog).path(RIDGES, update)):
                states[str(ridge)] |= {
                    k: v.to(base[k]) for k, v in view.parts(view.matrix(base) + d, start).items()
                }
        energies = {
            where: suite.layers(size, skip)
            for where, skip in (("calibration", 0), ("disjoint", size))
        }
        method = benchmark.result(suite, name, size)
        judge = lambda r, split, known: (
            known if r == "inf" else suite.normalised(states[r], split)["mean"]
        )
        points = [
            {
                "ridge": r,
                "validation": judge(r, "validation", method["validation"]),
                **{
                    where: _mean_captured(layers, suite.base, state)
                    for where, layers in energies.items()
                },
            }
            for r, state in states.items()
        ]
        best = {by: max(points, key=lambda p: p[by])["ridge"] for by in ("disjoint", "validation")}
        tested = {
            r: judge(r, "test", method["normalised"]["mean"])
            for r in {"inf", "0.0", *best.values()}
        }
        return {
            "points": points,
            "chosen": {
                k: {"ridge": r, "test": tested[r]}
                for k, r in (best | {"method": "inf", "programme": "0.0"}).items()
            },
        }

    return benchmark.kept(suite, "path", [name, size, RIDGES], make)


def _mean_captured(layers, base, state) -> float:
    """Mean over layers with residual energy, without the optimum that ``certify`` solves for."""
    pools = [
        (view.matrix(state) - view.matrix(base.state_dict()), moments.pool())
        for view, moments, _ in layers.values()
    ]
    found = [pooled.captured(update) for update, pooled in pools if pooled.energy]
    return sum(found) / len(found)


def _namesakes(suite: Suite, size: int):
    """Name, title and merge of TIES and DARE under every option in which implementations differ, at
    the density and scale that validation chose."""
    ties, dare = (benchmark.result(suite, m, size)["options"] for m in ("ties", "dare"))
    for semantics in datafree.TIES:
        merge = datafree.ties(suite.base, suite.experts, **ties, semantics=semantics)
        yield "TIES", f"TIES, {semantics}", merge
    for rescale in datafree.RESCALE:
        merge = datafree.dare(suite.base, suite.experts, **dare, rescale=rescale)
        yield "DARE", f"DARE, rescale {rescale}", merge


def namesakes(suite: Suite, size: int):
    """How far apart implementations of one name are, see ``book/same_name.md``.

    Returns: ``pandas.DataFrame`` with a row per implementation of TIES and of DARE; ``distance /
        first`` is that of its update from the update of the first of its name, relative to the
        length of that one; and ``validation accuracy``.
    """
    import pandas as pd

    def flat(state) -> Tensor:
        return torch.cat([v.flatten() for v in state.values()])

    start, first, rows = flat(suite.base.state_dict()), {}, {}
    for name, title, merge in _namesakes(suite, size):
        origin = first.setdefault(name, flat(merge.state_dict) - start)
        away = float((flat(merge.state_dict) - start - origin).norm() / origin.norm())
        accuracy = suite.normalised(merge.state_dict, "validation")["mean"]
        rows[title] = {"distance / first": away, "validation accuracy": accuracy}
    return pd.DataFrame(rows).T
