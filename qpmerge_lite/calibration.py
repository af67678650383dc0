r"""Calibration batches.

Calibration maps every task to batches of unlabelled inputs. A batch maps the names of keyword
arguments of the model's ``forward`` to tensors, or to plain values such as None and flags.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import EmptyCalibration, MergeError

# entries whose leading dimension is the number of sequences, the surest first
MASKS = ("attention_mask", "decoder_attention_mask")
TOKENS = ("input_ids", "inputs_embeds")
INPUTS = (*TOKENS, "pixel_values", "input_values", "input_features")
IGNORED = -100  # the label of tokens that take no part in the loss
PLAIN = (type(None), bool, int, float, str)

EXPECTED = (
    "expected a mapping from names of forward's arguments to tensors (or None, flags, numbers, "
    "strings), such as {'input_ids': tensor}"
)


@dataclass(frozen=True)
class Batch:
    """One calibration batch.

    Attributes:
        task: whose inputs these are.
        number: position in the task's list of batches.
        arguments: keyword arguments of ``forward``, tensors on the device of the model.
        size: number of sequences, images or the like.
        start: running number of the first of them within the task.
        decodes_labels: whether the model reads its labels as the decoder's tokens.
        shared: names of tensors that are one for all inputs, though they may be as long as the
            batch.
    """

    task: str
    number: int
    arguments: dict
    size: int
    start: int
    decodes_labels: bool = False
    shared: frozenset[str] = frozenset()

    @property
    def one_per_input(self) -> list[str]:
        """Names of the tensors that hold one row per input, rather than one for all."""
        tensors = {k: v for k, v in self.arguments.items() if isinstance(v, Tensor) and v.dim()}
        return [k for k, v in tensors.items() if len(v) == self.size and k not in self.shared]

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which tokens are counted, by name of the mask: nonzero entries of (B, S), or (B, S,
        choices).

        Of a decoder without a mask of its own, tokens whose label is -100 are not.
        """
        given = {name: self.arguments.get(name) for name in MASKS}
        masks = {name: mask for name, mask in given.items() if isinstance(mask, Tensor)}
        labels = self.arguments.get("labels")
        if self.decodes_labels and MASKS[1] not in masks and isinstance(labels, Tensor):
            if labels.dim() == 2:
                masks[MASKS[1]] = labels != IGNORED
        return {name: mask.movedim(-1, 1) for name, mask in masks.items()}

    def mask(self, name: str | None) -> Tensor | None:
        """A mask (B, S), or (B, S, choices), by its name; None where there is none."""
        return None if name is None else self.masks.get(name)

    @property
    def padded(self) -> bool:
        """Whether some of its tokens are not counted."""
        return any(bool((mask == 0).any()) for mask in self.masks.values())


def check_calibration(
    calibration, tasks: Iterable[str], device, decodes_labels: bool = False
) -> dict[str, list[Batch]]:
    """The batches of every task, tensors moved to ``device``.

    Args:
        calibration: task -> batches (any iterable, also a generator); a batch maps names of
            arguments of ``forward`` to tensors or plain values.
        tasks: for which there must be batches; others are left out.
        decodes_labels: of a :class:`Batch`.
    Raises: EmptyCalibration for tasks without batches or with an empty one; MergeError naming
        task, number of the batch and key for anything that is no batch.
    """
    if not isinstance(calibration, Mapping):
        raise MergeError(
            "calibration: expected a mapping of task names to lists of batches, found "
            f"{_type(calibration)}; in each batch {EXPECTED}"
        )
    lists = {task: _listed(task, calibration.get(task)) for task in tasks}
    missing = [task for task, batches in lists.items() if not batches or any(map(_hollow, batches))]
    if missing:
        raise EmptyCalibration(
            f"no calibration batches for {missing}; give every expert at least one batch of "
            "unlabelled inputs"
        )
    every: list[Batch] = []
    for task, batches in lists.items():
        every += _numbered(task, batches, device, decodes_labels)
    shared = frozenset(key for key in _names(every) if _is_shared(key, every))
    by_task: dict[str, list[Batch]] = {task: [] for task in lists}
    for batch in every:
        by_task[batch.task].append(replace(batch, shared=shared))
    return by_task


def _hollow(batch) -> bool:
    return isinstance(batch, Mapping) and not batch


def _listed(task: str, batches) -> list:
    """The batches of a task as a list; generators are used up once, here."""
    if batches is None:
        return []
    if isinstance(batches, Mapping):
        raise MergeError(
            f"task {task!r}: expected a list of batches, found a single one ({_type(batches)}); "
            "pass [batch]"
        )
    if isinstance(batches, (str, bytes, Tensor)) or not isinstance(batches, Iterable):
        raise MergeError(
            f"task {task!r}: expected a list of batches, found {_type(batches)}; in each batch "
            f"{EXPECTED}"
        )
    return list(batches)


def _type(value) -> str:
    return type(value).__name__


def _numbered(task: str, batches: list, device, decodes_labels: bool) -> list[Batch]:
    numbered, start = [], 0
    for number, batch in enumerate(batches):
        where = f"task {task!r}, batch {number}"
        arguments = _arguments(where, batch, device)
        size = _size(where, arguments)
        numbered.append(Batch(task, number, arguments, size, start, decodes_labels))
        start += size
    return numbered


def _arguments(where: str, batch, device) -> dict:
    """The keyword arguments of a batch, checked and on the device."""
    if not isinstance(batch, Mapping):
        raise MergeError(f"{where}: {EXPECTED}; found {_type(batch)}")
    for key in batch:
        if not isinstance(key, str):
            raise MergeError(
                f"{where}, key {key!r}: expected the name of an argument, found {_type(key)}"
            )
    arguments = {key: _argument(f"{where}, key {key!r}", batch[key], device) for key in batch}
    if not any(isinstance(value, Tensor) for value in arguments.values()):
        raise MergeError(f"{where}: {EXPECTED}; found {sorted(arguments)}, none of them a tensor")
    return arguments


def _names(batches: list[Batch]) -> set[str]:
    """Names of tensors of which it is not known beforehand that they hold one row per input."""
    names = set[str]()
    for batch in batches:
        tensors = (k for k, v in batch.arguments.items() if isinstance(v, Tensor) and v.dim())
        names.update(tensors)
    return names - {*MASKS, *INPUTS, "labels"}


def _is_shared(key: str, batches: list[Batch]) -> bool:
    """Whether an entry is one for all inputs: it keeps its length in batches of other sizes, or its
    values on other inputs.

    Raises: MergeError for a vector of which neither can be seen, as all batches are the same, and
        for an entry that has rows in some batches and is a single number in others.
    """
    holders = [batch for batch in batches if isinstance(batch.arguments.get(key), Tensor)]
    first, values = holders[0], [batch.arguments[key] for batch in holders]
    for batch in holders:
        if batch.arguments[key].dim() == 0:
            raise MergeError(
                f"task {batch.task!r}, batch {batch.number}, key {key!r}: expected a tensor with "
                "rows, as in other batches, found a single number; give it one shape in all of them"
            )
    lengths, sizes = {len(value) for value in values}, {batch.size for batch in holders}
    if len(lengths) > 1 or len(sizes) > 1:
        return len(lengths) == 1
    alone = lengths != sizes or not set(first.one_per_input) - {key}
    differs = not all(torch.equal(value, values[0]) for value in values)
    if alone or differs or bool((values[0] == values[0][:1]).all()):
        return False  # no question, or it differs from batch to batch, or in no input
    if not all(_agree(first, batch, key) for batch in holders):
        return True
    if values[0].dim() == 1:
        raise MergeError(
            f"task {first.task!r}, batch {first.number}, key {key!r}: expected to see whether it "
            "holds one number per input or is one for all, found a vector as long as the batch and "
            f"no other batch; give one of another size, or shape ({first.size}, 1) for the former "
            f"and (1, {first.size}) for the latter"
        )
    return False


def _agree(one: Batch, other: Batch, but: str) -> bool:
    """Whether batches hold the same tensors, one aside."""
    tensors = {k: v for k, v in one.arguments.items() if isinstance(v, Tensor) and k != but}
    others = {k: v for k, v in other.arguments.items() if isinstance(v, Tensor) and k != but}
    return tensors.keys() == others.keys() and all(
        torch.equal(v, others[k]) for k, v in tensors.items()
    )


def _argument(where: str, value, device):
    """A tensor on the device, or a plain value as it is."""
    if isinstance(value, PLAIN):
        return value
    if not isinstance(value, Tensor):
        raise MergeError(
            f"{where}: expected a tensor, None, a flag, a number or a string, found "
            f"{_type(value)}; convert it with torch.as_tensor"
        )
    if value.device.type == "meta":
        raise MergeError(f"{where}: the tensor is on the meta device, which holds no values")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested one" if value.is_nested else value.layout
        raise MergeError(
            f"{where}: expected a dense tensor, found {kind}; pad it or convert it with "
            f"to_dense(), "
            "and mark padding in an attention_mask"
        )
    if value.numel() == 0:
        raise EmptyCalibration(
            f"{where}: expected inputs, found an empty tensor of shape {tuple(value.shape)}; leave "
            "the batch out"
        )
    return value.to(device)


def _size(where: str, arguments: dict) -> int:
    """Number of sequences of a batch."""
    for name in INPUTS:
        if isinstance(arguments.get(name), Tensor) and arguments[name].dim() == 0:
            raise MergeError(
                f"{where}, key {name!r}: expected a row per input, found a single number; give it "
                "shape (1, …) for one input"
            )
    shapes = {k: v.shape for k, v in arguments.items() if isinstance(v, Tensor) and v.dim()}
    choices = shapes.get(TOKENS[0], ()) if len(shapes.get(TOKENS[0], ())) == 3 else None
    for name in MASKS:
        mask = arguments.get(name)
        if mask is not None and len(shapes.get(name, ())) != 2 and shapes.get(name, ()) != choices:
            given = tuple(mask.shape) if isinstance(mask, Tensor) else repr(mask)
            raise MergeError(
                f"{where}, key {name!r}: expected shape (B, S), or that of {TOKENS[0]!r} with "
                f"choices (B, choices, S), one entry per token, found {given}; leave it out where "
                "nothing is padding"
            )
    for name in TOKENS if MASKS[0] in shapes else ():
        if name in shapes and shapes[name][0] != shapes[MASKS[0]][0]:
            raise MergeError(
                f"{where}: expected as many rows in {name!r} as in {MASKS[0]!r}, found "
                f"{tuple(shapes[name])} and {tuple(shapes[MASKS[0]])}; expand the shorter one"
            )
    for name in (MASKS[0], *INPUTS):
        if name in shapes:
            return shapes[name][0]
    leading = Counter(shape[0] for shape in shapes.values() if shape[0] > 1)
    return leading.most_common(1)[0][0] if leading else 1
