"""What a tensor of the base becomes with a difference added to it, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def added(origin: Tensor, difference: Tensor) -> Tensor:
    """``W_0 + (W_k - W_0)``, computed in float64 and rounded to the dtype of the base; counters in
    whole numbers.

    That is ``W_k`` bit for bit, but for the sign of a zero, where the difference is stored without
    rounding: in float32 wherever no number of base and expert is larger than 2¹² times the other
    in float16, or 2¹⁵ times in bfloat16, or either is zero; of weights in float32 as a rule only in
    float64, up to 2²⁸ times. Otherwise it is off by what rounded the difference. Rounding to the
    base's dtype drops changes below half a step of it, as saving a model in that dtype does.

    Args:
        origin: the base's tensor (…). difference: (…), of any dtype of such numbers.
    Returns: (…) in the dtype of the base; infinite where that cannot hold it.
    """
    return (_computed(origin) + _computed(difference)).to(origin.dtype)


def subtracted(value: Tensor, origin: Tensor) -> Tensor:
    """``W_k - W_0`` (…), in float64, or int64 of whole numbers."""
    return _computed(value) - _computed(origin)


def _computed(tensor: Tensor) -> Tensor:
    """A tensor (…) in the dtype that it is computed with."""
    return tensor.double() if tensor.is_floating_point() else tensor.long()


def differs_in(one: Tensor, other: Tensor) -> int:
    """In how many of their numbers two tensors (…) of one dtype differ."""
    return int(torch.count_nonzero(_computed(one) != _computed(other)))
