r"""Captured energy in sample, disjoint and cross-fitted; spectral capture; certificates of any merge.

*Captured energy* is what a programme achieves, ``ρ = 1 - L/E``; *spectral capture* ``κ`` is the ceiling its output directions set.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .bases import build
from .errors import EmptyCalibration, MergeError
from .moments import Moments, Pooled
from .programme import Programme, programme
from .solve import Factored, minimise

RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def captured_energy(prog: Programme) -> float:
    """``ρ(B) = fᵀH⁺f / 2E`` in [0, 1]: the fraction of residual energy the basis captures in sample; 1 if E = 0."""
    return 1 - minimise(prog).objective / prog.energy if prog.energy else 1.0


def spectral_capture(pooled: Pooled, U: Tensor) -> float:
    """``κ(U) = tr(UᵀMU) / tr M`` in [0, 1] for orthonormal U (m, r) or (g, m, r); no merge with outputs in span U captures more."""
    U = U.to(pooled.M)
    total = pooled.M.diagonal(dim1=-2, dim2=-1).sum()
    return float(((pooled.M @ U) * U).sum() / total) if total > 0 else 1.0


def gap(pooled: Pooled, update: Tensor, family: str = "elements", updates: Tensor | None = None) -> float:
    r"""Certificate of any merge: ``L(W) - L(W*) ≥ 0``, its exact distance in calibration loss from the optimum of a basis.

    Args:
        update: ``W - W0`` (g, m, n), made by any method.
        family, updates: the basis whose optimum is W*; the unrestricted least squares by default. For a basis containing
            the merge this equals ``½ (d - d*)ᵀ H (d - d*)``.
    """
    prog = programme(pooled, build(family, update.unsqueeze(0) if updates is None else updates, pooled))
    return pooled.loss(update) - minimise(prog).objective


def disjoint(moments: Moments, updates: Tensor, family: str, ridges=(0.0,), *, prior: float | Tensor = 0.0, groups: Tensor | None = None,
             weights: str = "tokens", penalty: str = "mean") -> Tensor:
    r"""Disjoint captured energy ``ρ̃`` (F, len(ridges)): solved, rotation included, on all folds but one, scored on that one.

    Negative values are overfitting. In closed form from the moments; no second pass over data. ``prior`` is the scale, or one
    scale (K,) for each update, of the task arithmetic that the ridge pulls towards.
    Raises: EmptyCalibration when a fold lacks a task or there is only one fold.
    """
    if moments.folds < 2:
        raise EmptyCalibration(f"layer {moments.layer}: {moments.folds} fold leaves none to hold out; collect the moments in at least 2 folds")
    scores = torch.empty(moments.folds, len(ridges), dtype=torch.float64)
    for out in range(moments.folds):
        fitted = moments.pool([f for f in range(moments.folds) if f != out], weights)
        held = moments.pool([out], weights)
        basis = build(family, updates, fitted, groups=groups)
        solutions = Factored(programme(fitted, basis), penalty).path(ridges, basis.arithmetic(prior))
        scores[out] = torch.tensor([held.captured(basis.combine(d)) for d in solutions])
    return scores


def cross_fitted(moments: Moments, updates: Tensor, family: str, ridges=RIDGES, **options) -> tuple[float, float]:
    """The ridge with the highest disjoint captured energy averaged over folds, and that average; ties go to the smaller ridge.

    The ridge is chosen on the folds that score it, so the average flatters the choice a little. ``options`` are those of :func:`disjoint`.
    """
    if not ridges:
        raise MergeError("ridges: expected at least one number ≥ 0, found none")
    mean = disjoint(moments, updates, family, ridges, **options).mean(0)
    best = int(mean.argmax())
    return ridges[best], float(mean[best])
