"""Solved layers on the disk, so that a merge on calibration that was killed goes on from them."""

from __future__ import annotations

import json
import os
from pathlib import Path

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
