"""Merges of checkpoints on calibration texts: the base is built by transformers, and run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.keeping import keeping
from ..errors import MergeError
from ..experts import equal
from ..merge import Merge
from .architectures import HERE_ALONE, TROUBLES, class_of, quietly, require_transformers
from .conversion.layout import Layout
from .findings import Refused
from .folders import Checkpoint
from .large.mapped import mapped_tensors
from .large.solved import SolvedLayers
from .methods import OWN_PRECISION, function_of
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
    solved: SolvedLayers | None = None,
    progress: bool = False,
) -> Merge:
    """The merge of whole models by a method that runs them; those of the files stay there until
    they are used.

    Args:
        calibration: expert's name -> batches, as of ``feeds``: of token ids (B, S), or of pictures
            (B, C, H, W), which are taken in the dtype of the model.
        group: of ``torch.distributed``, whose processes share the forwards.
        solved: layers that an earlier run has solved, to which those that this one solves are
            added; None keeps none.
    Returns: a merge whose entries have the names of the base's files, and others tied to them.
    Raises: Refused where transformers cannot build the model, or has other tensors than the files;
        what the method raises, with the files that were read.
    """
    model, layout = build(base)
    inputs = {name: cast(batches, model.dtype) for name, batches in calibration.items()}
    rounds = method not in OWN_PRECISION  # what is run is rounded anyhow
    room = None if solved is None else solved.folder.parent
    states = {e.name: layout.state_of(e, rounds, room) for e in experts}
    given = {"group": group, "progress": progress, **options}
    try:
        with nullcontext() if solved is None else keeping(solved):
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
    """The base as a model of transformers, in evaluation mode, with the weights of its files, which
    stay there where they are of its dtype; and where these are in it.

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
    layout = Layout(base, model)
    _leave_in_files(base, model, layout)
    return model.eval(), layout


def _leave_in_files(base: Checkpoint, model: PreTrainedModel, layout: Layout) -> None:
    """Let go of the copies that a model has of what its files hold."""
    stored, state = mapped_tensors(base), model.state_dict(keep_vars=True)
    for name, value in state.items():
        if name in layout.converted:
            continue
        (file,) = layout.names(name)
        if file in stored and value.dtype == stored[file].dtype and equal(value, stored[file]):
            value.data = stored[file]


def _dtype(base: Checkpoint) -> torch.dtype:
    """The dtype of most floating numbers of the files."""
    counts: Counter[str] = Counter()
    for entry in base.entries.values():
        if entry.is_number:
            counts[entry.dtype] += entry.stop - entry.start
    return TYPES[counts.most_common(1)[0][0]] if counts else torch.float32
