"""Parts of calibration batches, and batches end to end: inputs are never padded or cut."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .calibration import Batch
from .errors import MergeError


def refuse_lost_entries(batches: list[Batch]) -> None:
    """MergeError for a batch without an entry that the first of its task has, such as a mask."""
    first = batches[0]
    for batch in batches[1:]:
        for key in first.arguments:
            if key not in batch.arguments:
                raise MergeError(
                    f"task {batch.task!r}, batch {batch.number}: lacks {key!r}, which batch "
                    f"{first.number} has; give it to every batch (None where there is none)"
                )


def take(batch: Batch, rows: Tensor) -> Batch:
    """Some inputs of a batch, ``rows`` (B',), as a batch of their own; entries for all inputs are
    kept whole."""
    arguments = dict(batch.arguments)
    for key in batch.one_per_input:
        arguments[key] = arguments[key][rows.to(arguments[key].device)]
    return replace(batch, arguments=arguments, size=len(rows))


def joined(batches: list[Batch]) -> Batch | None:
    """Batches end to end as one, or None where their entries do not allow it as they are."""
    first, keys = batches[0], batches[0].one_per_input
    for batch in batches[1:]:
        if batch.arguments.keys() != first.arguments.keys() or set(batch.one_per_input) != set(
            keys
        ):
            return None
        if not all(_fits(batch.arguments[k], v, k in keys) for k, v in first.arguments.items()):
            return None
    arguments = dict(first.arguments)
    for key in keys:
        arguments[key] = torch.cat([batch.arguments[key] for batch in batches])
    return replace(first, arguments=arguments, size=sum(batch.size for batch in batches))


def _fits(value, other, one_per_input: bool) -> bool:
    """Whether entries of two batches can be joined: rows of one kind, or one value for all."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return type(value) is type(other) and value == other
    if value.dtype != other.dtype:
        return False
    return value.shape[1:] == other.shape[1:] if one_per_input else torch.equal(value, other)


def draw(batches: list[Batch], count: int, generator) -> list[Batch]:
    """``count`` inputs drawn with replacement, those of one batch together."""
    places = torch.randint(sum(batch.size for batch in batches), (count,), generator=generator)
    drawn, start = [], 0
    for batch in batches:
        rows = places[(places >= start) & (places < start + batch.size)] - start
        if len(rows):
            drawn.append(take(batch, rows))
        start += batch.size
    return drawn
