"""GPT-2 on seven tasks of GLUE with public experts: backbones are merged, every task keeps its own
``score`` head.

Test is GLUE's validation split, as labels of its test split are not public. Texts are padded to
``LENGTH`` with the token that ends texts; the feature of a text is the state of its last token
before the padding, which is also what transformers classifies by.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import checkpoint
from . import public
from .training import trim

MANIFEST = None
RECIPE = None
CHUNK = 128
FAMILY = "gpt2"
N_CLASSES = {"cola": 2, "mnli": 3, "mrpc": 2, "qnli": 2, "qqp": 2, "rte": 2, "sst2": 2}
TASKS = list(N_CLASSES)
LENGTH, PAD = 512, "<|endoftext|>"


class TextEncoder(nn.Module):
    """A GPT-2 backbone with the state of a text's last token as its feature; its blocks are
    ``transformer.h``."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Feature of every text: tokens (B, L) and their mask, 1 for text and then 0 for padding,
        to (B, d)."""
        batch = trim({"input_ids": input_ids, "attention_mask": attention_mask})
        states = self.transformer(**batch, use_cache=False).last_hidden_state
        return states[
            torch.arange(len(states), device=states.device), batch["attention_mask"].sum(1) - 1
        ]


def base() -> tuple[TextEncoder, str]:
    """The pre-trained backbone in float32, and the SHA-256 of its file."""
    from transformers import GPT2Model

    folder, sha256 = public.base_of(FAMILY)
    return TextEncoder(public.pretrained(GPT2Model, folder)), sha256


def experts(task: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dict of a task's backbone, and its head, which has no bias."""
    from transformers import GPT2ForSequenceClassification

    model = public.pretrained(GPT2ForSequenceClassification, checkpoint(f"{FAMILY}/{task}"))
    weight = model.score.weight.detach()
    return TextEncoder(model.transformer).state_dict(), {
        "weight": weight,
        "bias": torch.zeros(len(weight)),
    }


def data(task: str, seed: int):
    """``datasets.DatasetDict`` of one task: columns ``text``, ``pair`` where it has two, and
    ``label``."""
    return public.rows(f"glue-{task}")


@lru_cache(maxsize=1)
def _tokenizer(folder: Path):
    return public.tokenizer(folder, LENGTH, PAD)


def collate(rows: dict) -> dict[str, Tensor]:
    """Arguments of the encoder from columns of a split: ``input_ids`` and ``attention_mask`` (B,
    LENGTH)."""
    texts = [str(text) for text in rows["text"]]
    if "pair" in rows:
        texts = list(zip(texts, map(str, rows["pair"])))
    return public.encoded(_tokenizer(checkpoint(FAMILY)), texts)
