"""Where the sequences and tokens of a batch lie in the rows that a layer reads.

Found out by comparing rows of a few sequences with those of one sequence less in another order, and
of sequences with one
token less: what changes its size with the sequences is their axis, what changes it with the tokens
is theirs. No guess from shapes that happen to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration import Batch
from ..errors import MergeError
from .lockstep import LeftOut


@dataclass(frozen=True)
class Layout:
    """Where the sequences and tokens of a batch lie in the rows (…, d) that a layer reads.

    Attributes:
        axis: the axis that holds the sequences, with several rows of each next to each other or, if
            not ``sequences_first``, one row of each next to each other; None where all sequences
            share the rows.
        token_axis: the axis of tokens behind that of the sequences, once these have been brought to
            the front.
        mask: the model's argument that says which tokens are padding, None where nothing is.
    """

    axis: int | None
    sequences_first: bool = True
    token_axis: int | None = None
    mask: str | None = None

    def arrange(self, rows: Tensor, size: int) -> Tensor:
        """Rows (…, d) of a batch of ``size`` sequences as (size, tokens, …, d)."""
        if self.axis is None:
            return rows.reshape(1, -1, rows.shape[-1]).expand(size, -1, -1)
        rows = rows.movedim(self.axis, 0)
        if self.sequences_first:
            rows = rows.unflatten(0, (size, len(rows) // size))
        else:
            rows = rows.unflatten(0, (len(rows) // size, size)).movedim(1, 0)
        return rows if self.token_axis is None else rows.movedim(self.token_axis, 1)

    def fits(self, rows: Tensor, batch: Batch) -> bool:
        """Whether rows (…, d) of another batch can lie like this."""
        if self.axis is None:
            return True
        if rows.dim() <= self.axis + 1 or rows.shape[self.axis] % batch.size:
            return False
        mask = batch.mask(self.mask)
        return mask is None or self.arrange(rows, batch.size).shape[: mask.dim()] == mask.shape


def find_layout(
    layer: str,
    rows: Tensor,
    fewer: Tensor | None,
    shorter: Mapping[str, Tensor | None],
    batch: Batch,
    *,
    padded: bool,
    table: bool = False,
) -> Layout:
    """The layout of what a layer reads of a batch of few sequences.

    Args:
        rows: (…, d). fewer: rows (…, d) without the last sequence, the others in reverse order.
        shorter: mask -> rows (…, d) of the sequences of ``fewer`` with one token less.
        padded: whether some of the calibration batches have padding.
        table: whether the layer looks up tokens.
    Raises: LeftOut or MergeError with the reason where there is none.
    """
    if fewer is None:
        return _layout_by_shape(rows, batch, padded)
    size = batch.size
    layout = _sequences_of(layer, rows, fewer, size, table)
    relations = {}
    for mask, cut in shorter.items():
        relations[mask] = _relation(layout, fewer, cut, size - 1, batch, mask)
    axes = [(mask, axis) for mask, of_mask in relations.items() for axis in of_mask or ()]
    if len(axes) > 1:
        raise LeftOut(layer, "reads pairs of tokens")
    if not axes:
        if padded and None in relations.values():
            if rows.dim() == 2:
                raise LeftOut(layer, "which rows it reads depends on what they hold")
            raise _unmatched(rows, batch)
        if layout.axis is None and not (rows.dim() == 2 or len(rows) == 1):
            raise LeftOut(layer, "its rows are not those of the batch's sequences")
        return layout
    mask, axis = axes[0]
    return replace(layout, token_axis=axis, mask=mask if mask in batch.masks else None)


def _sequences_of(layer, rows, fewer, size, table) -> Layout:
    """The axis of sequences: the one that shrinks with them, and whose rows are the same as before,
    in reverse order."""
    if rows.dim() != fewer.dim():
        raise LeftOut(layer, "its rows are laid out differently from batch to batch")
    axes = [i for i in range(rows.dim() - 1) if rows.shape[i] != fewer.shape[i]]
    if not axes and table:
        return Layout(None)
    if len(axes) != 1:
        raise LeftOut(layer, "its rows are not those of the batch's sequences")
    copies, rest = divmod(rows.shape[axes[0]], size)
    if rest or fewer.shape[axes[0]] != copies * (size - 1):
        raise LeftOut(layer, "how many rows it reads depends on what they hold")
    for sequences_first in (True, False):
        layout = Layout(axes[0], sequences_first)
        if _close(layout.arrange(rows, size)[: size - 1].flip(0), layout.arrange(fewer, size - 1)):
            return layout
    raise LeftOut(layer, "what it reads of a sequence depends on the others of its batch")


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree up to rounding; what is not finite is reported where it is read."""
    if not one.is_floating_point() or one.shape != other.shape:
        return torch.equal(one, other)
    one, other = one.double(), other.double()
    if not bool(one.isfinite().all()):
        return True
    return bool((one - other).norm() <= 0.03 * other.norm() + 1e-12)


def _relation(layout: Layout, rows, shorter, size, batch, mask) -> list[int] | None:
    """Arranged axes of rows that shrink with the tokens of a mask, none where rows do not depend on
    them one by one.

    None stands for rows that depend on the tokens and are not theirs. Without calls on shorter
    sequences, length decides.
    """
    arranged, of_mask = layout.arrange(rows, size), batch.masks.get(mask)
    length = None if of_mask is None else of_mask.shape[1]
    if shorter is None:
        return [i for i in range(1, arranged.dim() - 1) if arranged.shape[i] == length] or None
    if shorter.dim() != rows.dim():
        return None
    if layout.axis is None:
        return [1] * sum(a != b for a, b in zip(rows.shape[:-1], shorter.shape[:-1]))
    if shorter.shape[layout.axis] % size:
        return None
    cut = layout.arrange(shorter, size)
    axes = [i for i in range(1, cut.dim() - 1) if cut.shape[i] != arranged.shape[i]]
    for axis in axes:
        one_less = arranged.shape[axis] - cut.shape[axis] == 1
        if not one_less or length not in (None, arranged.shape[axis]):
            return None
    independent = not axes and torch.equal(arranged, cut)
    choices = 1 if of_mask is None else of_mask[0, 0].numel()
    one_row_each = arranged[..., 0].numel() == size * choices
    return axes if axes or independent or one_row_each else None


def _unmatched(rows, batch) -> MergeError:
    masks = {name: tuple(mask.movedim(1, -1).shape) for name, mask in batch.masks.items()}
    return MergeError(
        f"expected rows that can be matched to the tokens of {masks}, found {tuple(rows.shape)}; "
        "the model does not keep one row per token there: give it batches without padding (masks "
        "of ones), or name the layers to solve with layers="
    )


def _layout_by_shape(rows, batch: Batch, padded) -> Layout:
    """Where a model runs on whole batches only: the first axis as long as the batch."""
    if padded:
        raise MergeError(
            "the model does not run on some of a batch's sequences alone, so which rows are "
            "padding cannot be told; give it batches without padding (masks of ones)"
        )
    axes = [i for i in range(rows.dim() - 1) if rows.shape[i] == batch.size]
    if axes:
        return Layout(axes[0])
    if rows.shape[0] % batch.size == 0 and rows.dim() > 1:
        return Layout(0)
    raise LeftOut("", "its rows are not those of the batch's sequences")
