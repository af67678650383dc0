"""The encoder of the embedded vision suite in the public format: folders for transformers.

transformers has the architecture under the name of ViT. Weights only get other names; pictures have
three colours there, whose weights share those of the suite's one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import glyphs, vision
from .esm import blocks_as

PARTS = {
    "norm1": "layernorm_before",
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.output": "attention.o_proj",
    "norm2": "layernorm_after",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}  # part of a block -> the same in a layer of ViT
OTHERS = {
    "cls": "embeddings.cls_token",
    "position": "embeddings.position_embeddings",
    "embed.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
PATCHES = "embeddings.patch_embeddings.projection.weight"
COLOURS = 3
# pictures as they are, from bytes to numbers of [0, 1]
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    "do_normalize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
}


def vit_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the suite's encoder under the names of transformers' ``ViTModel``.

    Args:
        state: state dict of :func:`vision.build`.
    """
    named = {new: state[old] for old, new in OTHERS.items()}
    side = vision.build().patch
    grey = state["embed.weight"].unflatten(1, (1, side, side))
    named[PATCHES] = grey.expand(-1, COLOURS, -1, -1) / COLOURS
    named |= blocks_as(state, "layers", PARTS)
    return {name: value.detach().contiguous() for name, value in named.items()}


def config(labels: Sequence[str] = ()):
    """Configuration of the suite's encoder as transformers has it.

    Args:
        labels: of a classifier.
    """
    from transformers import ViTConfig

    encoder = vision.build()
    block = encoder.blocks[0]
    named = {"id2label": dict(enumerate(labels))} if labels else {}
    return ViTConfig(
        hidden_size=block.up.in_features,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=block.attention.heads,
        intermediate_size=block.up.out_features,
        layer_norm_eps=encoder.norm.eps,
        image_size=glyphs.SIDE,
        patch_size=encoder.patch,
        num_channels=COLOURS,
        **named,
    )


def save(
    folder: Path,
    state: Mapping[str, Tensor],
    head: Mapping[str, Tensor] | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Write a checkpoint of the suite's encoder, or of a classifier: configuration, weights and
    processor.

    Args:
        state: state dict of :func:`vision.build`.
        head: ``weight`` (classes, d) and ``bias`` (classes,) of a task; None for no head.
        labels: of its classes.
    """
    from transformers import ViTForImageClassification, ViTModel

    if head is None:
        model = ViTModel(config())
        for unused in model.pooler.parameters():  # the suite's encoder has no pooler
            torch.nn.init.zeros_(unused)
        model.load_state_dict(model.state_dict() | vit_state(state))
    else:
        model = ViTForImageClassification(config(labels))
        own = {f"vit.{name}": value for name, value in vit_state(state).items()}
        model.load_state_dict(own | {f"classifier.{name}": v for name, v in head.items()})
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")


def save_pictures(folder: Path, images: Sequence, labels: Sequence[str]) -> None:
    """Write grey pictures (N, side, side), whole numbers up to 255, into a folder for each
    label."""
    from PIL import Image

    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        points = np.asarray(image, dtype=np.uint8)
        Image.fromarray(points).save(folder / label / f"{number:04}.png")
