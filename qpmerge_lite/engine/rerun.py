"""Forwards that hold less while they wait, and which of a pass's forwards are such."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..calibration import Batch
from .effects import copied
from .lockstep import Disordered, Forward, Stage
from .orders import Point
from .probes import numbers
from .survey import Survey

PLAIN = (Tensor, type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)
ACTIVATIONS = 2**29  # bytes that paused forwards may always hold

_most: ContextVar[float] = ContextVar("most", default=inf)


@contextmanager
def holding(most: float) -> Iterator[None]:
    """Forwards of passes that run inside hold no more bytes while they wait, whatever they are
    allowed. The same merge, bit for bit."""
    token = _most.set(most)
    try:
        yield
    finally:
        _most.reset(token)


class Rerun(Forward):
    """A forward that waits in front of blocks, and holds what they are given and nothing else.

    It comes to a layer in a block by running the block as far as there, once for every layer: less
    memory, more time.
    """

    def __init__(self, *args):
        self._inside: list[Point] = []
        self._given: tuple[tuple, dict] = (), {}  # what the block was called with
        self._stays = False
        super().__init__(*args)

    def stops_at(self, point: Point) -> bool:
        """In front of blocks, and at layers outside of them."""
        if self._stays:
            return super().stops_at(point)
        return point in self.stage.parking or not any(
            point in inside for inside in self.stage.parking.values()
        )

    def advance(self) -> None:
        """To the next layer inside the block, or past it."""
        if self._inside:
            self._inside = self._inside[1:]
        while not self._inside:
            super().advance()
            if self._arrived not in self.stage.parking:
                break
            if not all(isinstance(leaf, PLAIN) for leaf in tree_leaves(self._brought)):
                # an object that blocks change, such as a cache: a block cannot be run twice
                self._stays = True
                continue
            self._inside, self._given = self.stage.parking[self._arrived], self._brought
            self._block = self.stage.model.get_submodule(self._arrived[1])

    @property
    def at(self) -> Point | None:
        """The point where it waits, or would."""
        return self._inside[0] if self._inside else self._arrived

    @at.setter
    def at(self, point: Point | None) -> None:
        self._arrived = point

    @property
    def payload(self):
        """What the layer reads, None if the block does not call it; worked out anew whenever it is
        asked for."""
        if not self._inside:
            return self._brought
        args, kwargs = tree_map(copied, self._given)
        within = _Within(self, self._inside, lambda: self._block(*args, **kwargs))
        within.advance()
        read = within.payload
        if not within.dead:
            within.throw()
        return read

    @payload.setter
    def payload(self, brought) -> None:
        self._brought = brought


class _Within(Forward):
    """A block of a forward run up to one of its layers.

    Args:
        outer: the forward, as it stands in front of the block.
        points: the layer, and the layers of the block that are to be solved behind it.
        function: runs the block.
    """

    def __init__(self, outer: Forward, points: list[Point], function: Callable[[], object]):
        super().__init__(outer.stage, outer.state, outer.batch, outer.kind, function)
        self.own = tree_map(copied, outer.own)
        self._layer, *self._later = points

    def stops_at(self, point: Point) -> bool:
        """At the layer. Raises: Disordered where one that is to be solved behind it comes first."""
        if point in self._later:
            raise Disordered([])
        return point == self._layer

    def reads_same(self, leader: str, read: Tensor) -> bool:
        """Checked when the block is run for good."""
        return True


def _between(sequence: list[Point], path: str) -> list[Point]:
    """Points between the entrance of a block and its exit."""
    if ("enter", path) not in sequence or ("leave", path) not in sequence:
        return []
    return sequence[sequence.index(("enter", path)) : sequence.index(("leave", path))]


class Room:
    """Decides which forwards of a pass wait in front of blocks, so that together they hold no more
    than allowed.

    Args:
        stage: whose ``parking`` is set, to what forwards wait in front of.
        known: what the survey found.
        leaders: layers in front of which forwards wait.
        batches, streams: a forward is run for each of the batches and streams.
        blocks: paths of blocks that may be run again; none where their borders have other uses.
        allowed: bytes; by default :data:`ACTIVATIONS`, or what the layers of one block read
            together, if that is more. Never more than :func:`holding` says.
    """

    def __init__(
        self,
        stage: Stage,
        known: Survey,
        leaders: list[str],
        blocks: list[str],
        *,
        batches: list[Batch],
        streams: int,
        allowed: float | None,
    ):
        points = {("layer", leader) for leader in leaders}
        self.gates: dict[Point, list[Point]] = {}
        for path in blocks:
            inside = []
            for point in _between(known.sequence, path):
                if point in points and f"{point[1]}.".startswith(f"{path}."):
                    inside.append(point)
            if inside:
                self.gates["enter", path] = inside
        every = sum(numbers(batch) for batch in batches)
        at_layers = max((known.held.get(point, 0.0) for point in points), default=0.0)
        at_gates = max((known.held.get(point, 0.0) for point in self.gates), default=0.0)
        if allowed is None:
            reads = 0.0
            for inside in self.gates.values():
                reads = max(reads, sum(known.read.get(name, 0.0) for _, name in inside))
            allowed = max(ACTIVATIONS, every * (reads + 2 * at_gates))
        allowed = min(allowed, _most.get())
        self._left = allowed - every * streams * at_gates
        self._more = at_layers - at_gates
        fits = every * streams * at_layers <= allowed
        stage.parking = {} if fits else self.gates

    def forward(self, stage: Stage, state, batch, kind) -> Forward:
        """The next forward, one that holds little if the room is used up."""
        self._left -= self._more * numbers(batch)
        tight = self._left < 0 and stage.parking
        return (Rerun if tight else Forward)(stage, state, batch, kind)
