"""Rows that layers read of batches, and what is seen of them on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..calibration import Batch
from ..errors import MergeError
from .layouts import Layout
from .lockstep import LeftOut
from .processes import Processes
from .rows import Selection, selection
from .survey import Survey
from .views import View

Value = TypeVar("Value")


class Rows(NamedTuple):
    """Rows (N, d) that a layer reads and are no padding, those of a fold side by side, and how many
    each fold has."""

    rows: Tensor
    counts: list[int]


class Reader:
    """Takes the rows that are no padding from what layers read, and sees that their number does not
    depend on what batches hold.

    Args:
        known: what the survey found.
        processes: that share the pass.
    """

    def __init__(self, known: Survey, processes: Processes):
        self.known, self.processes = known, processes
        self._selections: dict[tuple, Selection] = {}
        self._widths: dict[str, int] = {}
        # layer -> shapes of a batch -> of the rows that it reads
        self._row_counts: dict[str, dict[tuple, torch.Size]] = defaultdict(dict)

    def in_step(self, v: View, read: Callable[[], Value]) -> Value:
        """What this process finds out by reading a layer, when all processes have read it: what one
        refuses all refuse, and each knows how many rows the others have seen."""
        values: list[Value] = []

        def read_and_tell() -> dict[tuple, torch.Size]:
            values.append(read())
            return self._row_counts[v.name]

        for counts in self.processes.each(read_and_tell):
            for shapes, rows in counts.items():
                self._check_count(v, shapes, rows)
        return values[0]

    def rows(
        self, v: View, read: Tensor, batch: Batch, folds: int, later: Layout | None = None
    ) -> Rows:
        """Rows of a batch that are no padding, from what the module reads.

        Args:
            later: layout of tokens that are read behind the first call of a table.
        """
        rows = v.rows(read)
        layout = self.known.layout(v.name, batch) if later is None else later
        if not layout.fits(rows, batch):
            raise LeftOut(v.name, "its rows are laid out differently from batch to batch")
        if later is None:
            arguments = batch.arguments.items()
            shapes = tuple((k, z.shape) for k, z in arguments if isinstance(z, Tensor))
            self._check_count(v, shapes, rows.shape[:-1])
        width = self._widths.setdefault(v.name, rows.shape[-1])
        if rows.shape[-1] != width:
            raise MergeError(
                f"task {batch.task!r}, batch {batch.number}: layer {v.name!r} expects rows of "
                f"width {width}, found {rows.shape[-1]}; give all batches inputs of one kind"
            )
        rows = layout.arrange(rows, batch.size)
        key = (batch.task, batch.number, folds, layout.mask, rows.shape[:-1])
        if key not in self._selections:
            self._selections[key] = selection(rows.shape[:-1], batch, folds, layout.mask)
        places, counts = self._selections[key]
        rows = rows.reshape(-1, rows.shape[-1])
        return Rows(rows if places is None else rows.index_select(0, places), counts)

    def _check_count(self, v: View, shapes: tuple, rows: torch.Size) -> None:
        """LeftOut where the shapes of a batch do not settle how many rows a layer reads: they are
        chosen by what they hold."""
        if self._row_counts[v.name].setdefault(shapes, rows) != rows:
            raise LeftOut(v.name, "which rows it reads depends on what they hold")
