r"""A model walked in chunks: what runs before the first block, each block, what runs after the last. The only file with hooks.

Activations between chunks are carried along, so nothing runs twice, and any architecture will do whose blocks sit in one
``nn.ModuleList`` and follow each other directly.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .errors import EmptyCalibration, MergeError, MissingLayer, ShapeMismatch
from .layers import View, view


class _Stop(Exception):
    pass


def _call(module, state, args, kwargs):
    """``functional_call`` with every key given, tied ones under each of their names."""
    return functional_call(module, dict(state), args, kwargs, tie_weights=False)


@dataclass(frozen=True)
class Carry:
    """One batch of a task on its way through the model: the model's arguments, the hidden state entering the next chunk, what else
    blocks take, and the ``rest`` of a block's output where that is a tuple."""

    task: str
    batch: dict
    folds: Tensor
    hidden: Tensor | None = None
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    rest: tuple | None = None

    def samples(self, z: Tensor) -> Tensor:
        """Activations (B, S, d) or (B, d) as (N, d), padding dropped."""
        mask = self.batch.get("attention_mask")
        if z.dim() < 3 or mask is None:
            return z.flatten(0, -2)
        if mask.shape != z.shape[:2]:
            raise ShapeMismatch("activations under an attention mask", mask.shape, z.shape[:2], "pass masks with one entry per token")
        return z[mask.bool()]

    def fold(self, z: Tensor) -> Tensor:
        """Fold (N,) of every row of ``samples(z)``; all tokens of a sequence share one."""
        shape = (*z.shape[:-1], 1)
        return self.samples(self.folds.reshape(-1, *[1] * (z.dim() - 1)).expand(shape))[:, 0]


class Walker:
    """Runs a model chunk by chunk, and knows which layers each chunk calls in what order.

    Args:
        blocks: path of the ``nn.ModuleList`` of blocks; the one with most parameters by default.
    """

    def __init__(self, model: nn.Module, blocks: str | None = None, scope: str = "all"):
        lists = {k: m for k, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        if not lists or blocks not in (None, *lists):
            raise MissingLayer(f"blocks: expected the path of an nn.ModuleList of the model, found {blocks!r}; the model has {sorted(lists)}")
        self.path = blocks or max(lists, key=lambda k: sum(p.numel() for p in lists[k].parameters()))
        self.model, self.blocks = model, lists[self.path]
        state = model.state_dict(keep_vars=True)
        places = [p.data_ptr() for p in state.values()]
        tied = {k for k, p in state.items() if places.count(p.data_ptr()) > 1}
        views = {k: v for k, m in model.named_modules() if (v := view(k, m, scope))}
        self.views = {k: v for k, v in views.items() if not tied & set(v.parameters)}  # tied weights are averaged, all alike
        self.seen: set[str] = set()

    def __len__(self):
        return len(self.blocks) + 2

    def chunk_of(self, layer: str) -> int:
        """Index of the first chunk that a change of a layer can affect: its block's, or 0 for a layer outside the blocks."""
        inside = [index for index in range(len(self.blocks)) if layer.startswith(f"{self.path}.{index}.")]
        return inside[0] + 1 if inside else 0

    def check(self, state: Mapping[str, Tensor], carry: Carry) -> None:
        """Raise MergeError unless walking chunk by chunk gives what the model gives."""
        walked = carry
        for chunk in range(len(self)):
            walked = self._forward(chunk, state, walked)
        walked, whole = (tensor(z) for z in (walked.hidden, _call(self.model, state, (), carry.batch)))
        scale = float(whole.nan_to_num().abs().max())  # activations that are not finite are reported where they arise
        if walked.shape != whole.shape or not torch.allclose(walked, whole, rtol=1e-2, atol=1e-3 * scale, equal_nan=True):
            raise MergeError(f"blocks {self.path!r}: running them one after the other does not give what the model gives; it does something "
                             "else between them. Put that into the blocks, or name the list that is the model's backbone")

    def run(self, chunk: int, state: Mapping[str, Tensor], carry: Carry, reads=(), stop=False, puts=None):
        """Run a chunk under ``state``: the carry behind it, and the activations read by the named layers.

        With ``stop`` the chunk ends before the first layer of ``reads`` and the carry is returned unchanged. What the layers of
        ``reads`` put out is added to ``puts``, where that is a dict.
        """
        inputs, hooks = {}, []
        for name in reads:
            def read(_, args, name=name):
                inputs[name] = args[0]
                if stop:
                    raise _Stop

            def put(_, args, output, name=name):
                puts[name] = output

            module = self.views[name].module
            hooks.append(module.register_forward_pre_hook(read))
            if puts is not None:
                hooks.append(module.register_forward_hook(put))
        try:
            carry = self._forward(chunk, state, carry)
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return carry, inputs

    def _forward(self, chunk, state, carry):
        if chunk == 0:
            return self._prefix(state, carry)
        if chunk == len(self) - 1:
            return self._suffix(state, carry)
        prefix = f"{self.path}.{chunk - 1}."
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        out = _call(self.blocks[chunk - 1], state, (carry.hidden, *carry.args), carry.kwargs)
        return replace(carry, hidden=out[0], rest=out[1:]) if isinstance(out, tuple) else replace(carry, hidden=out)

    def _prefix(self, state, carry):
        caught = {}

        def catch(_, args, kwargs):
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            caught.update(hidden=hidden, args=args[1:], kwargs=kwargs)
            raise _Stop

        hook = self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
        try:
            _call(self.model, state, (), carry.batch)
        except _Stop:
            if not caught:
                raise
        except (TypeError, RuntimeError) as error:
            shapes = {k: tuple(v.shape) for k, v in carry.batch.items()}
            raise MergeError(f"task {carry.task!r}: the model does not take its calibration batch {shapes}; batches hold the keyword "
                             f"arguments of forward ({error})") from error
        finally:
            hook.remove()
        if not caught:
            raise MissingLayer(f"blocks {self.path!r}: the model's forward never calls the first of them; name the list it runs through")
        return replace(carry, **caught)

    def _suffix(self, state, carry):
        hidden = carry.hidden if carry.rest is None else (carry.hidden, *carry.rest)
        for block in self.blocks:
            block.forward = lambda *args, **kwargs: hidden
        try:
            out = _call(self.model, state, (), carry.batch)
        finally:
            for block in set(self.blocks):
                del block.forward
        return replace(carry, hidden=out)

    def stages(self, chunk: int, state, carry: Carry) -> list[list[View]]:
        """Layers of a chunk in calling order, those that read the same tensor together.

        Layers called more than once, and layers with tied weights, are left out.
        """
        calls, hooks = [], []
        for name, v in self.views.items():
            hooks.append(v.module.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0]))))
        try:
            self._forward(chunk, state, carry)
        finally:
            for hook in hooks:
                hook.remove()
        names = [name for name, _ in calls]
        groups: dict[tuple, list[View]] = {}
        for name, tensor in calls:  # calls keeps the tensors alive, so their ids are theirs alone
            if name not in self.seen and names.count(name) == 1:
                groups.setdefault((id(tensor), self.views[name].reads), []).append(self.views[name])
        self.seen.update(names)
        return list(groups.values())


def tensor(output) -> Tensor:
    """The main tensor of a model's output: itself, or the first of a tuple or mapping."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return output[0] if isinstance(output, tuple) else output


def carries(calibration: Mapping[str, list[dict]], tasks, folds: int, device) -> dict[str, list[Carry]]:
    """Calibration batches with the fold of every sequence: its running number modulo ``folds``.

    Raises: EmptyCalibration for tasks without batches or with an empty one, MergeError for no folds.
    """
    if folds < 1:
        raise MergeError(f"folds: expected at least 1, found {folds}")
    missing = [t for t in tasks if not calibration.get(t) or not all(calibration[t])]
    if missing:
        raise EmptyCalibration(f"no calibration batches for {missing}; give every expert at least one batch of unlabelled inputs")
    out = {}
    for task in tasks:
        start, out[task] = 0, []
        for batch in calibration[task]:
            size = len(next(iter(batch.values())))
            out[task].append(Carry(task, {k: v.to(device) for k, v in batch.items()}, (torch.arange(size, device=device) + start) % folds))
            start += size
    return out
