"""Merges of checkpoints on calibration texts: the base is built by transformers, and run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..aliases import tied
from ..errors import MergeError
from ..merge import Merge
from .architectures import HERE_ALONE, TROUBLES, class_of, quietly, require_transformers
from .findings import Refused, shortened
from .folders import Checkpoint
from .methods import function_of
from .tensors import TYPES, read_tensors
from .weights_only import located

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Value = TypeVar("Value")
CONVERT = (
    "load the model with this version of transformers and save it again, or merge by a method that "
    "looks at weights only"
)


def merged_model(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    calibration: Mapping[str, Sequence[Mapping[str, Tensor]]],
    method: str,
    options: Mapping[str, object],
    *,
    progress: bool = False,
) -> Merge:
    """The merge of whole models by a method that runs them.

    Args:
        calibration: expert's name -> batches, as of ``feeds``: of token ids (B, S), or of pictures
            (B, C, H, W), which are taken in the dtype of the model.
    Returns: a merge whose entries have the names of the base's files, and others tied to them.
    Raises: Refused where transformers cannot build the model, or has other tensors than the files;
        what the method raises, with the files that were read.
    """
    model = build(base)
    inputs = {name: cast(batches, model.dtype) for name, batches in calibration.items()}
    names, in_model = list(base.entries), names_of(model)
    states = {expert.name: renamed(read_tensors(expert, names), in_model) for expert in experts}
    try:
        merge = function_of(method)(model, states, inputs, progress=progress, **options)
    except MergeError as error:
        raise located(error, [base, *experts], names) from error
    in_files = {name: file for file, name in in_model.items()}
    merge.state_dict = renamed(merge.state_dict, in_files)
    merge.averaged = renamed(merge.averaged, in_files)
    return merge


def names_of(model: PreTrainedModel) -> dict[str, str]:
    """Name in a file -> name in the model, for the tensors that the files hold as they are: some,
    as those of vision transformers, are only called otherwise.

    Args:
        model: as ``from_pretrained`` made it, which notes how it renamed what it read.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    places = {id(value): name for name, value in state.items()}
    stored = revert_weight_conversion(model, state)
    return {file: places[id(value)] for file, value in stored.items() if id(value) in places}


def renamed(values: Mapping[str, Value], names: Mapping[str, str]) -> dict[str, Value]:
    """A mapping under other names; what has none keeps its own."""
    return {names.get(name, name): value for name, value in values.items()}


def cast(batches: Sequence[Mapping[str, Tensor]], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Batches whose floating tensors (…), as those of pictures are, have a dtype."""
    made = []
    for batch in batches:
        floating = {n: value.to(dtype) for n, value in batch.items() if value.is_floating_point()}
        made.append({**batch, **floating})
    return made


def build(base: Checkpoint) -> PreTrainedModel:
    """The base as a model of transformers, in evaluation mode, with the weights of its files.

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
    _check_entries(base, model)
    return model.eval()


def _dtype(base: Checkpoint) -> torch.dtype:
    """The dtype of most floating numbers of the files."""
    counts: Counter[str] = Counter()
    for entry in base.entries.values():
        if entry.is_number:
            counts[entry.dtype] += entry.stop - entry.start
    return TYPES[counts.most_common(1)[0][0]] if counts else torch.float32


def _check_entries(base: Checkpoint, model: PreTrainedModel) -> None:
    """Refused unless the model has the tensors of the files, others only tied to these, and their
    values."""
    files, state, ties = renamed(base.entries, names_of(model)), model.state_dict(), tied(model)
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
