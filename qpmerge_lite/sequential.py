r"""The forward-order pass: merge layer after layer on the inputs that the already merged part produces.

A model is walked in chunks: what runs before the first block, each block, what runs after the last. Activations between chunks are
cached, so every expert block runs once per calibration batch, and the cost is linear in depth. The only file with hooks.
"""
from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from .errors import EmptyCalibration, MergeError, MissingLayer, NonFinite, ShapeMismatch
from .layers import View, view
from .moments import Moments

INPUTS = ("merged", "expert", "block")
TARGETS = {"own": 1.0, "blend": 0.5, "propagated": 0.0}
Solver = Callable[[Moments, Tensor], tuple[Tensor, dict]]


@dataclass
class Merge:
    """A merged ``state_dict``, one ``table`` row per merged layer, and the names of parameters that were plainly ``averaged``."""

    state_dict: dict[str, Tensor]
    table: list[dict] = field(default_factory=list)
    averaged: list[str] = field(default_factory=list)

    def model(self, base: nn.Module) -> nn.Module:
        """A copy of ``base`` with the merged weights."""
        merged = copy.deepcopy(base)
        merged.load_state_dict(self.state_dict)
        return merged


def check_experts(base: nn.Module, experts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Experts on the base's device, or a MissingLayer, ShapeMismatch or NonFinite naming the expert and the parameter."""
    reference = base.state_dict()
    if not experts:
        raise MergeError("experts: expected at least one state dict, found none")
    checked = {}
    for task, state in experts.items():
        for name in sorted(reference.keys() ^ state.keys()):
            lacks = "lacks" if name in reference else "has an unknown"
            raise MissingLayer(f"expert {task!r} {lacks} parameter {name!r}; base and experts must be checkpoints of one architecture")
        for name, value in reference.items():
            if state[name].shape != value.shape:
                raise ShapeMismatch(f"expert {task!r}, parameter {name!r}", value.shape, state[name].shape)
            if not state[name].isfinite().all():
                raise NonFinite(f"expert {task!r}, parameter {name!r}", state[name], "the checkpoint is damaged")
        checked[task] = {k: v.detach().to(reference[k].device) for k, v in state.items()}
    return checked


def average(base: nn.Module, experts: Mapping[str, Mapping[str, Tensor]], weights=None) -> dict[str, Tensor]:
    """Weighted mean of the experts' floating parameters (weights default to 1/K); other buffers are the base's."""
    weights = [1 / len(experts)] * len(experts) if weights is None else weights
    mean = lambda name, value: sum(w * e[name].double() for w, e in zip(weights, experts.values())).to(value)
    return {k: mean(k, v) if v.is_floating_point() else v.clone() for k, v in base.state_dict().items()}


class _Stop(Exception):
    pass


def _call(module, state, args, kwargs):
    """``functional_call`` with every key given, tied ones under each of their names."""
    return functional_call(module, dict(state), args, kwargs, tie_weights=False)


@dataclass(frozen=True)
class Carry:
    """One batch on its way through the model: the model's arguments, the hidden state entering the next chunk, what else blocks
    take, and the ``rest`` of a block's output where that is a tuple."""

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
        self.views = {k: v for k, m in model.named_modules() if (v := view(k, m, scope))}
        self.seen: set[str] = set()

    def __len__(self):
        return len(self.blocks) + 2

    def run(self, chunk: int, state: Mapping[str, Tensor], carry: Carry, reads=(), writes=(), stop=False):
        """Run a chunk under ``state``: the carry behind it, and the activations read and written by the named layers.

        With ``stop`` the chunk ends before the first layer of ``reads`` and the carry is returned unchanged.
        """
        inputs, outputs, hooks = {}, {}, []
        for name in reads:
            def read(_, args, name=name):
                inputs[name] = args[0]
                if stop:
                    raise _Stop
            hooks.append(self.views[name].module.register_forward_pre_hook(read))
        for name in writes:
            hooks.append(self.views[name].module.register_forward_hook(lambda _, args, out, name=name: outputs.__setitem__(name, out)))
        try:
            carry = self._forward(chunk, state, carry)
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return carry, inputs, outputs

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

        hook = self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            _call(self.model, state, (), carry.batch)
        except _Stop:
            if not caught:
                raise
        finally:
            hook.remove()
        return replace(carry, **caught)

    def _suffix(self, state, carry):
        hidden = carry.hidden if carry.rest is None else (carry.hidden, *carry.rest)
        for block in self.blocks:
            block.forward = lambda *args, **kwargs: hidden
        try:
            out = _call(self.model, state, (), carry.batch)
        finally:
            for block in self.blocks:
                del block.forward
        return replace(carry, hidden=out)

    def stages(self, chunk: int, state, carry: Carry) -> list[list[View]]:
        """Layers of a chunk in calling order, those that read the same tensor together. Layers called more than once are left out."""
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


def carries(calibration: Mapping[str, list[dict]], tasks, folds: int, device) -> dict[str, list[Carry]]:
    """Calibration batches with the fold of every sequence: its running number modulo ``folds``."""
    missing = [t for t in tasks if not calibration.get(t)]
    if missing:
        raise EmptyCalibration(f"no calibration batches for {missing}; give every expert at least one batch of unlabelled inputs")
    out = {}
    for task in tasks:
        start, out[task] = 0, []
        for batch in calibration[task]:
            size = len(next(iter(batch.values())))
            out[task].append(Carry({k: v.to(device) for k, v in batch.items()}, (torch.arange(size, device=device) + start) % folds))
            start += size
    return out


class _Pass:
    """State of one sequential merge."""

    def __init__(self, base, experts, calibration, solver, inputs, beta, scope, folds, blocks):
        self.base, self.solver, self.inputs, self.folds = base.state_dict(), solver, inputs, folds
        self.experts = check_experts(base, experts)
        self.beta = beta if inputs == "merged" else 0.0  # on an expert's own inputs both targets agree
        self.walker = Walker(base, blocks, scope)
        self.merged = average(base, self.experts)
        streams = carries(calibration, list(self.experts), folds, next(base.parameters()).device)
        self.own = {t: list(c) for t, c in streams.items()} if inputs == "expert" or self.beta else None
        self.mixed = None if inputs == "expert" else streams
        self.table: list[dict] = []

    def chunk(self, index: int) -> None:
        """Solve the layers of one chunk in place, and carry all streams through it."""
        probe = next(iter((self.own or self.mixed).values()))[0]
        stages = self.walker.stages(index, self.base, probe)
        recorded = self._teach(index, stages)
        for stage in stages:
            started = time.perf_counter()
            moments = self._moments(index, stage, recorded)
            self._solve(stage, moments, started)
        if self.mixed is not None:
            for stream in self.mixed.values():
                stream[:] = [self.walker.run(index, self.merged, c)[0] for c in stream]

    def _teach(self, index, stages):
        """Run every expert's chunk once per batch, recording what the stages need of it."""
        if self.own is None and self.inputs == "merged":
            return None
        reads = [] if self.inputs == "merged" else [s[0].name for s in stages]
        writes = [v.name for s in stages for v in s] if self.beta else []
        recorded = {}
        for task, stream in (self.own or self.mixed).items():
            for i, carry in enumerate(stream):
                after, x, y = self.walker.run(index, self.experts[task], carry, reads, writes)
                recorded[task, i] = (x, y)
                if self.own is not None:
                    stream[i] = after
        return recorded

    def _moments(self, index, stage, recorded) -> Moments:
        first = stage[0]
        base = torch.cat([v.matrix(self.base) for v in stage], 1)
        g, m, n = base.shape
        moments = Moments.zeros(self.experts, n, m, g=g, folds=self.folds, layer=first.name, device=base.device,
                                full_energy=getattr(self.solver, "full_energy", True))
        for task, stream in (self.mixed or self.own).items():
            update = torch.cat([v.matrix(self.experts[task]) for v in stage], 1) - base
            for i, carry in enumerate(stream):
                x, y = recorded[task, i] if recorded else ({}, {})
                if not x:
                    x = self.walker.run(index, self.merged, carry, [first.name], stop=True)[1]
                raw = x[first.name]
                X = first.inputs(carry.samples(raw))
                R = (1 - self.beta) * torch.einsum("gmn,Ngn->Ngm", update, X) if self.beta < 1 else 0.0
                if self.beta:
                    Y = torch.cat([v.outputs(carry.samples(y[v.name])) for v in stage], 2)
                    R = R + self.beta * (Y - torch.einsum("gmn,Ngn->Ngm", base, X))
                moments.update(task, X, R, carry.fold(raw))
        return moments

    def _solve(self, stage, moments, started):
        row = 0
        for v in stage:
            base = v.matrix(self.base)
            updates = torch.stack([v.matrix(e) - base for e in self.experts.values()])
            part = replace(moments.rows(row, row + base.shape[1]), layer=v.name)
            row += base.shape[1]
            update, facts = self.solver(part, updates)
            for name, value in v.parts(base + update).items():
                self.merged[name] = value.to(self.base[name]).contiguous()
            self.table.append({"layer": v.name, **facts})
        for entry in self.table[-len(stage):]:
            entry["seconds"] = (time.perf_counter() - started) / len(stage)


@torch.no_grad()
def merge_sequentially(base: nn.Module, experts, calibration, solver: Solver, *, inputs: str = "merged", targets: str | float = "own",
                       scope: str = "all", folds: int = 4, blocks: str | None = None, progress: bool = True) -> Merge:
    """Merge experts into one model, layer by layer in forward order.

    Args:
        base: the common initialisation; not changed. Its device is where everything runs.
        experts: state dicts of the same architecture by task.
        calibration: for every task, batches of unlabelled inputs: keyword arguments of ``base.forward``. Tokens under a zero
            ``attention_mask`` are not counted.
        solver: ``(moments, updates (K, g, m, n)) -> (update (g, m, n), table row)``, e.g. ``methods.QP``; an attribute
            ``full_energy = False`` says that it can do without the off-diagonal of M.
        inputs: layers read what the ``merged`` prefix produces, each ``expert``'s own stream (RegMean), or the merged prefix up to
            the block and the expert within it (``block``, RegMean++).
        targets: ``own`` (the expert's outputs on its own stream), ``propagated`` (its layer applied to the merged stream), ``blend``,
            or the weight β in [0, 1] of own targets. Without effect unless inputs are merged.
        scope: see :func:`layers.view`; what no layer covers is averaged and listed.
        folds: number of folds of sequences kept apart for cross-fitting.
    Returns: Merge; rows in forward order. Cost: one run of each expert block, and one partial run of the merged block per stage.
    Raises: MissingLayer, ShapeMismatch, NonFinite, EmptyCalibration; MergeError for an unknown option.
    """
    beta = TARGETS.get(targets, targets)
    if inputs not in INPUTS or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise MergeError(f"expected inputs in {INPUTS} and targets in {tuple(TARGETS)} or a number in [0, 1]; found {inputs!r}, {targets!r}")
    training = base.training
    base.eval()
    try:
        state = _Pass(base, experts, calibration, solver, inputs, float(beta), scope, folds, blocks)
        for index in tqdm(range(len(state.walker)), desc="merging", unit="chunk", disable=not progress):
            state.chunk(index)
    finally:
        base.train(training)
    solved = {p for row in state.table for p in state.walker.views[row["layer"]].parameters}
    return Merge(state.merged, state.table, sorted(k for k, v in state.base.items() if v.is_floating_point() and k not in solved))
