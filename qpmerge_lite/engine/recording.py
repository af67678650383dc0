"""What a model does on a few sequences of a calibration batch, call by call."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..calibration import MASKS, Batch
from ..errors import MergeError
from ..forwards import evaluating, main_output
from ..inputs import take
from .effects import ABSENT, Traces, blaming, copied, first_tensor, identity_of, version_of
from .orders import Point
from .probes import numbers, unlike_sequences, with_even_tokens, without_a_token


@dataclass(frozen=True)
class Call:
    """One call of a layer, or one passage through the border of a block."""

    point: Point
    read: Tensor | None = None
    output: Tensor | None = None
    identity: tuple = ()  # of the tensor that was read: layers with the same one read the same
    held: float = 0.0  # bytes in the forward's frames, per number in the batch's arguments
    arguments: frozenset[str] = (
        frozenset()
    )  # names of those that hold just the tokens that were read


@dataclass(frozen=True)
class _Reading:
    """What a layer is about to read, as a :class:`Call` has it."""

    read: Tensor | None
    identity: tuple
    held: float
    arguments: frozenset[str]


def call_at(calls: list[Call] | None, point: Point) -> Call | None:
    """The first of some calls at a point, None where there is none."""
    return next((call for call in calls or () if call.point == point), None)


@dataclass(frozen=True)
class Recordings:
    """Calls on a few sequences of a batch, and on others made of them; None for what the model does
    not run on.

    Attributes:
        batch: the few sequences. some: calls on them.
        fewer: calls without the last of them, the others in reverse order.
        shorter: mask -> calls on the sequences of ``fewer``, the last token gone.
        even: calls on the sequences of ``fewer``, every token holding what the first one holds;
            None where there are no tokens.
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
    chosen = unlike_sequences(batch)
    few, without_last = take(batch, torch.tensor(chosen)), take(batch, torch.tensor(chosen[-2::-1]))
    try:
        some = _record(model, views, few, blocks, traces)
        fewer = _record(model, views, without_last, blocks, traces)
    except MergeError:
        # a model may need its batches whole, or this batch is wrong: then what follows says so
        return Recordings(batch, _record(model, views, batch, blocks, traces))
    shorter, even = {}, with_even_tokens(without_last)
    for mask in MASKS if batch.masks else ():
        cut = without_a_token(model, without_last, mask)
        if cut is not None:
            shorter[mask] = _attempt(model, views, cut, blocks, traces)
    on_even = None if even is None else _attempt(model, views, even, blocks, traces)
    return Recordings(few, some, fewer, shorter, on_even)


class _OutsideReads(TorchFunctionMode):
    """Layers whose parameters go into a computation while none of their modules runs."""

    # what takes another tensor's dtype or shape, not its values
    ALIKE = {
        "type_as",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_tensor",
    }

    def __init__(self, views):
        super().__init__()
        self.running: set[object] = set()
        self.layers_read: set[str] = set()
        self._layers: dict[Tensor, set[str]] = {}
        for name, v in views.items():
            for parameter in v.module.parameters(recurse=False):
                self._layers.setdefault(parameter, set()).add(name)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Calls the function; it computes with parameters if it returns new tensors."""
        result = function(*args, **(kwargs or {}))
        returns_tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        if self.running and returns_tensors and function.__name__ not in self.ALIKE:
            for value in tree_leaves(args[:1] if function is Tensor.to else (args, kwargs)):
                if not isinstance(value, Parameter) or value is result:
                    continue
                layers = self._layers.get(value, set())
                if not layers & self.running:
                    self.layers_read |= layers
        return result


def read_outside(views, model, batch: Batch, traces: Traces) -> set[str]:
    """Layers whose weights a model computes with on a batch without calling the layer, as a head
    that multiplies by a table's transpose."""
    reads, hooks = _OutsideReads(views), []
    for name, module in [(model, model), *((name, v.module) for name, v in views.items())]:
        hooks.append(
            module.register_forward_pre_hook(lambda *_, name=name: reads.running.add(name))
        )
        hooks.append(
            module.register_forward_hook(
                lambda *_, name=name: reads.running.discard(name), always_call=True
            )
        )
    try:
        with reads:
            _record(model, {}, batch, (), traces)
    except MergeError:  # it ran before: what watches functions is in its way
        return set()
    finally:
        for hook in hooks:
            hook.remove()
    return reads.layers_read


def _attempt(model, views, batch, blocks, traces):
    """Calls on a batch of our own making, None where the model does not run on it."""
    try:
        return _record(model, views, batch, blocks, traces)
    except MergeError:
        return None


class _Recorder:
    """Calls of layers, and passages of blocks, in order, while the model runs on a batch."""

    def __init__(self, model, batch: Batch):
        self.calls: list[Call] = []
        self._batch = batch
        self._readings: dict[str, _Reading] = {}
        self._alive: list[Tensor | None] = []  # so that identities stay their own
        entries = (*model.state_dict().values(), *batch.arguments.values())
        self._known = {z.untyped_storage().data_ptr() for z in entries if isinstance(z, Tensor)}

    def reading(self, name):
        """Hook of a layer, before it is called: what it reads, as it is now."""

        def hook(module, args, kwargs):
            read = first_tensor(args, kwargs)
            self._alive.append(read)
            identity = () if read is None else identity_of(read)
            as_it_is = None if read is None else read.clone()
            holds = self._held(sys._getframe(1))
            self._readings[name] = _Reading(as_it_is, identity, holds, self._holding(read))

        return hook

    def putting(self, name):
        """Hook of a layer, behind it."""

        def hook(module, args, output):
            seen = self._readings[name]
            # cloned before others work in place
            as_it_is = output.clone() if isinstance(output, Tensor) else None
            point = "layer", name
            self.calls.append(
                Call(point, seen.read, as_it_is, seen.identity, seen.held, seen.arguments)
            )

        return hook

    def entering(self, path):
        """Hook of a block, before it is called."""

        def hook(module, args):
            self.calls.append(Call(("enter", path), held=self._held(sys._getframe(1))))

        return hook

    def leaving(self, path):
        """Hook of a block, behind it."""

        def hook(module, args, output):
            self.calls.append(Call(("leave", path), output=first_output(output)))

        return hook

    def _holding(self, read: Tensor | None) -> frozenset[str]:
        """Arguments of the batch that hold the same tokens as what is read."""
        if read is None or read.is_floating_point() or read.is_complex():
            return frozenset()
        names = set()
        for name, value in self._batch.arguments.items():
            if isinstance(value, Tensor) and value.shape == read.shape:
                if bool((value == read).all()):
                    names.add(name)
        return frozenset(names)

    def _held(self, frame: FrameType | None) -> float:
        """Bytes of the tensors in the frames of the forward, from an inner one outwards, weights
        and batch aside, per number of the batch."""
        storages: dict[int, int] = {}
        while frame is not None and frame.f_code is not _run.__code__:
            for value in frame.f_locals.values():
                for z in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(z, Tensor) and z.untyped_storage().data_ptr() not in self._known:
                        storages[z.untyped_storage().data_ptr()] = z.untyped_storage().nbytes()
            frame = frame.f_back
        return sum(storages.values()) / numbers(self._batch)


def _run(model, arguments: dict):
    """What a model returns: the outermost frame of its forward."""
    return model(**arguments)


@torch.no_grad()
def _record(model, views, batch: Batch, blocks, traces: Traces) -> list[Call]:
    """Calls while the model runs on a batch, and what it returns. Raises: MergeError for a batch
    that it does not take."""
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
            output = _run(model, arguments)
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
    return [*recorder.calls, Call(("output", ""), output=first_output(output))]


@contextmanager
def _left_as_it_was(model, traces: Traces):
    """Notes what a forward leaves on modules, attributes and buffers, and takes it away again."""
    before = []
    for path, module in model.named_modules():
        for kind, entries in (("attribute", module.__dict__), ("buffer", module._buffers)):
            tensors = {}
            for key, value in entries.items() if kind == "buffer" else ():
                if value is not None:
                    tensors[key] = value, version_of(value), value.clone()
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


def first_output(output) -> Tensor | None:
    """The main tensor of an output, None where it has none."""
    try:
        return main_output(output)
    except MergeError:
        return None
