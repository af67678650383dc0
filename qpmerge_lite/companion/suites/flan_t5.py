"""Flan-T5-base on eight tasks of GLUE with public experts: full models are merged, and answers are
generated as text.

Test is GLUE's validation split, as labels of its test split are not public. An answer counts when
it is the wanted text; on ``stsb``, where it is a number, Spearman's rank correlation with the
wanted ones counts. Calibration needs decoder inputs: those of the answer that the expert itself
generates, so that no label is used.
"""

import copy
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
FAMILY = "flan-t5-base"
TASKS = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
N_CLASSES = {
    task: len(public.prompts("glue")[task]["answers"]) for task in TASKS
}  # none where answers are numbers
LENGTH, PAD, ANSWER = 512, "<pad>", 10  # tokens of a question, and of an answer with its start


class Answerer(nn.Module):
    """An encoder and a decoder; blocks are ``t5.encoder.block`` and ``t5.decoder.block``. The
    language head is merged with them,
    but no feature passes it: a merge averages it where it solves layers."""

    def __init__(self, t5: nn.Module):
        super().__init__()
        self.t5 = t5

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
    ) -> Tensor:
        """State of every token of the answer: tokens and masks of question (B, L) and answer (B, T)
        to (B, T, d)."""
        read = self.t5.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.t5.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=read,
            encoder_attention_mask=attention_mask,
            use_cache=False,
        ).last_hidden_state


def base() -> tuple[Answerer, str]:
    """The pre-trained model in float32, and the SHA-256 of its file."""
    folder, sha256 = public.base_of(FAMILY)
    return _model(folder), sha256


def _model(folder: Path) -> Answerer:
    from transformers import T5ForConditionalGeneration

    return Answerer(public.pretrained(T5ForConditionalGeneration, folder))


def experts(task: str) -> tuple[dict[str, Tensor], dict]:
    """State dict of a task's model; there is no head."""
    return _model(checkpoint(f"{FAMILY}/{task}")).state_dict(), {}


def data(task: str, seed: int):
    """``datasets.DatasetDict`` of one task: columns ``text``, the question to the model, and
    ``label``."""
    ask = public.prompts("glue")[task]["ask"]
    rows = public.rows(f"glue-{task}")
    return rows.map(
        lambda row: {"text": ask.format(**row), "label": row["label"]},
        remove_columns=rows["train"].column_names,
        features=_features(rows),
    )


def _features(rows):
    from datasets import Features, Value

    return Features(text=Value("string"), label=rows["train"].features["label"])


@lru_cache(maxsize=1)
def _tokenizer(folder: Path):
    return public.tokenizer(folder, LENGTH, PAD)


def collate(rows: dict) -> dict[str, Tensor]:
    """What is read: ``input_ids`` and ``attention_mask`` (B, LENGTH) from columns of a split."""
    return public.encoded(_tokenizer(checkpoint(FAMILY)), list(map(str, rows["text"])))


@torch.no_grad()
def generated(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Tokens (B, at most ANSWER) of the answers, each the likeliest at its place, start first."""
    return model.generate(**trim(batch), max_length=ANSWER, do_sample=False, num_beams=1)


def _with(encoder: Answerer, state: dict[str, Tensor]) -> nn.Module:
    """A copy of the model with the weights of a state dict."""
    model = copy.deepcopy(encoder)
    model.load_state_dict(state)
    return model.t5


def complete(
    encoder: Answerer, expert: dict[str, Tensor], batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The batch (B, L) with what the decoder reads while the expert answers, (B, T): its start and
    every token of the answer before its end."""
    tokens = generated(_with(encoder, expert), batch)
    mask = ((tokens == encoder.t5.config.eos_token_id).cumsum(1) == 0).long()[:, :-1]
    return {**batch, "decoder_input_ids": tokens[:, :-1], "decoder_attention_mask": mask}


def score(task: str, encoder: Answerer, state: dict[str, Tensor], batches, labels: Tensor) -> float:
    """Share of right answers to labels (N,), or Spearman's correlation where answers are numbers:
    then what is none counts as 0."""
    model, tokenizer, said = _with(encoder, state), _tokenizer(checkpoint(FAMILY)), []
    for batch in batches:
        said += tokenizer.decode_batch(generated(model, batch).tolist(), skip_special_tokens=True)
    answers = public.prompts("glue")[task]["answers"]
    if answers:
        pairs = zip(said, labels.tolist(), strict=True)
        return sum(text == answers[label] for text, label in pairs) / len(said)
    wanted = [round(label, 1) for label in labels.tolist()]
    return correlation([_number(text) for text in said], wanted)


def correlation(answers: list[float], wanted: list[float]) -> float:
    """Spearman's rank correlation; 0 where all answers are the same, as they tell nothing apart."""
    from scipy.stats import spearmanr

    return float(spearmanr(answers, wanted).statistic) if len(set(answers)) > 1 else 0.0


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
