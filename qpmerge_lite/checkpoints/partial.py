"""The folder that a merge is written to: all of it or nothing, and what a stopped merge leaves.

A merge grows in a hidden folder beside its output, ``.NAME.ORDER.partial``, named after what was
ordered: the next run of the same order finds there which files of weights are finished.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import MergeError
from .findings import Refused

LOCK, MERGED, AVERAGED, SOLVED = "lock", "merged", "averaged.json", "solved"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Partial:
    """A hidden folder with a merge in the making.

    Args:
        out: what is to be made.
        order: what is ordered, in hexadecimal digits; equal only where the bytes will be equal.
        sizes: file of weights -> its bytes, of those that the next run of the order can take as
            they are; none where it has to make them anew anyhow.
    Attributes:
        out: as given, absolute.
        hidden: the folder; it has a lock, which its process holds, and what follows.
        merged: the folder in it that becomes the output.
        solved: the folder in it with the layers that a pass has solved, groups of them in files.
        finished: names of the files of weights that are in it, of ``sizes``.
        averaged: tensor of a finished file -> why it was averaged, as far as an earlier run got.
    """

    def __init__(self, out: Path, order: str, sizes: Mapping[str, int]):
        self.out = Path(os.path.abspath(out))
        self.hidden = self.out.with_name(f".{self.out.name}.{order}.partial")
        self.merged, self._notes = self.hidden / MERGED, self.hidden / AVERAGED
        self.solved = self.hidden / SOLVED
        self._sizes = sizes
        self.finished: list[str] = []
        self.averaged: dict[str, str] = {}

    @property
    def room(self) -> int:
        """Bytes of what an earlier run has finished: files of weights, and solved layers."""
        solved = sum(path.stat().st_size for path in self.solved.glob("*"))
        return solved + sum(self._sizes[file] for file in self._there())

    @property
    def solved_groups(self) -> int:
        """How many groups of layers are solved."""
        return len([path for path in self.solved.glob("*") if not path.suffix])

    def begin(self) -> None:
        """Make the folder to be filled; finished files of an earlier run stay."""
        self.merged.mkdir(exist_ok=True)
        self.finished = self._there()
        for path in self.merged.iterdir():
            if path.name not in self.finished:
                _delete(path)
        if self.finished:
            self.averaged = json.loads(self._notes.read_text(encoding="utf-8"))

    def _there(self) -> list[str]:
        """Files of weights that an earlier run has finished."""
        if not self._notes.is_file():
            return []
        paths = {file: self.merged / file for file in self._sizes}
        return [f for f, p in paths.items() if p.is_file() and p.stat().st_size == self._sizes[f]]

    def finish(self, file: str, averaged: Mapping[str, str]) -> None:
        """Call a file of weights finished that was made under the name of :func:`unfinished`.

        Args:
            averaged: tensor -> why it was averaged, of this file and those before.
        """
        path = self.merged / file
        settle(unfinished(path))
        if self._sizes:
            fresh = unfinished(self._notes)
            fresh.write_text(json.dumps(averaged), encoding="utf-8")
            settle(fresh)
            os.replace(fresh, self._notes)
            self.finished.append(file)
        os.replace(unfinished(path), path)

    def hand_over(self) -> None:
        """Make the folder that was filled the output, and leave nothing else."""
        for path in (self._notes, unfinished(self._notes)):
            _delete(path)
        os.rename(self.merged, self.out)
        _remove_what_is_over(self.hidden)

    def remove(self) -> None:
        """Remove all of it; the lock last, as another process may ask for it meanwhile."""
        for path in (self.merged, self._notes, unfinished(self._notes), self.solved):
            _delete(path)
        _remove_lock(self.hidden)


def _remove_what_is_over(hidden: Path) -> None:
    """Remove a hidden folder whose output is there, by the process that holds its lock."""
    _delete(hidden / SOLVED)
    _remove_lock(hidden)


def _remove_lock(hidden: Path) -> None:
    """Remove a hidden folder in which only the lock is left, by the process that holds it."""
    (hidden / LOCK).unlink(missing_ok=True)
    with suppress(OSError):  # not empty where another process has just begun
        hidden.rmdir()


def unfinished(path: Path) -> Path:
    """Where a file is while it is made."""
    return path.with_name(f"{path.name}.unfinished")


def settle(path: Path) -> None:
    """See that a file is on the disk, not only on its way there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _delete(path: Path) -> None:
    """Delete a file or a folder, where it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def all_or_nothing(partial: Partial, say: Callable[[str], None]) -> Iterator[None]:
    """Fill a hidden folder: it becomes the output at the end, or goes at an error that comes again.

    A process that is killed leaves the hidden folder, but no output. So does one that is stopped,
    or that the system fails, as on a full disk, if there are finished files in it. What is refused
    of weights leaves nothing: they are refused again as they are, and others are another order,
    which may not use what was made of these.

    Args:
        say: is told what other orders have left.
    Raises: Refused where the folder cannot be written, as on a full disk, and where another process
        is making it; an error after which the order may go on has a note that says what was kept.
    """
    with explained(f"--out {partial.out}", partial.hidden):
        _look_at_others(partial, say)
        with _locked(partial):
            try:
                refuse_if_there(partial.out)
                partial.begin()
                yield
                partial.hand_over()
            except BaseException as error:
                if _may_pass(error):
                    error.add_note(_left(partial))
                else:
                    partial.remove()
                raise


def _may_pass(error: BaseException) -> bool:
    """Whether the same order may be made later: it was stopped, or the system failed it."""
    return not isinstance(error, MergeError) or isinstance(error.__cause__, OSError)


def _left(partial: Partial) -> str:
    """What a merge that may go on leaves, in a sentence; what is of no use is removed."""
    is_made = not partial.merged.is_dir()
    kept = f"{len(partial.finished)} finished file(s) of weights" if partial.finished else ""
    if partial.solved_groups:
        kept = f"{partial.solved_groups} solved group(s) of layers"
    if kept and not is_made:
        return f"{kept} are kept in {partial.hidden}; the same command goes on from there"
    partial.remove()
    return f"{partial.out} was finished" if is_made else "nothing is kept"


def refuse_if_there(out: Path) -> None:
    """Refused for an output that is there and not an empty folder."""
    cure = "choose a folder that is not there yet"
    if out.is_symlink() or out.exists() and not out.is_dir():
        raise Refused(f"--out {out}", "a new folder", "a file or a link", cure)
    if out.is_dir() and any(out.iterdir()):
        raise Refused(f"--out {out}", "a new or an empty folder", "one with files in it", cure)


@contextmanager
def explained(where: str, hidden: Path) -> Iterator[None]:
    """Errors of the system that are about an output, or the hidden folder that it is made in, as
    refusals.

    Args:
        where: the option and the output, for messages.
    """
    try:
        yield
    except MergeError:
        raise
    except OSError as error:
        if not _concerns(error, hidden):
            raise
        cure = "see that there is room, and that this folder may be written"
        found = error.strerror or str(error)
        refusal = Refused(where, "a place that can be written", found, cure)
        for note in getattr(error, "__notes__", []):
            refusal.add_note(note)
        raise refusal from error


def _concerns(error: OSError, hidden: Path) -> bool:
    """Whether an error is about the output: it names it, or no file at all, as on a full disk."""
    named = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return not named or any(name.startswith(str(hidden)) for name in named)


def hidden_folders(out: Path) -> list[Path]:
    """What unfinished merges to an output have left beside it, whatever their orders."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]+\.partial")
    beside = out.parent.glob(f".{glob.escape(out.name)}.*.partial")
    return sorted(path for path in beside if pattern.fullmatch(path.name))


def tidy(out: Path) -> None:
    """Remove what is left of a merge that was killed when its output had just been made.

    Raises: Refused where another process is at it.
    """
    for path in hidden_folders(out):
        inside = {entry.name for entry in path.iterdir()}
        if LOCK in inside and inside <= {LOCK, SOLVED}:
            _refuse_if_held(path, out)
            _remove_what_is_over(path)


def _look_at_others(partial: Partial, say: Callable[[str], None]) -> None:
    """Say which hidden folders other orders have left for this output.

    Raises: Refused where one of them is being filled.
    """
    for path in hidden_folders(partial.out):
        if path != partial.hidden:
            _refuse_if_held(path, partial.out)
            say(
                f"{path} is left of another order (other inputs, options or versions) and was not "
                "touched; delete it unless that one is to go on"
            )


def _refuse_if_held(hidden: Path, out: Path) -> None:
    """Refused where a process holds the lock of a hidden folder."""
    with suppress(FileNotFoundError):  # no lock, or just removed: nobody is at it
        descriptor = os.open(hidden / LOCK, os.O_RDWR)
        try:
            _take(descriptor, out)
        finally:
            os.close(descriptor)


@contextmanager
def _locked(partial: Partial) -> Iterator[None]:
    """Hold the lock of a hidden folder, which is made where it is not there.

    The system takes the lock back when its process ends, however that ends.

    Raises: Refused where another process holds it.
    """
    lock = partial.hidden / LOCK
    while True:
        partial.hidden.mkdir(exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # its last holder has just removed the folder
        try:
            _take(descriptor, partial.out)
            if _is_at(descriptor, lock):
                yield
                return
        finally:
            os.close(descriptor)


def _take(descriptor: int, out: Path) -> None:
    """Take the lock of an open file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        cure = "wait for it to end, or choose another folder"
        found = "one that is making it now"
        raise Refused(f"--out {out}", "no other process", found, cure) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        cure = "choose a folder on another file system, and move it afterwards"
        raise Refused(f"--out {out}", "files that can be locked", f"{error}", cure) from error


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at a path, and not one that was there before."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
