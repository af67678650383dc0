"""What a model does on a few sequences of a calibration batch, call by call."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .calibration import MASKS, Batch
from .effects import ABSENT, Traces, blaming, copied, first_tensor, identity_of, version_of
from .errors import MergeError
from .forwards import evaluating, is_encoder_decoder, main_output
from .inputs import take
from .orders import Point

IDS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Call:
    """One call of a layer, or one passage through the border of a block."""

    point: Point
    read: Tensor | None = None
    put: Tensor | None = None
    identity: tuple = ()  # of the tensor that was read: layers with the same one read the same
    held: float = 0.0  # bytes in the frames of the forward, per number in the arguments of the batch
    arguments: frozenset[str] = frozenset()  # names of those that hold just what was read, of tokens


def kind_of(batch: Batch) -> frozenset[str]:
    """Batches with the same arguments, of as many axes, the same dtypes and equal flags, are alike."""
    kinds = set()
    for key, value in batch.arguments.items():
        if isinstance(value, Tensor):
            kinds.add((key, value.dim(), value.dtype))
        elif value is not None:
            kinds.add((key, type(value), value))
    return frozenset(kinds)


def call_at(calls, point: Point) -> Call | None:
    return next((call for call in calls or () if call.point == point), None)


@dataclass(frozen=True)
class Recordings:
    """Calls on a few sequences of a batch, and on others made of them; None for what the model does not run on.

    Attributes:
        batch: the few sequences. some: calls on them.
        fewer: calls without the last of them, the others in reverse order.
        shorter: mask -> calls on those, the last token gone.
        even: calls on those, every token holding what the first one holds; empty where there are no tokens.
    """

    batch: Batch
    some: list[Call]
    fewer: list[Call] | None = None
    shorter: dict[str, list[Call] | None] = field(default_factory=dict)
    even: list[Call] | None = None

    def named(self) -> dict[str, list[Call] | None]:
        """All of them by name."""
        return {"some": self.some, "fewer": self.fewer, "even": self.even, **self.shorter}


def recordings(views, model, batch: Batch, blocks, traces: Traces) -> Recordings:
    """Record a model on a few sequences of a batch.

    Raises: MergeError for a batch that the model does not take.
    """
    chosen = _unlike(batch)
    few, without_last = take(batch, torch.tensor(chosen)), take(batch, torch.tensor(chosen[-2::-1]))
    try:
        some = _record(model, views, few, blocks, traces)
        fewer = _record(model, views, without_last, blocks, traces)
    except MergeError:  # a model may need its batches whole, or this batch is wrong: then what follows says so
        return Recordings(batch, _record(model, views, batch, blocks, traces))
    shorter, even = {}, _even(without_last)
    for mask in MASKS if batch.masks else ():
        cut = _shorter(model, without_last, mask)
        if cut is not None:
            shorter[mask] = _attempt(model, views, cut, blocks, traces)
    held = None if even is None else _attempt(model, views, even, blocks, traces)
    return Recordings(few, some, fewer, shorter, held)


def _unlike(batch: Batch) -> list[int]:
    """Three sequences of a batch, of different lengths where it can be seen; the only one twice."""
    if batch.size == 1:
        return [0, 0]
    order = list(range(batch.size))
    for mask in batch.masks.values():
        order = (mask != 0).flatten(1).sum(1).argsort(descending=True, stable=True).tolist()
        break
    return [order[0], order[-1], order[batch.size // 2]]


def _even(batch: Batch) -> Batch | None:
    """The batch with every token holding what the first of its sequence does; None where it has no tokens."""
    arguments = {}
    for key in batch.one_per_input:
        value = batch.arguments[key]
        if key in IDS:
            arguments[key] = value[..., :1].expand_as(value).contiguous()
        elif value.is_floating_point() and value.dim() > 2:
            arguments[key] = value[:, :1].expand_as(value).contiguous()
    return replace(batch, arguments=batch.arguments | arguments) if arguments else None


def _attempt(model, views, batch, blocks, traces):
    """Calls on a batch of our own making, None where the model does not run on it."""
    try:
        return _record(model, views, batch, blocks, traces)
    except MergeError:
        return None


def _shorter(model, batch: Batch, mask: str) -> Batch | None:
    """The batch with one token gone, of the decoder's or of all other arguments; None where it has one only.

    It is the last one, or the first where the last is padding in every sequence, whose loss might not show.
    """
    of_decoder = mask == MASKS[1]
    mine = {}
    for key, value in batch.arguments.items():
        decoders = key.startswith("decoder_") or (key == "labels" and is_encoder_decoder(model))
        if isinstance(value, Tensor) and decoders == of_decoder:
            mine[key] = value
    named = [k for k in (mask, "decoder_input_ids", "decoder_inputs_embeds", "labels") if k in mine]
    if not named or mine[named[0]].dim() < 2:
        return None
    axis = 1 if named[0] == "decoder_inputs_embeds" else mine[named[0]].dim() - 1
    length, arguments = mine[named[0]].shape[axis], dict(batch.arguments)
    if length < 2:
        return None
    kept = batch.masks.get(mask)
    start = 0 if kept is None or bool((kept[:, -1] != 0).any()) else 1
    for key, value in mine.items():
        tokens = value.dim() > axis and value.shape[axis] == length
        if tokens and (not value.is_floating_point() or value.dim() <= axis + 2):
            arguments[key] = value.narrow(axis, start, length - 1)
        elif value.dim() == 1 and len(value) == length != batch.size:
            arguments[key] = value.narrow(0, start, length - 1)
    return replace(batch, arguments=arguments)


class _Recorder:
    """Calls of layers, and passages of blocks, in order, while the model runs on a batch."""

    def __init__(self, model, batch: Batch):
        self.calls: list[Call] = []
        self._batch, self._reading, self._alive = batch, {}, []
        entries = (*model.state_dict().values(), *batch.arguments.values())
        self._known = {z.untyped_storage().data_ptr() for z in entries if isinstance(z, Tensor)}

    def reading(self, name):
        """Hook of a layer, before it is called: what it reads, as it is now."""

        def hook(module, args, kwargs):
            read = first_tensor(args, kwargs)
            self._alive.append(read)  # so that identities stay its own
            identity = () if read is None else identity_of(read)
            self._reading[name] = None if read is None else read.clone(), identity, self._held(), self._holding(read)

        return hook

    def putting(self, name):
        """Hook of a layer, behind it."""

        def hook(module, args, output):
            read, *facts = self._reading[name]
            put = output.clone() if isinstance(output, Tensor) else None  # before others work in place
            self.calls.append(Call(("layer", name), read, put, *facts))

        return hook

    def entering(self, path):
        """Hook of a block, before it is called."""

        def hook(module, args):
            self.calls.append(Call(("enter", path), held=self._held()))

        return hook

    def leaving(self, path):
        """Hook of a block, behind it."""

        def hook(module, args, output):
            self.calls.append(Call(("leave", path), put=first_output(output)))

        return hook

    def _holding(self, read: Tensor | None) -> frozenset[str]:
        """Arguments of the batch that hold the same tokens as what is read."""
        if read is None or read.is_floating_point() or read.is_complex():
            return frozenset()
        alike = {k: v for k, v in self._batch.arguments.items() if isinstance(v, Tensor) and v.shape == read.shape}
        return frozenset(k for k, v in alike.items() if bool((v == read).all()))

    def _held(self) -> float:
        """Bytes of the tensors in the frames of the forward, weights and batch aside, per number of the batch."""
        frame, storages = sys._getframe(2), {}
        while frame is not None and frame.f_code is not _record.__wrapped__.__code__:
            for value in frame.f_locals.values():
                for z in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(z, Tensor) and z.untyped_storage().data_ptr() not in self._known:
                        storages[z.untyped_storage().data_ptr()] = z.untyped_storage().nbytes()
            frame = frame.f_back
        return sum(storages.values()) / numbers(self._batch)


@torch.no_grad()
def _record(model, views, batch: Batch, blocks, traces: Traces) -> list[Call]:
    """Calls while the model runs on a batch, and what it returns. Raises: MergeError for a batch that it does not take."""
    recorder, hooks = _Recorder(model, batch), []
    for name, v in views.items():
        hooks.append(v.module.register_forward_pre_hook(recorder.reading(name), with_kwargs=True))
        hooks.append(v.module.register_forward_hook(recorder.putting(name)))
    for path in blocks:
        module = model.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(recorder.entering(path), prepend=True))
        hooks.append(module.register_forward_hook(recorder.leaving(path)))
    drawn = torch.get_rng_state()
    arguments = {key: copied(value) for key, value in batch.arguments.items()}
    try:
        with blaming(batch), evaluating(model), _left_as_it_was(model, traces):
            output = model(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    given = [value for value in arguments.values() if isinstance(value, Tensor)]
    traces.inputs |= any(version_of(value) for value in given)
    if not torch.equal(drawn, torch.get_rng_state()):
        torch.set_rng_state(drawn)
        raise MergeError(
            "the model draws random numbers in evaluation mode, so that no two forwards are alike; "
            "make it deterministic (for example mask_ratio=0 for masked autoencoders)"
        )
    return [*recorder.calls, Call(("output", ""), put=first_output(output))]


@contextmanager
def _left_as_it_was(model, traces: Traces):
    """Notes what a forward leaves on modules, attributes and buffers, and takes it away again."""
    before = []
    for path, module in model.named_modules():
        for kind, entries in (("attribute", module.__dict__), ("buffer", module._buffers)):
            tensors = {k: (v, version_of(v), v.clone()) for k, v in entries.items() if kind == "buffer" and v is not None}
            before.append((path, kind, entries, dict(entries), tensors))
    yield
    for path, kind, entries, values, tensors in before:
        for key in {*entries, *values}:
            value, now = values.get(key, ABSENT), entries.get(key, ABSENT)
            written = key in tensors and version_of(tensors[key][0]) != tensors[key][1]
            if now is value and not written:
                continue
            traces.values.add((path, kind, key))
            if written:
                value.copy_(tensors[key][2])
            if value is ABSENT:
                del entries[key]
            else:
                entries[key] = value


def numbers(batch: Batch) -> int:
    """How many numbers a batch holds in its tensors."""
    return sum(z.numel() for z in batch.arguments.values() if isinstance(z, Tensor))


def first_output(output) -> Tensor | None:
    """The main tensor of an output, None where it has none."""
    try:
        return main_output(output)
    except MergeError:
        return None
