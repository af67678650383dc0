"""What the layers of a stage read, added up over the calibration batches of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..calibration import Batch
from ..errors import MergeError, NonFinite
from ..moments import Moments
from .layouts import Layout
from .lockstep import Forward, LeftOut
from .recipes import Making, Recipe, looks_at
from .rows import joined, selection
from .sums import Buffers, Sums
from .survey import Survey
from .views import Table, View

ROWS = 4096  # rows whose products are taken together, at least
Reads = Mapping[
    tuple, Forward
]  # (stream, task, number of the batch) -> the forward that waits at the layer
Gathered = tuple[View, Moments, Tensor]


class Unreached(Exception):
    """Some task or fold has no rows of a layer: it is averaged, for the reason given."""


class Gatherer:
    """Moments of layers from what the forwards of a pass are about to read.

    Args:
        known: what the survey found. tasks, batches: of the calibration.
        base, experts: their entries, on the device of the model.
        products: ``activations`` or ``float64``, see :class:`sequential.Pass`.
    """

    def __init__(
        self, known: Survey, tasks: list[str], batches: list[Batch], base, experts, products: str
    ):
        self.known, self.tasks, self.batches = known, tasks, batches
        self.base, self.experts, self.products = base, experts, products
        self.device = next(iter(base.values())).device
        self.looks = looks_at(self.device)
        self._finite: dict[str, Tensor] = {}
        self._selections: dict[tuple, tuple] = {}
        self._widths: dict[str, int] = {}
        self._row_counts: dict[tuple, torch.Size] = {}
        self._buffers = Buffers(self.device)

    def moments(
        self, views: list[View], reads: Reads, making: Making, shared: dict | None
    ) -> Iterator[Gathered]:
        """Of layers that read alike, one by one: the view, its moments, and its updates (K, g, m,
        n).

        Args:
            shared: sums on the experts' own inputs that other merges of the pass have already; None
                where there are no others.
        Raises: Unreached, LeftOut; NonFinite for activations that are NaN or infinite.
        """
        if isinstance(views[0], Table):
            yield self._counted(views[0], reads, making)
            return
        sums = self._summed(views, reads, making, shared)
        row = 0
        for v in views:
            updates = self._updates(v)
            rows = slice(row, row + updates.shape[2])
            row = rows.stop
            yield v, sums.moments(v.name, updates, making.recipe.own_weight, rows), updates

    def check(self) -> None:
        """Where values were not looked at on the way, because that waits for the device: NonFinite
        for the first layer that read one."""
        if self.looks or not self._finite:
            return
        found = torch.stack(list(self._finite.values()))  # (layers, T), read once
        for layer, finite in zip(self._finite, found.tolist()):
            if not all(finite):
                task = self.tasks[finite.index(False)]
                cure = "check this task's calibration data and weights"
                raise NonFinite(
                    f"layer {layer}, task {task}, inputs", torch.tensor(float("nan")), cure
                )

    def _updates(self, v: View) -> Tensor:
        base = v.matrix(self.base)
        return torch.stack([v.matrix(state) - base for state in self.experts.values()])

    def _summed(self, views, reads, making: Making, shared) -> Sums:
        """Sums over all batches for layers that read alike."""
        recipe, first = making.recipe, views[0]
        key = (first.reads, recipe.folds, recipe.keeps_full_energy)
        own_stream = making.stream == "expert" and shared is not None
        if own_stream and key in shared:
            sums = shared[key]
        else:
            g, m, n = torch.cat([v.matrix(self.base) for v in views], 1).shape
            sums = self._opened((g, m, n), recipe, reuse=not own_stream)
            for task in self.tasks:
                W = (
                    torch.cat([v.matrix(self.experts[task]) for v in views], 1)
                    if recipe.own_weight
                    else None
                )
                self._add_task(task, W, sums, first, reads, making)
        if own_stream:
            shared[key] = sums
        self._check_reached(sums.counts)
        self._finite[first.name] = finite = sums.finite()
        if self.looks and not bool(finite.all()):
            self._refuse_not_finite(self.tasks[finite.tolist().index(False)], first, reads, making)
        return sums

    def _opened(self, shape, recipe: Recipe, reuse: bool) -> Sums:
        """Empty sums, in the buffers of those of the layer before where they will not be needed
        again."""
        buffers = (
            self._buffers
            if reuse and recipe.solver is not None
            else Buffers(self.device, kept=True)
        )
        drift = bool(recipe.own_weight)
        return Sums(
            self.tasks,
            shape,
            buffers,
            folds=recipe.folds,
            drift=drift,
            full_energy=recipe.keeps_full_energy,
        )

    def _add_task(self, task, W, sums: Sums, v: View, reads, making: Making) -> None:
        """Add one task's batches, small ones together."""
        held, batches = [], [batch for batch in self.batches if batch.task == task]
        for batch in batches:
            found = self._pair(W, v, reads, making, batch)
            held += [] if found is None else [found]
            if held and (batch is batches[-1] or sum(len(Z) for Z, *_ in held) >= ROWS):
                sums.add(v, task, *joined(held))
                held = []

    def _pair(
        self, W, v: View, reads, making: Making, batch: Batch
    ) -> tuple[Tensor, Tensor | None, list[int]] | None:
        """Samples Z of a batch, the expert's answer r to its drift from them, and rows by fold;
        None where no forward has come."""
        read = reading(reads, making.stream, batch)
        own = reading(reads, "expert", batch) if W is not None else None
        if read is None or (own is None and W is not None):
            return None
        Z, counts = self._samples(v, read, batch, making.recipe.folds)
        if own is None:
            return Z, None, counts
        Z_own, own_counts = self._samples(v, own, batch, making.recipe.folds)
        if own_counts != counts:
            raise LeftOut(v.name, "which rows it reads depends on the weights before it")
        return Z, v.respond(W.to(Z.dtype), Z_own - Z), counts

    def _samples(self, v: View, read: Tensor, batch: Batch, folds: int) -> tuple[Tensor, list[int]]:
        rows, counts = self._rows(v, read, batch, folds)
        Z = v.samples(rows)
        return (Z.double() if self.products == "float64" else Z), counts

    def _rows(
        self, v: View, read: Tensor, batch: Batch, folds: int, layout: Layout | None = None
    ) -> tuple[Tensor, list[int]]:
        """Rows (N, d) of a batch that are no padding, those of a fold side by side, and how many
        each fold has.

        Args:
            layout: of tokens that are read behind the first call of a table; otherwise that of the
                layer.
        """
        first, rows = layout is None, v.rows(read)
        layout = self.known.layout(v.name, batch) if first else layout
        if not layout.fits(rows, batch):
            raise LeftOut(v.name, "its rows are laid out differently from batch to batch")
        if first:
            self._check_count(v, rows, batch)
        width = self._widths.setdefault(v.name, rows.shape[-1])
        if rows.shape[-1] != width:
            raise MergeError(
                f"task {batch.task!r}, batch {batch.number}: layer {v.name!r} expects rows of width {width}, found "
                f"{rows.shape[-1]}; give all batches inputs of one kind"
            )
        rows = layout.arrange(rows, batch.size)
        key = (batch.task, batch.number, folds, layout.mask, rows.shape[:-1])
        if key not in self._selections:
            self._selections[key] = selection(rows.shape[:-1], batch, folds, layout.mask)
        index, counts = self._selections[key]
        rows = rows.reshape(-1, rows.shape[-1])
        return (rows if index is None else rows.index_select(0, index)), counts

    def _check_count(self, v: View, rows: Tensor, batch: Batch) -> None:
        """LeftOut where the shapes of a batch do not settle how many rows a layer reads: they are
        chosen by what they hold."""
        shapes = tuple((k, z.shape) for k, z in batch.arguments.items() if isinstance(z, Tensor))
        if self._row_counts.setdefault((v.name, shapes), rows.shape[:-1]) != rows.shape[:-1]:
            raise LeftOut(v.name, "which rows it reads depends on what they hold")

    def _refuse_not_finite(self, task, v: View, reads, making: Making) -> None:
        for batch in self.batches:
            read = reading(reads, making.stream, batch) if batch.task == task else None
            if read is not None:
                rows = self._rows(v, read, batch, 1)[0]
                if not bool(v.samples(rows).isfinite().all()):
                    cure = "check this task's calibration data and weights"
                    raise NonFinite(f"layer {v.name}, task {task}, inputs", rows, cure)
        raise MergeError(
            f"layer {v.name}, task {task}: products of its inputs overflow; use products='float64'"
        )

    def _check_reached(self, counts: list[list[int]]) -> None:
        """Unreached unless every task and fold has rows."""
        silent = [task for task, found in zip(self.tasks, counts) if min(found) == 0]
        if silent:
            raise Unreached(f"too few calibration inputs of {silent} reach it")

    def _tokens(
        self, table: Table, read: Tensor, batch: Batch, folds: int, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (N,) of a batch that are no padding, and the fold of each."""
        rows, counts = self._rows(table, read, batch, folds, layout)
        fold = torch.arange(folds).repeat_interleave(torch.tensor(counts))
        return rows[:, 0], fold.to(rows.device)

    def _counted(self, table: Table, reads, making: Making) -> Gathered:
        """A table of the tokens that occur, and its moments: how often each does. All targets agree
        on it."""
        folds, found = making.recipe.folds, {task: [] for task in self.tasks}
        for batch in self.batches:
            read = reading(reads, making.stream, batch)
            if read is not None:
                found[batch.task].append(self._tokens(table, read, batch, folds))
                for key, layout in self.known.later_lookups(table.name, batch):
                    found[batch.task].append(
                        self._tokens(table, batch.arguments[key], batch, folds, layout)
                    )
        tokens = [ids for parts in found.values() for ids, _ in parts]
        if not tokens:
            raise Unreached("no calibration input reaches it")
        table = replace(table, ids=torch.cat(tokens).unique())
        updates, g = self._updates(table), len(table.ids)
        options = {
            "g": g,
            "folds": folds,
            "layer": table.name,
            "device": updates.device,
            "shared": True,
        }
        moments = Moments.zeros(
            self.tasks, 1, updates.shape[2], full_energy=making.recipe.keeps_full_energy, **options
        )
        for (task, parts), update in zip(found.items(), updates):
            for ids, fold in parts:
                places = fold * g + torch.searchsorted(table.ids, ids)
                moments.count_copies(
                    task, places.bincount(minlength=folds * g).reshape(folds, -1), update
                )
        self._check_reached(moments.count.tolist())
        return table, moments, updates


def reading(reads: Reads, stream, batch: Batch) -> Tensor | None:
    """What a forward of a stream is about to read, None where it has not come to the layer."""
    forward = reads.get((stream, batch.task, batch.number))
    return None if forward is None else forward.payload
