r"""What ridges and priors capture of folds held out, every one for the price of one.

Scored in closed form from the moments: the programme is solved on all folds but one by its
eigenvectors, and the loss of the minimisers on that one is taken along them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bases import FAMILIES, Basis, build
from .climb import climb
from .errors import EmptyCalibration, MergeError
from .moments import WEIGHTS, Moments, Pooled, diagonal
from .programme import Programme, programme
from .solve import RTOL_FLOAT32, Factored, check_ridge, is_definite, least_definite, minimise

WIDE = 256  # blocks from this width on, of float32 products, choose by float32 factorisations
FEW = 3  # so many Cholesky factorisations cost less than one eigendecomposition


def unchecked(family: str, updates: Tensor, pooled: Pooled, *, groups: Tensor | None) -> Basis:
    """``bases.build`` for updates (K, g, m, n) or (K, m, n), without a look at the values."""
    updates = updates.unsqueeze(1) if updates.dim() == 3 else updates
    return FAMILIES[family](updates.to(pooled.C), pooled, groups, None)


@dataclass(frozen=True)
class Contest:
    """Ridges and priors compared by what they capture of folds held out.

    Attributes:
        moments, updates, family, ridges, priors, prior, groups, weights, penalty: as
            ``diagnostic.disjoint`` takes them; updates (K, g, m, n), or (K, m, n).
        make: builds a basis, ``bases.build`` or :func:`unchecked`.
        quick: whether factorisations may be of float32, to choose by.
    """

    moments: Moments
    updates: Tensor
    family: str
    ridges: Sequence[float]
    priors: Sequence[float] | None = None
    prior: float | Tensor = 0.0
    groups: Tensor | None = None
    weights: str = "tokens"
    penalty: str = "mean"
    make: Callable[..., Basis] = build
    quick: bool = False

    def __post_init__(self) -> None:
        moments, priors = self.moments, self.priors
        if len(self.ridges) == 0:
            raise MergeError("ridges: expected at least one number ≥ 0, found none")
        for ridge in self.ridges:
            check_ridge(ridge)
        if priors is not None and len(priors) == 0:
            raise MergeError("priors: expected at least one factor of the prior, found none")
        if priors is not None and self.at_base:
            raise MergeError("priors: factors of a prior that is 0; give prior=1 to scale Σ_k Δ_k")
        if self.weights not in WEIGHTS:
            raise MergeError(f"task weights: expected one of {WEIGHTS}, found {self.weights!r}")
        if moments.folds < 2:
            raise EmptyCalibration(
                f"layer {moments.layer}: {moments.folds} fold leaves none to hold out; "
                "collect the moments in at least 2 folds"
            )

    def check_counts(self) -> None:
        """Raise EmptyCalibration for a fold without samples of a task."""
        for fold in range(self.moments.folds):
            self.moments.check_samples([fold])

    @property
    def at_base(self) -> bool:
        """Whether the ridge pulls towards the base."""
        return not isinstance(self.prior, Tensor) and self.prior == 0

    def best(self) -> tuple[Tensor, Tensor]:
        """Place of the highest score and that score, averaged over the folds.

        Returns: place in ``ridges`` () or, given ``priors``, in these and in ``ridges`` (2,),
            int64; average () float64.
        """
        top = self._climb() if self._climbs else None
        if top is not None:
            return top
        mean = self.scores().mean(0).flatten()
        by_size = sorted(range(len(mean)), key=self._size)
        order = torch.tensor(by_size, device=mean.device)
        best = order.take(mean.take(order).argmax())  # the first of equals
        score = mean.take(best)
        if self.priors is None:
            return best, score
        count = len(self.ridges)
        return torch.stack([best.div(count, rounding_mode="floor"), best.remainder(count)]), score

    @property
    def _climbs(self) -> bool:
        """Whether a wide layer may look for its ridge step by step, which needs looks at the
        scores."""
        C = self.moments.C
        wide = C.shape[-1] >= WIDE and self.moments.rtol >= RTOL_FLOAT32 and C.device.type == "cpu"
        return self.quick and wide and self.priors is None and self.family == "elements"

    def _climb(self) -> tuple[Tensor, Tensor] | None:
        """The best ridge over single entries, step by step; None where that is not the way."""
        moments, prior = self.moments, None
        if not self.at_base:
            shapes = Pooled(moments.C[0, 0], moments.A[0, 0], None, 0.0)  # all that entries look at
            prior = self.make(self.family, self.updates, shapes, groups=None).arithmetic(self.prior)
        return climb(
            (self.split(fold) for fold in range(moments.folds)),
            self.ridges,
            least_definite(moments.rtol, moments.C.shape[2], moments.C.shape[-1]),
            self.penalty,
            prior,
        )

    def _size(self, place: int) -> tuple[float, float]:
        """Ridge and size of the prior's factor at a place of the flattened (P, R) scores."""
        scale, ridge = divmod(place, len(self.ridges))
        return self.ridges[ridge], 0.0 if self.priors is None else abs(self.priors[scale])

    def scores(self) -> Tensor:
        """``ρ̃`` (F, P, R), P = 1 without ``priors``."""
        folds = range(self.moments.folds)
        return torch.stack([self._score(*self.split(fold)) for fold in folds])

    def split(self, fold: int) -> tuple[Pooled, Pooled]:
        """Moments of all folds but one, and of that one, with no more of M than the basis needs."""
        return self.moments.split(fold, self.weights, self.family == "rotated_rows")

    def _score(self, fitted: Pooled, held_out: Pooled) -> Tensor:
        """``ρ̃`` (P, R) of one fold."""
        basis = self.make(self.family, self.updates, fitted, groups=self.groups)
        problem = programme(fitted, basis)
        prior = None if self.at_base else basis.arithmetic(self.prior)
        losses = self._losses(problem, held_out, prior)
        loss, at_prior = losses[:, :-1], losses[:, -1:]
        rounding = 1e-18 * diagonal(held_out.C).sum() + 1e-12 * at_prior
        silent = torch.where(loss <= rounding, 1.0, -math.inf)  # as Pooled.captured has it
        energy = torch.as_tensor(held_out.energy)
        return torch.where(energy > 0, 1 - loss / energy, silent)

    def _losses(self, problem: Programme, held_out: Pooled, prior: Tensor | None) -> Tensor:
        """Losses (P, R + 1) on the fold held out, those of the priors (b, s, q) last."""
        basis, ridges = problem.basis, (*self.ridges, math.inf)
        if self.priors is None and self._are_few(problem):
            solutions = [minimise(problem, r, prior, self.penalty).d for r in self.ridges]
            start = torch.zeros_like(problem.f) if prior is None else prior
            return _losses_one_by_one(held_out, basis, [*solutions, start]).unsqueeze(0)
        wide = problem.f.shape[2] >= WIDE and problem.rtol >= RTOL_FLOAT32
        dtype = torch.float32 if self.quick and wide else torch.float64
        factored = Factored(problem, self.penalty, dtype=dtype)
        if self.family != "rotated_columns":
            scales = None if self.priors is None else problem.f.new_tensor(self.priors)
            return losses_elsewhere(factored, programme(held_out, basis), ridges, prior, scales)
        losses = []  # whose blocks couple under other moments
        for scale in (1.0,) if self.priors is None else self.priors:
            path = factored.path(ridges, None if prior is None else scale * prior)
            losses.append(_losses_one_by_one(held_out, basis, path))
        return torch.stack(losses)

    def _are_few(self, problem: Programme) -> bool:
        """Whether a Cholesky factorisation for each ridge costs less than eigenvectors for all."""
        few = len(self.ridges) <= FEW
        return few and all(is_definite(problem, ridge) for ridge in self.ridges)


def _losses_one_by_one(pooled: Pooled, basis: Basis, solutions: Iterable[Tensor]) -> Tensor:
    """``L(W)`` (R,) of the merges of R coefficients (b, s, q), through their weights."""
    return torch.stack([pooled.loss_tensor(basis.combine(d)) for d in solutions])


def losses_elsewhere(
    factored: Factored,
    elsewhere: Programme,
    ridges: Sequence[float],
    prior: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    r"""Losses of the minimisers under other moments, without forming a minimiser.

    Along the eigenvectors a minimiser is ``d0 + s ∘ u``, u its pull and ``s = 1/(w + λ)``, and its
    loss elsewhere ``L'(d0) + lᵀs + ½ sᵀQs``. l and Q are taken once; a ridge then costs b·q²
    operations. The pull is linear in the prior, so a factor of it costs as little.

    Args:
        elsewhere: programme of the same basis under other moments.
        ridges: R relative ridges, ``inf`` for the prior itself.
        prior: (b, s, q), zero by default.
        scales: (P,) float64, factors of the prior; by default it is taken as it is, P = 1.
    Returns: (P, R) float64, including the residual energy ``elsewhere.energy``.
    """
    along, problem = _Along(factored, elsewhere, ridges), factored.programme
    f = problem.f
    if prior is None:
        level = along.loss(torch.as_tensor(elsewhere.energy), -f, elsewhere.f)
        return level.expand(1 if scales is None else len(scales), -1)
    prior = prior.to(f)
    force, moved = prior @ problem.H, prior @ elsewhere.H
    tilt, bend = (elsewhere.f * prior).sum(), (moved * prior).sum()
    if scales is None:
        level = elsewhere.energy + tilt + bend / 2
        return along.loss(level, -(f + force), elsewhere.f + moved).unsqueeze(0)
    pull, slope = along.turn(-f), along.turn(elsewhere.f)
    more_pull, more_slope = along.turn(-force), along.turn(moved)
    constant = elsewhere.energy + along.linear(pull, slope) + along.quadratic(pull, pull) / 2
    first = tilt + along.linear(more_pull, slope) + along.linear(pull, more_slope)
    first = first + along.quadratic(pull, more_pull)
    second = bend / 2 + along.linear(more_pull, more_slope)
    second = second + along.quadratic(more_pull, more_pull) / 2
    scales = scales[:, None]
    return constant + scales * first + scales.square() * second


class _Along:
    """Terms of the loss under other moments along the eigenvectors of a factorisation, in its
    precision: of steps ``s ∘ pull``, pull (b, s, q), for the s (R, b, q) of R ridges.

    Pulls and slopes are relative to the root of the residual energy, so that float32 can hold them.
    """

    def __init__(self, factored: Factored, elsewhere: Programme, ridges: Sequence[float]):
        self.vectors, self.inverse = factored.vectors, factored.inverse(ridges)
        energy = torch.as_tensor(factored.programme.energy).to(self.inverse)
        self.energy = torch.where(energy > 0, energy, 1.0)
        root = factored.gamma.sqrt()
        self.unit = (root * self.energy.sqrt()).unsqueeze(1)
        scaled = elsewhere.H / (root[:, :, None] * root[:, None, :])
        self.H = self.vectors.mT @ scaled.to(self.vectors.dtype) @ self.vectors

    def turn(self, slopes: Tensor) -> Tensor:
        """Slopes of the coefficients (b, s, q) as slopes along the eigenvectors, (b, s, q)."""
        return (slopes / self.unit).to(self.vectors.dtype) @ self.vectors

    def linear(self, pull: Tensor, slope: Tensor) -> Tensor:
        """``Σ s ∘ pull ∘ slope`` (R,) of pull and slope (b, s, q)."""
        steps = (pull * slope).sum(1).to(self.inverse)
        return self.energy * (self.inverse * steps).sum((1, 2))

    def quadratic(self, pull: Tensor, other: Tensor) -> Tensor:
        """``(s ∘ pull)ᵀ H' (s ∘ other)`` (R,) of pull and other (b, s, q)."""
        curved = ((pull.mT @ other) * self.H).to(self.inverse)
        steps = self.inverse.transpose(0, 1)  # (b, R, q)
        return self.energy * ((steps @ curved) * steps).sum((0, 2))

    def loss(self, level: Tensor, force: Tensor, slope: Tensor) -> Tensor:
        """Losses (R,) of starts with a loss ``level`` (), pulled by ``force`` (b, s, q) down from
        ``slope`` (b, s, q)."""
        pull = self.turn(force)
        return level + self.linear(pull, self.turn(slope)) + self.quadratic(pull, pull) / 2
