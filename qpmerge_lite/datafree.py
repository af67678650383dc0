r"""Methods that look at weights only, all called ``method(base, experts, calibration=None, **options) -> Merge``.

``θ_0`` is the base, ``τ_k = θ_k - θ_0`` the task vectors; merges are worked out in float64 and returned in the base's types. Where
implementations of one name differ, the difference is an option named after what it does or after whose it is.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import MergeError
from .sequential import Merge, average, check_experts

RESCALE = ("keep", "l1")


def task_vectors(base, experts) -> dict[str, Tensor]:
    """Name -> (K, …) float64, for the floating entries of the base."""
    checked = list(check_experts(base, experts).values())
    return {k: torch.stack([e[k].double() for e in checked]) - v.double() for k, v in base.state_dict().items() if v.is_floating_point()}


def add_update(base, update: dict[str, Tensor], scale: float = 1.0) -> Merge:
    """The base plus ``scale`` times an update of its floating entries."""
    state = {k: (v.double() + scale * update[k]).to(v) if k in update else v.clone() for k, v in base.state_dict().items()}
    return Merge(state)


def _fraction(name: str, value: float, low: bool = False, high: bool = False) -> None:
    if not (0 <= value <= 1 and (low or value > 0) and (high or value < 1)):
        raise MergeError(f"{name}: expected a fraction in {'[' if low else '('}0, 1{']' if high else ')'}, found {value}")


def _one_of(name: str, value: str, known) -> None:
    if value not in known:
        raise MergeError(f"{name}: expected one of {', '.join(known)}, found {value!r}")


def soup(base, experts, calibration=None, *, weights: Sequence[float] | None = None) -> Merge:
    """Model soup ``Σ_k w_k θ_k`` (arXiv:2203.05482); uniform by default. Raises: MergeError unless the weights sum to one."""
    if weights is not None and (len(weights) != len(experts) or abs(sum(weights) - 1) > 1e-9):
        raise MergeError(f"soup weights: expected {len(experts)} numbers with sum 1, found {list(weights)}; task_arithmetic scales freely")
    state = average(base, check_experts(base, experts), weights)
    return Merge(state, averaged=sorted(state))


def greedy_soup(base, experts, calibration=None, *, score: Callable[[dict], float]) -> Merge:
    """Greedy soup (arXiv:2203.05482): experts from best to worst, each kept if the soup's ``score`` rises strictly; look at validation data only."""
    order = sorted(experts, key=lambda t: score(experts[t]), reverse=True)
    chosen, best = {order[0]: experts[order[0]]}, score(experts[order[0]])
    for task in order[1:]:
        found = score(soup(base, chosen | {task: experts[task]}).state_dict)
        if found > best:
            chosen, best = chosen | {task: experts[task]}, found
    return soup(base, chosen)


def slerp(base, experts, calibration=None, *, t: float = 0.5) -> Merge:
    """Spherical interpolation of the weights of two experts, tensor by tensor, from the first (t = 0) to the second.

    ``sin((1-t)φ)/sin φ · θ_1 + sin(tφ)/sin φ · θ_2``, φ the angle between whole tensors; linear where |cos φ| > 0.9995 (Shoemake 1985).
    """
    if len(experts) != 2:
        raise MergeError(f"slerp: expected two experts, found {len(experts)}")
    state = {k: v.clone() for k, v in base.state_dict().items()}
    for name, pair in task_vectors(base, experts).items():
        first, second = pair + state[name].double()
        lengths = [z.norm() if z.norm() > 1e-8 else 1.0 for z in (first, second)]
        cosine = ((first / lengths[0]) * (second / lengths[1])).sum().clamp(-1, 1)
        angle = cosine.acos()
        a, b = (1 - t, t) if cosine.abs() > 0.9995 else (((1 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin())
        state[name] = (a * first + b * second).to(state[name])
    return Merge(state)


def model_stock(base, experts, calibration=None) -> Merge:
    """Model Stock (arXiv:2403.19522): per tensor ``θ_0 + r · mean τ``, ``r = K cos φ / (1 + (K - 1) cos φ)``, cos φ the mean cosine between task vectors."""
    if len(experts) < 2:
        raise MergeError(f"model_stock: expected at least two experts, found {len(experts)}")
    update = {}
    for name, vectors in task_vectors(base, experts).items():
        k, flat = len(vectors), vectors.flatten(1)
        lengths = flat.norm(dim=1)
        cosines = (flat @ flat.T / (lengths[:, None] * lengths).clamp(min=1e-6)).clamp(-1, 1)
        cosine = cosines[tuple(torch.triu_indices(k, k, 1))].mean()
        divisor = 1 + (k - 1) * cosine
        update[name] = vectors.mean(0) * (k * cosine / divisor if divisor.abs() >= 1e-6 else 0.0)
    return add_update(base, update)


def task_arithmetic(base, experts, calibration=None, *, scale: float | Sequence[float] = 0.3) -> Merge:
    """Task arithmetic (arXiv:2212.04089): ``θ_0 + Σ_k λ_k τ_k``, the sum and not the mean; ``scale`` is λ, one for all or one each."""
    scales = torch.as_tensor(scale, dtype=torch.float64).expand(len(experts)) if isinstance(scale, (int, float)) else torch.tensor(scale, dtype=torch.float64)
    if len(scales) != len(experts):
        raise MergeError(f"task arithmetic: expected one scale, or {len(experts)} of them, found {list(scale)}")
    return add_update(base, {k: torch.tensordot(scales.to(v), v, 1) for k, v in task_vectors(base, experts).items()})


def _rescaled(vector: Tensor, mask: Tensor, kept, rescale: str) -> Tensor:
    """Masked entries over the probability of being kept, or scaled together to the L1 norm of the whole tensor."""
    if rescale == "keep":
        return vector * mask / kept
    left = (vector * mask).abs().sum()
    return vector * mask * (vector.abs().sum() / left if left >= 1e-7 else 1.0)


def dare(base, experts, calibration=None, *, drop: float = 0.5, scale: float = 0.3, rescale: str = "keep", seed: int = 0) -> Merge:
    """DARE (arXiv:2311.03099): every entry of τ_k is dropped with probability ``drop``, the rest divided by ``1 - drop``; then task arithmetic.

    ``rescale="l1"`` restores the L1 norm of every tensor instead, as mergekit does from 0.1 on.
    """
    _fraction("drop", drop, low=True)
    _one_of("rescale", rescale, RESCALE)
    generator = torch.Generator().manual_seed(seed)
    vectors, total = task_vectors(base, experts), {}
    for k in range(len(experts)):
        for name in sorted(vectors):
            mask = torch.rand(vectors[name][k].shape, generator=generator).to(vectors[name].device) >= drop
            total[name] = total.get(name, 0) + _rescaled(vectors[name][k], mask, 1 - drop, rescale)
    return add_update(base, total, scale)


def breadcrumbs(base, experts, calibration=None, *, density: float = 0.9, outliers: float = 0.01, scale: float = 0.3) -> Merge:
    """Model Breadcrumbs (arXiv:2312.06795): per tensor the ⌊outliers·d⌋ largest entries are dropped, then the smallest until ⌊density·d⌋ are left."""
    _fraction("density", density, high=True)
    _fraction("outliers", outliers, low=True)
    update = {}
    for name, vectors in task_vectors(base, experts).items():
        flat = vectors.flatten(1)
        d = flat.shape[1]
        kept = d if density == 1 else int(density * d)
        first = max(0, d - kept - int(outliers * d))
        chosen = flat.abs().argsort(dim=1, stable=True)[:, first : first + kept]
        update[name] = (flat * torch.zeros_like(flat).scatter_(1, chosen, 1.0)).sum(0).reshape(vectors.shape[1:])
    return add_update(base, update, scale)


def _consensus(vectors: Tensor, weights: Tensor | None = None, zero: float = 1.0, election: str = "weighted", divide: str = "count") -> Tensor:
    """Sign election and disjoint mean of trimmed vectors (K, d); ``zero``: sign of entries that cancel; ``divide``: count of agreeing entries,
    their weights, or not at all."""
    weights = torch.ones(len(vectors), 1).to(vectors) if weights is None else weights.to(vectors)[:, None]
    votes = vectors * weights if election == "weighted" else vectors
    sign = votes.sum(0).sign()
    sign = torch.where(sign == 0, zero, sign)
    agree = torch.where(sign > 0, votes > 0, votes < 0)
    total = (vectors * weights * agree).sum(0)
    if divide == "nothing":
        return total
    parts = (agree if divide == "count" else agree * weights).sum(0)
    return total / torch.where(parts == 0, 1.0, parts)


# trimmed over the whole model or per tensor; entries kept beyond ⌊density·d⌋; sign of entries that cancel; election; divisor
TIES = {"authors": ("model", 1, "majority", "plain", "count"), "fusion_bench": ("model", 1, "majority", "plain", "nothing"),
        "mergekit": ("tensor", 0, "plus", "weighted", "weights"), "peft": ("tensor", 0, "plus", "plain", "count")}


def _trim(vector: Tensor, density: float, semantics: str) -> Tensor:
    """The largest entries of a vector (d,), the others zero."""
    cut = len(vector) - max(int(len(vector) * density), 1 if semantics == "mergekit" else 0)
    if cut <= 0:
        return vector
    if TIES[semantics][1]:
        return vector * (vector.abs() >= vector.abs().kthvalue(cut).values)
    return vector.scatter(0, vector.abs().argsort(stable=True)[:cut], 0.0)


def ties(base, experts, calibration=None, *, density: float = 0.2, scale: float = 1.0, weights: Sequence[float] | None = None,
         semantics: str = "authors") -> Merge:
    """TIES (arXiv:2306.01708): trim each τ_k to its largest entries, elect a sign per entry, average the entries that agree; ``θ_0 + λ τ``.

    Args:
        semantics: whose TIES. ``authors``: one trim over the whole flat vector of a model, keeping entries not below the
            (d - ⌊d·density⌋)-th smallest magnitude; entries that cancel take the sign of the majority; mean over agreeing entries.
            ``fusion_bench``: their sum instead. ``mergekit``: ⌊d·density⌋ entries per tensor, at least one; τ_k times its weight before the
            election; divided by the agreeing weights. ``peft``: ⌊d·density⌋ entries, election without weights, divided by the count.
        weights: of the experts, for ``mergekit`` and ``peft``.
    """
    _fraction("density", density, high=True)
    _one_of("semantics", semantics, TIES)
    span, _, zero, *rule = TIES[semantics]
    if weights is not None and (span == "model" or len(weights) != len(experts)):
        raise MergeError(f"ties weights: expected {len(experts)} numbers with semantics mergekit or peft, found {list(weights)} with {semantics}")
    vectors = {k: v.flatten(1) for k, v in sorted(task_vectors(base, experts).items())}
    for k in range(len(experts)):  # one by one and in place: a whole model's vectors are large
        for names in [list(vectors)] if span == "model" else [[name] for name in vectors]:
            trimmed = _trim(torch.cat([vectors[name][k] for name in names]), density, semantics)
            for name, piece in zip(names, trimmed.split([vectors[name].shape[1] for name in names])):
                vectors[name][k] = piece
    sign = sum(v.sum(0).sign().sum() for v in vectors.values()).sign() if zero == "majority" else 1.0
    weights, state = None if weights is None else torch.tensor(weights, dtype=torch.float64), base.state_dict()
    return add_update(base, {name: _consensus(v, weights, sign, *rule).view_as(state[name]) for name, v in vectors.items()}, scale)


def della(base, experts, calibration=None, *, density: float = 0.5, spread: float = 0.15, scale: float = 1.0, rescale: str = "keep",
          seed: int = 0) -> Merge:
    """DELLA (arXiv:2406.11617): entries are kept at random, within each row more likely the larger they are; then sign election and mean.

    The probability of being kept rises with the rank of an entry from ``density - spread`` to ``density + spread``; kept entries are
    divided by it, or with ``rescale="l1"`` scaled together to the L1 norm of the tensor, as mergekit does. Entries that agree are averaged.
    """
    _one_of("rescale", rescale, RESCALE)
    if not 0 < density - spread <= density + spread < 1:
        raise MergeError(f"della: expected density ± spread within (0, 1), found {density} ± {spread}")
    generator = torch.Generator().manual_seed(seed)
    update = {}
    for name, vectors in sorted(task_vectors(base, experts).items()):
        rows = vectors.flatten(1, -2) if vectors.dim() > 2 else vectors[:, None]
        ranks = rows.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
        kept = density - spread + 2 * spread * ranks / max(rows.shape[-1] - 1, 1)
        mask = torch.rand(kept.shape, generator=generator).to(kept) < kept
        trimmed = torch.stack([_rescaled(r, m, p, rescale) for r, m, p in zip(rows, mask, kept)])
        update[name] = _consensus(trimmed.flatten(1)).reshape(vectors.shape[1:])
    return add_update(base, update, scale)


def _by_matrix(base, experts, scale: float, merge: Callable[[Tensor], Tensor]) -> Merge:
    """``merge`` the task vectors (K, m, n) of every matrix and average those of all other parameters; then scale."""
    vectors = task_vectors(base, experts)
    return add_update(base, {k: merge(v) if v.dim() == 3 else v.mean(0) for k, v in vectors.items()}, scale)


def tsv_merge(base, experts, calibration=None, *, scale: float = 1.0) -> Merge:
    """TSV-M (arXiv:2412.00081): the first ⌊r/K⌋ singular triplets of every task matrix side by side, their vectors made orthonormal (polar factors)."""

    def merge(vectors):
        U, S, Vh = torch.linalg.svd(vectors, full_matrices=False)
        keep = S.shape[1] // len(S)
        U, S, Vh = torch.cat([*U[..., :keep]], 1), S[:, :keep].flatten(), torch.cat([*Vh[:, :keep]], 0)
        (P, _, Qh), (X, _, Yh) = (torch.linalg.svd(z, full_matrices=False) for z in (U, Vh))
        return (P @ Qh * S) @ (X @ Yh)

    return _by_matrix(base, experts, scale, merge)


def iso_c(base, experts, calibration=None, *, scale: float = 1.0) -> Merge:
    """Iso-C (arXiv:2502.04959): the sum of every task matrix with all singular values replaced by their mean."""

    def merge(vectors):
        U, S, Vh = torch.linalg.svd(vectors.sum(0), full_matrices=False)
        return S.mean() * U @ Vh

    return _by_matrix(base, experts, scale, merge)


def wudi(base, experts, calibration=None, *, rate: float = 1e-5, steps: int = 300, scale: float = 1.0) -> Merge:
    """WUDI (arXiv:2503.08099): Adam from ``Σ_k τ_k`` on ``Σ_k ‖(τ - τ_k) τ_kᵀ‖² / ‖τ_k‖²``, matrix by matrix.

    This is the merge programme over single entries with ``τ_kᵀ τ_k / ‖τ_k‖²`` in place of input moments, stopped early.
    """
    state, update, shapes = base.state_dict(), {}, {}
    for k, v in task_vectors(base, experts).items():
        if v.dim() == 3 and v.any():  # Adam works entry by entry, so matrices of one shape go together, in the precision of the model
            shapes.setdefault(v.shape, []).append((k, v.to(state[k])))
        else:
            update[k] = v.mean(0)
    for alike in shapes.values():
        vectors = torch.stack([v for _, v in alike])  # (matrices, K, m, n)
        moments = vectors.mT @ vectors / vectors.square().sum((2, 3), keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
        C, A, tau = moments.sum(1), (vectors @ moments).sum(1), torch.nn.Parameter(vectors.sum(1))
        adam = torch.optim.Adam([tau], lr=rate)
        for _ in range(steps):
            tau.grad = 2 * (tau.detach() @ C - A)
            adam.step()
        update |= {k: z for (k, _), z in zip(alike, tau.detach())}
    return add_update(base, update, scale)
