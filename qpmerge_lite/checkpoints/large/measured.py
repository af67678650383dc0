"""Memory and time that are spent, measured while they are."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")  # of Linux
EVERY = 0.01  # seconds between two looks at it


def taken() -> dict[str, int]:
    """Bytes of this process's memory by the names that Linux has for them: ``RssAnon`` of its own,
    ``VmHWM`` of all, at most so far. Elsewhere only the last.
    """
    if not STATUS.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"VmHWM": peak if sys.platform == "darwin" else peak * 1024}
    found = {}
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024
    return found


class Watch:
    """Looks again and again at what a process takes, in a thread of its own.

    Linux tells the most that a process ever had of all its memory, but not of what is its own: that
    is seen only by looking. What is seen is never too much, and too little where memory was taken
    and given back between two looks.

    Attributes:
        most: name, as of :func:`taken` -> bytes at most.
    """

    def __init__(self):
        self.most = self._first = taken()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        if "RssAnon" in self.most:
            self._thread.start()

    def _look_on(self) -> None:
        while not self._over.wait(EVERY):
            self._look()

    def _look(self) -> None:
        self.most = {name: max(self.most[name], count) for name, count in taken().items()}

    def end(self) -> int:
        """Bytes of its own memory that the process took more than at the beginning, at most."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._look()
        name = "RssAnon" if "RssAnon" in self.most else "VmHWM"
        return self.most[name] - self._first[name]


@contextmanager
def measured() -> Iterator[dict]:
    """What is done inside costs: filled in at its end, ``memory`` in bytes, by which the process's
    own memory grew at most, files that it reads not counted; ``own``, the most that it had of it;
    ``peak``, the most that the process ever had of both; and ``seconds``."""
    found: dict = {}
    started, watch = time.perf_counter(), Watch()
    try:
        yield found
    finally:
        found |= {"seconds": time.perf_counter() - started, "memory": watch.end()}
        found["peak"] = watch.most["VmHWM"]
        found["own"] = watch.most.get("RssAnon", found["peak"])
