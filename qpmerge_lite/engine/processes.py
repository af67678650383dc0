"""Processes that share a pass: each runs the forwards of its own batches, and all of them solve on
the sums of all.

They stay in step without a leader. In all of them the same layers are visited in the same order,
what one refuses all refuse, and sums are added up before anything is solved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..calibration import Batch
from ..errors import LostProcess, MergeError

Value = TypeVar("Value")


class Restart(BaseException):  # no model may take it for an error of its own
    """A pass has to start again, with what one of its forwards has shown."""


class Processes:
    """What a pass says to the other processes that share it: here there are none.

    Attributes:
        number: of this process, from 0.
        count: of all.
    """

    number, count = 0, 1

    def own(self, batches: list[Batch]) -> list[Batch]:
        """The batches whose forwards this process runs: every ``count``-th."""
        return batches[self.number :: self.count]

    def each(self, task: Callable[[], Value]) -> list[Value]:
        """What a function returns in every process, in their order.

        Raises: MergeError or Restart in all processes, where the function does in one.
        """
        return [task()]

    def add(self, sums: Sequence[Tensor]) -> None:
        """Add up sums (…), of one dtype, over all processes, in place."""

    def from_first(self, solution: Tensor) -> Tensor:
        """A solution (…) as the first process has it, from whose last digits others may differ."""
        return solution


ALONE = Processes()


class Group(Processes):
    """The processes of a group of ``torch.distributed``.

    Raises (whatever is asked of them): LostProcess where one has ended, or was silent for longer
        than the group's timeout.
    """

    def __init__(self, group: torch.distributed.ProcessGroup):
        self._group = group
        self.number, self.count = group.rank(), group.size()

    def each(self, task: Callable[[], Value]) -> list[Value]:
        """What a function returns in every process; it may not ask anything of the others."""
        value, problem = None, None
        try:
            value = task()
        except (MergeError, Restart) as raised:
            problem = raised
        told: list[Any] = [None] * self.count
        with self._heard():
            torch.distributed.all_gather_object(told, (value, _packed(problem)), self._group)
        for number, (_, packed) in enumerate(told):
            if number == self.number and problem is not None:
                raise problem
            if packed is not None:
                raise _unpacked(*packed)
        return [of_one for of_one, _ in told]

    def add(self, sums: Sequence[Tensor]) -> None:
        """Add up sums (…) in one all-reduce."""
        packed = torch.cat([part.reshape(-1) for part in sums])
        with self._heard():
            torch.distributed.all_reduce(packed, group=self._group)
        for part, total in zip(sums, packed.split([part.numel() for part in sums])):
            part.copy_(total.view(part.shape))

    def from_first(self, solution: Tensor) -> Tensor:
        """A solution (…) of the first process, which others get in place of their own."""
        solution = solution.contiguous()
        with self._heard():
            torch.distributed.broadcast(solution, group=self._group, group_src=0)
        return solution

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """What ``torch.distributed`` reports, whatever it calls it, as the loss of a process."""
        try:
            yield
        except RuntimeError as error:
            raise LostProcess(self.count, error) from error


def processes_of(group: torch.distributed.ProcessGroup | None) -> Processes:
    """Those of a group of which this process is one; None stands for this process alone.

    Raises: MergeError for what is no such group.
    """
    if group is None:
        return ALONE
    known = getattr(torch.distributed, "ProcessGroup", ())  # not in every build of torch
    if not isinstance(group, known) or torch.distributed.get_rank(group) < 0:
        raise MergeError(
            "group: expected None, or a group of torch.distributed with this process in it, such "
            f"as torch.distributed.group.WORLD, found {type(group).__name__}"
        )
    return Group(group) if group.size() > 1 else ALONE


def refuse_idle(processes: Processes, batches: list[Batch]) -> None:
    """MergeError where there are more processes than batches, so that some would have none."""
    if len(batches) < processes.count:
        raise MergeError(
            "group: expected no more processes than calibration batches, found "
            f"{processes.count} processes and {len(batches)} batches; make batches smaller "
            "(--batch-size), or start fewer processes"
        )


def _packed(problem: BaseException | None) -> tuple | None:
    """An exception as it travels: its class may be made of other arguments than those it has."""
    return None if problem is None else (type(problem), problem.args, vars(problem))


def _unpacked(kind: type[BaseException], args: tuple, attributes: dict) -> BaseException:
    problem = kind.__new__(kind, *args)
    vars(problem).update(attributes)
    return problem
