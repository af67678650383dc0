"""Solved layers on the disk, so that a merge on calibration that was killed goes on from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ...engine.keeping import Solved
from ..partial import settle


class SolvedLayers:
    """A folder with a file for each group of layers that were solved together.

    Args:
        folder: of this very order; it need not be there.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, key: str) -> Solved | None:
        """What is kept under a key, None where nothing is."""
        from safetensors import safe_open

        path = self.folder / key
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            parts = {name: file.get_tensor(name) for name in file.keys()}
            return Solved(parts, json.loads(file.metadata()["rows"]))

    def write(self, key: str, solved: Solved) -> None:
        """Keep what was solved; the file has its name only when it is whole."""
        from safetensors.torch import save_file

        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{key}.unfinished"
        parts = {name: value.contiguous() for name, value in solved.parts.items()}
        save_file(parts, path, {"rows": json.dumps(solved.rows)})
        settle(path)
        os.replace(path, self.folder / key)


@contextmanager
def remembering(store: SolvedLayers) -> Iterator[None]:
    """What ``esm`` decomposes inside is kept, and taken from there where an earlier run has
    decomposed the very same numbers: its pass hands over no merge, so that layers are kept as they
    come out of the decomposition."""
    from ...spectral import essential

    subspaces, triplets = essential.merge_subspaces, essential.merge_triplets

    def remembered(compute):
        def kept(*tensors: Tensor) -> Tensor:
            key = _key_of(compute.__name__, tensors)
            found = store.read(key)
            if found is None:
                found = Solved({"update": compute(*tensors)}, [])
                store.write(key, found)
            return found.parts["update"]

        return kept

    essential.merge_subspaces = remembered(subspaces)
    essential.merge_triplets = remembered(triplets)
    try:
        yield
    finally:
        essential.merge_subspaces, essential.merge_triplets = subspaces, triplets


def _key_of(name: str, tensors: tuple[Tensor, ...]) -> str:
    """A function and the numbers (…) that it is given, in a few digits."""
    digest = hashlib.sha256(name.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:32]
