"""Calibration pictures: folders of them, and one picture as a model's processor is given it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from io import BytesIO
from pathlib import Path

from ..findings import Refused
from .records import IMAGE, Record, require

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
WIDE = ("I", "F")  # modes of Pillow with more than eight bits a colour begin so


class Pictures:
    """A folder of pictures, and of folders of pictures whose names are not read.

    Args:
        path: the folder.
        shown: what messages call it.
    Attributes:
        others: what is not read: files and folders that are no pictures, hidden ones aside, and
            names of folders, if there are some.
    """

    def __init__(self, path: Path, shown: str):
        self.path, self.shown = path, shown
        pictures, others = [], []
        for entry in (*path.glob("*"), *path.glob("*/*")):
            name = entry.relative_to(path).as_posix()
            if "/." in f"/{name}":
                continue
            if entry.is_file() and entry.suffix.lower() in KINDS:
                pictures.append(name)
            elif entry.is_file() or "/" in name:
                others.append(name)
        in_folders = any("/" in name for name in pictures)
        self.names = sorted(pictures)
        self.others = [*sorted(others), *(["names of folders"] if in_folders else [])]

    def count(self) -> int:
        """How many pictures there are."""
        return len(self.names)

    def records(self, numbers: Collection[int], fields: Collection[str]) -> Iterator[Record]:
        """Pictures of some numbers, in the order of their names."""
        for number in sorted(set(numbers)):
            name = self.names[number]
            yield Record(f"{self.shown}/{name}", {IMAGE: self.path / name})


def opened(where: str, content: Path | bytes):
    """A picture of three colours, turned as its camera says.

    Greyscale, palettes and transparency become colours as Pillow converts them, which is what
    processors of transformers do: a transparent point has the colour that is stored for it. Of
    several frames the first one is taken.

    Args:
        where: what messages call it.
        content: a file, or the bytes of one.
    Returns: ``PIL.Image.Image`` in mode RGB.
    Raises: Refused for what Pillow does not open, for more than eight bits a colour, and for more
        points than Pillow takes for harmless.
    """
    require("PIL", "which is pillow and opens pictures", "choose a method that needs none")
    from PIL import Image
    from transformers.image_utils import load_image

    source = BytesIO(content) if isinstance(content, bytes) else content
    cure = "replace or remove the picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as picture:
                mode = picture.mode
                colours = None if mode.startswith(WIDE) else load_image(picture)
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise Refused(where, "a picture", f"what does not open ({error})", cure) from error
    if colours is None:
        found = f"more (mode {mode})"
        raise Refused(where, "eight bits a colour", found, "convert the picture to eight bits")
    return colours
