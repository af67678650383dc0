r"""A model walked in chunks: what runs before the first block, each block, what runs after the last. The only file with hooks.

Blocks sit in one ``nn.ModuleList``, or in one after another (encoder, decoder); what a model does between two such stacks is a chunk
too. Activations between chunks are carried along, so nothing runs twice, unless a model does more between its blocks than pass
the hidden state on: then that part of its forward is run again, with the blocks before standing in by what they put out.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .errors import EmptyCalibration, MergeError, MissingLayer, ShapeMismatch
from .layers import Table, View, view


class _Stop(Exception):
    pass


def _call(module, state, args, kwargs):
    """``functional_call`` with every key given, tied ones under each of their names."""
    return functional_call(module, dict(state), args, kwargs, tie_weights=False)


@contextmanager
def _standing_in(places):
    """Pairs of blocks and what they put out instead of computing it; their hooks are told by :func:`_stands_in`."""
    forwards = {block: block.__dict__.get("forward") for block, _ in places}
    for block, out in places:
        block.forward = lambda *args, out=out, **kwargs: out
        block._stands_in = True
    try:
        yield
    finally:
        for block, forward in forwards.items():
            del block.forward, block._stands_in
            if forward is not None:
                block.forward = forward


def _stands_in(module) -> bool:
    return "_stands_in" in module.__dict__


@dataclass(frozen=True)
class Carry:
    """One batch of a task on its way through the model: the model's arguments, the hidden state entering the next chunk, what else
    blocks take, the ``rest`` of a block's output where that is a tuple, and what the stacks behind put out last (``done``)."""

    task: str
    batch: dict
    folds: Tensor
    hidden: Tensor | None = None
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    rest: tuple | None = None
    done: tuple = ()

    @property
    def put(self):
        """What the last block put out, as it did."""
        return self.hidden if self.rest is None else (self.hidden, *self.rest)

    def samples(self, z: Tensor, mask: str = "attention_mask") -> Tensor:
        """Rows (B, S, d) or (B, d) as (N, d), padding dropped; ``mask`` names the argument that says what is padding."""
        kept = self.batch.get(mask)
        if z.dim() < 3 or kept is None:
            return z.flatten(0, -2)
        if kept.shape != z.shape[:2]:
            raise ShapeMismatch(f"activations under {mask}", kept.shape, z.shape[:2], "pass masks with one entry per token")
        return z[kept.bool()]

    def fold(self, z: Tensor, mask: str = "attention_mask") -> Tensor:
        """Fold (N,) of every row of ``samples(z)``; all tokens of a sequence share one."""
        folds = self.folds.reshape(-1, *[1] * (z.dim() - 1)).expand(*z.shape[:-1], 1)
        return self.samples(folds, mask)[:, 0]


class Walker:
    """Runs a model chunk by chunk, and knows which layers each chunk calls in what order.

    Args:
        blocks: path of the ``nn.ModuleList`` of blocks, or paths in calling order; by default the outermost list with most parameters,
            and the others that have a quarter of its parameters and are called.
    """

    def __init__(self, model: nn.Module, blocks: str | Sequence[str] | None = None, scope: str = "all"):
        lists = {k: m for k, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        named = [blocks] if isinstance(blocks, str) else list(blocks or ())
        if not lists or any(name not in lists for name in named):
            raise MissingLayer(f"blocks: expected the path of an nn.ModuleList of the model, found {blocks!r}; the model has {sorted(lists)}")
        size = {k: sum(p.numel() for p in m.parameters()) for k, m in lists.items()}
        large = [k for k in lists if not any(k.startswith(f"{o}.") for o in lists) and 4 * size[k] >= max(size.values())]
        self.model, self.lists = model, lists
        self._choose(named or sorted(large, key=lambda k: -size[k]))
        self.named, self.glue = bool(named), False
        state = model.state_dict(keep_vars=True)
        self.tied = {k: [o for o, q in state.items() if q.data_ptr() == p.data_ptr()] for k, p in state.items() if p.numel()}
        views = {k: v for k, m in model.named_modules() if (v := view(k, m, scope))}
        tables = {p for v in views.values() if isinstance(v, Table) for p in v.parameters}
        alone = lambda v: all(set(self.tied[p]) <= (tables if isinstance(v, Table) else {p}) for p in v.parameters)
        self.views = {k: v for k, v in views.items() if alone(v)}  # others that are tied are averaged, all alike
        self.seen: set[str] = set()

    def _choose(self, paths):
        self.paths, self.stacks = tuple(paths), [self.lists[p] for p in paths]
        self.blocks = [(s, i) for s, stack in enumerate(self.stacks) for i in range(-1, len(stack))] + [(len(self.stacks), -1)]

    def __len__(self):
        return len(self.blocks)

    def chunk_of(self, layer: str) -> int:
        """Index of the first chunk that a change of a layer can affect: its block's, or 0 for a layer outside the blocks."""
        inside = [c for c, (s, i) in enumerate(self.blocks) if i >= 0 and layer.startswith(f"{self.paths[s]}.{i}.")]
        return inside[0] if inside else 0

    def mask(self, chunk: int, carry: Carry, layer: str | None = None, read: Tensor | None = None) -> str:
        """Argument of the model that says which rows a layer reads are padding; without a layer, which of the state behind the chunk.

        That of a decoder holds in the stacks behind the first, but for layers that read what the encoder put out.
        """
        stack, index = self.blocks[chunk]
        if index < 0 and 0 < stack < len(self.stacks):
            behind = layer is None or layer.startswith(f"{self.paths[stack].rpartition('.')[0]}.")
        else:
            behind = min(stack, len(self.stacks) - 1) > 0 and all(read is not a for a in (*carry.args, *carry.kwargs.values()) if a is not None)
        return "decoder_attention_mask" if behind else "attention_mask"

    def check(self, state: Mapping[str, Tensor], carry: Carry) -> None:
        """Settle which stacks there are and how their blocks follow each other; MergeError unless walking chunk by chunk gives what
        the model gives."""
        called, hooks = [], []
        for path in self.paths:
            hooks.append(self.lists[path][0].register_forward_pre_hook(lambda *_, path=path: called.append(path)))
        try:
            whole = tensor(self._whole(state, carry))
        finally:
            for hook in hooks:
                hook.remove()
        if not called:
            raise MissingLayer(f"blocks {self.paths[0]!r}: the model's forward never calls the first of them; name the list it runs through")
        if not self.named:
            self._choose(dict.fromkeys(called))
        if not any(self._agrees(state, carry, whole, glue) for glue in (False, True)):
            raise MergeError(f"blocks {', '.join(map(repr, self.paths))}: running them one after the other does not give what the model gives; "
                             "it does something else between them. Put that into the blocks, or name the list that is the model's backbone")

    def _agrees(self, state, carry, whole, glue) -> bool:
        self.glue = glue
        for chunk in range(len(self)):
            carry = self._forward(chunk, state, carry)
        walked = tensor(carry.hidden)
        scale = float(whole.nan_to_num().abs().max())  # activations that are not finite are reported where they arise
        return walked.shape == whole.shape and torch.allclose(walked, whole, rtol=1e-2, atol=1e-3 * scale, equal_nan=True)

    def run(self, chunk: int, state: Mapping[str, Tensor], carry: Carry, reads=(), stop=False, puts=None):
        """Run a chunk under ``state``: the carry behind it, and the activations read by the named layers.

        With ``stop`` the chunk ends before the first layer of ``reads`` and the carry is returned unchanged. What the layers of
        ``reads`` put out is added to ``puts``, where that is a dict.
        """
        inputs, hooks = {}, []
        for name in reads:
            def read(module, args, name=name):
                if not _stands_in(module):
                    inputs[name] = args[0]
                    if stop:
                        raise _Stop

            def put(module, args, output, name=name):
                if not _stands_in(module):
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
        stack, index = self.blocks[chunk]
        if index < 0:
            done = carry.done if stack == 0 else (*carry.done, carry.put)
            carry = replace(carry, done=done, rest=None)
            return self._enter(state, carry, stack, 0) if stack < len(self.stacks) else self._leave(state, carry)
        prefix = f"{self.paths[stack]}.{index}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        out = _call(self.stacks[stack][index], own, (carry.hidden, *carry.args), carry.kwargs)
        carry = replace(carry, hidden=out[0], rest=out[1:]) if isinstance(out, tuple) else replace(carry, hidden=out)
        more = index + 1 < len(self.stacks[stack]) and (self.glue or carry.rest)
        return self._enter(state, carry, stack, index + 1) if more else carry

    def _behind(self, carry):
        return [(block, out) for stack, out in zip(self.stacks, carry.done) for block in stack]

    def _whole(self, state, carry):
        try:
            return _call(self.model, state, (), carry.batch)
        except (TypeError, RuntimeError) as error:
            shapes = {k: tuple(v.shape) for k, v in carry.batch.items()}
            raise MergeError(f"task {carry.task!r}: the model does not take its calibration batch {shapes}; batches hold the keyword "
                             f"arguments of forward ({error})") from error

    def _enter(self, state, carry, stack, index):
        """The carry with the arguments that the model gives to a block."""
        caught = {}

        def catch(_, args, kwargs):
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            caught.update(hidden=hidden, args=args[1:], kwargs=kwargs)
            raise _Stop

        hook = self.stacks[stack][index].register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
        try:
            with _standing_in(self._behind(carry) + [(b, carry.put) for b in [*self.stacks[stack]][:index]]):
                self._whole(state, carry)
        except _Stop:
            if not caught:
                raise
        finally:
            hook.remove()
        if not caught:
            raise MissingLayer(f"blocks {self.paths[stack]!r}: the model's forward never calls number {index} of them; name the list it runs through")
        return replace(carry, **caught)

    def _leave(self, state, carry):
        with _standing_in(self._behind(carry)):
            return replace(carry, hidden=self._whole(state, carry))

    def stages(self, chunk: int, state, carry: Carry) -> list[list[View]]:
        """Layers of a chunk in calling order, those that read the same tensor together.

        Left out are layers called more than once, tables read inside a block (biases of pairs of tokens), and modules that do not put
        out what their view says, such as a norm that adds one to its gain.
        """
        calls, hooks, fits = [], [], {}
        for name, v in self.views.items():
            def note(module, args, output, name=name, v=v):
                if _stands_in(module):
                    return
                calls.append((name, args[0]))
                inside = isinstance(v, Table) and self.blocks[chunk][1] >= 0
                fits[name] = name in self.seen or not inside and v.reproduces(state, args[0], tensor(output), len(carry.folds))

            hooks.append(v.module.register_forward_hook(note))
        try:
            self._forward(chunk, state, carry)
        finally:
            for hook in hooks:
                hook.remove()
        names = [name for name, _ in calls]
        groups: dict[tuple, list[View]] = {}
        for name, read in calls:  # calls keeps the tensors alive, so their ids are theirs alone
            if name not in self.seen and names.count(name) == 1 and fits[name]:
                groups.setdefault((id(read), self.views[name].reads), []).append(self.views[name])
                self.seen.update(o.rpartition(".")[0] for p in self.views[name].parameters for o in self.tied[p])
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
