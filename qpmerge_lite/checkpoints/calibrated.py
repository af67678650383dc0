"""Merges of checkpoints on calibration texts: the base is built by transformers, and run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..aliases import tied
from ..engine.keeping import keeping
from ..errors import MergeError
from ..experts import equal
from ..merge import Merge
from .architectures import HERE_ALONE, TROUBLES, class_of, quietly, require_transformers
from .compatibility import Report
from .conversion.layout import Layout
from .findings import Refused
from .folders import Checkpoint
from .heads.running import functions_of, noting_arguments
from .large.mapped import mapped_tensors
from .large.solved import SolvedLayers
from .methods import OWN_PRECISION, function_of
from .tensors import TYPES
from .weights_only import located

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

Value = TypeVar("Value")
CHOOSES = "auto"  # the method that judges by predictions, where heads make some


def merged_model(
    report: Report,
    calibration: Mapping[str, Sequence[Mapping[str, Tensor]]],
    method: str,
    options: Mapping[str, object],
    *,
    group: ProcessGroup | None = None,
    solved: SolvedLayers | None = None,
    progress: bool = False,
) -> Merge:
    """The merge of whole models, or of their backbones where heads are kept, by a method that runs
    them; those of the files stay there until they are used.

    Args:
        report: on checkpoints that fit.
        calibration: expert's name -> batches, as of ``feeds``: of token ids (B, S), or of pictures
            (B, C, H, W), which are taken in the dtype of the model.
        group: of ``torch.distributed``, whose processes share the forwards.
        solved: layers that an earlier run has solved, to which those that this one solves are
            added; None keeps none.
    Returns: a merge whose entries have the names of the base's files, and others tied to them.
    Raises: Refused where transformers cannot build the model, or has other tensors than the files;
        what the method raises, with the files that were read.
    """
    model, layout = build(report.base)
    names = list(report.backbone.entries)
    rounds = method not in OWN_PRECISION  # what is run is rounded anyhow
    room = None if solved is None else solved.folder.parent
    states = {e.name: layout.state_of(e, names, rounds, room) for e in report.experts}
    run = _run_of(model, bool(report.heads))
    others = _beside(run, {run.inner(layout.in_model[name]) for name in names})
    states = {name: others | run.inside(state) for name, state in states.items()}
    heads = functions_of(report.heads, run.module) if report.heads and method == CHOOSES else None
    inputs = {name: cast(batches, model.dtype) for name, batches in calibration.items()}
    given = {"group": group, "progress": progress, **options}
    given |= {} if heads is None else {"heads": heads}
    try:
        with (
            nullcontext() if solved is None else keeping(solved),
            nullcontext() if heads is None else noting_arguments(run.module),
        ):
            merge = function_of(method)(run.module, states, inputs, **given)
    except MergeError as error:
        raise located(error, [report.base, *report.experts], names) from error
    merge.state_dict = layout.stored(run.outside(merge.state_dict, others))
    merge.averaged = layout.by_file(run.outside(merge.averaged, others))
    return merge


class _Run(NamedTuple):
    """The module that is run, which may be a part of the model, and how its tensors are called.

    Attributes:
        prefix: what their names in the model begin with.
    """

    module: PreTrainedModel
    prefix: str

    def inner(self, name: str) -> str:
        """Name in the module of a name in the model."""
        return name.removeprefix(self.prefix)

    def inside(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the model's tensors that the module has, by its names."""
        return {self.inner(name): v for name, v in state.items() if name.startswith(self.prefix)}

    def outside(self, values: Mapping[str, Value], without: Collection[str]) -> dict[str, Value]:
        """What is told of the module's tensors, but for some, by the names of the model."""
        return {self.prefix + name: v for name, v in values.items() if name not in without}


def _run_of(model: PreTrainedModel, has_heads: bool) -> _Run:
    """The whole model, or its backbone, as transformers tells it, where heads are kept."""
    body = model.base_model if has_heads else model
    (path,) = [name for name, module in model.named_modules() if module is body]
    return _Run(body, path + "." if path else "")


def _beside(run: _Run, names: set[str]) -> dict[str, Tensor]:
    """Entries of the base that no expert brings, which are its own in all of them: as a pooler that
    some experts' classes have not.

    Args:
        names: that experts bring.
    """
    ties = tied(run.module)
    values = run.module.state_dict().items()
    return {name: value for name, value in values if names.isdisjoint(ties[name])}


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
                base.folder, dtype=dtype_of(base), use_safetensors=True, **HERE_ALONE
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


def dtype_of(base: Checkpoint) -> torch.dtype:
    """The dtype of most floating numbers of the files."""
    counts: Counter[str] = Counter()
    for entry in base.entries.values():
        if entry.is_number:
            counts[entry.dtype] += entry.stop - entry.start
    return TYPES[counts.most_common(1)[0][0]] if counts else torch.float32
