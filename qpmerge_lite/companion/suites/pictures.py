"""The standard vision suite: eight public sets of small pictures, and a base that was trained here
on none of their test images.

The encoder is pre-trained on two things at once: to tell apart 400 glyphs that no task uses, in
colour and as if drawn by hand, and to find the other view of a training picture among many (Chen et
al., 2020: SimCLR), without labels. Both ask for features that serve all tasks and none in
particular.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..data import rows
from . import augment, vision
from .encoders import VisionTransformer
from .public import some
from .training import Recipe, shipped

WEIGHTS = Path(__file__).parent / "weights" / "pictures_base.safetensors"
MANIFEST = "standard-vision"
# a strong ridge, for the reason given in sentences.py
RECIPE = Recipe(steps=400, batch=64, rate=1e-3, probe_decay=0.1)
LAYERS = ("blocks.0.attention.value", "blocks.1.up")
LAYER_RECIPE = Recipe(steps=80, batch=64, rate=1e-2)
SPLITS = {"train": 8192, "validation": 512, "test": 1024}  # rows a task, at most
N_CLASSES = {
    "mnist": 10,
    "fashion_mnist": 10,
    "cifar10": 10,
    "gtsrb": 43,
    "notmnist": 10,
    "arabic_chars": 28,
    "kannada_mnist": 10,
    "omniglot_alphabets": 8,
}
TASKS = list(N_CLASSES)
SIDE = 32

# Pre-training: the sets whose training pictures are shown without labels, and the shares of a
# batch.
UNLABELLED = ("cifar10", "gtsrb", "fashion_mnist")
GLYPHS, PAIRS, TEMPERATURE, PROJECTED = 3 / 4, 1 / 4, 0.2, 64


def data(task: str, seed: int):
    """``datasets.DatasetDict`` of one task: columns ``image`` and ``label`` of at most so many rows
    as ``SPLITS`` says.

    Training rows are drawn anew for each seed; those for validation and test never change.
    """
    return some(task, SPLITS, seed)


def pixels(images) -> Tensor:
    """Colour pictures (B, 3, 32, 32) in [0, 1], from bytes (B, 28, 28) or (B, 32, 32, 3); a grey
    one gets a black margin."""
    images = torch.as_tensor(np.asarray(images)).float() / 255
    if images.dim() == 4:
        return images.permute(0, 3, 1, 2)
    return F.pad(images, ((SIDE - images.shape[-1]) // 2,) * 4)[:, None].expand(-1, 3, -1, -1)


def standard(images: Tensor) -> Tensor:
    """Every picture (B, 3, H, W) with mean 0 and spread about 1, its three channels together."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    spread = images.std(dim=(1, 2, 3), keepdim=True)
    return (images - mean) / (spread + 0.1)


def collate(rows: dict) -> dict[str, Tensor]:
    """Arguments of the encoder from columns of a split: float pixels (B, 3, 32, 32), standardised
    picture by picture."""
    return {"pixels": standard(pixels(rows["image"]))}


def build() -> VisionTransformer:
    """The encoder with random weights."""
    return VisionTransformer(
        width=128,
        depth=4,
        heads=4,
        ratio=2,
        side=SIDE,
        patch=2,
        channels=3,
        stem=(32, 64),
        token=False,
    )


def base() -> tuple[VisionTransformer, str]:
    """The shipped encoder, in float32, and the SHA-256 of its file."""
    return shipped(build(), WEIGHTS)


@cache
def pretraining_data() -> tuple[Tensor, Tensor, Tensor]:
    """Masters (N, 56, 56) of the glyphs, their classes (N,), and training pictures (M, 32, 32, 3),
    all but the classes bytes."""
    masters, classes = vision.pretraining_data()
    shown = [pixels(rows(task)["train"].with_format("numpy")[:]["image"]) for task in UNLABELLED]
    pictures = (255 * torch.cat(shown)).round().to(torch.uint8)
    return masters, classes, pictures.permute(0, 2, 3, 1).contiguous()


class Heads(nn.Module):
    """What pre-training adds to the encoder: scores of the glyphs, and a projection in which views
    of one picture are close."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.classes = nn.Linear(width, classes)
        self.project = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, PROJECTED)
        )


def pretraining_head(encoder: VisionTransformer) -> Heads:
    """Heads for every pre-training glyph and for views."""
    return Heads(encoder.norm.normalized_shape[0], int(pretraining_data()[1].max()) + 1)


def pretraining_batch(encoder, head, generator: Generator, size: int) -> tuple[Tensor, Tensor]:
    """Scores and their right columns: of glyphs among all glyphs, and of views of pictures among
    all other views of the batch."""
    masters, classes, pictures = pretraining_data()
    glyphs = torch.randint(len(classes), (int(GLYPHS * size),), generator=generator)
    pairs = int(PAIRS * size)
    shown = pixels(pictures[torch.randint(len(pictures), (pairs,), generator=generator)])
    images = [
        augment.drawn(masters[glyphs], generator),
        augment.view(shown, generator),
        augment.view(shown, generator),
    ]
    features = encoder(standard(torch.cat(images)).to(head.classes.weight.device))
    of_glyphs, of_views = features[: len(glyphs)], features[len(glyphs) :]
    named, places = head.classes(of_glyphs), F.normalize(head.project(of_views), dim=1)
    alike = (places @ places.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    columns = max(named.shape[1], alike.shape[1])
    scores = [
        F.pad(part, (0, columns - part.shape[1]), value=-torch.inf) for part in (named, alike)
    ]
    right = torch.cat([classes[glyphs], torch.arange(2 * pairs).roll(pairs)])
    return torch.cat(scores), right.to(features.device)
