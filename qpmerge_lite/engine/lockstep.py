"""Forwards of the real model in lockstep: they take turns on one model, pause where told, and go on
when told.

                 expert's weights   ──▶ embed ─┐ ┌─▶ norm ─┐ ┌─▶ q k v ─┐
    one batch                                  │ │         │ │          │      every forward pauses
    before a layer;
                 merged weights     ──▶ embed ─┤ ├─▶ norm ─┤ ├─▶ q k v ─┤      when all that come to
                 it are there, it is
    next batch   …                             ▼ │         ▼ │          ▼      solved, its merged
    weights are set, and
                                             solve       solve        solve    all go on

A forward is a greenlet: a function that can be left in the middle and entered again. One thread,
one order, one run of
every forward, nothing recorded: what a paused forward knows stays in its own frames. The model is
never copied; its parameters and buffers are pointed to the weights of whichever forward runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from greenlet import greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..calibration import Batch
from .effects import ABSENT, Traces, blaming, copied, modes, set_modes, version_of
from .orders import Point
from .processes import ALONE, Processes, Restart

Stream = str | tuple[str, str]  # whose inputs are read: "expert", or a kind of inputs and a merge


class LeftOut(Restart):
    """A layer turned out not to be one that a pass can solve: the pass starts again without it."""

    def __init__(self, layer: str, reason: str):
        super().__init__(layer, reason)
        self.layer, self.reason = layer, reason


class Apart(Restart):
    """Two layers that read one tensor in the survey read two in another batch: the pass starts
    again with them apart."""

    def __init__(self, layer: str):
        super().__init__(layer)
        self.layer = layer


class Disordered(Restart):
    """A forward came to a layer that was visited without it: the pass starts again, knowing in
    which order each comes to them.

    Attributes:
        orders: of every forward, the layers in the order in which it came to them; none where that
            was not found out.
    """

    def __init__(self, orders: list[list[Point]]):
        super().__init__()
        self.orders = orders


class Stage:
    """A model on which forwards take turns: its parameters and buffers point to the state of the
    one that runs."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._shown: Mapping[str, Tensor] | None = None
        # entrances of blocks in front of which a Rerun waits, and layers inside
        self.parking: dict[Point, list[Point]] = {}
        state = model.state_dict(keep_vars=True)
        self._places = []
        for path, module in model.named_modules():
            for entries in (module._parameters, module._buffers):
                for key in entries:
                    name = f"{path}.{key}" if path else key
                    if name in state and entries[key] is not None:
                        self._places.append((entries, key, name))
        self._original = {name: entries[key] for entries, key, name in self._places}
        self._recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
        self.copies_inputs = False
        self._written: list[tuple[dict, str]] = []  # places that forwards write to
        self._before: list = []

    def keep(self, traces: Traces) -> None:
        """Heed what forwards of the model leave behind, as the survey saw it: every one then has
        values of its own."""
        self.copies_inputs = traces.inputs
        for path, kind, key in sorted(traces.values):
            module = self.model.get_submodule(path)
            self._written.append((module._buffers if kind == "buffer" else module.__dict__, key))
        self._before = self.values()

    def values(self) -> list:
        """What the places that forwards write to hold now."""
        return [entries.get(key, ABSENT) for entries, key in self._written]

    def set_values(self, values: list) -> None:
        """Give the places that forwards write to other values, those of :meth:`values`."""
        for (entries, key), value in zip(self._written, values):
            if value is ABSENT:
                entries.pop(key, None)
            else:
                entries[key] = value

    def arguments(self, batch: Batch) -> dict:
        """What the model is called with."""
        return tree_map(copied, batch.arguments) if self.copies_inputs else batch.arguments

    def show(self, state: Mapping[str, Tensor]) -> None:
        """Point the model to the entries of a state, name -> (…); nothing is copied."""
        if state is self._shown:
            return
        for entries, key, name in self._places:
            entries[key] = state[name]
        for module in self._recurrent:  # they keep a list of their own
            module._flat_weights = [getattr(module, key) for key in module._flat_weights_names]
        self._shown = state

    def begin(self, state: Mapping[str, Tensor]) -> None:
        """Point the model to a state, name -> (…), for a new forward, with values of its own where
        forwards write."""
        if not self._written:
            return self.show(state)
        self.set_values(self._before)
        self._shown = None
        self.show(state)
        self.set_values(tree_map(copied, self.values()))

    def restore(self) -> None:
        """The model as it was."""
        self.show(self._original)
        self.set_values(self._before)


class Forward(greenlet):
    """One forward of the model under a state, on one calibration batch.

    After :meth:`advance`, ``at`` is the point where it waits, None once it has ended, and
    ``payload`` what it brought: what a layer is about to read, or what a block is about to be
    called with or to return.
    """

    def __init__(
        self,
        stage: Stage,
        state: Mapping[str, Tensor],
        batch: Batch,
        kind: Stream,
        function: Callable[[], object] | None = None,
    ):
        super().__init__()
        self.stage, self.state, self.batch, self.kind = stage, state, batch, kind
        self.at: Point | None = None
        self.payload, self.answer, self._function = None, None, function
        self.started = False
        self.own: list | None = None  # values on modules, which other forwards write to as well
        # layer -> the tensor that it last read, and how often that had been written to
        self._called: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._modes: tuple | None = None
        self._inference = False  # the scheduler's mode

    def run(self):
        """The forward itself; what goes wrong in it is the fault of its batch."""
        self.started = True
        with blaming(self.batch):
            if self._function is not None:
                return self._function()
            return self.stage.model(**self.stage.arguments(self.batch))

    def advance(self) -> None:
        """Run to the next point, or to the end."""
        answer, self.payload, self.answer = self.answer, None, None
        if self.own is None:
            self.stage.begin(self.state)
        else:
            self.stage.show(self.state)
            self.stage.set_values(self.own)
        outside, self._inference = modes(), torch.is_inference_mode_enabled()
        set_modes(self._modes or outside)
        try:
            arrived = self.switch(answer) if self.started else self.switch()
        finally:
            self._modes, self.own = modes(), self.stage.values()
            set_modes(outside)
        if self.dead:
            self.at, self._called = None, {}
        else:
            self.at, self.payload = arrived

    def pause(self, point: Point, payload):
        """Called by hooks inside the forward: hand over to the scheduler, and return what it
        answers."""
        if not self.stops_at(point):
            return None
        with torch.inference_mode(
            self._inference
        ):  # what the scheduler makes outlives a forward in inference mode
            return self.parent.switch((point, payload))

    def stops_at(self, point: Point) -> bool:
        """Whether the forward waits at a point."""
        return point not in self.stage.parking

    def reads_same(self, leader: str, read: Tensor) -> bool:
        """Whether a tensor of any shape is the one that a layer named ``leader`` has just read."""
        if leader not in self._called:
            return False
        reference, version = self._called[leader]
        return reference() is read and version == version_of(read)

    def note(self, layer: str, read: Tensor) -> bool:
        """Remember what a layer reads, of any shape; whether it had been called before."""
        called_before = layer in self._called
        self._called[layer] = weakref.ref(read), version_of(read)
        return called_before


def run(
    forwards: list[Forward],
    sequence: list[Point],
    visit: Callable[[Point, list[Forward]], bool],
    processes: Processes = ALONE,
) -> None:
    """Run forwards in lockstep: all that come to a point wait there, ``visit`` is called, and they
    go on.

    Args:
        sequence: every point at which a forward may wait. Of the points where some wait, the first
            is visited.
        visit: called with the point and the forwards there; whether to go on.
        processes: that have forwards of their own. All visit the points where one of them waits.
    Raises: Disordered when a forward comes to a layer that was visited without it.
    """
    visited, places = set(), {point: place for place, point in enumerate(sequence)}
    came: dict[Forward, list[Point]] = {forward: [] for forward in forwards}

    def advance(forward):
        forward.advance()
        if forward.at is not None and forward.at[0] == "layer":
            came[forward].append(forward.at)

    def go_on(some: list[Forward]) -> set[int]:
        """Advance some of the forwards; the places in the sequence where any of all then wait."""
        for forward in some:
            advance(forward)
        return {places[forward.at] for forward in forwards if forward.at is not None}

    def end() -> list[list[Point]]:
        """Advance all forwards to their ends; the layers that each came to."""
        for forward in forwards:
            while forward.at is not None:
                advance(forward)
        return list(came.values())

    with _ended(forwards):
        arrived = forwards
        while waiting := set().union(*processes.each(partial(go_on, arrived))):
            point = sequence[min(waiting)]
            if point in visited and point[0] == "layer":
                raise Disordered([order for own in processes.each(end) for order in own])
            visited.add(point)
            arrived = [forward for forward in forwards if forward.at == point]
            if not visit(point, arrived) and len(waiting) == 1:
                return


@contextmanager
def _ended(forwards: list[Forward]) -> Iterator[None]:
    """Forwards of which none is left waiting in the end."""
    try:
        yield
    finally:
        outside = modes()
        for forward in forwards:
            if forward.started and not forward.dead:
                forward.throw()
        set_modes(outside)


def hand_over(arrived: list[Forward]) -> None:
    """At the border of a block, the expert's forward goes on with what the merged one has."""
    merged: dict[tuple, object] = {}
    for forward in arrived:
        if forward.kind[0] == "merged":
            merged[forward.kind[1], forward.batch.task, forward.batch.number] = forward.payload
    for forward in arrived:
        if forward.kind[0] == "block":
            given = merged.get((forward.kind[1], forward.batch.task, forward.batch.number))
            forward.answer = tree_map(copied, given)  # either may work in place
