"""How fast this machine reads and computes, measured in less than a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

SAMPLE = 1 << 24  # bytes of a file that are read
NUMBERS, EDGE, SMALLER, CALLS = 1 << 20, 384, 160, 500  # sizes of what is computed
LEAST = 0.1  # seconds that an operation is repeated for, so that the clock can tell


class Work(NamedTuple):
    """What a merge does; or, as rates, how much of each a machine does in a second.

    Attributes:
        moved: bytes that are read, or written, and digested.
        passed: numbers in double precision that operations go through.
        placed: numbers that are sorted with their places.
        multiplied: operations of products of matrices in the precision of activations.
        doubled: the same in double precision.
        decomposed: cubes of edges of matrices whose singular vectors are found.
        called: operations, however small.
    """

    moved: float = 0.0
    passed: float = 0.0
    placed: float = 0.0
    multiplied: float = 0.0
    doubled: float = 0.0
    decomposed: float = 0.0
    called: float = 0.0

    def seconds(self, rates: Work) -> float:
        """How long the work takes at some rates."""
        return sum(amount / rate for amount, rate in zip(self, rates))

    def plus(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(*map(sum, zip(self, other)))


def measured_rates(sample: Path | None = None) -> Work:
    """Rates of this machine, with as many threads as torch has now; what it computes at is measured
    once in a process.

    Args:
        sample: a file of weights whose beginning is read; by default reading is taken to cost
            nothing beside digesting.
    """
    import torch

    content = bytes(SAMPLE)
    started = time.perf_counter()
    if sample is not None:
        with sample.open("rb") as file:
            content = file.read(SAMPLE)
    sha256(content)
    moving = time.perf_counter() - started
    return _computing(torch.get_num_threads())._replace(moved=len(content) / moving)


@cache
def _computing(threads: int) -> Work:
    """Rates of what is computed with so many threads, which are those that torch has."""
    import torch

    own = torch.Generator().manual_seed(0)  # random numbers of others are left alone
    wide = torch.rand(NUMBERS, dtype=torch.float64, generator=own)
    single, small = torch.rand(EDGE, EDGE, generator=own), torch.rand(1, generator=own)
    double = single.double()
    smaller = torch.rand(SMALLER, SMALLER, dtype=torch.float64, generator=own)
    return Work(
        passed=_rate(NUMBERS, lambda: wide + wide),
        placed=_rate(NUMBERS, lambda: wide.argsort()),
        multiplied=_rate(2 * EDGE**3, lambda: single @ single),
        doubled=_rate(2 * EDGE**3, lambda: double @ double),
        decomposed=_rate(SMALLER**3, lambda: torch.linalg.svd(smaller)),
        called=_rate(CALLS, lambda: [small + small for _ in range(CALLS)]),
    )


def _rate(amount: float, compute: Callable[[], object]) -> float:
    """How much of an amount is computed in a second, what other programs take of it included."""
    compute()  # which may set something up
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < LEAST:
        compute()
        count += 1
    return count * amount / (time.perf_counter() - begun)
