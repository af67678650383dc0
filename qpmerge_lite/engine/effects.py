"""What forwards do beside computing: modes of the thread, values left on modules, tensors written
to, errors."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration import Batch
from ..errors import MergeError

ABSENT = object()


@dataclass
class Traces:
    """What forwards of a model leave behind: values on modules as (path, ``attribute`` or
    ``buffer``, key), written inputs."""

    values: set[tuple[str, str, str]] = field(default_factory=set)
    inputs: bool = False


def modes() -> tuple:
    """What holds for all that runs in the thread, and a forward may have set for a part of
    itself."""
    autocast = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
    ]
    return torch.is_grad_enabled(), torch.get_default_dtype(), autocast


def set_modes(found: tuple) -> None:
    """Set what :func:`modes` found."""
    gradients, dtype, autocast = found
    torch.set_grad_enabled(gradients)
    torch.set_default_dtype(dtype)
    for kind, enabled, precision in autocast:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, precision)


def version_of(tensor: Tensor) -> int:
    """How often a tensor of any shape was written to; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def identity_of(tensor: Tensor) -> tuple:
    """Equal for a tensor of any shape that has not been written to since; never where torch does
    not count that."""
    return id(tensor), object() if tensor.is_inference() else tensor._version


def copied(value):
    """A copy of a tensor, because a model may work in place; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def first_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    """What a module is given to read: the first tensor among its arguments; None for one within
    torch.vmap."""
    first = next((z for z in (*args, *kwargs.values()) if isinstance(z, Tensor)), None)
    return None if first is None or torch._C._functorch.is_batchedtensor(first) else first


@contextmanager
def blaming(batch: Batch):
    """What goes wrong while the model runs, other than a MergeError, is the fault of its batch."""
    try:
        yield
    except MergeError:
        raise
    except Exception as error:
        raise refused(batch, error) from error


def refused(batch: Batch, error: Exception) -> MergeError:
    """The error for a batch that the model does not take."""
    shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in batch.arguments.items()}
    return MergeError(
        f"task {batch.task!r}: the model does not take its calibration batch {shapes}, number "
        f"{batch.number}; batches hold the keyword arguments of forward "
        f"({type(error).__name__}: {error})"
    )
