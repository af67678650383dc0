"""Headers of safetensors files, read and checked without a byte of their weights.

Such a file is eight bytes with the length of its header, the header in JSON (tensor -> dtype, shape
and place), and the tensors one after the other. Nothing in it is ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from .findings import Refused

# bytes of one number, by the name that the format gives to a dtype
SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
# dtypes of real numbers -> their names in configurations
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
LENGTH = 8  # bytes that say how long the header is
LARGEST = 100_000_000  # bytes of a header, as the library of the format has it
PIECE = 1 << 24  # bytes that are read at a time, where not all of a tensor is
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
DAMAGED = "fetch the file again; it is cut short or damaged"
SAVE_AGAIN = (
    "where you trust whoever made it, load it with transformers and save it again, with "
    "model.save_pretrained(folder)"
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name, dtype, shape: as the header has them; a dtype is a key of ``SIZES``.
        start, stop: its bytes, counted from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_number(self) -> bool:
        """Whether its values can be averaged: floating or complex ones."""
        return self.dtype.startswith(("F", "BF", "C"))


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        path: of the file.
        raw: the bytes of the file before its first tensor.
        entries: name -> entry, in the order of their bytes.
        metadata: the header's own words, such as ``format``.
        size: bytes of the file.
    """

    path: Path
    raw: bytes
    entries: dict[str, Entry]
    metadata: dict
    size: int

    def as_dtype(self, dtype: str) -> Header:
        """The header of a file with the same tensors, whose real numbers have one dtype."""
        described: dict[str, dict] = {"__metadata__": self.metadata} if self.metadata else {}
        entries, end = [], 0
        for entry in self.entries.values():
            own = dtype if entry.is_number and entry.dtype != "C64" else entry.dtype
            start, end = end, end + prod(entry.shape) * SIZES[own]
            offsets = [start, end]
            described[entry.name] = {"dtype": own, "shape": entry.shape, "data_offsets": offsets}
            entries.append(Entry(entry.name, own, entry.shape, start, end))
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % LENGTH)  # so that the tensors begin at a multiple of it
        raw = len(text).to_bytes(LENGTH, "little") + text
        placed = {
            e.name: replace(e, start=len(raw) + e.start, stop=len(raw) + e.stop) for e in entries
        }
        return Header(self.path, raw, placed, self.metadata, len(raw) + end)


def read_header(path: Path) -> Header:
    """The header of a file, held against the file's length.

    Raises: Refused naming the file, and the tensor where it is one, for what is no safetensors file
        or does not hold together.
    """
    raw, size = _raw_header(path)
    described = _parsed(path, raw[LENGTH:])
    metadata = described.pop("__metadata__", {})
    entries = []
    for name, given in described.items():
        entries.append(_entry(path, name, given, len(raw)))
    entries.sort(key=_place)
    _check_places(path, entries, len(raw), size)
    by_name = {entry.name: entry for entry in entries}
    return Header(path, raw, by_name, metadata if isinstance(metadata, dict) else {}, size)


def _place(entry: Entry) -> tuple[int, int]:
    return entry.start, entry.stop


def _raw_header(path: Path) -> tuple[bytes, int]:
    """The bytes of a file before its first tensor, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(LENGTH)
            length = int.from_bytes(first, "little")
            fits = len(first) == LENGTH and 0 < length <= LARGEST and LENGTH + length <= size
            if not fits and first.startswith(PICKLES):  # a length may begin like a pickle
                found = "a pickled file, which can run any code when it is read"
                raise Refused(path, "safetensors", found, SAVE_AGAIN)
            if not fits:
                found = f"a file of {size} bytes that announces one of {length}"
                raise Refused(path, "a whole safetensors header", found, DAMAGED)
            return first + file.read(length), size
    except OSError as error:
        cure = "see that the file is there and may be read"
        raise Refused(path, "a file that can be read", str(error.strerror), cure) from error


def _parsed(path: Path, text: bytes) -> dict:
    """The header as a mapping."""
    try:
        described = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except ValueError as error:  # of JSON, of UTF-8, or a name that is there twice
        found = f"one that does not parse ({error})"
        raise Refused(path, "a safetensors header in JSON", found, DAMAGED) from error
    if not isinstance(described, dict):
        found = f"a {type(described).__name__}"
        raise Refused(path, "a safetensors header that names tensors", found, DAMAGED)
    return described


def _once(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON whose names are all different."""
    named = dict(pairs)
    if len(named) != len(pairs):
        raise ValueError("a name is there twice")
    return named


def _entry(path: Path, name: str, given, first: int) -> Entry:
    """One tensor as the header describes it; ``first`` is where the tensors begin."""
    where = f"{path}, tensor {name!r}"
    try:
        dtype, shape, (start, stop) = given["dtype"], tuple(given["shape"]), given["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise Refused(where, "dtype, shape and data_offsets", f"{given!r:.80}", DAMAGED)
    if dtype not in SIZES:
        cure = "if these are quantised weights, load the model dequantised and save it again"
        raise Refused(where, f"a dtype out of {', '.join(SIZES)}", repr(dtype), cure)
    if stop - start != prod(shape) * SIZES[dtype]:
        expected = f"{prod(shape) * SIZES[dtype]} bytes for {dtype} of shape {shape}"
        raise Refused(where, expected, f"{stop - start}", DAMAGED)
    return Entry(name, dtype, shape, first + start, first + stop)


def _check_places(path: Path, entries: list[Entry], first: int, size: int) -> None:
    """Refused unless the tensors follow each other without holes up to the end of the file."""
    end = first
    for entry in entries:
        if entry.start != end:
            where = f"{path}, tensor {entry.name!r}"
            raise Refused(where, f"its bytes from {end} on", f"from {entry.start} on", DAMAGED)
        end = entry.stop
    if end != size:
        raise Refused(path, f"a file of {end} bytes, as its header says", f"{size}", DAMAGED)


def pieces(path: Path, entry: Entry) -> Iterator[bytes]:
    """The bytes of one tensor of a file, piece by piece.

    Raises: Refused where the file cannot be read, or not so far.
    """
    where, left = f"{path}, tensor {entry.name!r}", entry.stop - entry.start
    try:
        with path.open("rb") as file:
            file.seek(entry.start)
            while left:
                piece = file.read(min(left, PIECE))
                if not piece:
                    raise Refused(where, f"{left} more bytes", "the end of the file", DAMAGED)
                left -= len(piece)
                yield piece
    except OSError as error:
        cure = "see that the file is there and may be read"
        raise Refused(path, "a file that can be read", str(error.strerror), cure) from error
