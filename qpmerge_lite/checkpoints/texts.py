"""Calibration files: texts, one a line, plain or in JSON."""

from __future__ import annotations

import json
from pathlib import Path

from .findings import Refused

COLUMN = "text"
JSON_LINES = (".jsonl", ".ndjson", ".json")
OTHER_KINDS = (".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".zst", ".xz")
AS_LINES = 'write it as JSON lines, {"text": "…"} a line, or as plain text, one input a line'


def read_texts(path: Path) -> list[str]:
    """The texts of a calibration file, in their order.

    Args:
        path: JSON lines (.jsonl, .ndjson, .json) with a field ``text``, whose other fields are
            ignored; or plain text, an input a line. Both in UTF-8; empty lines are left out.
    Raises: Refused naming the file, and the line where it is one.
    """
    if path.suffix.lower() in OTHER_KINDS:
        raise Refused(path, "JSON lines or plain text", f"a {path.suffix} file", AS_LINES)
    lines = _lines(path)
    if path.suffix.lower() in JSON_LINES:
        texts = [_text(path, number, line) for number, line in lines]
    else:
        texts = [line for _, line in lines]
    if not texts:
        cure = "give every expert some unlabelled inputs of its task"
        raise Refused(path, "at least one text", "none", cure)
    return texts


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1 on."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        cure = "see that the file is there and may be read"
        found = error.strerror or "none"
        raise Refused(path, "a calibration file that can be read", found, cure) from error
    except UnicodeDecodeError as error:
        found = f"a byte that is none at position {error.start}"
        raise Refused(path, "text in UTF-8", found, "save the file as UTF-8") from error
    # Only line ends part lines: a text may well hold one of the other separators of Unicode.
    numbered = enumerate(content.replace("\r\n", "\n").split("\n"), start=1)
    return [(number, line) for number, line in numbered if line.strip()]


def _text(path: Path, number: int, line: str) -> str:
    """The text of one line of JSON."""
    where = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except ValueError as error:
        found = f"what does not parse ({error})"
        raise Refused(where, "an object of JSON", found, AS_LINES) from error
    if not isinstance(value, dict):
        raise Refused(where, "an object of JSON", f"a {type(value).__name__}", AS_LINES)
    text = value.get(COLUMN)
    if COLUMN not in value:
        found = f"only {', '.join(map(repr, value)) or 'none'}"
        raise Refused(where, f"a field {COLUMN!r}", found, f"rename the field to {COLUMN!r}")
    if not isinstance(text, str) or not text.strip():
        cure = "leave the line out"
        raise Refused(where, f"words in the field {COLUMN!r}", f"{text!r:.40}", cure)
    return text
