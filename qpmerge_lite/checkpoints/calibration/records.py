"""What readers of calibration files have in common: a record, and packages that may be
missing, of recipes and shells too."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

from ..findings import Refused

TEXT, TARGET, IMAGE, MESSAGES = "text", "target", "image", "messages"


class Record(NamedTuple):
    """One row of a calibration source.

    Attributes:
        where: file and line, or row, for messages.
        values: field -> value, of the fields that were asked for and are there.
        others: fields that are there besides.
    """

    where: str
    values: dict[str, object]
    others: Collection[str] = ()


class Reader(Protocol):
    """A source that is read row by row, never as a whole.

    Attributes:
        path: where it is.
        shown: what messages call it.
    """

    path: Path
    shown: str

    def count(self) -> int:
        """How many rows there are."""

    def records(self, numbers: Collection[int], fields: Collection[str]) -> Iterator[Record]:
        """Rows of some numbers, from 0 on and in their order."""


def require(package: str, gives: str, otherwise: str, *, extra: str = "hub") -> None:
    """Refused where a package is not installed that an extra of this one has.

    Args:
        gives: what it is needed for, as ``which reads Parquet``.
        otherwise: what to do without it.
        extra: name of the extra.
    """
    if find_spec(package) is None:
        cure = f"pip install 'qpmerge-lite[{extra}]', or {otherwise}"
        raise Refused("the environment", f"{package}, {gives}", "none", cure)
