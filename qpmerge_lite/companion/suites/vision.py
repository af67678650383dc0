"""The embedded vision suite: eight scripts, each in a medium that the base never saw.

Seven tasks draw their glyphs from the typefaces shipped with matplotlib, with typefaces of their
own for training, validation and test; the eighth is scikit-learn's handwritten digits, split in the
order of the file, so that few writers appear in two splits. Validation and test images are the same
for every seed; training images vary with it.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn

from ..data.manifests import load_manifest, locate
from . import glyphs
from .encoders import VisionTransformer
from .training import Recipe, seeded, shipped

WEIGHTS = Path(__file__).parent / "weights" / "vision_base.safetensors"
MANIFEST = "smoke-vision"
RECIPE = Recipe(steps=220, batch=64, rate=1e-3)
LAYERS = ("blocks.0.attention.value", "blocks.1.up")
LAYER_RECIPE = Recipe(steps=80, batch=64, rate=1e-2)
SPLITS = {"train": 4096, "validation": 512, "test": 1024}
FACES = {
    "train": (
        "DejaVuSans DejaVuSans-Bold DejaVuSansMono DejaVuSansMono-BoldOblique DejaVuSerif "
        "DejaVuSerif-BoldItalic STIXGeneral"
    ).split(),
    "validation": "DejaVuSans-Oblique DejaVuSansMono-Oblique STIXGeneralBolIta".split(),
    "test": (
        "DejaVuSans-BoldOblique DejaVuSansMono-Bold DejaVuSerif-Italic DejaVuSerif-Bold "
        "STIXGeneralBol STIXGeneralItalic"
    ).split(),
}
# Computer Modern has ASCII letters only.
LATIN_FACES = {
    "train": [*FACES["train"], "cmr10", "cmb10", "cmss10"],
    "validation": FACES["validation"],
    "test": [*FACES["test"], "cmtt10"],
}
# Slanted typefaces draw operators upright, exactly as their upright sisters do: these are split by
# weight.
OPERATOR_FACES = {
    "train": "DejaVuSans DejaVuSansMono DejaVuSerif STIXGeneral".split(),
    "validation": ["DejaVuSansMono-Bold"],
    "test": "DejaVuSans-Bold DejaVuSerif-Bold STIXGeneralBol".split(),
}


@dataclass(frozen=True)
class Script:
    """One task: the characters to tell apart, the medium they are shown in, and the typefaces of
    each split."""

    characters: str
    medium: object
    faces: dict


def _span(first: str, last: str, without: str = "") -> str:
    return "".join(chr(c) for c in range(ord(first), ord(last) + 1) if chr(c) not in without)


# Left out: final sigma, and one of each pair that can hardly be told apart (Щ beside Ш, Ց beside
# Յ).
SCRIPTS = {
    "latin": Script(_span("a", "z"), glyphs.grainy, LATIN_FACES),
    "greek": Script(_span("α", "ω", "ς"), glyphs.diagonal, FACES),
    "cyrillic": Script(_span("А", "Я", "Щ"), glyphs.speckled, FACES),
    "armenian": Script(_span("Ա", "Ֆ", "Ց"), glyphs.backlit, FACES),
    "georgian": Script(_span("\u10d0", "\u10f0"), glyphs.struck, FACES),
    "hebrew": Script(_span("\u05d0", "\u05ea"), glyphs.meshed, FACES),
    "operators": Script(
        "∀∃∈∉∋∏∑−∕∘√∞∟∠∧∨∩∪∫∬≂≐≑≒≓≠≡≤≥⊂⊃⊄⊅⊆⊇⊏⊐⊑⊒⊓⊔⊕⊘⊞⊠⊢⊤⊥⋄", glyphs.blotched, OPERATOR_FACES
    ),
}
DIGITS_MEDIUM = glyphs.squared
DIGIT_ROWS = {"train": slice(0, 1000), "validation": slice(1000, 1200), "test": slice(1200, None)}
TASKS = [*SCRIPTS, "digits"]
N_CLASSES = {**{task: len(script.characters) for task, script in SCRIPTS.items()}, "digits": 10}

# Pre-training: Unicode blocks that no task uses, with the number of classes taken from each.
BASE_BLOCKS = {
    "Canadian syllabics": (0x1401, 0x1676, 126),
    "Tifinagh": (0x2D30, 0x2D65, 31),
    "Lao": (0x0E81, 0x0EDD, 36),
    "NKo": (0x07CA, 0x07E7, 17),
    "phonetic alphabet": (0x0250, 0x02AF, 40),
    "dingbats": (0x2701, 0x27BE, 36),
    "geometric shapes": (0x25A0, 0x25FF, 14),
    "technical": (0x2300, 0x23FF, 24),
    "supplemental operators": (0x2A00, 0x2AFF, 24),
    "hexagrams": (0x4DC0, 0x4DFF, 4),
    "arrows": (0x2190, 0x21FF, 24),
    "symbols": (0x2600, 0x26FF, 24),
}
BASE_MEDIA = (
    glyphs.plain,
    glyphs.inverted,
    glyphs.blurred,
    glyphs.striped,
    glyphs.screened,
    glyphs.faint,
    glyphs.shaded,
)
ALIKE_CLASSES, ALIKE_TASKS = 0.96, 0.90


def masters(characters, faces) -> tuple[Tensor, Tensor]:
    """All glyphs of the characters in the typefaces that have them: (N, 56, 56) bytes and (N,)
    class indices."""
    images, labels = [], []
    for index, character in enumerate(characters):
        for face in faces:
            image = _master(face, character)
            if image is not None:
                images.append(image)
                labels.append(index)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def _master(face: str, character: str):
    """A glyph (56, 56) as bytes, None where the typeface does not have it."""
    if ord(character) not in glyphs.characters(face):
        return None
    return glyphs.master(face, character)


@cache
def digit_masters(split: str) -> tuple[Tensor, Tensor]:
    """Handwritten digits, 8 x 8 pixels enlarged to 40 on a (N, 56, 56) byte canvas, and their
    values."""
    source = load_manifest(MANIFEST).source("digits")
    table = np.loadtxt(locate(source, source.files[0]), delimiter=",", dtype=np.int64)
    table = table[DIGIT_ROWS[split]]
    images, labels = table[:, :64], torch.from_numpy(table[:, 64])
    small = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    large = torch.nn.functional.interpolate(
        small, size=40, mode="bicubic", align_corners=False
    ).clamp(0, 1)
    return torch.nn.functional.pad(255 * large[:, 0], (8,) * 4).to(torch.uint8), labels


def draw(task: str, split: str, seed: int) -> dict[str, Tensor]:
    """Images of one task and split: ``image`` (N, 28, 28) bytes and ``label`` (N,), classes in
    equal shares.

    Digits for validation and test appear once each; every other example is drawn several times, and
    each draw varies place, size and medium.
    """
    if task == "digits":
        (images, labels), medium = digit_masters(split), DIGITS_MEDIUM
    else:
        script = SCRIPTS[task]
        (images, labels), medium = masters(script.characters, script.faces[split]), script.medium
    generator = seeded(seed if split == "train" else 0, task, split)
    if task == "digits" and split != "train":
        chosen = torch.arange(len(labels))
    else:
        chosen = balanced(labels, SPLITS[split], generator)
    return {"image": glyphs.show(images[chosen], medium, generator), "label": labels[chosen]}


def balanced(labels: Tensor, n: int, generator: Generator) -> Tensor:
    """n indices with every class equally often (up to one) and, within a class, every example
    equally often."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    groups = order.split(labels.bincount().tolist())
    turns = -(-n // len(groups))
    table = torch.stack([group[torch.arange(turns) % len(group)] for group in groups], 1)
    return table.flatten()[:n]


def data(task: str, seed: int):
    """``datasets.DatasetDict`` of one task: columns ``image`` (28, 28) uint8 and ``label``."""
    from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features

    names = list(SCRIPTS[task].characters) if task in SCRIPTS else list("0123456789")
    schema = Features(
        image=Array2D((glyphs.SIDE, glyphs.SIDE), "uint8"), label=ClassLabel(names=names)
    )
    splits = {}
    for split in SPLITS:
        columns = {name: value.numpy() for name, value in draw(task, split, seed).items()}
        splits[split] = Dataset.from_dict(columns, features=schema)
    return DatasetDict(splits)


def collate(rows: dict) -> dict[str, Tensor]:
    """Arguments of the encoder from columns of a split: float pixels (B, 1, 28, 28) in [0, 1]."""
    return {"pixels": torch.as_tensor(np.asarray(rows["image"])).float()[:, None] / 255}


def build() -> VisionTransformer:
    """The encoder with random weights."""
    return VisionTransformer(width=96, depth=4, heads=4, ratio=2, side=glyphs.SIDE, patch=7)


def base() -> tuple[VisionTransformer, str]:
    """The shipped encoder, in float32, and the SHA-256 of its file."""
    return shipped(build(), WEIGHTS)


@cache
def base_characters() -> tuple[str, ...]:
    """The 400 characters of pre-training: no two nearly identical, none nearly identical to a
    task's."""
    of_tasks = _task_signatures()
    chosen: dict[str, np.ndarray] = {}  # character -> signature
    for first, last, count in BASE_BLOCKS.values():
        enough = len(chosen) + count
        for character in map(chr, range(first, last + 1)):
            image = _master(FACES["train"][0], character)
            if image is None or len(chosen) == enough:
                continue
            look = glyphs.signature(image)
            like_a_class = chosen and np.max(list(chosen.values()) @ look) >= ALIKE_CLASSES
            if (of_tasks @ look).max() < ALIKE_TASKS and not like_a_class:
                chosen[character] = look
    return tuple(chosen)


def _task_signatures() -> np.ndarray:
    """Signatures of all glyphs of all tasks in the training typefaces: (N, d)."""
    signatures = []
    for script in SCRIPTS.values():
        images, _ = masters(script.characters, FACES["train"])
        signatures += [glyphs.signature(image) for image in images.numpy()]
    return np.stack(signatures)


@cache
def pretraining_data() -> tuple[Tensor, Tensor]:
    """Masters (N, 56, 56) of the pre-training characters in the training typefaces, and their
    classes (N,)."""
    return masters(base_characters(), FACES["train"])


def pretraining_head(encoder: VisionTransformer) -> nn.Linear:
    """Scores of every pre-training character."""
    return nn.Linear(encoder.norm.normalized_shape[0], int(pretraining_data()[1].max()) + 1)


def pretraining_batch(encoder, head, generator: Generator, size: int) -> tuple[Tensor, Tensor]:
    """Scores and classes of ``size`` masters drawn at random, shown in the mild media of the base
    in turn."""
    images, labels = pretraining_data()
    chosen = torch.randint(len(labels), (size,), generator=generator)
    shown = torch.empty(size, glyphs.SIDE, glyphs.SIDE, dtype=torch.uint8)
    for index, medium in enumerate(BASE_MEDIA):
        turn = slice(index, None, len(BASE_MEDIA))
        shown[turn] = glyphs.show(images[chosen[turn]], medium, generator)
    return head(encoder(**collate({"image": shown}))), labels[chosen]
