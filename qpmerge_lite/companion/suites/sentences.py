"""The standard language suite: eight kinds of sentences, classified by experts fine-tuned from
all-MiniLM-L6-v2.

Rows are those of the published sets, see the manifest. Validation rows are the official ones where
a set has any, and otherwise held out of its training rows; validation and test sentences are the
same for every seed, training sentences vary with it.
"""

import hashlib
from dataclasses import replace
from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..data import checkpoint
from . import public
from .training import Recipe, trim

MANIFEST = None
CHECKPOINT = "all-MiniLM-L6-v2"
N_CLASSES = {
    "trec": 6,
    "sst2": 2,
    "snips": 7,
    "clinc150": 150,
    "ag_news": 4,
    "sms_spam": 2,
    "tweet_emotion": 4,
    "cola": 2,
}
# The first three, which have short sentences, are also the tasks of the single-layer problem.
TASKS = list(N_CLASSES)
SPLITS = {"train": 3000, "validation": 128, "test": 400}  # at most so many rows of each
MORE = {task: {"train": 6000} for task in ("clinc150", "cola")}
LENGTH = 64  # word pieces of a sentence, longer ones are cut
# A strong ridge on the probe: where the head alone serves the base well, its encoder has little to
# learn, experts hardly differ and every merge is as good as they are.
RECIPE = Recipe(steps=188, batch=32, rate=3e-4, probe_decay=0.1, chunk=64)  # two epochs
RECIPES = {task: replace(RECIPE, steps=564) for task in MORE}  # three
# the ridge sums over classes, which are many here
RECIPES["clinc150"] = replace(RECIPES["clinc150"], probe_decay=0.01)
LAYERS = ("bert.encoder.layer.4.intermediate.dense",)
LAYER_RECIPE = replace(RECIPE, rate=1e-3, probe_decay=Recipe.probe_decay)
# sentences of like length that a CPU takes at a time in training and calibration: in larger batches
# half of the work is padding
ALIKE = 8


class SentenceEncoder(nn.Module):
    """A BERT encoder with the mean over a sentence's tokens as its feature; its blocks are
    ``bert.encoder.layer``."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Feature of every sentence: word pieces (B, L) and their mask, 1 for text and 0 for
        padding, to (B, d)."""
        if not torch.is_grad_enabled() or input_ids.device.type != "cpu":
            return self._mean(input_ids=input_ids, attention_mask=attention_mask)
        order = attention_mask.sum(1).argsort()
        # once, as their gradient is as large as the whole table
        words = self.bert.embeddings.word_embeddings(input_ids)
        parts = [
            self._mean(inputs_embeds=words[rows], attention_mask=attention_mask[rows])
            for rows in order.split(ALIKE)
        ]
        return torch.cat(parts)[order.argsort()]

    def _mean(self, **batch) -> Tensor:
        batch = trim(batch)
        states, mask = self.bert(**batch)[0], batch["attention_mask"].unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)


def data(task: str, seed: int):
    """``datasets.DatasetDict`` of one task, columns ``text`` and ``label``: at most ``SPLITS`` rows
    of each split, by length."""
    rows = public.some(task, SPLITS | MORE.get(task, {}), seed)
    for split in rows:  # sentences of a batch are then about as long
        lengths = [len(text) for text in rows[split]["text"]]
        rows[split] = rows[split].select(sorted(range(len(lengths)), key=lengths.__getitem__))
    return rows


@cache
def tokenizer():
    """The checkpoint's own, cutting and padding to ``LENGTH``."""
    return public.tokenizer(checkpoint(CHECKPOINT), LENGTH, "[PAD]")


def collate(rows: dict) -> dict[str, Tensor]:
    """Arguments of the encoder from columns of a split: ``input_ids`` and ``attention_mask`` (B,
    LENGTH)."""
    return public.encoded(tokenizer(), [str(text) for text in rows["text"]])


def build(folder) -> SentenceEncoder:
    """The encoder of a checkpoint's ``config.json`` with random weights; no dropout, so that a seed
    decides an expert.

    Eager attention: backwards on a CPU in bfloat16 it takes half the time of the fused one,
    forwards the same.
    """
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(
        folder,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return SentenceEncoder(BertModel(config, add_pooling_layer=False))


def base() -> tuple[SentenceEncoder, str]:
    """The checkpoint in float32, and the SHA-256 of its weights."""
    folder = checkpoint(CHECKPOINT)
    path, encoder = folder / "model.safetensors", build(folder)
    unused = ("pooler.", "embeddings.position_ids")
    encoder.bert.load_state_dict(
        {k: v for k, v in load_file(path).items() if not k.startswith(unused)}
    )
    return encoder, hashlib.sha256(path.read_bytes()).hexdigest()
