"""The best ridge of a wide layer by few factorisations: up the scores of folds held out, from a middle ridge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .moments import Pooled
from .programme import programme
from .solve import penalty_weights


class _Climber:
    """Scores of single ridges of a wide programme over single entries, by Cholesky factors in float32."""

    def __init__(self, contest):
        self.folds = [self._prepared(contest, *contest._split(f)) for f in range(contest.moments.folds)]
        self.known: dict[float, float] = {}

    def _prepared(self, contest, fitted: Pooled, held: Pooled):
        """Of a fold: scaled Hessians, force and slope at the prior in float32, loss there and energy."""
        basis = contest.make(contest.family, contest.updates, fitted, groups=contest.groups)
        problem, other = programme(fitted, basis), programme(held, basis)
        prior = torch.zeros_like(problem.f) if contest._at_base else basis.arithmetic(contest.prior)
        root = penalty_weights(problem, contest.penalty).sqrt()
        scale = root[:, :, None] * root[:, None, :]
        unit = root.unsqueeze(1) * max(float(problem.energy), 1e-300) ** 0.5
        force, slope = -problem.gradient(prior) / unit, other.gradient(prior) / unit
        start = float(other.objective(prior) / max(float(problem.energy), 1e-300))
        energy = float(other.energy) / max(float(problem.energy), 1e-300)
        return (problem.H / scale).float(), (other.H / scale).float(), force.float(), slope.float(), start, energy

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
    noise = 2 * moments.rtol * moments.C.shape[2] * moments.C.shape[-1]  # as in solve.is_definite
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
