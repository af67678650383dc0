"""Glyph images: rendering from typefaces, affine variation, and the media they are shown in.

A master is a glyph at twice the final size, 56 x 56 bytes; images are 28 x 28. Ink is 1, paper 0.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

MASTER, SIDE, SIZE = 56, 28, 40
NOISE = 0.05


@cache
def typeface(name: str) -> Path:
    """Path of a typeface shipped with matplotlib, by its file name without ``.ttf``."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


@cache
def characters(name: str) -> frozenset:
    """Code points that a typeface can draw."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(typeface(name))).get_charmap())


@cache
def _font(name: str):
    from PIL import ImageFont

    return ImageFont.truetype(str(typeface(name)), SIZE, layout_engine=ImageFont.Layout.BASIC)


@cache
def master(name: str, character: str) -> np.ndarray | None:
    """Glyph centred by its ink on a (56, 56) uint8 canvas; None for one that is blank or too
    large."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = _font(name).getbbox(character)
    if not 0 < max(right - left, bottom - top) <= MASTER or min(right - left, bottom - top) < 1:
        return None
    canvas = Image.new("L", (MASTER, MASTER))
    corner = (MASTER - right + left) // 2 - left, (MASTER - bottom + top) // 2 - top
    ImageDraw.Draw(canvas).text(corner, character, fill=255, font=_font(name))
    image = np.asarray(canvas)
    return image if image.any() else None


def signature(image: np.ndarray) -> np.ndarray:
    """Unit vector of a blurred, centred master: the cosine of two says how alike the glyphs
    look."""
    small = F.avg_pool2d(torch.from_numpy(image.astype(np.float32))[None], 5, stride=3).flatten()
    small = small - small.mean()
    return (small / small.norm()).numpy()


def affine(masters: Tensor, generator: Generator) -> Tensor:
    """Slightly rotated, scaled, sheared and shifted images: (B, 56, 56) bytes to (B, 28, 28) in [0,
    1]."""
    n = len(masters)
    turn, grow, shear, dx, dy = 2 * torch.rand(5, n, generator=generator) - 1
    turn, grow, shear = 0.12 * turn, 1 + 0.1 * grow, 0.1 * shear
    cos, sin = turn.cos() * grow, turn.sin() * grow
    rows = torch.stack([cos, shear - sin, 0.07 * dx, sin, cos, 0.07 * dy], 1).view(n, 2, 3)
    grid = F.affine_grid(rows, [n, 1, SIDE, SIDE], align_corners=False)
    images = masters[:, None].float() / 255
    return F.grid_sample(images, grid, align_corners=False)[:, 0]


def _uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, 1, 1, generator=generator)


def _axes() -> tuple[Tensor, Tensor]:
    steps = torch.linspace(-1, 1, SIDE)
    return steps[:, None], steps[None, :]


def _wave(n: int, generator: Generator, angle: Tensor | float) -> Tensor:
    """Stripes of period 4 to 7 pixels and random phase across a direction, in [0, 1]."""
    angle, (y, x) = torch.as_tensor(angle), _axes()
    pixels = (SIDE / 2) * (y * angle.cos() + x * angle.sin())
    period = _uniform(n, 4, 7, generator)
    return 0.5 + 0.5 * torch.sin(2 * torch.pi * (pixels / period + _uniform(n, 0, 1, generator)))


def _ramp(n: int, generator: Generator) -> Tensor:
    """Brightness rising along a random direction, in [0, 1]."""
    angle, (y, x) = _uniform(n, 0, 2 * torch.pi, generator), _axes()
    return 0.5 + 0.35 * (y * angle.cos() + x * angle.sin())


def plain(g, generator):
    """Ink on paper."""
    return g


def inverted(g, generator):
    """Paper and ink exchanged."""
    return 1 - g


def blurred(g, generator):
    """Ink that has run."""
    return F.avg_pool2d(g[:, None], 3, 1, 1)[:, 0]


def striped(g, generator):
    """Ink printed in level stripes."""
    return g * (0.35 + 0.65 * _wave(len(g), generator, 0.0))


def screened(g, generator):
    """Ink printed as a dot screen."""
    n = len(g)
    return g * (0.3 + 0.7 * _wave(n, generator, 0.0) * _wave(n, generator, torch.pi / 2)).clamp(
        0, 1
    )


def faint(g, generator):
    """Low contrast on grey."""
    return _uniform(len(g), 0, 0.5, generator) + _uniform(len(g), 0.25, 0.5, generator) * g


def shaded(g, generator):
    """A soft gradient behind the ink."""
    return torch.maximum(g, 0.5 * _ramp(len(g), generator))


def diagonal(g, generator):
    """Diagonal stripes that change sign under the ink."""
    wave = 0.5 * _wave(len(g), generator, torch.pi / 4)
    return g * (1 - wave) + (1 - g) * wave


def speckled(g, generator):
    """Salt and pepper: every sixth pixel is black or white."""
    draw = torch.rand(g.shape, generator=generator)
    return torch.where(draw < 1 / 12, 0.0, torch.where(draw > 11 / 12, 1.0, g))


def backlit(g, generator):
    """Dark ink on a steep gradient."""
    return (1.2 * _ramp(len(g), generator)).clamp(0, 1) * (1 - g)


def meshed(g, generator):
    """A checker mesh of two-pixel cells, inverted under the ink."""
    cells = torch.arange(SIDE) // 2
    mesh = 0.6 * ((cells[:, None] + cells[None, :]) % 2)
    return g * (1 - mesh) + (1 - g) * mesh


def blotched(g, generator):
    """Cloudy paper, in places nearly as strong as the ink."""
    clouds = torch.rand(len(g), 1, 5, 5, generator=generator)
    clouds = F.interpolate(clouds, size=(SIDE, SIDE), mode="bicubic", align_corners=False)[:, 0]
    return torch.maximum(g, 0.75 * clouds.clamp(0, 1))


def struck(g, generator):
    """Struck through by two straight pencil strokes at random."""
    y, x = _axes()
    for _ in range(2):
        angle = _uniform(len(g), 0, torch.pi, generator)
        distance = (
            y * angle.cos() + x * angle.sin() - _uniform(len(g), -0.8, 0.8, generator)
        ).abs()
        g = torch.maximum(g, 0.6 * (1.5 - (SIDE / 2) * distance).clamp(0, 1))
    return g


def grainy(g, generator):
    """Grain as strong as in a film that was pushed."""
    return g + 0.35 * torch.randn(g.shape, generator=generator)


def squared(g, generator):
    """Squared paper: lines of random place, seven pixels apart, nearly as strong as the ink."""
    steps = torch.arange(SIDE)
    down, across = (torch.randint(7, (len(g), 1, 1), generator=generator) for _ in range(2))
    lines = ((steps[:, None] + down) % 7 == 0) | ((steps[None, :] + across) % 7 == 0)
    return torch.maximum(g, 0.8 * lines.float())


def show(masters: Tensor, medium, generator: Generator) -> Tensor:
    """Images in a medium: (B, 56, 56) bytes to (B, 28, 28) bytes, varied and with noise of 0.05."""
    image = medium(affine(masters, generator), generator)
    image = image + NOISE * torch.randn(image.shape, generator=generator)
    return (255 * image.clamp(0, 1)).round().to(torch.uint8)
