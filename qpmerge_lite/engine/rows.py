"""Rows of calibration batches: those that are no padding, the rows of a fold side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration import Batch
from ..errors import EmptyCalibration


def selection(
    shape, batch: Batch, folds: int, mask_name: str | None
) -> tuple[Tensor | None, list[int]]:
    """Which rows of an arranged (B, tokens, …) batch are no padding, those of a fold side by side,
    and how many each has."""
    device = next(v.device for v in batch.arguments.values() if isinstance(v, Tensor))
    mask = batch.masks.get(mask_name)
    if mask is None and folds == 1:
        return None, [torch.Size(shape).numel()]
    fold = ((torch.arange(batch.size) + batch.start) % folds).to(device)
    fold = fold.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    if mask is not None:
        fold = torch.where(counted(mask, shape), fold, folds)  # padding comes last
    order = fold.flatten().argsort(stable=True)
    counts = fold.flatten().bincount(minlength=folds + 1).tolist()[:folds]
    return order[: sum(counts)], counts


def counted(mask: Tensor, shape) -> Tensor:
    """Which of arranged rows of a shape (B, tokens, …) a mask (B, S), or (B, S, choices), leaves.

    Rows that all choices share are left where one of them has the token.
    """
    kept = mask != 0
    if mask.dim() > len(shape):
        kept = kept.any(-1)
    return kept.reshape(*kept.shape, *[1] * (len(shape) - kept.dim())).expand(shape)


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


def joined(held: list[tuple]) -> tuple[Tensor, Tensor | None, list[int]]:
    """Samples of several batches as of one, those of a fold side by side."""
    if len(held) == 1:
        return held[0]
    counts = [sum(fold) for fold in zip(*(counts for *_, counts in held))]
    joined = []
    for which in (0, 1):
        if held[0][which] is None:
            joined.append(None)
            continue
        parts = [entry[which].split(entry[2]) for entry in held]
        joined.append(torch.cat([part[fold] for fold in range(len(counts)) for part in parts]))
    return *joined, counts
