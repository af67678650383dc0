"""The best ridge of a wide layer by few factorisations: up the scores of folds held out, from a
middle ridge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .cholesky import solve_definite
from .moments import Pooled, diagonal
from .solve import penalty_weights


@dataclass(frozen=True)
class _Fold:
    """The programme over single entries with one fold held out, in units that float32 can hold: the
    roots of the residual energy and of the penalty. Tensors are float32.

    Attributes:
        C_fitted, C_held_out: (g, n, n) second moments of the folds solved on, and of the other.
        pull: (g, m, n) slope down from the prior on the folds solved on, ``A - P C``.
        slope: (g, m, n) slope at the prior on the fold held out, ``P C - A``.
        loss: at the prior, on the fold held out.
        energy: residual energy of the fold held out.
    """

    C_fitted: Tensor
    C_held_out: Tensor
    pull: Tensor
    slope: Tensor
    loss: float
    energy: float

    @classmethod
    def of(cls, fitted: Pooled, held_out: Pooled, penalty: str, prior: Tensor | None) -> _Fold:
        """From the moments of both sides, and the prior's update (g, m, n) or None for the base."""
        energy = max(float(fitted.energy), 1e-300)
        root = penalty_weights(fitted.C, penalty).sqrt().unsqueeze(1)  # (g, 1, n)
        C_fitted, C_held_out = _squares(fitted.C, root), _squares(held_out.C, root)
        A_fitted, A_held_out = (
            (side.A / (root * energy**0.5)).float() for side in (fitted, held_out)
        )
        start = torch.zeros_like(fitted.A) if prior is None else prior
        P = (start * root / energy**0.5).float()
        slope = P @ C_held_out - A_held_out
        own_energy = float(held_out.energy) / energy
        loss = own_energy + float((P.double() * (slope - A_held_out).double()).sum()) / 2
        return cls(C_fitted, C_held_out, A_fitted - P @ C_fitted, slope, loss, own_energy)

    def captured(self, ridge: float, memory: Tensor) -> float:
        """What the minimiser for a ridge captures of the fold held out; NaN where it has none.

        Args:
            memory: of the shape (…, n, n) and dtype of ``C_fitted``, written over.
        """
        if self.energy <= 0:
            return math.nan
        damped = memory.copy_(self.C_fitted)
        diagonal(damped).add_(ridge)
        step = solve_definite(damped, self.pull)
        first = (step * self.slope).sum(dtype=torch.float64)
        second = ((step @ self.C_held_out) * step).sum(dtype=torch.float64) / 2
        return 1 - (self.loss + float(first + second)) / self.energy


def _squares(C: Tensor, root: Tensor) -> Tensor:
    """C (g, n, n) over the roots (g, 1, n) of its rows and columns, float32."""
    scaled = torch.empty(C.shape)
    torch.div(C, root.mT, out=scaled)  # in float64, rounded once
    return scaled.div_(root.float())


def _best_near(place: int, score: Callable[[float], float], ridges: Sequence[float]) -> int:
    """Of the places next to one, and itself, that of the ridge with the highest score; the smaller
    of equals."""
    near = [i for i in (place - 1, place, place + 1) if 0 <= i < len(ridges)]
    return max(near, key=lambda i: (score(ridges[i]), -i))


def climb(
    splits: Iterable[tuple[Pooled, Pooled]],
    ridges: Sequence[float],
    noise: float,
    penalty: str,
    prior: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """The best ridge of the programme over single entries of a wide layer on the CPU, from a middle
    ridge upwards in score.

    What a ridge captures of a fold held out rises and then falls with it, as bias takes over from
    variance; a few float32 Cholesky factorisations find the top.

    Args:
        splits: moments of all folds but one, and of that one; taken one by one.
        ridges: relative to Γ, to choose from.
        noise: the least ridge that Cholesky can be trusted with, of ``solve.least_definite``.
        penalty: Γ, see ``solve.penalty_weights``.
        prior: update (g, m, n) that the ridge pulls towards, None for the base.
    Returns: place in ``ridges`` () int64, and its average score () float64; None where this is not
        the way: few ridges, or a top beside ridges below ``noise``.
    """
    strong = sorted(ridge for ridge in ridges if noise <= ridge < math.inf)
    weak = [ridge for ridge in ridges if ridge < noise]
    if len(strong) < 3 or len(weak) + len(strong) < len(ridges):
        return None
    folds = [_Fold.of(*split, penalty, prior) for split in splits]
    memory = torch.empty_like(folds[0].C_fitted)

    @cache
    def score(ridge: float) -> float:
        return sum(fold.captured(ridge, memory) for fold in folds) / len(folds)

    place = len(strong) // 2
    while (best := _best_near(place, score, strong)) != place:
        place = best
    top = score(strong[place])
    if not math.isfinite(top) or (place == 0 and weak):
        return None
    return torch.tensor(list(ridges).index(strong[place])), torch.tensor(top, dtype=torch.float64)
