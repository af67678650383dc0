"""How a model of transformers has the tensors of its files: as they are, under other names, or
fused and split, as the experts of a mixture are, which lie in files one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ...aliases import tied
from ...errors import NonFinite, is_finite
from ..architectures import HERE_ALONE, TROUBLES, quietly
from ..findings import Refused, shortened
from ..folders import Checkpoint
from ..large.mapped import expert_state
from ..tensors import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Value = TypeVar("Value")
CONVERT = (
    "load the model with this version of transformers and save it again, or merge by a method that "
    "looks at weights only"
)


class Layout:
    """Where the tensors of files are in a model that ``from_pretrained`` has made of them.

    Args:
        base: the checkpoint that the model was made of.
        model: which notes how it renamed and converted what it read.
    Attributes:
        in_model: name in a file -> name of the tensor of the model that it is, or is a part of.
        in_files: name in the model -> names in the files of what it is made of: one for most.
        converted: names in the model of tensors that are not in the files as they are.
    Raises: Refused where the model has other tensors than the files.
    """

    def __init__(self, base: Checkpoint, model: PreTrainedModel):
        self.base, self._model = base, model
        self._names = list(base.entries)
        values = {name: value.to("meta") for name, value in model.state_dict().items()}
        names = {id(value): name for name, value in values.items()}
        stored = self._reverted(values)
        self.in_files: dict[str, list[str]] = {}
        for file, value in stored.items():
            if id(value) in names:
                self.in_files[names[id(value)]] = [file]
        self.converted = frozenset(values.keys() - self.in_files.keys())
        for name in sorted(self.converted):
            self.in_files[name] = list(self._reverted({name: values[name]}))
        self.in_model: dict[str, str] = {}
        for name, files in self.in_files.items():
            for file in files:
                self.in_model.setdefault(file, name)
        self._check({file: tuple(value.shape) for file, value in stored.items()})

    def _reverted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model as ``save_pretrained`` would write them."""
        from transformers.core_model_loading import revert_weight_conversion

        try:
            return revert_weight_conversion(self._model, state)
        except TROUBLES as error:
            expected = "a model whose tensors transformers can write as they were read"
            raise Refused(self.base.folder, expected, f"{error}", CONVERT) from error

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refused unless the files have the tensors that the model is saved as, others only tied to
        these, and their shapes.

        Args:
            shapes: name that a tensor of the model is saved under -> its shape there.
        """
        files, ties = self.base.entries, tied(self._model)
        unknown = [file for file in files if file not in shapes]
        absent = []
        for file in shapes.keys() - files.keys():
            same = [other for name in ties[self.in_model[file]] for other in self.in_files[name]]
            if files.keys().isdisjoint(same):
                absent.append(file)
        if unknown or absent:
            differing = [f"{shortened(unknown)} in the files alone"] if unknown else []
            differing += [f"{shortened(sorted(absent))} in the model alone"] if absent else []
            expected = "files and model with the same tensors"
            raise Refused(self.base.folder, expected, " and ".join(differing), CONVERT)
        for file, entry in files.items():
            if shapes[file] != entry.shape:
                where = f"{self.base.folder}, tensor {file!r}"
                in_model = f"{shapes[file]} in the model"
                raise Refused(where, f"shape {entry.shape}", in_model, CONVERT)

    def state_of(
        self,
        checkpoint: Checkpoint,
        names: Collection[str] | None = None,
        rounds: bool = False,
        room: Path | None = None,
    ) -> dict[str, Tensor]:
        """The tensors of a checkpoint of the base's architecture as the model has them: name in the
        model -> tensor, in the dtype of the files, or of the model where some were converted.

        They stay in their files until they are used, but for those that are converted, which takes
        a second copy of the checkpoint for as long as it lasts.

        Args:
            names: of tensors that it has, by default all.
            rounds: whether all have the dtype of the model, as far as their numbers fit into it.
            room: folder for what is in no file as it is wanted, see ``expert_state``.
        Raises: NonFinite naming the file, where tensors are converted that are not finite; Refused
            for some names only, where tensors are converted.
        """
        names = self._names if names is None else names
        if not self.converted:
            dtypes: dict[str, torch.dtype | None] = dict.fromkeys(names)
            if rounds:
                state = self._model.state_dict()
                dtypes |= {name: state[self.in_model[name]].dtype for name in names}
            return renamed(expert_state(checkpoint, dtypes, room), self.in_model)
        if len(names) != len(self._names):
            expected = "heads beside a backbone that transformers has as it is in its files"
            cure = "merge by a method that looks at weights only"
            raise Refused(self.base.folder, expected, "one that it converts", cure)
        tensors = read_tensors(checkpoint, self._names)
        self._refuse_damaged(checkpoint, tensors)
        model = self._model
        with quietly():
            made = type(model).from_pretrained(
                None, config=model.config, state_dict=tensors, dtype=model.dtype, **HERE_ALONE
            )
        return made.state_dict()

    def _refuse_damaged(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
        """NonFinite for a tensor that is fused with others, whose name would say less."""
        for name, value in tensors.items():
            if self.in_model[name] in self.converted and not is_finite(value):
                file = checkpoint.files_of_tensors.get(name, "")
                where = f"expert {checkpoint.name!r}, {checkpoint.folder / file}, tensor {name!r}"
                raise NonFinite(where, value, "the checkpoint is damaged")

    def stored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model under the names and in the shapes of the files.

        Args:
            state: all of the model's; tied ones may be there under several names.
        """
        if not self.converted:
            return renamed(state, {name: files[0] for name, files in self.in_files.items()})
        return self._reverted(dict(state))

    def by_file(self, told: Mapping[str, Value]) -> dict[str, Value]:
        """What is told of tensors of the model, told of those of the files that they are made
        of."""
        return {file: value for name, value in told.items() for file in self.names(name)}

    def names(self, name: str) -> Sequence[str]:
        """Names in the files of a tensor of the model."""
        return self.in_files.get(name, [name])


def renamed(values: Mapping[str, Value], names: Mapping[str, str]) -> dict[str, Value]:
    """A mapping under other names; what has none keeps its own."""
    return {names.get(name, name): value for name, value in values.items()}
