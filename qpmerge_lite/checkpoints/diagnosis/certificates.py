"""Certificates of a whole model's layers, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...diagnostic import certificate
from ...engine.reasons import reasons_to_average
from ...engine.recipes import Recipe
from ...experts import is_number
from ...moments import Moments
from ...sequential import Pass, PassOptions


class Certifying:
    """A layer solver that keeps the anchor as it is, and tells its certificate."""

    full_energy = False

    def __call__(self, moments: Moments, updates: Tensor, anchor: Tensor) -> tuple[Tensor, dict]:
        return anchor, certificate(moments.pool(), anchor)


def certify_in_passing(
    base: nn.Module,
    state: Mapping[str, Tensor],
    experts,
    calibration,
    *,
    progress: bool = False,
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """What :func:`assess.certify` says on ``layer_moments(..., along=state)``, but with the moments
    of one layer in memory at a time, or of those that read the same tensor.

    Args:
        state: merged state dict, by any method.
        base, experts, calibration, progress: as in :func:`sequential.merge_sequentially`.
    Returns: layer -> ``captured`` and ``gap``; and name of every floating entry that is in no layer
        that was visited -> why.
    Raises: what :func:`sequential.merge_sequentially` raises.
    """
    recipe = Recipe(Certifying(), folds=1, anchor=state)
    gathering = Pass(base, experts, calibration, {"merge": recipe}, PassOptions())
    making = gathering.makings(progress)[0]
    reasons = reasons_to_average(base, gathering.known, making)
    certificates, left_out = {}, {}
    for row in making.table:
        if "gap" in row:  # not where there is no residual energy
            certificates[row["layer"]] = {name: row[name] for name in ("captured", "gap")}
    for name, value in gathering.base.items():
        if is_number(value) and name not in making.solved:
            left_out[name] = reasons[name]
    return certificates, left_out
