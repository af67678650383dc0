"""Merges of checkpoints on calibration texts: the base is built by transformers, and run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..aliases import tied
from ..errors import MergeError
from ..merge import Merge
from .architectures import HERE_ALONE, TROUBLES, class_of, quietly, require_transformers
from .findings import Refused, shortened
from .folders import CONFIG, TOKENIZER, Checkpoint
from .methods import function_of
from .tensors import TYPES, read_tensors
from .weights_only import located

CONVERT = "load the model with this version of transformers and save it again"


def merged_model(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    texts: Mapping[str, Sequence[str]],
    method: str,
    options: Mapping[str, object],
    *,
    max_length: int = 128,
    batch_size: int = 8,
    progress: bool = False,
) -> Merge:
    """The merge of whole models by a method that runs them.

    Args:
        texts: expert's name -> its calibration inputs, tokenised by the expert's own tokenizer, or
            by the base's where it has none.
        max_length: tokens of an input at most; never more than the model has positions for.
        batch_size: inputs of a forward.
    Returns: a merge whose entries have the names of the base's files, and others tied to them.
    Raises: Refused where transformers cannot build the model or a tokenizer, or has other tensors
        than the files; what the method raises, with the files that were read.
    """
    model = build(base)
    limit = min(max_length, positions(model))
    calibration = {}
    for expert in experts:
        tokenizer = tokenizer_of(expert, base)
        rows = token_rows(texts[expert.name], tokenizer, limit)
        check_tokens(expert.name, rows, model)
        calibration[expert.name] = batches(rows, batch_size, tokenizer.pad_token_id)
    names = list(base.entries)
    states = {expert.name: read_tensors(expert, names) for expert in experts}
    try:
        return function_of(method)(model, states, calibration, progress=progress, **options)
    except MergeError as error:
        raise located(error, [base, *experts], names) from error


def build(base: Checkpoint) -> nn.Module:
    """The base as a model of transformers, in evaluation mode, with the weights of its files.

    Its dtype is the one that most numbers of the files have. No code of the folder is run, and
    nothing is asked of a network.

    Raises: Refused for models with an encoder and a decoder, and where the model's tensors are not
        those of the files.
    """
    require_transformers()
    try:
        with quietly():
            model = class_of(base).from_pretrained(
                base.folder, dtype=_dtype(base), use_safetensors=True, **HERE_ALONE
            )
    except TROUBLES as error:
        where, cure = str(base.folder), "see that config.json belongs to these weights"
        raise Refused(where, "a model that transformers load", f"{error}", cure) from error
    if model.config.is_encoder_decoder:
        cure = "merge by a method that looks at weights only, or call the method from Python"
        where = f"{base.folder / CONFIG}, is_encoder_decoder"
        raise Refused(where, "a model that reads one text", "an encoder with a decoder", cure)
    _check_entries(base, model)
    return model.eval()


def _dtype(base: Checkpoint) -> torch.dtype:
    """The dtype of most floating numbers of the files."""
    counts: Counter[str] = Counter()
    for entry in base.entries.values():
        if entry.is_number:
            counts[entry.dtype] += entry.stop - entry.start
    return TYPES[counts.most_common(1)[0][0]] if counts else torch.float32


def _check_entries(base: Checkpoint, model: nn.Module) -> None:
    """Refused unless the model has the tensors of the files, others only tied to these, and their
    values."""
    files, state, ties = base.entries, model.state_dict(), tied(model)
    unknown = [name for name in files if name not in state]
    absent = [name for name in state if files.keys().isdisjoint(ties[name])]
    if unknown or absent:
        found = f"{shortened(unknown)} in the files alone" if unknown else ""
        found += " and " if unknown and absent else ""
        found += f"{shortened(absent)} in the model alone" if absent else ""
        where = str(base.folder)
        raise Refused(where, "files and model with the same tensors", found, CONVERT)
    for name, value in state.items():
        if name in files and tuple(value.shape) != files[name].shape:
            found = f"{tuple(value.shape)} in the model"
            where = f"{base.folder}, tensor {name!r}"
            raise Refused(where, f"shape {files[name].shape}", found, CONVERT)


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

    holder = expert if expert.matching(TOKENIZER) else base
    if not holder.matching(TOKENIZER):
        cure = "save one there, with tokenizer.save_pretrained(folder)"
        expected = "a tokenizer in the expert's folder or in the base's"
        raise Refused(expert.folder, expected, "none", cure)
    try:
        with quietly():
            return AutoTokenizer.from_pretrained(holder.folder, **HERE_ALONE)
    except TROUBLES as error:
        cure = "save it again with this version of transformers"
        expected = "a tokenizer that transformers load"
        raise Refused(holder.folder, expected, f"{error}", cure) from error


def token_rows(texts: Sequence[str], tokenizer, limit: int) -> list[list[int]]:
    """Token ids of every text, ``limit`` of them at the most."""
    limit = min(limit, tokenizer.model_max_length)
    with quietly():
        return [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in texts]


def check_tokens(task: str, rows: Sequence[Sequence[int]], model: nn.Module) -> None:
    """Refused for a text without tokens, and for tokens that the model has no row for."""
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    for number, row in enumerate(rows):
        where = f"calibration of {task!r}, text {number + 1}"
        if not row:
            raise Refused(where, "at least one token", "none", "leave the text out")
        if max(row) >= known:
            cure = "see that tokenizer and model belong together"
            raise Refused(where, f"token ids below {known}", f"{max(row)}", cure)


def batches(
    rows: Sequence[Sequence[int]], size: int, padding: int | None = None
) -> list[dict[str, Tensor]]:
    """Batches of ``size`` rows in their order, the last one maybe smaller: ``input_ids`` and
    ``attention_mask``, both (B, S), padded at the end to the longest row of the batch."""
    made = []
    for start in range(0, len(rows), size):
        own = rows[start : start + size]
        longest = max(len(row) for row in own)
        ids = torch.full((len(own), longest), padding or 0)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(own):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        made.append({"input_ids": ids, "attention_mask": mask})
    return made
