"""Calibration texts as batches of tokens, and the tokenizers that make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...calibration import IGNORED
from ..architectures import TROUBLES, loaded, quietly
from ..findings import Refused
from ..folders import CONFIG, TOKENIZER, Checkpoint
from .sources import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = dict[str, list[int]]  # name of an argument of forward, or labels -> a number per token


def positions(model: nn.Module) -> int:
    """How many tokens the model has positions for at the most; very many if it does not say."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    limit = getattr(config, "max_position_embeddings", None) or 2**31
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = min(limit, module.num_embeddings - before)  # RoBERTa counts behind padding
    return limit


def tokenizer_of(expert: Checkpoint, base: Checkpoint):
    """The expert's tokenizer, or the base's where the expert's folder has none.

    Raises: Refused where there is none, or one that transformers cannot load without remote code.
    """
    from transformers import AutoTokenizer

    return loaded(AutoTokenizer, expert, base, TOKENIZER, "a tokenizer")


def token_rows(
    rows: Sequence[Row], tokenizer, limit: int, has_targets: bool = False
) -> tuple[list[Tokens], int]:
    """Tokens of every row, ``limit`` of them at the most, and how many rows were cut for that.

    Args:
        rows: of one text, of a pair, of a chat, or of a text and its target.
        has_targets: whether second texts are targets, which become ``labels``, rather than parts of
            the input.
    Raises: Refused for a chat that the tokenizer has no template for.
    """
    made, cut = [], 0
    with quietly():
        for row in rows:
            is_text = isinstance(row.content, tuple)
            texts = row.content if isinstance(row.content, tuple) else (rendered(row, tokenizer),)
            read = texts[:1] if has_targets else texts
            # a template writes the special tokens itself
            found, is_cut = _tokens(tokenizer, limit, *read, add_special_tokens=is_text)
            if has_targets:
                target, target_is_cut = _tokens(tokenizer, limit, text_target=texts[1])
                found["labels"], is_cut = target["input_ids"], is_cut or target_is_cut
            made.append(found)
            cut += is_cut
    return made, cut


def _tokens(tokenizer, limit: int, *texts: str, **options) -> tuple[Tokens, bool]:
    """Token ids of a text or a pair, for a pair also which of the two a token belongs to where the
    tokenizer says so; and whether it was cut."""
    found = tokenizer(*texts, **options)
    is_cut = len(found["input_ids"]) > limit
    if is_cut:
        found = tokenizer(*texts, truncation=True, max_length=limit, **options)
    kept = ("input_ids", "token_type_ids") if len(texts) > 1 else ("input_ids",)
    return {name: found[name] for name in kept if name in found}, is_cut


def rendered(row: Row, tokenizer) -> str:
    """A chat as the tokenizer's template writes it. Transformers run templates in a sandbox.

    Raises: Refused where there is no template, or one that does not take these messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        cure = "save chat_template.jinja beside the tokenizer, or give texts"
        expected = "a tokenizer with a chat template, as the row is a chat"
        raise Refused(row.where, expected, "one without", cure)
    try:
        return tokenizer.apply_chat_template(row.content, tokenize=False)
    except (TemplateError, *TROUBLES) as error:
        cure = "correct the messages, or leave the row out"
        expected = "messages that the tokenizer's chat template takes"
        raise Refused(row.where, expected, f"what it refuses ({error})", cure) from error


def longest(model: nn.Module, tokenizer, asked: int) -> int:
    """Tokens of a text at the most: what is asked for, where model and tokenizer have that many."""
    return min(asked, positions(model), tokenizer.model_max_length)


def checked_rows(
    rows: Sequence[Row], tokenizer, model: nn.Module, limit: int, has_targets: bool
) -> tuple[list[Tokens], int]:
    """What :func:`token_rows` gives, refused where the model cannot read it."""
    tokens, cut = token_rows(rows, tokenizer, limit, has_targets)
    check_tokens(rows, tokens, model)
    return tokens, cut


def check_tokens(rows: Sequence[Row], tokens: Sequence[Tokens], model: nn.Module) -> None:
    """Refused for a text without tokens, and for tokens that the model has no row for."""
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    for row, found in zip(rows, tokens):
        for ids in (found["input_ids"], found.get("labels", found["input_ids"])):
            if not ids:
                raise Refused(row.where, "at least one token", "none", "leave the text out")
            if max(ids) >= known:
                cure = "see that tokenizer and model belong together"
                raise Refused(row.where, f"token ids below {known}", f"{max(ids)}", cure)


def batches(
    rows: Sequence[Tokens], size: int, padding: int | None = None
) -> list[dict[str, Tensor]]:
    """Batches of ``size`` rows in their order, the last one maybe smaller: what the rows have and
    ``attention_mask``, all (B, S), padded at the end to the longest row of the batch."""
    fill = {"input_ids": padding or 0, "labels": IGNORED}
    made = []
    for start in range(0, len(rows), size):
        own, batch = rows[start : start + size], {}
        for name in own[0]:
            batch[name] = _padded([row[name] for row in own], fill.get(name, 0))
        ones = [[1] * len(row["input_ids"]) for row in own]
        made.append(batch | {"attention_mask": _padded(ones, 0)})
    return made


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Rows of numbers as a tensor (B, S), shorter ones filled up at the end."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def with_decoder(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch whose ``labels`` (B, S) are what the decoder reads: moved on by one behind its first
    token, as the model itself does in training, with a mask (B, S).

    Raises: Refused where the configuration does not say what a decoder begins with.
    """
    labels = batch.pop("labels")
    try:
        ids = model.prepare_decoder_input_ids_from_labels(labels)
    except (ValueError, TypeError) as error:
        where, cure = f"{CONFIG}, decoder_start_token_id", "say there what its tokens are"
        expected = "the token that the decoder begins with, and pad_token_id"
        raise Refused(where, expected, f"{error}", cure) from error
    mask = (labels != IGNORED).long()
    return batch | {"decoder_input_ids": ids, "decoder_attention_mask": mask}
