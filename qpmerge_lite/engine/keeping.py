"""Solved layers that outlive a process: a pass that was cut short is made again without solving
them once more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count, repeat
from typing import NamedTuple, Protocol

from torch import Tensor

from .recipes import Making, plain
from .survey import Survey
from .views import View


class Solved(NamedTuple):
    """Layers that were solved together.

    Attributes:
        parts: entry of the state dict -> its merged value (…), as it is stored.
        rows: of the merge's table.
    """

    parts: dict[str, Tensor]
    rows: list[dict]


class Store(Protocol):
    """Where solved layers are kept, by keys that say what they hang on in their merge."""

    def read(self, key: str) -> Solved | None:
        """What is kept under a key, None where nothing is."""

    def write(self, key: str, solved: Solved) -> None:
        """Keep what was solved, all of it or nothing."""


class Keeper:
    """The solved layers of one pass.

    Args:
        store: of the whole merge, None where nothing is kept.
        number: of the pass, of those of the merge.
    """

    def __init__(self, store: Store | None = None, number: int = 0):
        self._store, self._number, self._sweep = store, number, ""

    def begin(self, known: Survey, reruns: bool) -> None:
        """Another attempt at the pass: layers are solved on what those before them became, and
        which these are follows from what is left out and from the order."""
        state = [sorted(known.left_out.items()), known.stages, known.sequence, reruns]
        self._sweep = json.dumps(state)

    def sets(self, views: list[View], making: Making, tied: Mapping[str, list[str]]) -> bool:
        """Whether an earlier run has solved these layers together; they are set in the merge then.

        Args:
            tied: entry of the state dict -> its names.
        """
        solved = None if self._store is None else self._store.read(self._key(views, making))
        if solved is None:
            return False
        for name, value in solved.parts.items():
            making.state[name].copy_(value)
            making.solved.update(tied[name])
        making.table += solved.rows
        return True

    def keep(self, views: list[View], making: Making, first: int) -> None:
        """Keep layers that were solved together, whose rows are those of the merge's table from
        ``first`` on."""
        if self._store is not None:
            parts = {name: making.state[name] for v in views for name in v.parameters}
            rows = [plain(row) for row in making.table[first:]]
            self._store.write(self._key(views, making), Solved(parts, rows))

    def _key(self, views: list[View], making: Making) -> str:
        layers = [v.name for v in views]
        said = json.dumps([self._number, self._sweep, making.name, layers])
        return hashlib.sha256(said.encode()).hexdigest()[:32]


_keepers: ContextVar[Iterator[Keeper] | None] = ContextVar("keepers", default=None)


@contextmanager
def keeping(store: Store) -> Iterator[None]:
    """Passes that are run inside take from a store what is solved, and add what they solve.

    The store has to be of this very merge: of the same code, inputs and options.
    """
    token = _keepers.set(map(Keeper, repeat(store), count()))
    try:
        yield
    finally:
        _keepers.reset(token)


def keeper_of_next_pass() -> Keeper:
    """The keeper of a pass that begins now."""
    keepers = _keepers.get()
    return Keeper() if keepers is None else next(keepers)
