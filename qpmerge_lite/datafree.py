r"""Methods that look at weights only: ``method(base, experts, calibration=None, **options)``.

All return a :class:`~qpmerge_lite.merge.Merge`. ``θ_0`` is the base, ``τ_k = θ_k - θ_0`` are the
task vectors. Parameters are merged in float64, by WUDI in float32 at least, and returned in the
base's dtypes; floating buffers are averaged. Where implementations of one name differ, the
difference is an option named after what it does or after whose it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

from .aliases import as_loaded
from .errors import MergeError
from .merge import (
    Computed,
    Merge,
    add_update,
    average,
    check_experts,
    differences,
    differences_one_by_one,
    is_number,
    parameters_of,
    stored,
    task_vectors,
    wide,
)
from .options import MAX_SINGLE, function, number, numbers, refuse_complex, score_of, whole
from .sparse import RESCALE as RESCALE
from .sparse import TIES as TIES
from .sparse import breadcrumbs, dare, della, ties
from .spectral.triplets import dc_merge, iso_c, tsv_merge

__all__ = [
    "breadcrumbs",
    "dare",
    "dc_merge",
    "della",
    "greedy_soup",
    "iso_c",
    "model_stock",
    "slerp",
    "soup",
    "task_arithmetic",
    "task_vectors",
    "ties",
    "tsv_merge",
    "wudi",
]


def soup(base, experts, calibration=None, *, weights: Sequence[float] | None = None) -> Merge:
    """Model soup ``Σ_k w_k θ_k`` (arXiv:2203.05482); the base's own weights do not matter.

    Args:
        weights: one per expert, uniform by default; floating buffers are averaged evenly.
    Raises: MergeError unless the weights sum to one, and for experts that do not fit the base.
    """
    experts = check_experts(base, experts, check_base=False)
    if weights is not None:
        weights = numbers("soup weights", weights, len(experts))
        if abs(sum(weights) - 1) > 1e-9:
            raise MergeError(
                f"soup weights: expected {len(experts)} numbers with sum 1, found {weights}; "
                "task_arithmetic scales freely"
            )
    state = average(base, experts, weights)
    reason = "a soup averages every entry"
    return Merge(state, averaged={k: reason for k, v in state.items() if is_number(v)})


def greedy_soup(base, experts, calibration=None, *, score: Callable[[dict], float]) -> Merge:
    """Greedy soup (arXiv:2203.05482): experts join from best to worst if the score rises.

    Args:
        score: of a state dict, the higher the better; it must look at validation data only. An
            expert is kept if the soup's score rises strictly.
    Raises: NonFinite for a score that is NaN and MergeError for one that is no number, naming the
        expert.
    """
    function("score", score)
    experts = check_experts(base, experts, check_base=False)
    scores = {task: score_of(f"expert {task!r}", score(state)) for task, state in experts.items()}
    order = sorted(experts, key=scores.__getitem__, reverse=True)
    chosen, best = {order[0]: experts[order[0]]}, scores[order[0]]
    for task in order[1:]:
        larger = chosen | {task: experts[task]}
        larger_score = score(soup(base, larger).state_dict)
        reached = score_of(f"the soup with expert {task!r}", larger_score)
        if reached > best:
            chosen, best = larger, reached
    return soup(base, chosen)


def slerp(base, experts, calibration=None, *, t: float = 0.5) -> Merge:
    """Spherical interpolation of two experts, from the first (t = 0) to the second.

    Per parameter ``sin((1-t)φ)/sin φ · θ_1 + sin(tφ)/sin φ · θ_2``, φ the angle between whole
    tensors; linear where ``|cos φ| > 0.9995`` (Shoemake 1985). The base's own weights do not
    matter.

    Raises: MergeError unless there are two experts that fit the base.
    """
    t = number("t", t)
    experts = check_experts(base, experts, check_base=False)
    if len(experts) != 2:
        raise MergeError(f"slerp: expected two experts, found {len(experts)}")
    # buffers and counters of the average; of experts that agree in a parameter, the parameter
    state, origin = average(base, experts), base.state_dict()
    parameters = parameters_of(base)
    for name in parameters:
        first, second = (wide(expert[name]) for expert in experts.values())
        if not torch.equal(first, second):
            state[name] = stored(f"parameter {name!r}", on_arc(first, second, t), origin[name])
    reason = "slerp interpolates parameters only; the mean of the experts' buffers"
    buffers = [k for k, v in state.items() if is_number(v) and k not in parameters]
    return Merge(as_loaded(base, state), averaged=dict.fromkeys(buffers, reason))


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor (…) as one of its real and imaginary parts (…, 2); a real one as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def on_arc(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The point at t on the arc from one tensor to another."""
    directions = []
    for tensor in (first, second):
        length = _real(tensor).norm()
        directions.append(_real(tensor) / (length if length > 1e-8 else 1.0))
    cosine = (directions[0] * directions[1]).sum().clamp(-1, 1)
    if cosine.abs() > 0.9995:
        return (1 - t) * first + t * second
    angle = cosine.acos()
    a, b = ((1 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()
    return a * first + b * second


def model_stock(base, experts, calibration=None) -> Merge:
    """Model Stock (arXiv:2403.19522): per parameter ``θ_0 + r · mean τ``.

    ``r = K cos φ / (1 + (K - 1) cos φ)``, cos φ the mean cosine between task vectors.

    Raises: MergeError for fewer than two experts, and for experts that do not fit the base.
    """
    experts = check_experts(base, experts)
    if len(experts) < 2:
        raise MergeError(f"model_stock: expected at least two experts, found {len(experts)}")
    update = {}
    for name, vectors in differences_one_by_one(base, experts).items():
        k, parts = len(vectors), _real(vectors)
        flat = parts.reshape(k, parts[0].numel())
        lengths = flat.norm(dim=1)
        cosines = flat @ flat.T / (lengths[:, None] * lengths).clamp(min=1e-6)
        cosine = cosines.clamp(-1, 1)[tuple(torch.triu_indices(k, k, 1))].mean()
        divisor = 1 + (k - 1) * cosine
        update[name] = vectors.mean(0) * (k * cosine / divisor if divisor.abs() >= 1e-6 else 0.0)
    return add_update(base, experts, update)


def task_arithmetic(
    base, experts, calibration=None, *, scale: float | Sequence[float] = 0.3
) -> Merge:
    """Task arithmetic (arXiv:2212.04089): ``θ_0 + Σ_k λ_k τ_k``, the sum and not the mean.

    Args:
        scale: λ, one number for all experts or a list of one each; negative ones subtract.
    Raises: MergeError for scales that are no such numbers, and for experts that do not fit.
    """
    experts = check_experts(base, experts)
    given = [scale] * len(experts) if isinstance(scale, Real) else scale
    scales = torch.tensor(numbers("scale", given, len(experts)), dtype=torch.float64)
    vectors = differences_one_by_one(base, experts)

    def update(name: str) -> Tensor:
        of_name = vectors[name]
        return torch.tensordot(scales.to(of_name), of_name, 1)

    return add_update(base, experts, Computed(vectors, update))


def wudi(
    base,
    experts,
    calibration=None,
    *,
    rate: float = 1e-5,
    steps: int = 300,
    scale: float = 1.0,
) -> Merge:
    """WUDI (arXiv:2503.08099): Adam from ``Σ_k τ_k`` on ``Σ_k ‖(τ - τ_k) τ_kᵀ‖² / ‖τ_k‖²``.

    Matrix by matrix, in float32, or in float64 where the base is stored so: half precision could
    not hold Adam's steps. This is the merge programme over single entries with
    ``τ_kᵀ τ_k / ‖τ_k‖²`` in place of input moments, stopped early. Updates of parameters that are
    no matrices are averaged.

    Args:
        rate, steps: of Adam.
        scale: of the whole update.
    Raises: MergeError for options out of range, complex parameters, and experts that do not fit
        the base.
    """
    scale, rate = number("scale", scale), number("rate", rate, 0, MAX_SINGLE)
    steps = whole("steps", steps)
    experts, state = check_experts(base, experts), base.state_dict()
    vectors = differences(base, experts)
    refuse_complex("wudi", vectors)
    update: dict[str, Tensor] = {}
    groups: dict[tuple, dict[str, Tensor]] = {}
    for name, stacked in vectors.items():
        if stacked.dim() == 3 and stacked.any():
            # Adam works entry by entry, so matrices of one shape can go together
            double = state[name].dtype == torch.float64
            dtype = torch.float64 if double else torch.float32
            groups.setdefault((stacked.shape, dtype), {})[name] = stacked.to(dtype)
        else:
            update[name] = stacked.mean(0)
    for alike in groups.values():
        descended = _wudi_descent(torch.stack(list(alike.values())), rate, steps)
        update |= dict(zip(alike, descended))
    return add_update(base, experts, update, scale)


def _wudi_descent(vectors: Tensor, rate: float, steps: int) -> Tensor:
    """Updates (matrices, m, n) from task vectors (matrices, K, m, n)."""
    lengths = vectors.square().sum((2, 3), keepdim=True)
    moments = vectors.mT @ vectors / lengths.clamp(min=torch.finfo(vectors.dtype).tiny)
    C, A = moments.sum(1), (vectors @ moments).sum(1)
    tau = torch.nn.Parameter(vectors.sum(1))
    adam = torch.optim.Adam([tau], lr=rate)
    for _ in range(steps):
        tau.grad = 2 * (tau.detach() @ C - A)
        adam.step()
    return tau.detach()
