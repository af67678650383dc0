"""Merges of checkpoints on calibration texts: the base is built by transformers, and run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

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
from .large.solved import SolvedLayers, remembering
from .methods import OWN_PRECISION, function_of
from .tensors import TYPES
from .weights_only import located

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

Value = TypeVar("Value")
CHOOSES = "auto"  # the method that judges by predictions, where heads make some
DECOMPOSES = "esm"  # whose layers are not kept by the pass


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
    rounds = method not in OWN_PRECISION  # what is run is rounded anyhow
    room = None if solved is None else solved.folder.parent
    running = Running(report)
    body = running.module
    states = {e.name: running.state_of(e, rounds, room) for e in report.experts}
    heads = functions_of(report.heads, body) if report.heads and method == CHOOSES else None
    inputs = {name: cast(batches, body.dtype) for name, batches in calibration.items()}
    by_itself = method == DECOMPOSES and group is None
    given = {"group": group, "progress": progress, **options}
    given |= {} if heads is None else {"heads": heads}
    try:
        with (
            nullcontext() if solved is None else keeping(solved),
            remembering(solved) if solved and by_itself else nullcontext(),
            nullcontext() if heads is None else noting_arguments(body),
        ):
            merge = function_of(method)(body, states, inputs, **given)
    except MergeError as error:
        raise located(error, [report.base, *report.experts], running.names) from error
    merge.state_dict = running.stored(merge.state_dict)
    merge.averaged = running.by_file(merge.averaged)
    return merge


class Running:
    """What of a base is run, and how its tensors are called there and in the files: the whole
    model, or its backbone, as transformers tells it, where heads are kept.

    Args:
        report: on checkpoints that fit.
    Attributes:
        module: what is run, with the base's weights.
        names: of the tensors in the files that experts bring.
    Raises: Refused where transformers cannot build the model, or has other tensors than the files.
    """

    def __init__(self, report: Report):
        model, self._layout = build(report.base)
        self.module: PreTrainedModel = model.base_model if report.heads else model
        self.names = list(report.backbone.entries)
        (path,) = [name for name, module in model.named_modules() if module is self.module]
        self._prefix = path + "." if path else ""
        self._others = self._beside({self._layout.in_model[name] for name in self.names})

    def _beside(self, names: set[str]) -> dict[str, Tensor]:
        """Entries of the base that no expert brings, which are its own in all of them: as a pooler
        that some experts' classes have not.

        Args:
            names: that experts bring, as the model has them.
        """
        ties, values = tied(self.module), self.module.state_dict().items()
        inner = {name.removeprefix(self._prefix) for name in names}
        return {name: value for name, value in values if inner.isdisjoint(ties[name])}

    def state_of(
        self, checkpoint: Checkpoint, rounds: bool = False, room: Path | None = None
    ) -> dict[str, Tensor]:
        """The tensors of a checkpoint as the module has them, see ``Layout.state_of``."""
        state = self._layout.state_of(checkpoint, self.names, rounds, room)
        start = self._prefix
        inside = {n.removeprefix(start): v for n, v in state.items() if n.startswith(start)}
        return self._others | inside

    def _outside(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What is told of the module's tensors, but for those that no expert brings, by the names
        of the whole model."""
        kept = values.keys() - self._others.keys()
        return {self._prefix + name: v for name, v in values.items() if name in kept}

    def stored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the module, all of them, under the names and in the shapes of the files."""
        return self._layout.stored(self._outside(state))

    def by_file(self, told: Mapping[str, Value]) -> dict[str, Value]:
        """What is told of tensors of the module, told of those of the files."""
        return self._layout.by_file(self._outside(told))


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
