"""The paper's diagnostic, before any merge is made: the share ``ρ(B) = fᵀH⁺f / 2E`` of every
layer's residual energy that a basis captures, in closed form from calibration data."""

from __future__ import annotations

from torch import Tensor

from ....assess import Layers, layer_moments
from ....bases import build
from ....diagnostic import captured_energy
from ....moments import Moments
from ....programme import programme
from ...suites import Suite
from ..cache import kept


def of_layer(moments: Moments, updates: Tensor, tasks: list[str], family: str) -> dict[str, float]:
    """``rho`` and residual ``energy`` of one layer for some of its tasks.

    Args:
        moments: of all tasks, with the whole of M where the family is ``rotated_rows``.
        updates: (K, g, m, n) of all tasks, in the order of the moments' tasks.
        family: a key of ``bases.FAMILIES`` that needs no labels of rows.
    """
    chosen = updates[[moments.tasks.index(task) for task in tasks]]
    pooled = moments.only(tasks).pool()
    rho = captured_energy(programme(pooled, build(family, chosen, pooled)))
    return {"rho": rho, "energy": float(pooled.energy)}


def _gathered(suite: Suite, size: int) -> Layers:
    """Moments of every layer on the experts' own inputs, M whole; computed once."""

    def gather():
        batches = suite.calibration(size)
        return layer_moments(suite.base, suite.experts, batches, folds=1)

    return suite.cached(("layers, M whole", size), gather)


def of_basis(suite: Suite, tasks: list[str], family: str, size: int) -> dict[str, dict]:
    """Layer -> ``rho`` and ``energy`` of a basis, on so many calibration examples per task, cached.

    Layers in which the experts equal the base are left out, for there is nothing to capture.
    """

    def make():
        captured = {}
        for name, (_, moments, updates) in _gathered(suite, size).items():
            of_one = of_layer(moments, updates, tasks, family)
            if of_one["energy"] > 0:
                captured[name] = of_one
        return captured

    return kept(suite, "basis-capture", [tasks, family, size], make)
