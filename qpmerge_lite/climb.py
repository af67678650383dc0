"""The best ridge of a wide layer by few factorisations: up the scores of folds held out, from a middle ridge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .moments import Pooled
from .solve import least_definite


class _Climber:
    """Scores of single ridges of a wide programme over single entries, by Cholesky factors in float32."""

    def __init__(self, contest):
        self.folds = [self._prepared(contest, *contest._split(f)) for f in range(contest.moments.folds)]
        self.known: dict[float, float] = {}

    def _prepared(self, contest, fitted: Pooled, held: Pooled):
        """Of a fold: scaled C of both sides, force and slope at the prior, all float32; the loss there and the energy.

        Everything is relative to the root of the residual energy and of the penalty, so that float32 can hold it.
        """
        basis = contest.make(contest.family, contest.updates, fitted, groups=contest.groups)
        size = max(float(fitted.energy), 1e-300)
        diagonal = fitted.C.diagonal(dim1=-2, dim2=-1)
        gamma = diagonal if contest.penalty == "diagonal" else diagonal.mean().expand_as(diagonal)
        root = torch.where(gamma > 0, gamma, 1.0).sqrt().unsqueeze(1)
        scale = root.mT * root
        C, other = (fitted.C / scale).float(), (held.C / scale).float()
        A, elsewhere = ((side.A / (root * size**0.5)).float() for side in (fitted, held))
        prior = torch.zeros_like(fitted.A) if contest._at_base else basis.arithmetic(contest.prior)
        prior = (prior * root / size**0.5).float()
        force, slope = A - prior @ C, prior @ other - elsewhere
        energy = float(held.energy) / size
        start = energy + float((prior.double() * (slope - elsewhere).double()).sum()) / 2
        return C, other, force, slope, start, energy

    def score(self, ridge: float) -> float:
        """Average over the folds of what one ridge captures."""
        if ridge not in self.known:
            self.known[ridge] = sum(self._captured(ridge, *fold) for fold in self.folds) / len(self.folds)
        return self.known[ridge]

    def _captured(self, ridge, H, other, force, slope, start, energy) -> float:
        damped = H + ridge * torch.eye(H.shape[-1])
        factor, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed.any()) or energy <= 0:
            return math.nan
        step = torch.cholesky_solve(force.mT, factor).mT
        change = (step * slope).sum(dtype=torch.float64) + ((step @ other) * step).sum(dtype=torch.float64) / 2
        return 1 - (start + float(change)) / energy


def climb(contest) -> tuple[Tensor, Tensor] | None:
    """:meth:`Contest.best` for a wide layer on the CPU, ridge by ridge from a middle one upwards in score.

    What a ridge captures of a fold held out rises and then falls with it, as bias takes over from variance; a few factorisations find
    the top. None where that is not the way: few ridges, or a top beside ridges too weak for Cholesky.
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
