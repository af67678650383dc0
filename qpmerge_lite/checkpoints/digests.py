"""SHA-256 digests of files, taken while the files are read for something else."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _beside() -> ThreadPoolExecutor:
    """The thread that digests run in, beside the merge."""
    return ThreadPoolExecutor(1, thread_name_prefix="sha256")


class Digest:
    """The digest of a file of which parts pass by, most of them in their order.

    Parts that continue what has passed are digested in a thread of their own; others are left to
    the end, and read once more then.

    Args:
        path: of the file.
        beginning: its first bytes.
    """

    def __init__(self, path: Path, beginning: bytes):
        self.path, self._digested = path, len(beginning)
        self._hash = hashlib.sha256(beginning)
        self._last: Future | None = None

    def take(self, start: int, part) -> None:
        """Bytes of the file from ``start`` on, which must not change afterwards."""
        if start != self._digested or not len(part):
            return
        self._wait()  # so that no more than one part is held
        self._last = _beside().submit(self._hash.update, part)
        self._digested += len(part)

    def finish(self) -> str:
        """The digest of the whole file, in hexadecimal digits; what did not pass by is read."""
        self._wait()
        with self.path.open("rb") as file:
            file.seek(self._digested)
            while part := file.read(2**20):
                self._hash.update(part)
                self._digested += len(part)
        return self._hash.hexdigest()

    def _wait(self) -> None:
        """Wait for the last part."""
        if self._last is not None:
            self._last.result()
            self._last = None
