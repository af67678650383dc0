"""The few ways a merge can be refused, each with its cause and its cure in the message."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class MergeError(ValueError):
    """Anything this package refuses to do; the message names the place, what was expected and what
    was found."""


class ShapeMismatch(MergeError):
    """Two tensors that must agree do not."""

    def __init__(self, where, expected, found, cure="pass tensors of one architecture"):
        super().__init__(f"{where}: expected shape {tuple(expected)}, found {tuple(found)}; {cure}")


class MissingLayer(MergeError):
    """An expert lacks a parameter of the base, or has one that the base does not know."""


class NonFinite(MergeError):
    """NaN or infinity among weights or activations."""

    def __init__(self, where, tensor, cure):
        bad = int((~tensor.isfinite()).sum())
        super().__init__(f"{where}: {bad} of {tensor.numel()} values are NaN or infinite; {cure}")


class EmptyCalibration(MergeError):
    """A task (or one of its folds) has no calibration tokens."""


class LostProcess(MergeError):
    """Another process that shares a merge has ended, or was silent for too long."""

    def __init__(self, count, error):
        line = str(error).partition("\n")[0]
        line = line.partition("] ")[2] if line.startswith("[") else line  # where in its sources
        reason = line.partition(". ")[0]
        super().__init__(
            f"group: expected an answer of all {count} processes, found that one has ended or was "
            f"silent for too long ({reason}); start all of them again"
        )


class Infeasible(MergeError):
    """The constraints of a programme admit no point, or the solver found none."""


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any shape and dtype holds neither NaN nor infinity."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.element_size() == 1:
        tensor = tensor.double()  # 8-bit numbers have no sums
    quick = bool(tensor.sum().isfinite())  # one pass over the numbers; a sum may overflow by itself
    return quick or bool(tensor.isfinite().all())
