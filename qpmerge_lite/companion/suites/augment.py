"""Random variations for pre-training on colour pictures of 32 x 32: glyphs as if drawn by hand,
painted; and views of a picture.

Images are floats in [0, 1]; coordinates run from -1 to 1 across an image.
"""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

SIDE = 32


def _draw(generator: Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator)


def warp(
    images: Tensor,
    generator: Generator,
    *,
    strength: Tensor,
    zoom: Tensor,
    turn: float,
    shear: float,
    shift: Tensor | float,
    bend: float,
    beyond: str,
) -> Tensor:
    """Images (B, C, H, W) turned, sheared, shifted, zoomed and bent at random: (B, C, 32, 32).

    Args:
        strength: (B,) factor of everything that follows but the zoom.
        zoom: (B,) extent of the source that is shown.
        turn, shear, shift: largest angle in radians, slope, and displacement.
        bend: standard deviation of the displacement at the knots of a 4 x 4 mesh, smooth between
            them.
        beyond: what is outside the source, as ``padding_mode`` of ``grid_sample``.
    """
    n = len(images)
    angle, slope, x, y, stretch = (2 * _draw(generator, 5, n) - 1) * strength
    cos, sin = (turn * angle).cos() * zoom, (turn * angle).sin() * zoom
    across = [cos, shear * slope - sin, shift * x]
    down = [sin, cos * (1 + 0.2 * stretch), shift * y]
    affine = torch.stack([*across, *down], 1).view(n, 2, 3)
    knots = bend * strength.view(-1, 1, 1, 1) * torch.randn(n, 2, 4, 4, generator=generator)
    bent = F.interpolate(knots, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    grid = F.affine_grid(affine, [n, 1, SIDE, SIDE], align_corners=False) + bent.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, align_corners=False, padding_mode=beyond)


def _soften(images: Tensor, share: float, generator: Generator) -> Tensor:
    """A share of the images blurred."""
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return torch.where(_draw(generator, len(images), 1, 1, 1) < share, blurred, images)


def _noisy(images: Tensor, spread: float, generator: Generator) -> Tensor:
    return (images + spread * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _clouds(n: int, generator: Generator) -> Tensor:
    """Colour fields (n, 3, 32, 32), from flat to cloudy."""
    clouds = F.interpolate(
        _draw(generator, n, 3, 4, 4), size=(SIDE, SIDE), mode="bilinear", align_corners=False
    )
    flat, share = _draw(generator, n, 3, 1, 1), _draw(generator, n, 1, 1, 1) ** 2
    return flat * (1 - share) + clouds * share


def _light(field: Tensor) -> Tensor:
    """Mean over colours and places: (n, 3, 32, 32) to (n, 1, 1, 1)."""
    return field.mean((1, 2, 3), keepdim=True)


def _alike(one: Tensor, other: Tensor) -> Tensor:
    """Which colour fields (n, 3, 32, 32) are about as light as each other: (n, 1, 1, 1)."""
    return (_light(one) - _light(other)).abs() < 0.25


def paint(glyphs: Tensor, generator: Generator) -> Tensor:
    """Ink (B, 1, 32, 32) as pictures (B, 3, 32, 32): half in light grey on black or the reverse,
    half in colours that differ."""
    n = len(glyphs)
    ink, paper, kind = _clouds(n, generator), _clouds(n, generator), _draw(generator, n, 1, 1, 1)
    ink = torch.where(_alike(ink, paper), 1 - ink, ink)
    ink = torch.where(_alike(ink, paper), (_light(paper) < 0.5).float(), ink)
    grey = (glyphs * (0.6 + 0.4 * _draw(generator, n, 1, 1, 1))).expand(-1, 3, -1, -1)
    grey = torch.where(kind < 0.05, 1 - grey, grey)
    painted = torch.where(kind < 0.5, grey, ink * glyphs + paper * (1 - glyphs))
    return _noisy(_soften(painted, 0.3, generator), 0.03, generator)


def drawn(masters: Tensor, generator: Generator) -> Tensor:
    """Glyphs (B, 56, 56) bytes as painted pictures (B, 3, 32, 32), from nearly as printed to as if
    drawn by an unsteady hand."""
    strength = _draw(generator, len(masters)) ** 1.5
    zoom = 1 + 0.2 * strength * (2 * _draw(generator, len(masters)) - 1)
    images = masters[:, None].float() / 255
    warped = warp(
        images,
        generator,
        strength=strength,
        zoom=zoom,
        turn=0.25,
        shear=0.25,
        shift=0.15,
        bend=0.1,
        beyond="zeros",
    )
    return paint(warped, generator)


def view(images: Tensor, generator: Generator) -> Tensor:
    """A random view of pictures (B, 3, 32, 32): a part of it, somewhat distorted, in other light
    and colours."""
    n = len(images)
    zoom = 0.5 + 0.6 * _draw(generator, n)
    shift = 0.5 * (1.1 - zoom).clamp(0.1)
    images = warp(
        images,
        generator,
        strength=torch.ones(n),
        zoom=zoom,
        turn=0.2,
        shear=0.15,
        shift=shift,
        bend=0.04,
        beyond="border",
    )
    gain = 0.6 + 0.8 * _draw(generator, n, 3, 1, 1)
    gain = torch.where(_draw(generator, n, 1, 1, 1) < 0.5, gain, gain.mean(1, keepdim=True))
    images = (images - 0.5) * gain + 0.5 + 0.2 * (_draw(generator, n, 1, 1, 1) - 0.5)
    images = torch.where(_draw(generator, n, 1, 1, 1) < 0.2, images.mean(1, keepdim=True), images)
    return _noisy(_soften(images, 0.3, generator), 0.03, generator)
