"""What the suites of public sets and checkpoints share: rows and prompts under the manifests, and
weights that fit without a remainder."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import MissingLayer
from .. import data
from ..data import manifests
from ..paths import MANIFESTS
from .training import seeded

# at most so many of the rows held out of the training split choose a method's options
HELD_OUT = 2000
SPLITS = manifests.SPLITS


def rows(name: str):
    """A data set as ``data.rows`` gives it, with at most ``HELD_OUT`` validation rows, the same
    ones every time."""
    splits = data.rows(name)
    validation = splits["validation"]
    order = torch.randperm(len(validation), generator=seeded(0, name, "validation"))
    splits["validation"] = validation.select(sorted(order[:HELD_OUT].tolist()))
    return splits


def some(name: str, most: dict[str, int], seed: int):
    """A data set with at most so many rows of every split, drawn; training rows anew for each seed,
    the others never change."""
    splits = data.rows(name)
    for split, count in most.items():
        generator = seeded(seed if split == "train" else 0, name, split)
        order = torch.randperm(len(splits[split]), generator=generator)
        splits[split] = splits[split].select(order[:count].tolist())
    return splits


@cache
def prompts(name: str) -> dict:
    """Prompts of a family of checkpoints by task, from ``data_manifests/prompts``."""
    import yaml

    return yaml.safe_load((MANIFESTS / "prompts" / f"{name}.yaml").read_text(encoding="utf-8"))


def pretrained(kind, folder: Path, **options) -> nn.Module:
    """A model of transformers with the weights of a checkpoint's folder, float32, in evaluation
    mode.

    Raises: MissingLayer naming a weight that the checkpoint lacks or has in another shape: none is
        left as it was initialised.
    """
    model, loading = kind.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
    )
    lacking = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if lacking:
        raise MissingLayer(
            f"{folder}: expected every weight of a {kind.__name__}, "
            f"found none that fits {lacking[0]} ({len(lacking)} in all)"
        )
    return model.eval()


def base_of(family: str) -> tuple[Path, str]:
    """Folder of a family's base, and the SHA-256 of its weights."""
    folder = data.checkpoint(family)
    return folder, manifests.sha256(folder / "model.safetensors")


def tokenizer(folder: Path, length: int, pad: str):
    """The ``tokenizers.Tokenizer`` of a checkpoint's folder, cutting and padding to ``length`` with
    the token ``pad``."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=made.token_to_id(pad), pad_token=pad)
    return made


def encoded(tokenizer, texts) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (N, length), int64, of texts or pairs of them."""
    encodings = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
        "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
    }
