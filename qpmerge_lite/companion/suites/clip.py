"""CLIP ViT-B/32 on eight tasks with public experts: vision towers fine-tuned under frozen text
heads.

The protocol of task arithmetic (Ilharco et al., 2023) as fusion_bench serves it: only vision towers
differ and are merged; projection and logit scale are the base's. A class scores by the cosine of
the image's embedding and the mean of its prompts' embeddings.
"""

from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..data import checkpoint
from ..data.manifests import ManifestError
from . import public
from .training import trim

MANIFEST = None
RECIPE = None
CHUNK = 128
FAMILY = "clip-vit-base-patch32"
TASKS = ["sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
PAD = "<|endoftext|>"
N_CLASSES = {task: len(public.prompts("clip")[task]["classes"]) for task in TASKS}


class ImageEncoder(nn.Module):
    """A CLIP vision tower with the frozen projection of its model; its blocks are
    ``vision.encoder.layers``.

    Projection and the pixels' mean and deviation are no part of the state dict, so no merge touches
    them.
    """

    def __init__(self, model, mean, std):
        super().__init__()
        self.vision = model.vision_model
        self.register_buffer(
            "projection", model.visual_projection.weight.detach().clone(), persistent=False
        )
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embedding of every image, of length 1: (B, 3, S, S) uint8 to (B, d)."""
        pixels = (pixels.to(self.mean) / 255 - self.mean) / self.std
        return normalize(self.vision(pixel_values=pixels).pooler_output @ self.projection.T, dim=-1)


@lru_cache(maxsize=1)
def _parts(folder: Path):
    """CLIP model of a folder, and the processor that crops images as it wants them."""
    from transformers import CLIPImageProcessorPil, CLIPModel

    return public.pretrained(CLIPModel, folder), CLIPImageProcessorPil.from_pretrained(folder)


def base() -> tuple[ImageEncoder, str]:
    """The pre-trained encoder in float32, and the SHA-256 of its file."""
    folder, sha256 = public.base_of(FAMILY)
    model, processor = _parts(folder)
    return ImageEncoder(model, processor.image_mean, processor.image_std), sha256


def experts(task: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dict of a task's encoder, and its head: e^(logit scale) times the classes' embeddings,
    no bias."""
    from transformers import CLIPVisionModel

    tower = public.pretrained(CLIPVisionModel, checkpoint(f"{FAMILY}/{task.replace('_', '-')}"))
    state = {f"vision.{name}": value for name, value in tower.state_dict().items()}
    return state, head(checkpoint(FAMILY), **public.prompts("clip")[task])


@torch.no_grad()
def head(folder: Path, classes: list[str], templates: list[str]) -> dict[str, Tensor]:
    """Frozen text head (classes, d): every prompt's embedding made of length 1, their mean over
    templates, that made of length 1."""
    model = _parts(folder)[0]
    tokenizer = public.tokenizer(folder, model.config.text_config.max_position_embeddings, PAD)
    rows = []
    for name in classes:
        prompts = [template.format(name) for template in templates]
        tokens = trim(public.encoded(tokenizer, prompts))
        embeddings = normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        rows.append(normalize(embeddings.mean(0), dim=-1))
    return {"weight": model.logit_scale.exp() * torch.stack(rows), "bias": torch.zeros(len(rows))}


def data(task: str, seed: int):
    """``datasets.DatasetDict`` of one task, read and cropped as needed: columns ``pixels`` (3, S,
    S) uint8 and ``label``."""
    rows, classes = public.rows(f"clip-{task}"), N_CLASSES[task]
    labels = rows["train"].features["label"]
    if getattr(labels, "num_classes", classes) != classes:
        raise ManifestError(
            f"clip-{task}: expected the {classes} classes of data_manifests/prompts/clip.yaml, "
            f"found {labels.num_classes}"
        )
    return rows.with_transform(partial(_cropped, _parts(checkpoint(FAMILY))[1]))


def _cropped(processor, rows: dict) -> dict:
    images = [image.convert("RGB") for image in rows["image"]]
    cropped = processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")
    return {"pixels": cropped["pixel_values"], "label": rows["label"]}


def collate(rows: dict) -> dict[str, Tensor]:
    """Arguments of the encoder from columns of a split: ``pixels`` (B, 3, S, S) uint8."""
    return {"pixels": torch.as_tensor(rows["pixels"], dtype=torch.uint8)}
