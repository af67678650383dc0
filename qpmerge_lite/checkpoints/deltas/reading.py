"""Task vectors: files of differences ``W_k - W_0`` by the base's names, as ``delta:FILE``.

Only headers are read here; ``adding`` has the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..findings import ERROR, INFO, WARNING, Finding, Refused, shortened
from ..folders import (
    CONFIG,
    SINGLE,
    Change,
    Checkpoint,
    check_index,
    under_names_of,
    weight_files,
)
from ..headers import Entry, read_header

PREFIX = "delta:"
SUFFIX = ".safetensors"
OF = "base"  # field of the metadata: what the differences are from
WHOLE = "make a whole model of it, qpmerge merge BASE delta:FILE --out FOLDER, and name that folder"
OTHER_BASE = "name the base that the differences are from, or write them again with qpmerge delta"


def behind(place: Path | str) -> Path | None:
    """The file or folder that ``delta:FILE`` names; None for any other place.

    Raises: Refused where it names none.
    """
    word = place.as_posix() if isinstance(place, Path) else place
    if not word.startswith(PREFIX):
        return None
    if word == PREFIX:
        cure = "write the file behind it"
        raise Refused(word, f"{PREFIX}FILE, a file of differences from the base", "none", cure)
    return Path(word.removeprefix(PREFIX))


def as_delta(path: Path) -> Path:
    """The place ``delta:FILE`` of a file or folder."""
    return Path(f"{PREFIX}{path}")


@dataclass
class Delta(Change):
    """A task vector and the base that it is added to.

    Attributes:
        is_file: whether it is one file, whatever else lies beside it; not all of its folder.
    """

    is_file: bool = False

    kind, make_whole = "a task vector", WHOLE

    @property
    def is_sharded(self) -> bool:
        """Whether an index says in which file a tensor is."""
        return not self.is_file and SINGLE not in self.headers

    @property
    def place(self) -> Path:
        """What messages name: its folder, or its one file."""
        return self.folder / next(iter(self.headers), "") if self.is_file else self.folder

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """Tensor of the base -> the entry of its difference; to be asked for when all headers are
        there."""
        return {name: e for header in self.headers.values() for name, e in header.entries.items()}

    def matching(self, patterns) -> list[str]:
        """Files of the folder whose names fit; none beside a single file."""
        return [] if self.is_file else super().matching(patterns)


def read_delta(name: str, place: Path, base: Checkpoint) -> tuple[Delta, list[Finding]]:
    """A task vector of a base, and an error where it cannot be read.

    Args:
        place: ``delta:FILE``, with a file of safetensors, or a folder with one or with shards and
            their index.
    """
    path = behind(place) or place
    is_file = not path.is_dir()
    delta = Delta(name, path.parent if is_file else path, base=base, is_file=is_file)
    try:
        for file in [path.name] if is_file else _files(path):
            delta.headers[file] = read_header(delta.folder / file)
        check_index(delta)
    except Refused as refusal:
        return delta, [refusal.finding]
    return delta, []


def _files(folder: Path) -> list[str]:
    """The files of weights of a folder; refused where it is that of a whole model."""
    if (folder / CONFIG).is_file():
        expected = "differences alone, without a configuration"
        cure = "leave delta: out, or name the file of the differences itself"
        raise Refused(folder / CONFIG, expected, "one, as whole models have", cure)
    return weight_files(folder)


def fit(delta: Delta) -> list[Finding]:
    """An error for each way in which differences do not fit the base's tensors, and what else is to
    be known of them."""
    older = under_names_of(delta.base, delta)
    findings, wanted = [], delta.base.entries
    unknown = [name for name in delta.tensors if name not in wanted]
    if unknown:
        other = shortened(unknown)
        expected = "differences of tensors of the base alone"
        findings.append(Finding(ERROR, str(delta.place), expected, other, OTHER_BASE))
    findings += _unlike(delta)
    if older:
        cure = "nothing is to be done: they are those of the same norms"
        names = "the base's names of norms", shortened(older)
        findings.append(Finding(INFO, str(delta.place), *names, cure))
    if not delta.tensors:
        cure = "the expert is the base itself; see that the file is whole"
        findings.append(Finding(WARNING, str(delta.place), "differences", "none", cure))
    return findings + _other_base(delta)


def _unlike(delta: Delta) -> list[Finding]:
    """Shapes and dtypes that a difference cannot have; tensors of one kind are one finding."""
    places: dict[tuple[str, str], list[str]] = {}
    for name, entry in delta.tensors.items():
        like = delta.base.entries.get(name)
        if like is None:
            continue
        where = f"{delta.folder / delta.files_of_tensors[name]}, tensor {name!r}"
        if entry.shape != like.shape:
            way = f"shape {like.shape}", f"shape {entry.shape}"
            places.setdefault(way, []).append(where)
        elif kind_of(entry) is None or kind_of(entry) != kind_of(like):
            way = f"numbers to add to those of the base ({like.dtype})", entry.dtype
            places.setdefault(way, []).append(where)
    findings = []
    for (expected, found), same in places.items():
        more = f", as in {len(same) - 1} more tensors" if len(same) > 1 else ""
        findings.append(Finding(ERROR, same[0], expected, f"{found}{more}", OTHER_BASE))
    return findings


def kind_of(entry: Entry) -> str | None:
    """Whether a tensor has ``real`` numbers or ``whole`` ones, as counters are; None for others,
    which have no differences here."""
    if entry.dtype.startswith(("F", "BF")):
        return "real"
    return "whole" if entry.dtype.startswith(("I", "U")) else None


def _other_base(delta: Delta) -> list[Finding]:
    """A word on a base that the file calls otherwise."""
    names = {str(header.metadata.get(OF, "")) for header in delta.headers.values()} - {""}
    own = delta.base.folder.resolve().name
    if not names or own in names:
        return []
    cure = "see that they are differences from this base, wherever that lies"
    where = f"{delta.place}, {OF}"
    return [Finding(INFO, where, repr(own), shortened(sorted(names)), cure)]
