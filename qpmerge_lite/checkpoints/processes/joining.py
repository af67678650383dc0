"""Processes that a launcher such as torchrun has started with the same command line: they find each
other, one of them speaks, and all end with one status.

What a launcher sets in the environment is all that is known of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from ...errors import LostProcess
from ..findings import Refused

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # which launchers set
PATIENCE = timedelta(minutes=10)  # for an answer of another process
WRITING = timedelta(days=7)  # for the end of the one that writes, whose loss is seen at once


@dataclass(frozen=True)
class Launch:
    """Which one of how many processes this is, from 0."""

    number: int
    count: int


def launch_of(environment: Mapping[str, str]) -> Launch:
    """What the variables of a launcher say; without all of them, a process is by itself."""
    number, count, *address = (environment.get(name, "") for name in VARIABLES)
    if not (number.isdecimal() and count.isdecimal() and all(address)):
        return Launch(0, 1)
    return Launch(int(number), int(count))


@contextmanager
def silent_unless_first(launch: Launch) -> Iterator[None]:
    """Print nothing in other processes than the first."""
    if launch.number == 0:
        yield
        return
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


class Party:
    """The processes of a command, from the view of one.

    Attributes:
        number: of this process, from 0.
        count: of all.
        group: of ``torch.distributed``, once they have joined; None for a process by itself.
    """

    def __init__(self, launch: Launch):
        self.number, self.count = launch.number, launch.count
        self.group: ProcessGroup | None = None
        self._patient: ProcessGroup | None = None  # the same processes, with more time
        self._store: Store | None = None

    def join(self) -> None:
        """Meet the others. Raises: Refused where they do not come."""
        if self.count == 1:
            return
        # torch prints where in its sources it lost a process; what that means is told once, by us
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from torch import distributed

        try:
            meeting, number, count = next(distributed.rendezvous("env://", timeout=PATIENCE))
            store = distributed.PrefixStore("qpmerge", meeting)  # which may serve others too
            distributed.init_process_group(
                "gloo", store=store, rank=number, world_size=count, timeout=PATIENCE
            )
            self._patient = distributed.new_group(timeout=WRITING)
        except (RuntimeError, ValueError) as error:
            minutes = PATIENCE.total_seconds() / 60
            expected = f"{self.count} processes that meet within {minutes:g} minutes"
            cure = "start all of them by torchrun, or unset it for one process"
            raise Refused("environment, WORLD_SIZE", expected, _first_line(error), cure) from error
        self.group = distributed.group.WORLD
        self._store = store

    def leave(self) -> None:
        """Let go of the others: those that wait for this process wait no more."""
        if self.group is not None:
            from torch import distributed

            distributed.destroy_process_group()

    def ended(self, status: int) -> int:
        """The exit status of all, once all have come to their end.

        Args:
            status: of this process.
        Raises: LostProcess, but not in the first process, whose work is done then.
        """
        if self.group is None:
            return status
        from ...engine.processes import processes_of

        try:
            return max(processes_of(self._patient).each(lambda: status))
        except LostProcess:
            if self.number == 0:
                return status
            raise

    def tell(self, line: str) -> None:
        """Print a line on the error stream, unless another process has: the first one to tell knows
        the cause, and the others tell of what followed from it."""
        if self._speaks():
            print(line, file=sys.stderr if self.number == 0 else sys.__stderr__, flush=True)

    def _speaks(self) -> bool:
        """Whether nobody has spoken before."""
        if self._store is None:
            return self.number == 0
        try:
            return self._store.add("told", 1) == 1
        except RuntimeError:  # the process with the store has gone: rather twice than not at all
            return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
