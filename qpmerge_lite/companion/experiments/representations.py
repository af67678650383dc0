"""Existing methods written as coefficients of the experts' updates, and how well that represents
them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ... import datafree
from ...assess import layer_moments
from ...bases import build
from ...gradient import fisher_weights
from ...programme import programme
from ...solve import minimise
from ...solvers import shrink
from ...spectral.essential import OUT_PROJECTIONS
from ..suites import Suite
from . import benchmark


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """One value per expert (K,) in a shape (K, 1, …) that multiplies a parameter's (K, …)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _each(scales, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One coefficient per expert, for all parameters."""
    coefficients = {}
    for name, updates in vectors.items():
        values = torch.as_tensor(scales, dtype=updates.dtype).expand(len(updates))
        coefficients[name] = _columns(values, updates)
    return coefficients


def _ties(vectors, density, scale) -> dict[str, Tensor]:
    """λ over the number of trimmed updates that agree with the elected sign."""
    flat = torch.cat([updates.flatten(1) for updates in vectors.values()], 1)
    first_in = flat.shape[1] - int(density * flat.shape[1]) - 1
    least = flat.abs().sort(dim=1).values[:, first_in]
    trimmed = {
        name: updates * (updates.abs() >= _columns(least, updates))
        for name, updates in vectors.items()
    }
    majority = sum(float(updates.sum(0).sign().sum()) for updates in trimmed.values())
    shares = {}
    for name, updates in trimmed.items():
        sign = updates.sum(0).sign()
        elected = torch.where(sign == 0, 1.0 if majority > 0 else -1.0, sign)
        agree = (updates.sign() == elected) & (updates != 0)
        shares[name] = scale * agree / agree.sum(0).clamp(min=1)
    return shares


def _dare(vectors, drop, scale, seed) -> dict[str, Tensor]:
    """λ/(1 - p) on the entries that the seed does not drop."""
    generator, masks = torch.Generator().manual_seed(seed), {name: [] for name in vectors}
    for expert in range(len(next(iter(vectors.values())))):
        for name in sorted(vectors):
            drawn = torch.rand(vectors[name][expert].shape, generator=generator)
            masks[name].append(drawn >= drop)
    return {name: scale * torch.stack(mask) / (1 - drop) for name, mask in masks.items()}


def _stock(vectors) -> dict[str, Tensor]:
    """r/K, with r from the mean cosine between updates."""
    shares = {}
    for name, updates in vectors.items():
        unit, count = normalize(updates.flatten(1), dim=1), len(updates)
        cosine = float((unit @ unit.T).sum() - count) / (count * (count - 1))
        shares |= _each(cosine / (1 + (count - 1) * cosine), {name: updates})
    return shares


def _greedy(suite: Suite, vectors):
    """One over the number of chosen experts for each of them."""

    def score(state):
        return suite.normalised(state, "validation")["mean"]

    merge = datafree.greedy_soup(suite.base, suite.experts, score=score)
    largest = max(vectors, key=lambda name: vectors[name].numel())
    merged, base = merge.state_dict[largest], suite.base.state_dict()[largest]
    update = (merged.double() - base.double()).flatten()
    shares = torch.linalg.lstsq(vectors[largest].flatten(1).T, update).solution
    chosen = (shares > shares.max() / 2).double()
    return merge, _each(chosen / chosen.sum(), vectors)


def _adamerging(merge, vectors) -> dict[str, Tensor]:
    """The learned λ of every expert and layer."""
    shares = {}
    for row in merge.table:
        shares |= _each(row["lambda"], {row["layer"]: vectors[row["layer"]]})
    return shares


def represented(suite: Suite, size: int):
    """Every method with coefficients ``c_k`` per expert, or expert and entry, derived here and not
    by the method.

    Yields: name, the method's merge as validation tuned it, ``c_k`` (K, …) by parameter.
    """
    vectors = datafree.task_vectors(suite.base, suite.experts)

    def tuned(name):
        """The merge of a method and the options that validation chose."""
        options = benchmark.result(suite, name, size)["options"]
        return benchmark.chosen_merge(suite, name, size), options

    merge, _ = tuned("soup")
    yield "soup", merge, _each(1 / len(suite.experts), vectors)
    merge, options = tuned("weighted_soup")
    yield "weighted_soup", merge, _each(options["weights"], vectors)
    yield "greedy_soup", *_greedy(suite, vectors)
    merge, options = tuned("task_arithmetic")
    yield "task_arithmetic", merge, _each(options["scale"], vectors)
    yield "model_stock", datafree.model_stock(suite.base, suite.experts), _stock(vectors)
    merge, options = tuned("ties")
    yield "ties", merge, _ties(vectors, **options)
    merge, options = tuned("dare")
    yield "dare", merge, _dare(vectors, **options)
    merge, options = tuned("fisher")
    calibration, heads = suite.calibration(size), suite.classifiers()
    F = fisher_weights(suite.base, suite.experts, calibration, heads=heads, **options)
    yield "fisher", merge, {name: f / f.sum(0) for name, f in F.items()}
    merge, _ = tuned("adamerging")
    yield "adamerging", merge, _adamerging(merge, vectors)


def _relative(pairs) -> float:
    """``‖difference‖ / ‖of‖`` over all pairs (difference, of) of tensors of one shape each."""
    off, of = 0.0, 0.0
    for difference, reference in pairs:
        off += float(difference.square().sum())
        of += float(reference.square().sum())
    return (off / of) ** 0.5


def _slerp_error(base, pair: dict[str, dict[str, Tensor]]) -> float:
    """SLERP halfway between two experts as ``(2s - 1) W_0 + s Δ_1 + s Δ_2`` beside W_0,
    ``s = sin(φ/2)/sin φ``."""
    state, merged, pairs = base.state_dict(), datafree.slerp(base, pair).state_dict, []
    for name, (first, second) in datafree.task_vectors(base, pair).items():
        origin = state[name].double()
        ends = (origin + first).flatten(), (origin + second).flatten()
        cosine = torch.cosine_similarity(*ends, 0).clamp(-1, 1)
        angle = cosine.acos()
        s = 0.5 if cosine > 0.9995 else float((angle / 2).sin() / angle.sin())
        update = merged[name].double() - origin
        pairs.append(((2 * s - 1) * origin + s * first + s * second - update, update))
    return _relative(pairs)


def _regmean_error(suite: Suite, size: int) -> float:
    """RegMean against the optimum over single entries of every dense layer, its α as a ridge
    towards the diagonal of every task's Gram matrix."""
    alpha = benchmark.result(suite, "regmean", size)["options"]["alpha"]
    state, base = benchmark.chosen_merge(suite, "regmean", size).state_dict, suite.base.state_dict()
    layers = layer_moments(
        suite.base, suite.experts, suite.calibration(size), scope="weights", folds=1
    )
    pairs = []
    for view, moments, updates in layers.values():
        pooled = shrink(moments, updates, alpha).pool()
        optimum = minimise(programme(pooled, build("elements", updates, pooled))).d
        update = view.matrix(state) - view.matrix(base)
        pairs.append((optimum - update, update))
    return _relative(pairs)


def _root_and_inverse(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Trace () of the square root of a positive semidefinite matrix (p, p), and the root's
    pseudo-inverse (p, p)."""
    values, vectors = torch.linalg.eigh(gram)
    there = values > len(gram) * torch.finfo(gram.dtype).eps * values[-1]
    inverse_roots = torch.where(there, values, 1.0).rsqrt() * there
    return values.clamp(min=0).sqrt().sum(), vectors * inverse_roots @ vectors.mT


def _esm_coefficients(C: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """``A_t`` (K, m, m) and the diagonal of D (n,) with which ESM's update of a layer is ``Σ_t A_t
    Δ_t D``, but for its scales of whole matrices.

    Every A_t is ``(coefficients) U_tᵀ`` with the ⌊m/K⌋ leading eigenvectors U_t of
    ``Δ_t C_t Δ_tᵀ``: elements of the basis are ``e_a u_tjᵀ Δ_t D``, for every output a and
    eigenvector u_tj.

    Args:
        C: second moments (K, n, n). updates: ``Δ_t`` (K, m, n).
    """
    tasks, outputs, inputs = updates.shape
    rank = outputs // tasks
    values, vectors = torch.linalg.eigh(updates @ C @ updates.mT)
    values, U = values.flip(1)[:, :rank].clamp(min=0), vectors.flip(2)[..., :rank]
    s = (values / values.mean(1, keepdim=True)) ** 0.15
    s = s / s.mean(1, keepdim=True)
    norms = updates.square().sum((1, 2)).sqrt()
    left = torch.cat([*(U * s.unsqueeze(1))], 1)
    # what multiplies the updates from the left before they are made orthonormal (K·r, m) by task
    rows = (s * ((norms / norms.mean()) ** 2)[:, None]).unsqueeze(2) * U.mT
    V = (rows @ updates).flatten(0, 1)
    columns = V.norm(dim=0)
    D = (columns / columns.mean()) ** 2
    left_trace, left_inverse = _root_and_inverse(left.mT @ left)
    right_trace, right_inverse = _root_and_inverse(V * D.square() @ V.mT)
    means = left_trace * right_trace / (min(left.shape) * min(V.shape))
    coefficients = 2 * means * left @ left_inverse @ right_inverse  # (m, K·r)
    by_task = coefficients.unflatten(1, (tasks, rank)).movedim(1, 0)
    return by_task @ rows, D


def _esm_error(suite: Suite, size: int) -> float:
    """ESM against ``Σ_t A_t Δ_t D``, times the scale and the square of its norm over the mean norm
    of the layers that are the same in other blocks, in every dense layer that it decomposes."""
    scale = benchmark.result(suite, "esm", size)["options"]["scale"]
    state, base = benchmark.chosen_merge(suite, "esm", size).state_dict, suite.base.state_dict()
    layers = layer_moments(
        suite.base,
        suite.experts,
        suite.calibration(size),
        scope="weights",
        folds=1,
        full_energy=False,
        products="float64",
    )
    decomposed, kinds = {}, {}
    for name, (_, moments, updates) in layers.items():
        if not name.endswith(OUT_PROJECTIONS):
            A, D = _esm_coefficients(moments.C[:, 0, 0], updates[:, 0])
            decomposed[name] = (A @ updates[:, 0]).sum(0) * D
            kind = tuple(part for part in name.split(".") if not part.isdigit())
            kinds.setdefault(kind, []).append(name)
    pairs = []
    for names in kinds.values():
        mean = sum(float(decomposed[name].norm()) for name in names) / len(names)
        for name in names:
            view, own = layers[name].view, decomposed[name]
            update = view.matrix(state)[0] - view.matrix(base)[0]
            pairs.append((scale * (own.norm() / mean) ** 2 * own - update, update))
    return _relative(pairs)


def representation_errors(suite: Suite, size: int) -> dict[str, float]:
    """Method -> relative error of ``W_0 + Σ_k c_k ∘ Δ_k`` against the method's own weights, over
    all parameters."""
    base, vectors = suite.base.state_dict(), datafree.task_vectors(suite.base, suite.experts)
    errors = {}
    for method, merge, shares in represented(suite, size):
        pairs = []
        for name, share in shares.items():
            update = merge.state_dict[name].double() - base[name].double()
            pairs.append(((share * vectors[name]).sum(0) - update, update))
        errors[method] = _relative(pairs)
    errors["slerp"] = _slerp_error(suite.base, dict(list(suite.experts.items())[:2]))
    return errors | {"regmean": _regmean_error(suite, size), "esm": _esm_error(suite, size)}
