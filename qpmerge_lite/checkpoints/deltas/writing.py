"""``qpmerge delta``: the differences of an expert from its base, in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from ...errors import MergeError
from ...experts import check_experts, equal, stored
from ..compatibility import Report, check, refuse_errors
from ..findings import Refused
from ..folders import Checkpoint
from ..headers import LENGTH, NAMES, SIZES, Entry
from ..heads.telling import MERGED
from ..orders import fetched
from ..output import check_new_file, check_room, new_file, versions
from ..tensors import TYPES, Entries, bytes_of, read_tensors
from ..weights_only import located
from .adding import added, differs_in, subtracted
from .reading import OF, SUFFIX, kind_of

EXPERT = "expert"  # what messages call it
DTYPES = {word: name for name, word in NAMES.items()}
NO_DIGEST = "0" * 64  # as long as one


@dataclass
class Difference:
    """Which difference is to be written.

    Attributes:
        base: folder of the model that the expert was tuned from, or its reference at the Hub.
        expert: folder, of a whole model or of an adapter, or reference, or ``delta:FILE``.
        out: file to be made.
        dtype: of the differences, a key of ``DTYPES``.
    """

    base: Path
    expert: Path
    out: Path
    dtype: str = "float32"


def write_difference(order: Difference, *, progress: bool = False) -> dict:
    """Write the differences of an expert from its base, of the tensors that are not the same, which
    are read one by one.

    They are computed in float64 and rounded to the dtype that is asked for. Whether the base and
    they give the expert back is found out on the way.

    Returns: ``differences`` (how many tensors have one), ``unchanged`` (how many have none) and
        ``inexact`` (tensor -> how many of its numbers do not come back bit for bit).
    Raises: MergeError for checkpoints that do not fit, as :func:`check` tells, and for numbers that
        are not finite or that the dtype cannot hold. Nothing is left of the output then.
    """
    check_new_file(order.out, SUFFIX)
    # a difference is of all tensors: with a head of its own an expert has none
    base, experts = fetched(order.base, {EXPERT: order.expert}, MERGED, progress)
    report = check(base, experts, MERGED)
    refuse_errors(report)
    dtype = DTYPES[order.dtype]
    check_room(order.out, sum(e.stop - e.start for e in _all_entries(report.base, dtype)))
    with new_file(order.out, "whole") as made:
        return _write(made / "whole", report, dtype, progress)


def _write(path: Path, report: Report, dtype: str, progress: bool) -> dict:
    """Write the file; what is told of it. Its header, which has the entries that there are and the
    digests of what they were made of, is written last, into room that was left for all."""
    from tqdm import tqdm

    base, expert = report.base, report.experts[0]
    room = len(_header(_all_entries(base, dtype), _about(base, expert, _no_digests)))
    entries: list[Entry] = []
    inexact: dict[str, int] = {}
    end = 0
    with path.open("xb") as file:
        file.seek(LENGTH + room)
        names = tqdm(base.entries, desc="tensors", disable=not progress)
        for name, origin, value in _changed(base, expert, names):
            difference = _rounded(name, subtracted(value, origin), dtype)
            start, end = end, end + difference.nbytes
            own = _stored_as(base.entries[name], dtype)
            entries.append(Entry(name, own, tuple(origin.shape), start, end))
            file.write(bytes_of(entries[-1], difference))
            count = differs_in(added(origin, difference), value.to(origin.dtype))
            if count:
                inexact[name] = count
        header = _header(entries, _about(base, expert, _digests))
        file.seek(0)
        file.write(room.to_bytes(LENGTH, "little") + header.ljust(room))
    unchanged = len(base.entries) - len(entries)
    return {"differences": len(entries), "unchanged": unchanged, "inexact": inexact}


def _changed(base: Checkpoint, expert: Checkpoint, names) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, base's tensor (…) and expert's (…), of those that are not the same.

    Raises: MergeError with the files, for tensors that are not finite, or no real numbers.
    """
    for name in names:
        origin, states = read_tensors(base, [name]), read_tensors(expert, [name])
        try:
            states = check_experts(Entries(origin), {EXPERT: states})[EXPERT]
        except MergeError as error:
            raise located(error, [base, expert], [name]) from error
        if equal(origin[name], states[name]):
            continue
        if kind_of(base.entries[name]) is None:
            where = f"{expert.folder / expert.files_of_tensors[name]}, tensor {name!r}"
            others = f"others, of {base.entries[name].dtype}"
            cure = "these have no differences: give the expert the base's tensor"
            raise Refused(where, "the base's values", others, cure)
        yield name, origin[name], states[name]


def _rounded(name: str, difference: Tensor, dtype: str) -> Tensor:
    """A difference (…) in the dtype that it is stored in; one of whole numbers as it is."""
    if not difference.is_floating_point():
        return difference
    like = difference.new_empty((), dtype=TYPES[dtype])
    return stored(f"the difference of tensor {name!r}", difference, like)


def _stored_as(entry: Entry, dtype: str) -> str:
    """What the difference of a tensor is stored in, where real ones are in a dtype."""
    return "I64" if kind_of(entry) == "whole" else dtype


def _all_entries(base: Checkpoint, dtype: str) -> list[Entry]:
    """Entries of differences of all tensors."""
    entries, end = [], 0
    for name, entry in base.entries.items():
        own = _stored_as(entry, dtype)
        start, end = end, end + prod(entry.shape) * SIZES[own]
        entries.append(Entry(name, own, entry.shape, start, end))
    return entries


def _header(entries: list[Entry], about: Mapping[str, str]) -> bytes:
    """The header of a file in JSON, as long as a multiple of eight.

    Args:
        entries: places from the first tensor on.
    """
    described: dict[str, dict] = {"__metadata__": dict(about)}
    for entry in entries:
        places = [entry.start, entry.stop]
        described[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": places}
    text = json.dumps(described, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % LENGTH)


def _about(
    base: Checkpoint, expert: Checkpoint, digests: Callable[[Checkpoint], dict[str, str]]
) -> dict[str, str]:
    """What a file says of itself, without a path or a date: the base's folder, and the digests of
    the weights that it was made of."""
    return {
        "format": "pt",
        OF: base.folder.resolve().name,
        "base_weights": json.dumps(digests(base)),
        "expert_weights": json.dumps(digests(expert)),
        "versions": json.dumps(versions(with_transformers=False)),
    }


def _digests(checkpoint: Checkpoint) -> dict[str, str]:
    """File of weights -> its SHA-256."""
    return {file: digest.finish() for file, digest in checkpoint.digests.items()}


def _no_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """File of weights -> what is as long as its SHA-256."""
    return dict.fromkeys(checkpoint.headers, NO_DIGEST)
