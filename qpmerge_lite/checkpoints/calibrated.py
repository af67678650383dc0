"""Merges of checkpoints on calibration texts: the base is built by transformers, and run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import MergeError
from ..merge import Merge
from .architectures import HERE_ALONE, TROUBLES, class_of, quietly, require_transformers
from .conversion.layout import Layout
from .findings import Refused
from .folders import Checkpoint
from .methods import function_of
from .tensors import TYPES
from .weights_only import located

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel


def merged_model(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    calibration: Mapping[str, Sequence[Mapping[str, Tensor]]],
    method: str,
    options: Mapping[str, object],
    *,
    group: ProcessGroup | None = None,
    progress: bool = False,
) -> Merge:
    """The merge of whole models by a method that runs them.

    Args:
        calibration: expert's name -> batches, as of ``feeds``: of token ids (B, S), or of pictures
            (B, C, H, W), which are taken in the dtype of the model.
        group: of ``torch.distributed``, whose processes share the forwards.
    Returns: a merge whose entries have the names of the base's files, and others tied to them.
    Raises: Refused where transformers cannot build the model, or has other tensors than the files;
        what the method raises, with the files that were read.
    """
    model, layout = build(base)
    inputs = {name: cast(batches, model.dtype) for name, batches in calibration.items()}
    states = {expert.name: layout.state_of(expert) for expert in experts}
    try:
        given = {"group": group, "progress": progress, **options}
        merge = function_of(method)(model, states, inputs, **given)
    except MergeError as error:
        raise located(error, [base, *experts], list(base.entries)) from error
    merge.state_dict = layout.stored(merge.state_dict)
    merge.averaged = layout.by_file(merge.averaged)
    return merge


def cast(batches: Sequence[Mapping[str, Tensor]], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Batches whose floating tensors (…), as those of pictures are, have a dtype."""
    made = []
    for batch in batches:
        floating = {n: value.to(dtype) for n, value in batch.items() if value.is_floating_point()}
        made.append({**batch, **floating})
    return made


def build(base: Checkpoint) -> tuple[PreTrainedModel, Layout]:
    """The base as a model of transformers, in evaluation mode, with the weights of its files; and
    where these are in it.

    Its dtype is the one that most numbers of the files have. No code of the folder is run, and
    nothing is asked of a network.

    Raises: Refused where the model's tensors are not those of the files.
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
    return model.eval(), Layout(base, model)


def _dtype(base: Checkpoint) -> torch.dtype:
    """The dtype of most floating numbers of the files."""
    counts: Counter[str] = Counter()
    for entry in base.entries.values():
        if entry.is_number:
            counts[entry.dtype] += entry.stop - entry.start
    return TYPES[counts.most_common(1)[0][0]] if counts else torch.float32
