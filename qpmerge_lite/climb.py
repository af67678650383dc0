"""The best ridge of a wide layer by few factorisations: up the scores of folds held out, from a
middle ridge."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .cholesky import spare
from .moments import Pooled
from .solve import least_definite


class _Climber:
    """Scores of single ridges of a wide programme over single entries, by Cholesky factors in
    float32."""

    def __init__(self, contest):
        self.contest, self.known = contest, {}
        self._prior = None
        self.folds = [
            self._prepared(*contest._split(fold)) for fold in range(contest.moments.folds)
        ]
        self._damped = torch.empty_like(self.folds[0][0])

    def _prepared(self, fitted: Pooled, held: Pooled):
        """Of a fold: scaled C of both sides, force and slope at the prior, all float32; the loss
        there and the energy.

        Everything is relative to the root of the residual energy and of the penalty, so that
        float32 can hold it, and has a spare column of zeros where that makes factors faster.
        """
        size = max(float(fitted.energy), 1e-300)
        diagonal = fitted.C.diagonal(dim1=-2, dim2=-1)
        gamma = (
            diagonal if self.contest.penalty == "diagonal" else diagonal.mean().expand_as(diagonal)
        )
        root = torch.where(gamma > 0, gamma, 1.0).sqrt().unsqueeze(1)
        C, other = (_squares(side.C, root) for side in (fitted, held))
        A, elsewhere = (_columns(side.A / (root * size**0.5)) for side in (fitted, held))
        prior = _columns(self._prior_of(fitted) * root / size**0.5)
        force, slope = A - prior @ C, prior @ other - elsewhere
        energy = float(held.energy) / size
        start = energy + float((prior.double() * (slope - elsewhere).double()).sum()) / 2
        return C, other, force, slope, start, energy

    def _prior_of(self, fitted: Pooled) -> Tensor:
        """The prior's update (g, m, n), the same for every fold."""
        contest = self.contest
        if contest._at_base:
            return torch.zeros_like(fitted.A)
        if self._prior is None:
            basis = contest.make(contest.family, contest.updates, fitted, groups=contest.groups)
            self._prior = basis.arithmetic(contest.prior)
        return self._prior

    def score(self, ridge: float) -> float:
        """Average over the folds of what one ridge captures."""
        if ridge not in self.known:
            self.known[ridge] = sum(self._captured(ridge, *fold) for fold in self.folds) / len(
                self.folds
            )
        return self.known[ridge]

    def _captured(self, ridge, H, other, force, slope, start, energy) -> float:
        damped = self._damped.copy_(H)
        damped.diagonal(dim1=-2, dim2=-1).add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed.any()) or energy <= 0:
            return math.nan
        step = torch.cholesky_solve(force.mT, factor).mT
        change = (step * slope).sum(dtype=torch.float64) + ((step @ other) * step).sum(
            dtype=torch.float64
        ) / 2
        return 1 - (start + float(change)) / energy


def _squares(C: Tensor, root: Tensor) -> Tensor:
    """C (g, n, n) over the roots (g, 1, n) of its rows and columns, float32, with spare rows and
    columns of zeros."""
    g, n, _ = C.shape
    scaled = torch.zeros(g, n + spare(n), n + spare(n))
    inside = scaled[:, :n, :n]
    torch.div(C, root.mT, out=inside)  # in float64, rounded once
    inside /= root.float()
    return scaled


def _columns(values: Tensor) -> Tensor:
    """Values (g, m, n) in float32, with spare columns of zeros."""
    return F.pad(values.float(), (0, spare(values.shape[-1])))


def climb(contest) -> tuple[Tensor, Tensor] | None:
    """:meth:`Contest.best` for a wide layer on the CPU, ridge by ridge from a middle one upwards in
    score.

    What a ridge captures of a fold held out rises and then falls with it, as bias takes over from
    variance; a few factorisations find
    the top. None where that is not the way: few ridges, or a top beside ridges too weak for
    Cholesky.
    """
    moments, ridges = contest.moments, contest.ridges
    noise = least_definite(moments.rtol, moments.C.shape[2], moments.C.shape[-1])
    strong = sorted(ridge for ridge in ridges if noise <= ridge < math.inf)
    weak = [ridge for ridge in ridges if ridge < noise]
    if len(strong) < 3 or len(weak) + len(strong) < len(ridges):
        return None
    climber, place = _Climber(contest), len(strong) // 2
    while True:
        near = [i for i in (place - 1, place, place + 1) if 0 <= i < len(strong)]
        best = max(near, key=lambda i: (climber.score(strong[i]), -i))
        if best == place:
            break
        place = best
    score = climber.score(strong[place])
    if not math.isfinite(score) or (place == 0 and weak):
        return None
    return torch.tensor(list(ridges).index(strong[place])), torch.tensor(score, dtype=torch.float64)
