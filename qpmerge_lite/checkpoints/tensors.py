"""Tensors of checkpoints, read and written one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..experts import is_number, stored
from .adapters.folding import folded
from .adapters.reading import Adapter
from .deltas.adding import added
from .deltas.reading import Delta
from .digests import Digest
from .findings import Refused
from .folders import Checkpoint
from .headers import DAMAGED, Entry, Header
from .partial import unfinished

TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
# entries of torch's normalisations that are statistics of data, not weights
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def read_tensor(header: Header, name: str, digest: Digest | None = None) -> Tensor:
    """One tensor of a file, of the shape and dtype that its header gives.

    Only its own bytes are read, into memory of its own.

    Args:
        digest: of the file, which takes the bytes as they pass by.

    Raises: Refused where the file cannot be read, or not so far.
    """
    entry = header.entries[name]
    where = f"{header.path}, tensor {name!r}"
    memory = bytearray(entry.stop - entry.start)
    try:
        with header.path.open("rb") as file:
            file.seek(entry.start)
            count = file.readinto(memory)
    except OSError as error:
        cure = "see that the file is there and may be read"
        raise Refused(where, "a file that can be read", f"{error.strerror}", cure) from error
    if count != len(memory):
        raise Refused(where, f"{len(memory)} bytes", f"{count}", DAMAGED)
    if digest is not None:
        digest.take(entry.start, memory)
    if not memory:
        return torch.empty(entry.shape, dtype=TYPES[entry.dtype])
    return torch.frombuffer(memory, dtype=TYPES[entry.dtype]).reshape(entry.shape)


def read_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, by name; those of an adapter are folded into its base's, and
    differences added to them. The digests of its files take their bytes."""
    if isinstance(checkpoint, Adapter):
        return _folded_tensors(checkpoint, list(names))
    if isinstance(checkpoint, Delta):
        return _moved_tensors(checkpoint, list(names))
    tensors = {}
    for name in names:
        file = checkpoint.files_of_tensors[name]
        tensors[name] = read_tensor(checkpoint.headers[file], name, checkpoint.digests[file])
    return tensors


def _folded_tensors(adapter: Adapter, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of the base, those that the adapter changes with their change."""
    tensors = read_tensors(adapter.base, names)
    for name in names:
        if name in adapter.folds:
            fold = adapter.folds[name]
            parts = {part: read_tensor(adapter.header, key) for part, key in fold.parts.items()}
            tensors[name] = folded(tensors[name], fold, parts)
    return tensors


def _moved_tensors(delta: Delta, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of the base, with the differences that there are for them."""
    tensors = read_tensors(delta.base, names)
    for name in names:
        if name in delta.tensors:
            file = delta.files_of_tensors[name]
            difference = read_tensor(delta.headers[file], name, delta.digests[file])
            tensors[name] = added(tensors[name], difference)
    return tensors


class Entries(nn.Module):
    """Tensors under their names, in place of a model where a method looks at weights only.

    It has the three things that such methods ask of a model: entries, which of them are
    parameters, and which are buffers.

    Args:
        entries: name -> tensor (…). Names may have dots; equal objects count as tied.
    """

    def __init__(self, entries: Mapping[str, Tensor]):
        super().__init__()
        self.entries = dict(entries)

    def state_dict(self, *_, **__):
        """The tensors by name."""
        return dict(self.entries)

    def parameters(self, recurse: bool = True) -> Iterator:
        """All tensors, statistics among them."""
        yield from self.entries.values()

    def named_buffers(self, *_, **__):
        """Statistics that torch's normalisations keep of their inputs, by name."""
        for name, value in self.entries.items():
            if name.rpartition(".")[2] in STATISTICS:
                yield name, value


class Shards:
    """Files of weights that have the headers of others, and get tensor after tensor.

    A file is made under the name of :func:`unfinished` until it has all its tensors.

    Args:
        folder: where the files are made.
        headers: name of a file -> the header that it copies, byte for byte.
        finished: files that are there already.
        finish: gives a file its name, called with it.
    Attributes:
        missing: tensor -> its file, of those that were not written yet.
    """

    def __init__(
        self,
        folder: Path,
        headers: Mapping[str, Header],
        finished: Collection[str] = (),
        finish: Callable[[str], None] | None = None,
    ):
        self.folder, self.headers = folder, headers
        self.missing: dict[str, str] = {}
        self._left: dict[str, int] = {}  # file -> how many of its tensors are missing
        self._finish = finish or self._rename
        for file, header in headers.items():
            if file not in finished:
                self.missing |= dict.fromkeys(header.entries, file)
                self._left[file] = len(header.entries)
                if not header.entries:
                    self._begin(file)
                    self._finish(file)

    def write(self, name: str, value: Tensor) -> None:
        """Write one tensor (…), in the dtype that its header gives.

        Raises: NonFinite where that dtype cannot hold it.
        """
        file = self.missing.pop(name)
        entry = self.headers[file].entries[name]
        if self._left[file] == len(self.headers[file].entries):
            self._begin(file)
        with unfinished(self.folder / file).open("r+b") as out:
            out.seek(entry.start)
            out.write(bytes_of(entry, value))
        self._left[file] -= 1
        if not self._left[file]:
            self._finish(file)

    def _begin(self, file: str) -> None:
        """Make a file with its header, and room for its tensors."""
        header = self.headers[file]
        with unfinished(self.folder / file).open("xb") as out:
            out.write(header.raw)
            out.truncate(header.size)

    def _rename(self, file: str) -> None:
        unfinished(self.folder / file).rename(self.folder / file)

    def finish(self) -> None:
        """MergeError unless every tensor was written."""
        if self.missing:
            raise MergeError(f"tensors without a merged value: {sorted(self.missing)[:3]}")


def bytes_of(entry: Entry, value: Tensor):
    """The bytes of a value (…), as a file has them for this entry: a flat array of them."""
    like = torch.empty((), dtype=TYPES[entry.dtype])
    if is_number(value) and value.dtype != like.dtype:
        value = stored(f"tensor {entry.name!r}", value, like)
    if value.dtype != like.dtype or tuple(value.shape) != entry.shape:
        raise MergeError(
            f"tensor {entry.name!r}: expected {like.dtype} of shape {entry.shape}, found "
            f"{value.dtype} of shape {tuple(value.shape)}"
        )
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()
