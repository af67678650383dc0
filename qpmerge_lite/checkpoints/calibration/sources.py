"""Calibration inputs of an expert: where they are, which are taken, what is told of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..digests import sha256
from ..findings import WARNING, Finding, Refused, shortened
from .data_sets import SCHEME, fetched
from .parquet import Parquet
from .pictures import KINDS, Pictures
from .records import IMAGE, MESSAGES, TEXT, Reader, Record
from .texts import AS_LINES, JSON_LINES, OTHER_KINDS, JsonLines, Lines

SAMPLES = 256  # inputs of an expert that are taken by default
OVERLAP = 0.1  # share of inputs that two experts have in common, from which on it is told
FORMS = "JSON lines, Parquet or plain text"


@dataclass(frozen=True)
class Row:
    """One calibration input.

    Attributes:
        where: file and line, or row, or the picture, for messages.
        content: texts, as many as there are fields; the messages of a chat; or a picture, as a path
            or as the bytes of a file.
        label: what the row has in a field for that, None where none is read.
    """

    where: str
    content: tuple[str, ...] | list[dict] | Path | bytes
    label: object = None


@dataclass
class Source:
    """Calibration inputs of one expert, as they were read.

    Attributes:
        name: the name of a file or folder, or an address at the Hub.
        digest: SHA-256 of the file; of pictures in a folder, that of the lines ``digest  name``
            which ``sha256sum`` writes for those taken.
        rows: the inputs that are taken.
        total: how many the source has.
        fields: what was read of every row.
        others: fields, or files of a folder, that are not read.
        blank: how many rows were left out for they have no words.
    """

    name: str
    digest: str
    rows: list[Row]
    total: int
    fields: Sequence[str]
    others: list[str] = field(default_factory=list)
    blank: int = 0

    def as_json(self) -> dict:
        """What a manifest says of it."""
        return {
            "file": self.name,
            "sha256": self.digest,
            "inputs": len(self.rows),
            "of": self.total,
            "fields": list(self.fields),
        }


def spread(total: int, count: int) -> list[int]:
    """``count`` numbers below ``total``, evenly apart, as a file may be sorted by its labels; all
    of them where there are no more."""
    count = min(total, count)
    return [place * total // count for place in range(count)]


def read_source(
    expert: str,
    place: str | Path,
    fields: Sequence[str],
    samples: int | None,
    pictures: bool = False,
    label: str | None = None,
) -> Source:
    """The calibration inputs of an expert.

    Args:
        expert: its name, for messages.
        place: a file of JSON lines, Parquet or plain text; a folder of pictures; or the address of
            a file at the Hub, see ``hub.fetched``.
        fields: names of what is read of a row: a picture; a text or a pair of texts; or a text and
            its target. A row with ``messages`` in place of ``text`` is a chat.
        samples: how many inputs are taken at the most, spread evenly over all; None for all.
        pictures: whether the inputs are pictures.
        label: field that labels are read from, None for no labels; pictures in a folder have the
            name of the folder inside it as theirs.
    Raises: Refused naming the file, and the line or row where it is one.
    """
    reader = reader_of(place, pictures)
    total = reader.count()
    numbers = spread(total, total if samples is None else samples)
    asked = {*fields, MESSAGES} if tuple(fields) == (TEXT,) else set(fields)
    asked |= set() if label is None else {label}
    rows, others, blank = [], dict.fromkeys(getattr(reader, "others", ())), 0
    for record in reader.records(numbers, asked):
        others |= dict.fromkeys(record.others)
        content = _content(expert, record, fields, pictures)
        if content is None:
            blank += 1
        elif label is None:
            rows.append(Row(record.where, content))
        else:
            rows.append(Row(record.where, content, _label(expert, reader, record, label)))
    if not rows:
        cure = "give every expert some unlabelled inputs of its task"
        what = "picture" if pictures else "text"
        raise Refused(reader.shown, f"at least one {what}", "none", cure)
    name = str(place) if _is_remote(place) else reader.path.resolve().name
    return Source(name, _digest(reader, rows), rows, total, fields, list(others), blank)


def _is_remote(place: str | Path) -> bool:
    return str(place).startswith(SCHEME)


def reader_of(place: str | Path, wants_pictures: bool) -> Reader:
    """What reads a source.

    Raises: Refused for a kind of file that is not read, or that has no inputs of that kind.
    """
    shown, path = str(place), fetched(str(place)) if _is_remote(place) else Path(place)
    suffix = path.suffix.lower()
    if path.is_dir() and wants_pictures:
        return Pictures(path, shown)
    if path.is_dir() or suffix in KINDS and not wants_pictures:
        found = "a folder" if path.is_dir() else "a picture"
        raise Refused(shown, f"{FORMS}, as the model reads texts", found, AS_LINES)
    if suffix == ".parquet":
        return Parquet(path, shown)
    if wants_pictures and path.exists():
        cure = f"give a folder of {', '.join(KINDS)}, or Parquet with a field {IMAGE!r}"
        raise Refused(shown, "pictures, which the model reads", f"a {suffix} file", cure)
    if suffix in OTHER_KINDS:
        raise Refused(shown, FORMS, f"a {suffix} file", AS_LINES)
    return JsonLines(path, shown) if suffix in JSON_LINES else Lines(path, shown)


def _content(expert: str, record: Record, fields: Sequence[str], pictures: bool):
    """What a model is given of a row; None for one without words."""
    values = record.values
    if MESSAGES in values and fields[0] not in values:
        fields = (MESSAGES,)
    for name in fields:
        if name not in values:
            there = [*values, *record.others]
            found = f"only {', '.join(map(repr, there)) or 'none'}"
            cure = f"rename the field to {name!r}, or say which one is meant: "
            cure += f"--column {expert}={','.join(['FIELD'] * len(fields))}"
            raise Refused(record.where, f"a field {name!r}", found, cure)
    first = values[fields[0]]
    if isinstance(first, Path):
        return first
    if pictures:
        return _bytes(record.where, fields[0], first)
    if len(fields) == 1 and isinstance(first, list):
        return _messages(record.where, fields[0], first)
    texts = [_text(record.where, name, values[name]) for name in fields]
    return tuple(texts) if all(text.strip() for text in texts) else None


def _label(expert: str, reader: Reader, record: Record, field: str) -> object:
    """The label of a row."""
    if isinstance(reader, Pictures):
        (path,) = record.values.values()
        folder = Path(str(path)).relative_to(reader.path).parent.name
        if not folder:
            cure = "put every picture into a folder with the name of its label"
            raise Refused(record.where, "a picture in a folder of its label", "one beside", cure)
        return folder
    if field not in record.values:
        there = [*record.values, *record.others]
        found = f"only {', '.join(map(repr, there))}"
        cure = f"say which field has the labels: --label {expert}=FIELD"
        raise Refused(record.where, f"a field {field!r} with the label", found, cure)
    return record.values[field]


def _text(where: str, name: str, value: object) -> str:
    """Words of a field; none for a field that is null."""
    if value is None:
        return ""
    expected, cure = f"words in the field {name!r}", "leave the row out, or name another field"
    if not isinstance(value, str):
        raise Refused(where, expected, f"{value!r:.40}", cure)
    if any("\ud800" <= sign <= "\udfff" for sign in value):
        raise Refused(where, expected, "half of a surrogate pair", cure)
    return value


def _messages(where: str, name: str, value: list) -> list[dict]:
    """Messages of a chat, each with its role."""
    for message in value or [None]:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            expected = f"words, or messages with role and content, in the field {name!r}"
            raise Refused(where, expected, f"{value!r:.40}", "write the rows so")
    return value


def _bytes(where: str, name: str, value: object) -> bytes:
    """Bytes of a picture as Parquet has them: by themselves, or beside a path that is not read."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        cure = "store the bytes of the files, as datasets does with an Image"
        expected = f"bytes of a picture in the field {name!r}"
        raise Refused(where, expected, f"{value!r:.40}", cure)
    return content


def _digest(reader: Reader, rows: Sequence[Row]) -> str:
    if not isinstance(reader, Pictures):
        return sha256(reader.path)
    total = hashlib.sha256()
    for row in rows:
        name = row.content.relative_to(reader.path).as_posix()  # type: ignore[union-attr]
        total.update(f"{sha256(row.content)}  {name}\n".encode())  # type: ignore[arg-type]
    return total.hexdigest()


def notes(sources: dict[str, Source]) -> list[str]:
    """What is to be known of sources that were read, a sentence each."""
    told = []
    for expert, source in sources.items():
        if source.blank:
            told.append(f"{expert}: {source.blank} rows of {source.name} have no words: left out")
    others = {name for source in sources.values() for name in source.others}
    if others:
        listed = shortened(sorted(others))
        told.append(f"labels and whatever else inputs come with are not read: {listed}")
    return told


def shared(sources: dict[str, Source]) -> list[Finding]:
    """A warning for every two experts with one file, or with inputs in common."""
    names, findings = list(sources), []
    contents = {name: set(map(_identity, source.rows)) for name, source in sources.items()}
    for place, second in enumerate(names):
        for first in names[:place]:
            fewest = min(len(contents[first]), len(contents[second]))
            common = len(contents[first] & contents[second])
            found = f"{common} of {fewest} inputs of {first!r} too"
            if sources[first].digest == sources[second].digest:
                found = f"the same file as of {first!r}"
            elif common < OVERLAP * fewest:
                continue
            where = f"calibration of {second!r}, {sources[second].name}"
            cure = "see that every expert has inputs of its own task"
            findings.append(Finding(WARNING, where, "inputs of its own", found, cure))
    return findings


def _identity(row: Row) -> str:
    """What tells inputs apart: their words, or the bytes of a picture."""
    if isinstance(row.content, Path):
        return sha256(row.content)
    if isinstance(row.content, bytes):
        return hashlib.sha256(row.content).hexdigest()
    return repr(row.content)
