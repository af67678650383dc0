"""A command that is told to stop: by Ctrl-C, or by the signal that ends a process politely."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """The signal to end, treated as Ctrl-C is."""


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status of a command that was stopped: 128 and the number of the signal, as shells
    have it."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@contextmanager
def told_to_stop() -> Iterator[None]:
    """Make the signal to end raise Terminated meanwhile; it can be done in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_) -> None:
    raise Terminated
