"""What the layers of a stage read, added up over the calibration batches of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibration import Batch
from ..errors import MergeError, NonFinite
from ..experts import State
from ..moments import Moments
from .layouts import Layout
from .lockstep import Forward, LeftOut, Stream
from .processes import ALONE, Processes
from .reading import Reader, Rows
from .recipes import LayerMoments, Making, Recipe, looks_at
from .rows import Samples, joined
from .sums import Buffers, Sums
from .survey import Survey
from .views import Table, View

ROWS = 4096  # rows whose products are taken together, at least
# (stream, task, number of the batch) -> the forward that waits at the layer
Reads = Mapping[tuple, Forward]
CURE = "check this task's calibration data and weights"


class Tokens(NamedTuple):
    """Tokens (N,) that a table looks up and are no padding, and the fold (N,) of each."""

    ids: Tensor
    fold: Tensor


class Inputs(NamedTuple):
    """What layers that read alike read, added up; valid until the next are asked for.

    Attributes:
        views: the layers; that of a table names the tokens that occur.
        C: ``Σ x xᵀ`` (T, F, g, n, n) float64, to be read on and below the diagonal.
        counts: samples (T, F) of every task and fold.
        rtol: rounding noise of C, relative to its largest eigenvalue.
    """

    views: list[View]
    C: Tensor
    counts: Tensor
    rtol: float


class Unreached(Exception):
    """Some task or fold has no rows of a layer: it is averaged, for the reason given."""


class Gatherer:
    """Moments of layers from what the forwards of a pass are about to read.

    Args:
        known: what the survey found. tasks: of the calibration.
        batches: those whose forwards this process runs.
        base, experts: their entries, on the device of the model.
        products: precision of products of activations, ``activations`` or ``float64``.
        processes: that share the pass.
    """

    def __init__(
        self,
        known: Survey,
        tasks: list[str],
        batches: list[Batch],
        *,
        base: State,
        experts: Mapping[str, State],
        products: str,
        processes: Processes = ALONE,
    ):
        self.known, self.tasks, self.batches = known, tasks, batches
        self.base, self.experts, self.products = base, experts, products
        self.processes = processes
        self.device = next(iter(base.values())).device
        self.looks = looks_at(self.device)
        self._finite: dict[str, Tensor] = {}
        self._reader = Reader(known, processes)
        self._buffers = Buffers(self.device)

    def moments(
        self, views: list[View], reads: Reads, making: Making, shared: dict | None
    ) -> Iterator[LayerMoments]:
        """Of layers that read alike, one by one.

        Args:
            shared: sums on the experts' own inputs that other merges of the pass have already, and
                to which those of this one are added; None where there are no others.
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
            moments = sums.moments(v.name, updates, making.recipe.own_weight, rows)
            yield LayerMoments(v, moments, updates)

    def inputs(self, views: list[View], reads: Reads, making: Making) -> Inputs:
        """Sums over what layers that read alike read, and over nothing else.

        Raises: what :meth:`moments` raises.
        """
        if isinstance(views[0], Table):
            table = self._counted(views[0], reads, making)
            moments = table.moments
            return Inputs([table.view], moments.C, moments.count, moments.rtol)
        sums = self._summed(views, reads, making, None)
        return Inputs(views, sums.C, torch.tensor(sums.counts), sums.rtol)

    def check(self) -> None:
        """Where values were not looked at on the way, because that waits for the device: NonFinite
        for the first layer that read one."""
        if self.looks or not self._finite:
            return
        by_layer = torch.stack(list(self._finite.values()))  # (layers, T), read once
        for layer, finite in zip(self._finite, by_layer.tolist()):
            if not all(finite):
                where = f"layer {layer}, task {self.tasks[finite.index(False)]}, inputs"
                raise NonFinite(where, torch.tensor(float("nan")), CURE)

    def _updates(self, v: View) -> Tensor:
        """Residual updates (K, g, m, n) of a layer."""
        base = v.matrix(self.base)
        return torch.stack([v.matrix(state) - base for state in self.experts.values()])

    def _summed(self, views: list[View], reads: Reads, making: Making, shared: dict | None) -> Sums:
        """Sums over all batches for layers that read alike."""
        recipe, first = making.recipe, views[0]
        key = (first.reads, recipe.folds, recipe.keeps_full_energy)
        cache = {} if shared is None or making.stream != "expert" else shared
        if key not in cache:
            shapes = [v.matrix(self.base).shape for v in views]
            g, _, n = shapes[0]
            outputs = sum(m for _, m, _ in shapes)
            cache[key] = self._opened((g, outputs, n), recipe, reused=cache is not shared)
            self._reader.in_step(first, partial(self._add_own, views, cache[key], reads, making))
            cache[key].add_up(self.processes)
        sums = cache[key]
        self._check_reached(sums.counts)
        self._finite[first.name] = finite = sums.finite()
        if self.looks and not bool(finite.all()):
            self._refuse_not_finite(self.tasks[finite.tolist().index(False)], first, reads, making)
        return sums

    def _opened(self, shape: tuple[int, int, int], recipe: Recipe, reused: bool) -> Sums:
        """Empty sums for layers of a shape (g, m, n), in the memory of those before where these are
        ``reused``."""
        lasting = recipe.solver is None or not reused
        buffers = Buffers(self.device, reused=False) if lasting else self._buffers
        return Sums(
            self.tasks,
            shape,
            buffers,
            folds=recipe.folds,
            drift=bool(recipe.own_weight),
            full_energy=recipe.keeps_full_energy,
        )

    def _add_own(self, views: list[View], sums: Sums, reads: Reads, making: Making) -> None:
        """Add the batches of this process to the sums of layers that read alike."""
        for task in self.tasks:
            self._add_task(task, views, sums, reads, making)

    def _add_task(
        self, task: str, views: list[View], sums: Sums, reads: Reads, making: Making
    ) -> None:
        """Add one task's batches to the sums of layers that read alike, small ones together."""
        W = None
        if making.recipe.own_weight:
            W = torch.cat([v.matrix(self.experts[task]) for v in views], 1)
        batches = [batch for batch in self.batches if batch.task == task]
        waiting: list[Samples] = []
        for batch in batches:
            samples = self._samples(W, views[0], reads, making, batch)
            if samples is not None:
                waiting.append(samples)
            enough = batch is batches[-1] or sum(len(part.Z) for part in waiting) >= ROWS
            if waiting and enough:
                sums.add(views[0], task, joined(waiting))
                waiting = []

    def _samples(
        self, W: Tensor | None, v: View, reads: Reads, making: Making, batch: Batch
    ) -> Samples | None:
        """Samples of a batch; None where no forward has come.

        Args:
            W: the expert's (g, m, n), where its own inputs are looked at too.
        """
        read = reading(reads, making.stream, batch)
        if read is None:
            return None
        Z, counts = self._inputs(v, read, batch, making.recipe.folds)
        if W is None:
            return Samples(Z, None, counts)
        own_read = reading(reads, "expert", batch)
        if own_read is None:
            return None
        Z_own, own_counts = self._inputs(v, own_read, batch, making.recipe.folds)
        if own_counts != counts:
            raise LeftOut(v.name, "which rows it reads depends on the weights before it")
        return Samples(Z, v.respond(W.to(Z.dtype), Z_own - Z), counts)

    def _inputs(self, v: View, read: Tensor, batch: Batch, folds: int) -> Rows:
        """What a layer makes of the rows that it reads, in the precision that products are taken
        in."""
        rows, counts = self._reader.rows(v, read, batch, folds)
        Z = v.samples(rows)
        return Rows(Z.double() if self.products == "float64" else Z, counts)

    def _refuse_not_finite(self, task: str, v: View, reads: Reads, making: Making) -> None:
        """NonFinite naming what is not finite in a task's inputs; MergeError where only products
        are."""
        self.processes.each(partial(self._check_finite, task, v, reads, making))
        raise MergeError(
            f"layer {v.name}, task {task}: products of its inputs overflow; use products='float64'"
        )

    def _check_finite(self, task: str, v: View, reads: Reads, making: Making) -> None:
        """NonFinite for what a layer reads in this process of a task."""
        for batch in self.batches:
            read = reading(reads, making.stream, batch) if batch.task == task else None
            if read is not None:
                rows = self._reader.rows(v, read, batch, 1).rows
                if not bool(v.samples(rows).isfinite().all()):
                    raise NonFinite(f"layer {v.name}, task {task}, inputs", rows, CURE)

    def _check_reached(self, counts: list[list[int]]) -> None:
        """Unreached unless every task and fold has rows."""
        silent = [task for task, of_folds in zip(self.tasks, counts) if min(of_folds) == 0]
        if silent:
            raise Unreached(f"too few calibration inputs of {silent} reach it")

    def _tokens(
        self, table: Table, read: Tensor, batch: Batch, folds: int, later: Layout | None = None
    ) -> Tokens:
        """Tokens of a batch, from what the module reads; ``later`` is their layout behind its first
        call."""
        rows, counts = self._reader.rows(table, read, batch, folds, later)
        fold = torch.arange(folds).repeat_interleave(torch.tensor(counts))
        return Tokens(rows[:, 0], fold.to(rows.device))

    def _looked_up(self, table: Table, reads: Reads, making: Making) -> dict[str, list[Tokens]]:
        """What a table looks up: task -> tokens, call by call."""
        folds = making.recipe.folds
        tokens: dict[str, list[Tokens]] = {task: [] for task in self.tasks}
        for batch in self.batches:
            read = reading(reads, making.stream, batch)
            if read is None:
                continue
            tokens[batch.task].append(self._tokens(table, read, batch, folds))
            for key, layout in self.known.later_lookups(table.name, batch):
                argument = batch.arguments[key]
                tokens[batch.task].append(self._tokens(table, argument, batch, folds, layout))
        return tokens

    def _of_all_processes(
        self, table: Table, own: dict[str, list[Tokens]], folds: int
    ) -> dict[str, list[Tokens]]:
        """Tokens of all processes, task -> tokens, those of several processes as of one call."""
        if self.processes.count == 1:
            return own
        rows = table.module.num_embeddings
        shape = len(own), folds * rows
        counts = torch.zeros(shape, dtype=torch.int64, device=self.device)
        for of_task, parts in zip(counts, own.values()):
            for part in parts:
                of_task += (part.fold * rows + part.ids).bincount(minlength=folds * rows)
        self.processes.add([counts])
        tokens: dict[str, list[Tokens]] = {}
        for task, of_task in zip(own, counts):
            places = torch.arange(folds * rows, device=self.device).repeat_interleave(of_task)
            tokens[task] = [Tokens(places % rows, places // rows)] if len(places) else []
        return tokens

    def _counted(self, table: Table, reads: Reads, making: Making) -> LayerMoments:
        """A table of the tokens that occur, and its moments: how often each does. All targets agree
        on it."""
        folds = making.recipe.folds
        own = self._reader.in_step(table, partial(self._looked_up, table, reads, making))
        tokens = self._of_all_processes(table, own, folds)
        every = [part.ids for parts in tokens.values() for part in parts]
        if not every:
            raise Unreached("no calibration input reaches it")
        ids = torch.cat(every).unique()
        table = replace(table, ids=ids)
        updates, g = self._updates(table), len(ids)
        moments = Moments.zeros(
            self.tasks,
            1,
            updates.shape[2],
            g=g,
            folds=folds,
            layer=table.name,
            device=updates.device,
            full_energy=making.recipe.keeps_full_energy,
            shared=True,
        )
        for (task, parts), update in zip(tokens.items(), updates):
            for part in parts:
                places = part.fold * g + torch.searchsorted(ids, part.ids)
                counts = places.bincount(minlength=folds * g).reshape(folds, -1)
                moments.count_copies(task, counts, update)
        self._check_reached(moments.count.tolist())
        return LayerMoments(table, moments, updates)


def reading(reads: Reads, stream: Stream, batch: Batch) -> Tensor | None:
    """What a forward of a stream is about to read, None where it has not come to the layer."""
    forward = reads.get((stream, batch.task, batch.number))
    return None if forward is None else forward.payload
