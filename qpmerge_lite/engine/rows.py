"""Rows of calibration batches: those that are no padding, the rows of a fold side by side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..calibration import Batch
from ..errors import EmptyCalibration


class Selection(NamedTuple):
    """Rows that are no padding, those of a fold side by side.

    Attributes:
        places: (N,) int64, of the rows among all, None for all as they are.
        counts: how many each fold has.
    """

    places: Tensor | None
    counts: list[int]


class Samples(NamedTuple):
    """Samples of a layer, those of a fold side by side.

    Attributes:
        Z: as ``View.samples`` gives them.
        drift: the expert's answers ``W (x° - x)`` to how far its own inputs are from these, as
            ``View.respond`` gives them; None where only these are looked at.
        counts: how many each fold has.
    """

    Z: Tensor
    drift: Tensor | None
    counts: list[int]


def selection(shape: torch.Size, batch: Batch, folds: int, mask_name: str | None) -> Selection:
    """Which rows of a batch, arranged in a shape (B, tokens, …), are no padding."""
    device = next(v.device for v in batch.arguments.values() if isinstance(v, Tensor))
    mask = batch.mask(mask_name)
    if mask is None and folds == 1:
        return Selection(None, [shape.numel()])
    fold = ((torch.arange(batch.size) + batch.start) % folds).to(device)
    fold = fold.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    if mask is not None:
        fold = torch.where(counted(mask, shape), fold, folds)  # padding comes last
    order = fold.flatten().argsort(stable=True)
    counts = fold.flatten().bincount(minlength=folds + 1).tolist()[:folds]
    return Selection(order[: sum(counts)], counts)


def counted(mask: Tensor, shape: torch.Size) -> Tensor:
    """Which of arranged rows of a shape (B, tokens, …) a mask (B, S), or (B, S, choices), leaves.

    Rows that all choices share are left where one of them has the token.
    """
    counts = mask != 0
    if mask.dim() > len(shape):
        counts = counts.any(-1)
    return counts.reshape(*counts.shape, *[1] * (len(shape) - counts.dim())).expand(shape)


def check_folds(by_task: dict[str, list[Batch]], folds: int) -> None:
    """EmptyCalibration where a fold of a task has no sequence with a token."""
    for task, batches in by_task.items():
        filled = set()
        for batch in batches:
            mask = batch.masks.get("attention_mask")
            with_tokens = (
                range(batch.size)
                if mask is None
                else (mask != 0).flatten(1).any(1).nonzero()[:, 0].tolist()
            )
            filled |= {(batch.start + i) % folds for i in with_tokens}
        empty = sorted(set(range(min(folds, len(filled) + 9))) - filled)
        if empty:
            raise EmptyCalibration(
                f"no calibration tokens for {[task]} in folds {empty} of {folds}; "
                "give at least one sequence per task and fold, or use fewer folds"
            )


def joined(parts: list[Samples]) -> Samples:
    """Samples of several batches as of one."""
    if len(parts) == 1:
        return parts[0]
    counts = [part.counts for part in parts]
    Z = _by_fold([part.Z for part in parts], counts)
    drifts = [part.drift for part in parts if part.drift is not None]
    drift = _by_fold(drifts, counts) if drifts else None
    return Samples(Z, drift, [sum(of_fold) for of_fold in zip(*counts)])


def _by_fold(tensors: list[Tensor], counts: list[list[int]]) -> Tensor:
    """Tensors (N, …), each with so many rows of every fold, as one with the rows of a fold side by
    side."""
    pieces = [tensor.split(count) for tensor, count in zip(tensors, counts)]
    return torch.cat([piece for of_fold in zip(*pieces) for piece in of_fold])
