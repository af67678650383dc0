"""Weights that stay in their files until they are used: the system reads them in as they are
touched, and lets go of them when memory is short.

What no file has, as a tensor with an adapter folded in or one in another dtype than it is wanted
in, goes through a file of ours that has no name and ends with the process.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import is_finite
from ..findings import Refused
from ..folders import Change, Checkpoint
from ..headers import DAMAGED, Header
from ..tensors import TYPES, read_tensor, read_tensors

ALIGNED = 64  # bytes at whose multiples tensors begin in a file of ours


def mapped(file) -> Tensor:
    """All bytes of an open file that is not empty, uint8: nothing is read yet, and what is written
    to them changes no file."""
    return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def tensors_of_file(header: Header) -> dict[str, Tensor]:
    """The tensors of a file by name. Those whose bytes do not lie as torch needs it are read.

    Raises: Refused where the file cannot be read, or is not as long as its header says.
    """
    try:
        with header.path.open("rb") as file:
            content = mapped(file)
    except (OSError, ValueError) as error:  # as of an empty file
        cure = "see that the file is there and may be read"
        raise Refused(header.path, "a file that can be read", f"{error}", cure) from error
    if len(content) != header.size:
        raise Refused(header.path, f"a file of {header.size} bytes", f"{len(content)}", DAMAGED)
    tensors = {}
    for name, entry in header.entries.items():
        dtype = TYPES[entry.dtype]
        if entry.start == entry.stop or entry.start % dtype.itemsize:
            tensors[name] = read_tensor(header, name)
        else:
            tensors[name] = content[entry.start : entry.stop].view(dtype).reshape(entry.shape)
    return tensors


def mapped_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name; of a change of its base, those of the base.

    Raises: what :func:`tensors_of_file` raises.
    """
    if isinstance(checkpoint, Change):
        return mapped_tensors(checkpoint.base)
    tensors: dict[str, Tensor] = {}
    for header in checkpoint.headers.values():
        tensors |= tensors_of_file(header)
    return tensors


class Spool:
    """Computed tensors in a file in place of memory.

    Args:
        file: open for reading and writing, empty.
    """

    def __init__(self, file):
        self._file = file
        self._places: dict[str, tuple[int, Tensor]] = {}  # and what a tensor there is like

    def add(self, name: str, value: Tensor) -> None:
        """Put a tensor (…) there."""
        flat = value.contiguous().reshape(-1).view(torch.uint8)
        start = -(-self._file.tell() // ALIGNED) * ALIGNED
        self._file.seek(start)
        self._file.write(flat.numpy())
        self._places[name] = start, value.to("meta")

    def tensors(self) -> dict[str, Tensor]:
        """All that was put there, by name."""
        if not self._file.tell():
            return {}
        self._file.flush()
        content, tensors = mapped(self._file), {}
        for name, (start, like) in self._places.items():
            flat = content[start : start + like.numel() * like.itemsize]
            tensors[name] = flat.view(like.dtype).reshape(like.shape)
        return tensors


def expert_state(
    expert: Checkpoint, names: Mapping[str, torch.dtype | None], folder: Path | None
) -> dict[str, Tensor]:
    """The tensors of an expert by name, with the values that ``read_tensors`` gives them.

    Args:
        names: of the tensors -> the dtype that each is rounded to where its numbers fit into it,
            None for its own.
        folder: where there is room for what is computed; None for where the system has its own.
    """
    stored = mapped_tensors(expert)
    changed = expert.files_of_tensors if isinstance(expert, Change) else {}
    state = {name: stored[name] for name in names}
    with tempfile.TemporaryFile(dir=folder) as file:
        spool = Spool(file)
        for name, dtype in names.items():
            if name in changed:
                value = read_tensors(expert, [name])[name]
            elif dtype in (None, state[name].dtype) or not state[name].is_floating_point():
                continue
            else:
                value = state[name]
            spool.add(name, _rounded(value, dtype))
        return state | spool.tensors()


def _rounded(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor (…) in a dtype, or as it is where that one cannot hold it."""
    if dtype is None or dtype.itemsize == 1:  # such numbers are cut without a word
        return value
    rounded = value.to(dtype)
    return rounded if is_finite(rounded) else value
