"""Forwards that hold less while they wait, and which of a pass's forwards are such."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .effects import copied
from .lockstep import Disordered, Forward, Stage
from .orders import Point
from .probes import numbers
from .survey import Survey

PLAIN = (Tensor, type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)
ACTIVATIONS = 2**29  # bytes that paused forwards may always hold


class Rerun(Forward):
    """A forward that waits in front of blocks, and holds what they are given and nothing else.

    It comes to a layer in a block by running the block as far as there, once for every layer: less
    memory, more time.
    """

    def __init__(self, *args):
        self._inside: list[Point] = []
        self._gate, self._given, self._stays = None, None, False
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
            self._gate = self.stage.model.get_submodule(self._arrived[1])

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
        within = _Within(
            self.stage, self.state, self.batch, self.kind, lambda: self._gate(*args, **kwargs)
        )
        within.layer, within.later, within.own = (
            self._inside[0],
            self._inside[1:],
            tree_map(copied, self.own),
        )
        within.advance()
        read = within.payload
        if not within.dead:
            within.throw()
        return read

    @payload.setter
    def payload(self, brought) -> None:
        self._brought = brought


class _Within(Forward):
    """A block run up to one of its layers."""

    layer: Point
    later: list[Point]  # which are to be solved behind it

    def stops_at(self, point: Point) -> bool:
        if point in self.later:
            raise Disordered([])
        return point == self.layer

    def reads_again(self, leader: str, read: Tensor) -> bool:
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
        leaders: layers in front of which forwards wait.
        blocks: paths of blocks that may be run again; none where their borders have other uses.
        allowed: bytes; by default :data:`ACTIVATIONS`, or what the layers of one block read
            together, if that is more.
    """

    def __init__(
        self,
        stage: Stage,
        known: Survey,
        leaders: list[str],
        blocks: list[str],
        batches,
        streams: int,
        allowed: int | None,
    ):
        points = {("layer", leader) for leader in leaders}
        self.gates: dict[Point, list[Point]] = {}
        for path in blocks:
            inside = [
                p
                for p in _between(known.sequence, path)
                if p in points and f"{p[1]}.".startswith(f"{path}.")
            ]
            if inside:
                self.gates["enter", path] = inside
        every = sum(numbers(batch) for batch in batches)
        at_layers = max((known.held.get(point, 0.0) for point in points), default=0.0)
        at_gates = max((known.held.get(point, 0.0) for point in self.gates), default=0.0)
        if allowed is None:
            reads = [
                sum(known.read.get(name, 0.0) for _, name in inside)
                for inside in self.gates.values()
            ]
            allowed = max(ACTIVATIONS, every * (max(reads, default=0.0) + 2 * at_gates))
        self._left = allowed - every * streams * at_gates
        self._more = at_layers - at_gates
        fits = every * streams * at_layers <= allowed
        stage.parking = {} if fits else self.gates

    def forward(self, stage: Stage, state, batch, kind) -> Forward:
        """The next forward, one that holds little if the room is used up."""
        self._left -= self._more * numbers(batch)
        tight = self._left < 0 and stage.parking
        return (Rerun if tight else Forward)(stage, state, batch, kind)
