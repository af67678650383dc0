"""Calibration files of texts: one a line, plain or in JSON, read line by line."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from ..findings import Refused
from .records import TEXT, Record

JSON_LINES = (".jsonl", ".ndjson", ".json")
OTHER_KINDS = (".csv", ".tsv", ".arrow", ".pkl", ".gz", ".zip", ".zst", ".xz")
AS_LINES = 'write it as JSON lines, {"text": "…"} a line, or as plain text, one input a line'


class Lines:
    """Plain text in UTF-8, an input a line. Empty lines are none.

    Args:
        path: the file.
        shown: what messages call it.
    """

    def __init__(self, path: Path, shown: str):
        self.path, self.shown = path, shown

    def count(self) -> int:
        """How many lines are not empty.

        Raises: Refused for a file that cannot be read, or a line that is not in UTF-8.
        """
        return sum(1 for _ in self._lines())

    def records(self, numbers: Collection[int], fields: Collection[str]) -> Iterator[Record]:
        """Lines of some numbers, counted from 0 without the empty ones."""
        chosen = set(numbers)
        for place, (number, line) in enumerate(self._lines()):
            if place in chosen:
                yield self._record(f"{self.shown}, line {number}", line, fields)

    def _record(self, where: str, line: str, fields: Collection[str]) -> Record:
        return Record(where, {TEXT: line})

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Lines that are not empty, with their numbers from 1 on."""
        try:
            with self.path.open("rb") as file:
                # Only line ends part lines: a text may hold other separators of Unicode.
                for number, content in enumerate(file, start=1):
                    line = _decoded(f"{self.shown}, line {number}", content)
                    if line.strip():
                        yield number, line
        except OSError as error:
            cure = "see that the file is there and may be read"
            found = error.strerror or "none"
            expected = "a calibration file that can be read"
            raise Refused(self.shown, expected, found, cure) from error


def _decoded(where: str, content: bytes) -> str:
    """A line without its end, and without the mark that some editors begin a file with."""
    cure = "save the file as UTF-8"
    try:
        line = content.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"a byte that is none at position {error.start} of the line"
        raise Refused(where, "text in UTF-8", found, cure) from error
    if "\0" in line:
        found = f"a null character at position {line.index(chr(0))} of the line"
        raise Refused(where, "text in UTF-8", found, cure)
    return line.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


class JsonLines(Lines):
    """JSON lines: an object a line."""

    def _record(self, where: str, line: str, fields: Collection[str]) -> Record:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            found = f"what does not parse ({error})"
            raise Refused(where, "an object of JSON", found, AS_LINES) from error
        if not isinstance(value, dict):
            raise Refused(where, "an object of JSON", f"a {type(value).__name__}", AS_LINES)
        wanted = {name: value[name] for name in fields if name in value}
        return Record(where, wanted, [name for name in value if name not in wanted])
