"""What a tensor of the base becomes with an adapter folded into it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .reading import Fold


def folded(origin: Tensor, fold: Fold, parts: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the base with its change, as peft's ``merge_and_unload`` makes it.

    An update ``W + s B A`` or, of DoRA, ``m (W + s B A) / ‖W + s B A‖`` with a norm per output. It
    is computed in float32, or in float64 where the base has that, and is not rounded to the base's
    dtype: that is left to whoever stores the merge.

    Args:
        origin: the base's tensor (…).
        fold: which parts there are, and what they are multiplied by.
        parts: part -> its tensor, of the shape that ``Fold`` says.
    Returns: (…) in float32 or float64 where something is added; else in the base's dtype.
    """
    weight = origin
    if "replacement" in parts:
        weight = parts["replacement"].to(origin.dtype)
    if "rows" in parts:
        return weight.index_copy(0, torch.tensor(fold.indices), parts["rows"].to(origin.dtype))
    wide = torch.float64 if origin.dtype == torch.float64 else torch.float32
    if "shift" in parts:
        return weight.to(wide) + parts["shift"].to(wide) * fold.scale
    for down, up in (("down", "up"), ("table_down", "table_up")):
        if up in parts:
            weight = weight.to(wide) + _update(
                parts[down].to(wide), parts[up].to(wide), fold, weight
            )
    if "magnitude" in parts:
        weight = _with_norms(weight, parts["magnitude"].to(wide), fold.is_transposed)
    return weight


def _update(down: Tensor, up: Tensor, fold: Fold, like: Tensor) -> Tensor:
    """``s B A`` in the layout of the base's tensor: (m, n), transposed, or with a kernel's axes."""
    product = up.flatten(1) @ down.flatten(1)
    laid_out = product.T if fold.is_transposed else product.reshape(like.shape)
    return laid_out * fold.scale


def _with_norms(weight: Tensor, magnitude: Tensor, is_transposed: bool) -> Tensor:
    """A weight whose rows, or columns where it is transposed, have these norms."""
    rows = (weight.T if is_transposed else weight).flatten(1)
    factors = magnitude.flatten() / torch.linalg.norm(rows, dim=1)
    if is_transposed:
        return factors * weight
    return factors.reshape(-1, *(1 for _ in weight.shape[1:])) * weight
