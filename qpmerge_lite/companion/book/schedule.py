"""How long chapters take: which are started first, and how long a run has still to go."""

import heapq
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..records import read_json, write_json

# Of a run of everything with nothing kept, on two cores: tier -> chapter -> seconds.
COMMITTED = ("book", "seconds.json")
# The same of the last runs in a checkout; git ignores it, and ``make clean`` leaves it.
LAST = (".cache", "seconds.json")
UNKNOWN = 60.0  # seconds of a chapter where nothing at all is known


def seconds(root: Path, tier: str, names: list[str]) -> dict[str, float]:
    """Expected seconds of some chapters, by name: those of their last run in this checkout, else
    the committed ones, else the mean of those that are known."""
    known: dict[str, float] = {}
    for place in (COMMITTED, LAST):
        path = root.joinpath(*place)
        if path.exists():
            known |= read_json(path).get(tier, {})
    mean = sum(known.values()) / len(known) if known else UNKNOWN
    return {name: known.get(name, mean) for name in names}


def keep(root: Path, tier: str, taken: dict[str, float]) -> None:
    """Remember how many seconds chapters took, by name, for the next run in this checkout."""
    path = root.joinpath(*LAST)
    by_tier = read_json(path) if path.exists() else {}
    rounded = {name: round(value, 1) for name, value in taken.items()}
    by_tier[tier] = dict(sorted((by_tier.get(tier, {}) | rounded).items()))
    write_json(path, by_tier)


@dataclass
class Schedule:
    """A run of chapters, so many at a time, the longest first: what takes long and starts late
    would run alone at the end.

    Attributes:
        expected: chapter -> seconds.
        workers: how many run at a time.
    """

    expected: dict[str, float]
    workers: int
    waiting: list[str] = field(init=False)
    started: dict[str, float] = field(default_factory=dict)
    taken: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self.waiting = sorted(self.expected, key=self.expected.__getitem__, reverse=True)

    def next(self, now: float | None = None) -> str | None:
        """The chapter to start at this moment; None while all workers are busy, or none waits."""
        if not self.waiting or len(self.started) == self.workers:
            return None
        name = self.waiting.pop(0)
        self.started[name] = time.monotonic() if now is None else now
        return name

    def end(self, name: str, seconds: float) -> None:
        """A chapter has ended after so many seconds."""
        del self.started[name]
        self.taken[name] = seconds

    def left(self, now: float | None = None) -> float:
        """Seconds until the last chapter ends, if those that are to come are off by the same factor
        as those that have ended."""
        now = time.monotonic() if now is None else now
        pace = 1.0
        if expected := sum(self.expected[name] for name in self.taken):
            pace = sum(self.taken.values()) / expected
        busy = [0.0] * (self.workers - len(self.started))
        for name, begin in self.started.items():
            busy.append(max(pace * self.expected[name] - (now - begin), 0.0))
        heapq.heapify(busy)
        for name in self.waiting:
            heapq.heappush(busy, heapq.heappop(busy) + pace * self.expected[name])
        return max(busy)


def in_words(seconds: float) -> str:
    """A time that is left: whole minutes from two on, before that tens of seconds."""
    if seconds < 5:
        return "nearly done"
    if seconds < 120:
        return f"about {max(10, 10 * round(seconds / 10))} s left"
    return f"about {round(seconds / 60)} min left"
