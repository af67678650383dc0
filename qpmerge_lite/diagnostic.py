r"""Captured energy in sample, disjoint and cross-fitted; spectral capture; certificates of merges.

*Captured energy* is what a programme achieves, ``ρ = 1 - L/E``; *spectral capture* ``κ`` is the
ceiling its output directions set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bases import build
from .errors import MergeError
from .held_out import Contest, unchecked
from .moments import Moments, Pooled, diagonal, task_weights
from .programme import Programme, programme
from .solve import Factored, minimise

RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def captured_energy(prog: Programme) -> float:
    """``ρ(B) = fᵀH⁺f / 2E`` in [0, 1]: the share of energy captured in sample; 1 if E = 0."""
    energy = float(prog.energy)
    return 1 - minimise(prog).objective / energy if energy else 1.0


def spectral_capture(pooled: Pooled, U: Tensor) -> float:
    """``κ(U) = tr(UᵀMU) / tr M`` in [0, 1]; no merge with outputs in span U captures more.

    Args:
        U: orthonormal columns, (m, r) or (g, m, r).
    Raises: MergeError for moments that kept the diagonal of M only.
    """
    M = pooled.M
    if M is None:
        raise MergeError(
            "spectral capture needs the whole residual energy matrix M; collect the moments with "
            "full_energy=True"
        )
    U, total = U.to(M), diagonal(M).sum()
    return float(((M @ U) * U).sum() / total) if total > 0 else 1.0


def gap(
    pooled: Pooled, update: Tensor, family: str = "elements", updates: Tensor | None = None
) -> float:
    r"""Certificate of any merge: ``L(W) - L(W*) ≥ 0``, its exact distance from a basis' optimum.

    For a basis containing the merge this equals ``½ (d - d*)ᵀ H (d - d*)``.

    Args:
        update: ``W - W0`` (g, m, n), made by any method.
        family, updates: the basis whose optimum is W*; the unrestricted least squares by default.
    """
    updates = update.unsqueeze(0) if updates is None else updates
    prog = programme(pooled, build(family, updates, pooled))
    return pooled.loss(update) - minimise(prog).objective


def certificate(pooled: Pooled, update: Tensor) -> dict[str, float]:
    """Captured energy ``1 - L(W)/E`` and :func:`gap` of any merge, as fractions of the residual
    energy E; empty where there is none.

    Args:
        update: ``W - W0`` (g, m, n), made by any method.
    """
    energy = float(pooled.energy)
    if not energy:
        return {}
    return {"captured": pooled.captured(update), "gap": gap(pooled, update) / energy}


def disjoint(
    moments: Moments,
    updates: Tensor,
    family: str,
    ridges: Sequence[float] = (0.0,),
    *,
    priors: Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    r"""Disjoint captured energy ``ρ̃``: solved on all folds but one, scored on that one.

    The rotation of a basis is solved for as well. Negative values are overfitting. In closed form
    from the moments, with no second pass over data; R ridges and P priors cost hardly more than
    one, except for ``rotated_columns``, whose blocks couple elsewhere.

    Args:
        updates: (K, g, m, n), or (K, m, n) for a dense layer.
        ridges: R relative ridges ``λ ≥ 0``.
        priors: P factors of ``prior`` to score.
        options: ``prior`` (0 by default), the scale, or one scale (K,) for each update, of the
            task arithmetic that the ridge pulls towards; ``groups`` of :func:`bases.build`,
            ``weights`` of :meth:`Moments.pool`, ``penalty`` of :class:`solve.Factored`.
    Returns: (F, R) float64 for F folds held out; (F, P, R) where ``priors`` are given.
    Raises: EmptyCalibration when a fold lacks a task or there is only one fold; MergeError for a
        negative ridge, no ridges, no priors, or factors of a prior that is 0.
    """
    contest = Contest(moments, updates, family, ridges, priors, **options)
    contest.check_counts()
    scores = contest.scores()
    return scores.squeeze(1) if priors is None else scores


def cross_fitted(
    moments: Moments,
    updates: Tensor,
    family: str,
    ridges: Sequence[float] = RIDGES,
    *,
    priors: Sequence[float] | None = None,
    **options: Any,
) -> tuple[float, ...]:
    """The ridge with the highest disjoint captured energy averaged over folds, and that average.

    The ridge is chosen on the folds that score it, so the average flatters the choice a little.
    Ties go to the smaller ridge, then to the prior's factor of smaller size, then to the first.
    Wide layers whose moments are of float32 products choose by float32 factorisations.

    Args:
        moments, updates, family, ridges, priors, options: of :func:`disjoint`.
    Returns: ``(ridge, average)``, or ``(ridge, factor of the prior, average)`` given ``priors``.
    Raises: what :func:`disjoint` raises.
    """
    contest = Contest(moments, updates, family, ridges, priors, quick=True, **options)
    contest.check_counts()
    index, score = contest.best()
    if priors is None:
        return ridges[int(index)], float(score)
    place_of_prior, place_of_ridge = index.tolist()
    return ridges[place_of_ridge], priors[place_of_prior], float(score)


def choose(
    moments: Moments,
    updates: Tensor,
    family: str,
    ridges: Sequence[float] = RIDGES,
    *,
    priors: Sequence[float] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What :func:`cross_fitted` takes, as tensors on the device of the moments.

    No value is read, so that the device need not be waited for: that updates are finite and every
    fold has samples of every task is for the caller to know.

    Args:
        moments, updates, family, ridges, priors, options: of :func:`disjoint`.
    Returns: place in ``ridges`` () or, given ``priors``, in these and in ``ridges`` (2,), int64;
        average () float64.
    Raises: MergeError for the arguments that :func:`disjoint` refuses, apart from those.
    """
    options = {"make": unchecked, "quick": True, **options}
    return Contest(moments, updates, family, ridges, priors, **options).best()


def optimism(
    moments: Moments,
    updates: Tensor,
    family: str,
    ridge: float = 0.0,
    *,
    by: str = "refit",
    prior: float | Tensor = 0.0,
    groups: Tensor | None = None,
    weights: str = "tokens",
    penalty: str = "mean",
) -> float:
    r"""Expected ``ρ_in - ρ_out`` of the minimiser, as a share of E, from its own moments.

    Subtract it from ``1 - L/E`` in sample. Folds have to be of independent sequences. Costs F + 1
    factorisations for ``refit``, else one.

    Args:
        by: ``refit``, the mean over folds of ``(L_f - L)(d̂_{-f}) - (L_f - L)(d̂)``, Burman's form
            of leaving out one fold, rotation included; ``gradients``, its first order
            ``tr((H + λΓ)⁻¹J)`` with ``J = F/(F-1) Σ_tf e_tf e_tfᵀ``, e_tf the gradient at d̂ of
            task t in fold f less the fold's share of the task's; or ``tokens``,
            ``2L df/(N - df)``, as if every token were drawn by itself and all outputs were
            equally noisy.
        updates, family, prior, groups, weights, penalty: of :func:`disjoint`.
    Raises: MergeError for an unknown ``by`` or a single fold; EmptyCalibration when a fold lacks a
        task.
    """
    if by not in OPTIMISM or moments.folds < 2:
        raise MergeError(
            f"optimism: expected one of {sorted(OPTIMISM)} and at least 2 folds, "
            f"found {by!r} and {moments.folds}"
        )

    def solve(pooled: Pooled) -> tuple[Factored, Tensor]:
        basis = build(family, updates, pooled, groups=groups)
        factored = Factored(programme(pooled, basis), penalty)
        return factored, basis.combine(factored.solve(ridge, basis.arithmetic(prior)).d)

    full = moments.pool(weights=weights)
    fit = _Fit(moments, weights, ridge, full, solve)
    energy = float(full.energy)
    return OPTIMISM[by](fit) / energy if energy else 0.0


class _Fit(NamedTuple):
    """What optimism is computed from: ``solve`` gives the factored programme under some moments,
    and its merged update (g, m, n); ``full`` are those of all folds."""

    moments: Moments
    weights: str
    ridge: float
    full: Pooled
    solve: Callable[[Pooled], tuple[Factored, Tensor]]


def _by_refit(fit: _Fit) -> float:
    """Mean over folds of what a fold held out adds to the loss of the fit without it, less what it
    adds to that of the fit on all."""
    moments, full, total = fit.moments, fit.full, 0.0
    _, best = fit.solve(full)
    for fold in range(moments.folds):
        moments.check_samples([fold])
        fitted, held_out = moments.split(fold, fit.weights)
        _, update = fit.solve(fitted)
        total += held_out.loss(update) - held_out.loss(best) - full.loss(update) + full.loss(best)
    return total / moments.folds


def _by_gradients(fit: _Fit) -> float:
    """``tr((H + λΓ)⁻¹J)``, J of the gradients of tasks and folds at the minimiser."""
    moments, count = fit.moments, fit.moments.count
    factored, update = fit.solve(fit.full)
    omega = task_weights(count.sum(1), moments.energies.sum(1), fit.weights)
    slopes = omega[:, None, None, None, None] * (update @ moments.C - moments.A)  # (T, F, g, m, n)
    share = (count / count.sum(1, keepdim=True))[:, :, None, None, None]
    slopes = (slopes - share * slopes.sum(1, keepdim=True)).flatten(0, 1)
    linear = torch.stack([factored.programme.basis.linear(slope) for slope in slopes])
    pulls = linear @ factored.rotation
    total = (pulls.square() * factored.inverse((fit.ridge,)).unsqueeze(2)).sum()
    return float(total) * moments.folds / (moments.folds - 1)


def _by_tokens(fit: _Fit) -> float:
    """``2L df/(N - df)`` for N samples of every output and df degrees of freedom."""
    moments = fit.moments
    factored, update = fit.solve(fit.full)
    shrunk = factored.values * factored.inverse((fit.ridge,))[0]
    freedom = float(shrunk.sum()) * factored.programme.f.shape[1]
    copies, outputs = moments.A.shape[2:4]
    samples = float(moments.count.sum()) * (outputs if moments.shared else copies * outputs)
    return 2 * fit.full.loss(update) * freedom / max(samples - freedom, 1.0)


OPTIMISM = {"refit": _by_refit, "gradients": _by_gradients, "tokens": _by_tokens}
