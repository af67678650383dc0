r"""Methods that merge the singular vectors of task matrices, parameter by parameter, from weights
alone.

Task vectors of one matrix are stacked as (K, m, n), r is ``min(m, n)``. What is no matrix is
averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..experts import State, check_experts
from ..merge import Computed, Merge, add_update, differences_one_by_one
from ..options import fraction, number, refuse_complex


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Polar factor (m, n) of a matrix (m, n), and the mean () of its ``min(m, n)`` singular values.

    That is the matrix with ones for its singular values. Those that are zero to rounding stay zero:
    no direction is made up where the matrix has none.
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    if not S.numel():
        return torch.zeros_like(matrix), S.new_zeros(())
    there = S > max(matrix.shape) * torch.finfo(S.dtype).eps * S[0]
    return U[:, there] @ Vh[there], S.mean()


def leading_triplets(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``k = ⌊r/K⌋`` singular triplets of every task matrix (K, m, n): left vectors (K, m,
    k), singular values (K, k), right vectors (K, k, n)."""
    U, S, Vh = torch.linalg.svd(vectors, full_matrices=False)
    count = S.shape[1] // len(S)
    return U[..., :count], S[:, :count], Vh[:, :count]


def merge_triplets(vectors: Tensor) -> Tensor:
    """TSV-M of one matrix: the update (m, n) of task matrices (K, m, n)."""
    U, S, Vh = leading_triplets(vectors)
    left, _ = polar(torch.cat([*U], 1))
    right, _ = polar(torch.cat([*Vh], 0))
    return (left * S.flatten()) @ right


def finished(
    method: str,
    base: nn.Module,
    experts: Mapping[str, State],
    update: Mapping[str, Tensor],
    scale: float,
) -> Merge:
    """The base plus ``scale`` times an update in which all but matrices was averaged, and says so
    where ``scale`` is one.

    Args:
        experts: as :func:`check_experts` returns them.
        update: parameter name -> tensor (…).
    """
    merged = add_update(base, experts, update, scale)
    if scale == 1:
        origin = base.state_dict()
        others = [name for name in update if origin[name].dim() != 2]
        merged.averaged |= dict.fromkeys(others, f"{method} merges matrices, and this is none")
    return merged


def _by_matrix(
    method: str, base, experts, scale: float, merge: Callable[[Tensor], Tensor]
) -> Merge:
    """``merge`` the task vectors (K, m, n) of every matrix, average all others; then scale."""
    scale = number("scale", scale)
    experts = check_experts(base, experts)
    vectors = differences_one_by_one(base, experts)

    def update(name: str) -> Tensor:
        stacked = vectors[name]
        return merge(stacked) if stacked.dim() == 3 else stacked.mean(0)

    return finished(method, base, experts, Computed(vectors, update), scale)


def tsv_merge(base, experts, calibration=None, *, scale: float = 1.0) -> Merge:
    """TSV-M (arXiv:2412.00081): the leading singular triplets of every task, made orthonormal.

    The first ⌊r/K⌋ triplets of every task matrix side by side, their singular vectors replaced by
    the polar factors. Updates of parameters that are no matrices are averaged.
    """
    return _by_matrix("TSV-M", base, experts, scale, merge_triplets)


def iso_c(base, experts, calibration=None, *, scale: float = 1.0) -> Merge:
    """Iso-C (arXiv:2502.04959): the sum of every task matrix, its singular values made equal.

    All of them are replaced by their mean. Updates of parameters that are no matrices are averaged.
    """

    def merge(vectors):
        U, S, Vh = torch.linalg.svd(vectors.sum(0), full_matrices=False)
        return S.mean() * U @ Vh

    return _by_matrix("Iso-C", base, experts, scale, merge)


def dc_merge(
    base, experts, calibration=None, *, density: float = 1e-3, scale: float = 1.0
) -> Merge:
    """DC-Merge (arXiv:2603.06242) of fully fine-tuned experts: task matrices cut to their leading
    singular triplets are merged in one basis for all.

    The basis is TSV-M's, polar factors P and Q of the first ⌊r/K⌋ singular vectors of all tasks.
    In it, ``Pᵀ Δ_k Qᵀ``, every task keeps its largest entries; those that agree with the sign of
    their sum are averaged; and what couples the triplets of different tasks is dropped. Updates of
    parameters that are no matrices are averaged.

    Args:
        density: share of r² entries that a task keeps, at least one. The authors' thousandth is for
            matrices of some hundred rows.
    """
    fraction("density", density, high=True)
    experts = check_experts(base, experts)
    refuse_complex("dc_merge", differences_one_by_one(base, experts))

    def merge(vectors):
        return _merge_in_one_basis(vectors, density)

    return _by_matrix("DC-Merge", base, experts, scale, merge)


def _merge_in_one_basis(vectors: Tensor, density: float) -> Tensor:
    """DC-Merge of one matrix: the update (m, n) of task matrices (K, m, n)."""
    tasks, smaller = len(vectors), min(vectors.shape[1:])
    U, S, Vh = leading_triplets(vectors)
    count = S.shape[1]
    if count == 0:  # fewer directions than tasks
        return torch.zeros_like(vectors[0])
    P, _ = polar(torch.cat([*U], 1))
    Q, _ = polar(torch.cat([*Vh], 0))
    in_basis = (P.mT @ U * S.unsqueeze(1)) @ (Vh @ Q.mT)  # (K, K·count, K·count)
    largest = _largest(in_basis, max(1, int(density * smaller**2)))
    total = largest.sum(0)
    agrees = (largest.sign() == total.sign()) & (total != 0)
    mean = (largest * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    of_task = torch.arange(tasks, device=mean.device).repeat_interleave(count)
    return P @ (mean * (of_task[:, None] == of_task)) @ Q


def _largest(matrices: Tensor, count: int) -> Tensor:
    """Matrices (K, m, n) with zeros for all but the ``count`` entries of each that are largest in
    absolute value, and those that equal the last of them."""
    sizes = matrices.abs()
    flat = sizes.flatten(1)
    least = flat.topk(min(count, flat.shape[1]), dim=1).values[:, -1]
    return torch.where(sizes >= least[:, None, None], matrices, 0.0)
