"""Existing methods as special cases of the programme: where they lie, what their calibration data
would allow, and the way from them to the optimum."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import datafree
from ...assess import certify, layer_moments
from ...bases import build
from ...diagnostic import captured_energy
from ...moments import Pooled
from ...programme import programme
from ...solve import Factored
from ..suites import Suite, load
from . import benchmark
from .baselines import BASELINES, HEURISTICS
from .representations import representation_errors as representation_errors
from .single_layer import FAMILIES, HEADS

METHODS = (*(name for name in HEURISTICS if name != "weighted_soup"), *BASELINES)
STARTS = ("soup", "ties", "tsv_merge", "wudi")
RIDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def dominance(suite: Suite, size: int, name: str):
    """A method against programmes over bases that contain it, in all dense layers on the experts'
    own inputs, ridge zero.

    Returns: ``pandas.DataFrame``, a row per layer; captured energy of the ``method``, of its update
        ``alone`` (best scale), of it beside the updates of a ``layer``, beside their ``rows``, and
        of all ``elements``.
    """
    import pandas as pd

    state, base = benchmark.chosen_merge(suite, name, size).state_dict, suite.base.state_dict()
    rows = {}
    for layer, (view, moments, updates) in suite.layers(size).items():
        if view.matrix(state).shape[0] > 1:  # norms
            continue
        pooled, update = moments.pool(), view.matrix(state) - view.matrix(base)
        wider = torch.cat([updates, update[None]])
        spans = {
            "alone": ("layer", update[None]),
            "layer": ("layer", wider),
            "rows": ("rows", wider),
            "elements": ("elements", updates),
        }
        rows[layer] = {"method": pooled.captured(update)}
        for span, (family, spanning) in spans.items():
            optimum = programme(pooled, build(family, spanning, pooled))
            rows[layer][span] = captured_energy(optimum)
    return pd.DataFrame(rows).T


def _white_inputs(update: Tensor) -> Pooled:
    """Moments of an update (1, m, n) on white inputs, where outputs are weights: captured energy is
    then the share of the update's squared norm."""
    identity = torch.eye(update.shape[-1]).to(update)[None]
    energy = float(update.square().sum()) / 2
    return Pooled(identity, update, update @ update.mT, energy)


def membership(suite: Suite, size: int, name: str, layer: str) -> dict[str, float]:
    """Family -> share of the squared norm of a method's update that lies in the span of the family,
    in one layer's weights."""

    def gather():
        batches = suite.calibration(size)
        return layer_moments(suite.base, suite.experts, batches, (layer,), scope="weights", folds=1)

    view, moments, updates = suite.cached(("layer", layer, size), gather)[layer]
    state = benchmark.chosen_merge(suite, name, size).state_dict
    update, pooled = view.matrix(state) - view.matrix(suite.base.state_dict()), moments.pool()
    white = _white_inputs(update)
    head_of_row = torch.arange(update.shape[1]) // (update.shape[1] // HEADS)
    shares = {}
    for family in FAMILIES:
        groups = head_of_row if family == "groups" else None
        basis = build(family, updates, pooled, groups=groups)
        shares[family] = captured_energy(programme(white, basis))
    return shares


def certificates(suite: Suite, name: str, size: int) -> dict[str, float]:
    """Layer -> calibration loss of a method above the optimum over single entries, as a fraction of
    the residual energy; cached.

    A layer is judged on what the merge's own earlier layers send it, against the experts' outputs.
    """

    def make():
        state = benchmark.chosen_merge(suite, name, size).state_dict
        layers = layer_moments(
            suite.base,
            suite.experts,
            suite.calibration(size),
            along=state,
            folds=1,
            full_energy=False,
        )
        certified = certify(layers, suite.base, state)
        return {layer: certificate["gap"] for layer, certificate in certified.items()}

    return benchmark.kept(suite, "certificate", [name, size], make)


def _path_states(suite: Suite, start: dict[str, Tensor], size: int) -> dict[str, dict]:
    """Ridge, as text, -> state dict of the programme that is pulled towards ``start`` with it;
    ``inf`` is ``start`` itself. Parameters keep their shapes (…)."""
    base = suite.base.state_dict()
    states = {str(ridge): dict(start) for ridge in RIDGES} | {"inf": dict(start)}
    for view, moments, _ in suite.layers(size).values():
        pooled, update = moments.pool(), view.matrix(start) - view.matrix(base)
        factored = Factored(programme(pooled, build("elements", update[None], pooled)))
        for ridge, optimum in zip(RIDGES, factored.path(RIDGES, update)):
            parts = view.parts(view.matrix(base) + optimum, start)
            states[str(ridge)] |= {name: value.to(base[name]) for name, value in parts.items()}
    return states


def path(suite: Suite, name: str, size: int) -> dict:
    """The ridge path from a method (λ → ∞) to the programme over single entries (λ = 0), on the
    experts' own inputs; cached.

    Returns: ``points``, one per ridge and one for the method, with ``calibration`` and ``disjoint``
        captured energy (mean over layers) and ``validation`` accuracy; ``chosen``, by disjoint
        energy and by validation, with test accuracy, beside the two ends.
    """

    def make():
        start = benchmark.chosen_merge(suite, name, size).state_dict
        states = _path_states(suite, start, size)
        method = benchmark.result(suite, name, size)
        known = {"validation": method["validation"], "test": method["normalised"]["mean"]}

        def accuracy(ridge, split):
            return (
                known[split] if ridge == "inf" else suite.normalised(states[ridge], split)["mean"]
            )

        points = []
        for ridge, state in states.items():
            points.append(
                {
                    "ridge": ridge,
                    "validation": accuracy(ridge, "validation"),
                    "calibration": _mean_captured(suite.layers(size), suite.base, state),
                    "disjoint": _mean_captured(suite.layers(size, size), suite.base, state),
                }
            )
        picks = {by: _best(points, by) for by in ("disjoint", "validation")}
        picks |= {"method": "inf", "programme": str(RIDGES[0])}
        tested = {ridge: accuracy(ridge, "test") for ridge in set(picks.values())}
        chosen = {by: {"ridge": ridge, "test": tested[ridge]} for by, ridge in picks.items()}
        return {"points": points, "chosen": chosen}

    return benchmark.kept(suite, "path", [name, size, RIDGES], make)


def paths(name: str, seed: int, tier="smoke", device="cpu", *, size: int) -> list[dict]:
    """An experiment as of ``evidence``: :func:`path` from every one of ``STARTS``, rows with their
    suite, seed and start."""
    suite = load(name, tier, seed, device, progress=False)
    return [{"suite": name, "seed": seed, "start": m, **path(suite, m, size)} for m in STARTS]


def _best(points: list[dict], by: str) -> str:
    """Ridge of the point with the highest value, the first one of several."""
    return max(points, key=lambda point: point[by])["ridge"]


def _mean_captured(layers, base, state) -> float:
    """Mean over layers with residual energy, without the optimum that ``certify`` solves for."""
    shares = []
    for view, moments, _ in layers.values():
        update, pooled = view.matrix(state) - view.matrix(base.state_dict()), moments.pool()
        if pooled.energy:
            shares.append(pooled.captured(update))
    return sum(shares) / len(shares)


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
