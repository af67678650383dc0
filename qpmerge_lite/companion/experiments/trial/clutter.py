"""A construction in which captured energy misleads: experts that all move features in the same way
along directions that no head reads."""

from __future__ import annotations

import torch
from torch import Tensor

EXAMPLES = 4096  # per task
DIRECTIONS = 16  # that no head reads


class Clutter:
    """Two tasks with inputs of their own, and one layer of features.

    On its inputs, a task's expert moves the feature along one direction that its head reads (the
    *signal*, of size one), which the other expert leaves alone; and along ``DIRECTIONS`` that no
    head reads (the *clutter*), in which both experts move alike, so that the sum of their updates
    moves twice as far.

    Args:
        size: of the clutter in every direction, in units of the signal.
        seed: of the draw.
    """

    def __init__(self, size: float, seed: int):
        generator = torch.Generator().manual_seed(seed)
        # what the task's head reads: of the update, and in the base
        self.signal = torch.randn(2, EXAMPLES, 1, generator=generator)
        self.before = torch.randn(2, EXAMPLES, 1, generator=generator)
        self.clutter = size * torch.randn(2, EXAMPLES, DIRECTIONS, generator=generator)

    def sweep(self, scales: Tensor) -> dict[str, Tensor]:
        """What merges that add so many times the sum of both updates capture, all of it and as the
        heads see it, and how often they decide as the experts do; (S,) each for scales (S,)."""
        scale = scales[:, None, None, None]
        error = ((scale - 1) * self.signal).square().sum((1, 2, 3))
        unread = ((2 * scale - 1) * self.clutter).square().sum((1, 2, 3))
        signal, clutter = self.signal.square().sum(), self.clutter.square().sum()
        decided = (self.before + scale * self.signal).sign()
        agrees = decided == (self.before + self.signal).sign()
        return {
            "energy": 1 - (error + unread) / (signal + clutter),
            "energy seen by the heads": 1 - error / signal,
            "agreement with experts": agrees.double().mean((1, 2, 3)),
        }


def lost(swept: dict[str, Tensor], form: str) -> float:
    """Agreement with the experts that is lost by the scale that a form of the energy picks, against
    the best scale.

    Args:
        swept: what :meth:`Clutter.sweep` returns, (S,) each.
    """
    agreement = swept["agreement with experts"]
    return float(agreement.max() - agreement[swept[form].argmax()])
