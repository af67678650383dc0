"""Names of a backbone's tensors, in an expert's files and in the base's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from ..folders import Checkpoint, other_name


class Way(NamedTuple):
    """What names of a backbone begin with, in an expert's files and in the base's.

    Transformers calls it ``base_model_prefix``; a base without a head may lack it.
    """

    own: str
    base: str


def way_of(base: Checkpoint, names: Collection[str]) -> Way | None:
    """The way by which most of an expert's names are the base's; None where none is."""
    counts: dict[Way, int] = {}
    for prefix in _first_parts(names):
        for before in dict.fromkeys((prefix, "")):
            way = Way(prefix, before)
            inside = relative(names, prefix)
            counts[way] = sum(name_in(base, before + name) is not None for name in inside)
    best = max(counts, key=counts.__getitem__, default=None)
    return best if best is not None and counts[best] else None


def _first_parts(names: Iterable[str]) -> list[str]:
    dotted = [name.partition(".")[0] + "." for name in names if "." in name]
    return list(dict.fromkeys(dotted))


def relative(names: Iterable[str], prefix: str) -> list[str]:
    """Names that begin with a prefix, without it."""
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def name_in(base: Checkpoint, name: str) -> str | None:
    """A tensor's name in the base's files, which may have its norms' older names; None where they
    have it not."""
    other = other_name(name)
    if name in base.entries:
        return name
    return other if other is not None and other in base.entries else None


def part_of(name: str, prefix: str) -> str | None:
    """The first part of a name behind a prefix; None for a name that does not begin with it."""
    return name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else None


def viewed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """A checkpoint with some of its tensors alone, under other names.

    Args:
        names: of the tensors in its files -> what they are to be called.
    """
    headers = {}
    for file, header in checkpoint.headers.items():
        entries = {names[n]: entry for n, entry in header.entries.items() if n in names}
        headers[file] = replace(header, entries=entries)
    view = replace(checkpoint, headers=headers)
    view.digests = checkpoint.digests  # of the files as they are, which both read
    return view


def newer(name: str) -> str:
    """A name as models of transformers have it: of a norm, the newer one."""
    other = other_name(name)
    return other if other is not None and name.endswith((".gamma", ".beta")) else name
