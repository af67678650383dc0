r"""Layers drawn on purpose: how far the updates share directions, and how far those lie along the
coordinate axes.

Every task reads ``rank`` input patterns v_i and writes them to output directions u_i, both
orthonormal:

    Δ_t = Σ_{i ∈ S_t} σ_ti u_i v_iᵀ + noise      x_t = Σ_i s_ti z_i v_i,  z_i ~ N(0, 1)

Shared patterns belong to every task. A private one belongs to one task (s = 1) and leaks into the
inputs of the others with a strength of its own (s ~ U(0, 1)), so the best coefficient differs from
direction to direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...bases import RowBasis, build
from ...diagnostic import captured_energy, cross_fitted, spectral_capture
from ...errors import MergeError
from ...moments import Moments, Pooled
from ...programme import programme

NOISE = 0.05  # Frobenius norm of the dense part of an update, relative to one of unit strengths


def rotation(size: int, alignment: float, generator: torch.Generator) -> Tensor:
    r"""Orthogonal (size, size) at a fraction ``1 - alignment`` of a geodesic from the identity:
    ``exp((1 - a) π G/‖G‖₂)``, G skew Gaussian."""
    G = torch.randn(size, size, generator=generator, dtype=torch.float64)
    G = G - G.mT
    return torch.matrix_exp((1 - alignment) * torch.pi * G / torch.linalg.matrix_norm(G, 2))


def draw(
    tasks: int,
    *,
    alignment: float,
    overlap: float,
    seed: int,
    size: int = 40,
    rank: int = 6,
    tokens: int = 128,
    folds: int = 4,
) -> tuple[Moments, Tensor]:
    """Moments and residual updates of one drawn layer.

    Args:
        tasks: K experts, one task each.
        alignment: 1 puts the output directions on the coordinate axes, 0 anywhere.
        overlap: share of each task's ``rank`` directions that all tasks have in common, rounded to
            whole directions.
        size: number of outputs and of inputs, m = n.
        tokens: calibration samples per task, dealt to the folds in turn.
    Returns: moments over ``folds`` folds; updates (K, m, n) float64. Targets are the experts'
        outputs on these inputs.
    Raises: MergeError when ``size`` has no room for the directions asked for.
    """
    shared = round(overlap * rank)
    used = shared + tasks * (rank - shared)
    if used > size:
        raise MergeError(
            f"synthetic layer: {tasks} tasks of rank {rank} with {shared} shared directions "
            f"need size ≥ {used}, found {size}"
        )
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # the task that owns a direction; negative: everybody's
    owner = torch.arange(used).sub(shared).div(rank - shared or 1, rounding_mode="floor")
    mine = (owner < 0) | (owner == torch.arange(tasks)[:, None])  # (K, used)
    strength = uniform(0.5, 1.5, tasks, used) * mine
    spread = torch.where(mine, 1.0, uniform(0, 1, used))
    spread = torch.cat([spread, torch.full((tasks, size - used), 0.3, dtype=torch.float64)], 1)
    U = rotation(size, alignment, generator)[:, torch.randperm(size, generator=generator)[:used]]
    V = torch.linalg.qr(normal(size, size)).Q
    patterns = (U * strength[:, None]) @ V[:, :used].mT
    updates = patterns + NOISE * rank**0.5 / size * normal(tasks, size, size)
    names = [f"task {k}" for k in range(tasks)]
    moments = Moments.zeros(names, size, size, folds=folds, layer="synthetic")
    for k, task in enumerate(moments.tasks):
        X = (normal(tokens, size) * spread[k]) @ V.mT
        moments.update(task, X, X @ updates[k].mT, torch.arange(tokens) % folds)
    return moments, updates


def top_rows(updates: Tensor, pooled: Pooled, keep: int) -> RowBasis:
    """The ``rows`` family on the ``keep`` outputs with most residual energy: what ``rotated_rows``
    with ``keep`` competes with. Updates are (K, m, n)."""
    energies = pooled.M[0].diagonal()
    largest = energies.argsort(descending=True)[:keep]
    axes = torch.eye(len(energies)).to(energies)[:, largest]
    return RowBasis("top_rows", updates.unsqueeze(1), torch.arange(keep), axes.unsqueeze(0))


def off_diagonal(pooled: Pooled) -> float:
    """Share of the residual energy matrix off its diagonal, ``1 - Σ_j M_jj² / ‖M‖_F²`` in [0, 1): 0
    when the axes are eigenvectors."""
    diagonal = pooled.M.diagonal(dim1=-2, dim2=-1)
    return 1 - float((diagonal**2).sum() / (pooled.M**2).sum())


def rotation_gain(updates: Tensor, pooled: Pooled, keep: int) -> tuple[float, float]:
    """What eigenvectors gain over coordinate axes at the same ``keep``: in captured energy, and in
    spectral capture (its ceiling). Updates are (K, m, n)."""
    rotated = build("rotated_rows", updates, pooled, keep=keep)
    axes = top_rows(updates, pooled, keep)
    captured = captured_energy(programme(pooled, rotated)) - captured_energy(
        programme(pooled, axes)
    )
    ceiling = spectral_capture(pooled, rotated.U) - spectral_capture(pooled, axes.U)
    return captured, ceiling


def compare(
    tasks: int, alignment: float, overlap: float, seed: int, keep: int, few: int
) -> dict[str, float]:
    """What rotating the rows gains on one drawn layer, in captured energy.

    Args:
        keep: directions kept in the truncated comparison.
        few: calibration samples per task in the disjoint one.
    Returns: ``full`` ρ(rotated) - ρ(rows) with all directions, ``truncated`` with ``keep`` of them,
        ``disjoint`` the cross-fitted difference from ``few`` samples a task, each family at its
        best ridge; and three predictors: ``off_diagonal``; ``promise``, the same times what rows
        leave, 1 - ρ(rows); ``reach``, the same times what rows leave of what a linear layer can
        capture at all, ρ(elements) - ρ(rows); ``capture``, the gain in spectral capture at
        ``keep``.
    """
    settings = {"alignment": alignment, "overlap": overlap, "seed": seed}
    moments, updates = draw(tasks, **settings)
    pooled = moments.pool()
    full, _ = rotation_gain(updates, pooled, updates.shape[1])
    truncated, capture = rotation_gain(updates, pooled, keep)
    scarce, updates = draw(tasks, tokens=few, **settings)
    _, rotated = cross_fitted(scarce, updates, "rotated_rows")
    _, rows = cross_fitted(scarce, updates, "rows")
    gains = {
        "full": full,
        "truncated": truncated,
        "disjoint": rotated - rows,
        "capture": capture,
    }
    return gains | promises(updates, pooled)


def promises(updates: Tensor, pooled: Pooled) -> dict[str, float]:
    """Forecasts of what turning the rows gains, from calibration moments and updates (K, m, n).

    Returns: ``off_diagonal``, the share of the residual energy matrix off its diagonal;
        ``promise``, that times what rows leave, 1 - ρ(rows); ``reach``, it times what rows leave of
        what a linear layer can capture at all, ρ(elements) - ρ(rows).
    """
    share = off_diagonal(pooled)
    rows = captured_energy(programme(pooled, build("rows", updates, pooled)))
    most = captured_energy(programme(pooled, build("elements", updates, pooled)))
    return {"off_diagonal": share, "promise": share * (1 - rows), "reach": share * (most - rows)}
