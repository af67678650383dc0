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


def optimism(moments: Moments, updates: Tensor, family: str, ridge: float = 0.0, *, by: str = "refit", prior: float | Tensor = 0.0,
             groups: Tensor | None = None, weights: str = "tokens", penalty: str = "mean") -> float:
    r"""Expected ``ρ_in - ρ_out`` of the minimiser, as a share of E, from its own calibration moments; subtract it from ``1 - L/E`` in sample.

    Args:
        by: ``refit``, the mean over folds of ``(L_f - L)(d̂_{-f}) - (L_f - L)(d̂)``, Burman's form of leaving out one fold, rotation
            included; ``gradients``, its first order ``tr((H + λΓ)⁻¹J)`` with ``J = F/(F-1) Σ_tf e_tf e_tfᵀ``, e_tf the gradient at d̂ of task t in fold f less the fold's share of
            the task's; or ``tokens``, ``2L df/(N - df)``, as if every token were drawn by itself and all outputs were equally noisy.
        The others as in :func:`disjoint`. Folds have to be of independent sequences.
    Raises: MergeError for an unknown ``by`` or a single fold; EmptyCalibration when a fold lacks a task. Cost of ``refit``: F + 1 factorisations, else one.
    """
    if by not in OPTIMISM or moments.folds < 2:
        raise MergeError(f"optimism: expected one of {sorted(OPTIMISM)} and at least 2 folds, found {by!r} and {moments.folds}")
    full = moments.pool(weights=weights)

    def solve(pooled):
        basis = build(family, updates, pooled, groups=groups)
        factored = Factored(programme(pooled, basis), penalty)
        return factored, basis.combine(factored.path((ridge,), basis.arithmetic(prior))[0])

    return OPTIMISM[by](moments, full, weights, ridge, solve) / full.energy if full.energy else 0.0


def _by_refit(moments, full, weights, ridge, solve) -> float:
    best, total = solve(full)[1], 0.0
    for out in range(moments.folds):
        update = solve(moments.pool([f for f in range(moments.folds) if f != out], weights))[1]
        held = moments.pool([out], weights)
        total += held.loss(update) - held.loss(best) - full.loss(update) + full.loss(best)
    return total / moments.folds


def _by_gradients(moments, full, weights, ridge, solve) -> float:
    factored, update = solve(full)
    count, energy = moments.count, (moments.M.diagonal(dim1=-2, dim2=-1) if moments.full_energy else moments.M).flatten(2).sum((1, 2))
    omega = 1 / count.sum(1) if weights == "tokens" else torch.where(energy > 0, 1 / energy, 0.0)
    slopes = omega[:, None, None, None, None] * (update @ moments.C - moments.A)  # (T, F, g, m, n)
    share = (count / count.sum(1, keepdim=True))[:, :, None, None, None]
    slopes = (slopes - share * slopes.sum(1, keepdim=True)).flatten(0, 1)
    pulls = torch.stack([factored.programme.basis.linear(e) for e in slopes]) / factored.gamma.sqrt().unsqueeze(1) @ factored.vectors
    inverse = torch.where(factored.kept, 1 / torch.where(factored.kept, factored.values + ridge, 1.0), 0.0)
    return float((pulls.square() * inverse.unsqueeze(1)).sum()) * moments.folds / (moments.folds - 1)


def _by_tokens(moments, full, weights, ridge, solve) -> float:
    factored, update = solve(full)
    shrunk = torch.where(factored.kept, factored.values / torch.where(factored.kept, factored.values + ridge, 1.0), 0.0)
    freedom = float(shrunk.sum()) * factored.programme.f.shape[1]
    copies, outputs = moments.A.shape[2:4]
    samples = float(moments.count.sum()) * (outputs if moments.shared else copies * outputs)
    return 2 * full.loss(update) * freedom / max(samples - freedom, 1.0)


OPTIMISM = {"refit": _by_refit, "gradients": _by_gradients, "tokens": _by_tokens}
