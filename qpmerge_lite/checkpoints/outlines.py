"""What of the Hub's models can be looked at before they are downloaded: small files, and headers of
weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import MergeError
from .adapters.reading import WEIGHTS
from .compatibility import Report, check
from .deltas.reading import as_delta, behind
from .folders import CONFIG, SINGLE
from .headers import LARGEST, LENGTH
from .heads.card import FOLDER
from .heads.card import WEIGHTS as HEAD
from .heads.telling import AUTO
from .hub import (
    SMALL,
    Reference,
    endpoint,
    files_of_weights,
    reference_of,
    refuse_without_weights,
    snapshot,
    troubles,
)

FIRST = 100_000  # bytes of a file that are asked for at first: nearly every header is shorter


class Outlines:
    """Folders in place of those of references, with headers and holes where their weights are.

    Args:
        root: where they are made.
        more: patterns of files that are wanted beside configuration, tokenizer and index.
    Attributes:
        missing: bytes of weights that a merge would download.
        names: such a folder -> the reference that it stands for.
    """

    def __init__(self, root: Path, more: Sequence[str] = ()):
        self.missing = 0
        self.names: dict[str, str] = {}
        self._root, self._small = root, (*SMALL, *more)

    def of(self, place: Path) -> Path:
        """A folder as it is; of a reference, one with its small files as they are, and of every
        file of weights its header, at its size.

        Raises: Refused saying why the Hub does not give them.
        """
        differences = behind(place)
        if differences is not None:
            return as_delta(self.of(differences))
        reference = reference_of(place)
        if reference is None:
            return place
        kept = snapshot(reference, self._small)
        pinned = Reference(reference.repo, kept.name)
        names, heads = files_of_weights(kept), _heads(kept)
        is_whole = _has_weights(kept, names) and all((kept / name).is_file() for name in heads)
        folder = kept if is_whole else self._root / f"{len(self.names):04}"
        self.names[str(folder)] = str(pinned)
        if not is_whole:
            self._make(folder, kept, pinned, [*names, *heads])
        return folder

    def _make(self, folder: Path, kept: Path, pinned: Reference, names: list[str]) -> None:
        """Make the folder of a reference.

        Args:
            kept: where the client has its small files.
            names: that files of weights may have.
        """
        for path in kept.rglob("*"):
            name = path.relative_to(kept).as_posix()
            if path.is_file() and any(fnmatchcase(name, pattern) for pattern in self._small):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
        sizes = _sizes(pinned, names) if names else {}
        if names and not sizes:
            refuse_without_weights(pinned)
        for name, size in sizes.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                file.write(first_bytes(pinned, name, size))
                file.truncate(size)
            self.missing += 0 if (kept / name).is_file() else size

    def named(self, text: str) -> str:
        """A text with references in place of these folders."""
        for folder, name in self.names.items():
            text = text.replace(folder, name)
        return text


def check_places(base: Path, experts: Mapping[str, Path], heads: str = AUTO) -> tuple[Report, int]:
    """What ``check`` finds about folders and references, of which headers alone are fetched, and
    how many bytes of weights a merge would download.

    Args:
        base: folder or reference of the model that the experts were tuned from.
        experts: name -> folder or reference, or ``delta:`` and one of a task vector.
        heads: as of ``check``.
    """
    with outlined() as outlines:
        origin = outlines.of(base)
        folders = {name: outlines.of(place) for name, place in experts.items()}
        report = check(origin, folders, heads)
    report.findings = [
        replace(finding, where=outlines.named(finding.where)) for finding in report.findings
    ]
    return report, outlines.missing


@contextmanager
def outlined(more: Sequence[str] = ()) -> Iterator[Outlines]:
    """Outlines to check what is at the Hub by, which are gone afterwards; errors meanwhile name
    references in their place.

    Args:
        more: as of ``Outlines``.
    """
    with tempfile.TemporaryDirectory(prefix="qpmerge-") as root:
        outlines = Outlines(Path(root), more)
        try:
            yield outlines
        except MergeError as error:
            told = outlines.named(str(error))
            if told == str(error):
                raise
            raise MergeError(told) from error


def _heads(kept: Path) -> list[str]:
    """Files of the heads that a merge keeps, as far as their configurations are there."""
    return [f"{FOLDER}/{path.parent.name}/{HEAD}" for path in kept.glob(f"{FOLDER}/*/{CONFIG}")]


def _has_weights(kept: Path, names: list[str]) -> bool:
    """Whether all weights of a repository have been downloaded: all shards, or the one file."""
    there = [(kept / name).is_file() for name in names]
    return any(there) if names == [SINGLE, WEIGHTS] else bool(there) and all(there)


def _sizes(reference: Reference, names: list[str]) -> dict[str, int]:
    """Bytes of those of the files that the repository has."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with troubles(reference):
        found = HfApi(endpoint()).get_paths_info(reference.repo, names, revision=reference.revision)
    return {entry.path: entry.size for entry in found if isinstance(entry, RepoFile)}


def first_bytes(reference: Reference, name: str, size: int) -> bytes:
    """The beginning of a file of weights, its whole header at least where it has one."""
    start = _range(reference, name, min(FIRST, size))
    length = LENGTH + int.from_bytes(start[:LENGTH], "little")
    if len(start) < length <= min(size, LENGTH + LARGEST):
        start = _range(reference, name, length)
    return start[:length]


def _range(reference: Reference, name: str, count: int) -> bytes:
    """The first bytes of a file, this many of them."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if not count:
        return b""
    url = hf_hub_url(reference.repo, name, revision=reference.revision, endpoint=endpoint())
    headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}"}
    with troubles(reference):
        answer = get_session().get(url, headers=headers)
        hf_raise_for_status(answer)
    return answer.content[:count]
