r"""The forward-order pass: merge layer after layer on the inputs that the already merged part produces.

Every expert block runs once per calibration batch, and the cost is linear in depth, see ``walk``.
"""
from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import MergeError, MissingLayer, NonFinite, ShapeMismatch
from .layers import Table, View
from .moments import Moments
from .walk import Walker, carries

INPUTS = ("merged", "expert", "block")
TARGETS = {"own": 1.0, "blend": 0.5, "propagated": 0.0}
Solver = Callable[[Moments, Tensor], tuple[Tensor, dict]]


@dataclass
class Merge:
    """A merged ``state_dict``, one ``table`` row per merged layer, the names of parameters that were plainly ``averaged``, and the
    ``views`` of the merged layers."""

    state_dict: dict[str, Tensor]
    table: list[dict] = field(default_factory=list)
    averaged: list[str] = field(default_factory=list)
    views: dict[str, View] = field(default_factory=dict, repr=False)

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


@contextmanager
def evaluating(model: nn.Module):
    """The model in evaluation mode and without a cache of keys and values, and as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    configs = {id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", False)}
    model.eval()
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for config in configs.values():
            config.use_cache = True


class _Pass:
    """State of one sequential merge."""

    def __init__(self, base, experts, calibration, solver, inputs, beta, scope, folds, blocks, layers, anchor):
        self.base, self.solver, self.inputs, self.folds = base.state_dict(), solver, inputs, folds
        self.experts = check_experts(base, experts)
        self.beta = beta if inputs == "merged" else 0.0  # on an expert's own inputs both targets agree
        self.walker = Walker(base, blocks, scope)
        self.wanted = set(self.walker.views if layers is None else layers)
        for name in sorted(self.wanted - self.walker.views.keys()):
            raise MissingLayer(f"layer {name!r}: not among the layers of scope {scope!r}, which are {sorted(self.walker.views)}")
        self.anchor = None if anchor is None else check_experts(base, {"anchor": anchor})["anchor"]
        self.merged = average(base, self.experts) if anchor is None else {k: v.clone() for k, v in self.anchor.items()}
        streams = carries(calibration, list(self.experts), folds, next(base.parameters()).device)
        self.walker.check(self.base, next(iter(streams.values()))[0])
        self.own = {t: list(c) for t, c in streams.items()} if inputs == "expert" or self.beta else None
        self.mixed = None if inputs == "expert" else streams
        self.table: list[dict] = []

    def chunk(self, index: int) -> None:
        """Solve the layers of one chunk in place, and carry all streams through it."""
        probe = next(iter((self.own or self.mixed).values()))[0]
        stages = [[v for v in stage if v.name in self.wanted] for stage in self.walker.stages(index, self.base, probe)]
        stages = [stage for stage in stages if stage]
        recorded = self._teach(index, stages)
        for stage in stages:
            started = time.perf_counter()
            moments = self._count(index, stage, recorded) if isinstance(stage[0], Table) else self._moments(index, stage, recorded)
            self._solve(stage, moments, started)
        self.wanted -= self.walker.seen
        if self.mixed is not None and self.wanted:
            for stream in self.mixed.values():
                stream[:] = [self.walker.run(index, self.merged, c)[0] for c in stream]

    def _teach(self, index, stages):
        """Run every expert's chunk once per batch, recording what its stages read there, and the name of its mask: told by the carry before."""
        if self.own is None and self.inputs == "merged":
            return None
        recorded = {}
        for task, stream in (self.own or self.mixed).items():
            for i, carry in enumerate(stream):
                after, read = self.walker.run(index, self.experts[task], carry, [s[0].name for s in stages])
                recorded[task, i] = {name: (raw, self.walker.mask(index, carry, name, raw)) for name, raw in read.items()}
                if self.own is not None:
                    stream[i] = after
        return recorded

    def _streams(self):
        return (self.mixed or self.own).items()

    def _zeros(self, stage, **shape) -> Moments:
        return Moments.zeros(self.experts, folds=self.folds, layer=stage[0].name, device=next(iter(self.base.values())).device,
                             full_energy=getattr(self.solver, "full_energy", True), **shape)

    def _read(self, index, first, carry, taught):
        """What the first layer of a stage reads: rows of a batch on the merged stream (or the expert's), and the name of their mask."""
        if self.inputs == "merged":
            raw = self.walker.run(index, self.merged, carry, [first.name], stop=True)[1][first.name]
            taught = raw, self.walker.mask(index, carry, first.name, raw)
        return first.sequence(taught[0], len(carry.folds)), taught[1]

    def _moments(self, index, stage, recorded) -> Moments:
        first = stage[0]
        base = torch.cat([v.matrix(self.base) for v in stage], 1)
        g, m, n = base.shape
        moments = self._zeros(stage, n=n, m=m, g=g)
        for task, stream in self._streams():
            expert, held = torch.cat([v.matrix(self.experts[task]) for v in stage], 1), []
            for i, carry in enumerate(stream):
                taught = recorded[task, i][first.name] if recorded else None
                rows, mask = self._read(index, first, carry, taught)
                X = first.inputs(carry.samples(rows, mask))
                R = (1 - self.beta) * first.apply(expert - base, X) if self.beta < 1 else 0.0
                if self.beta:
                    own = first.inputs(carry.samples(first.sequence(taught[0], len(carry.folds)), mask))
                    R = R + self.beta * (first.apply(expert, own) - first.apply(base, X))
                held.append((X, R, carry.fold(rows, mask)))
                if carry is stream[-1] or sum(len(x) for x, *_ in held) >= n:  # an update costs n², however few its samples are
                    moments.update(task, *map(torch.cat, zip(*held)))
                    held = []
        return moments

    def _count(self, index, stage, recorded) -> Moments:
        """Moments of a table from how often each token occurs: all targets agree, because no merge changes what it reads.

        The stage's view is replaced by one of the tokens that occur.
        """
        found = {}
        for task, stream in self._streams():
            for i, carry in enumerate(stream):
                rows, mask = self._read(index, stage[0], carry, recorded[task, i][stage[0].name] if recorded else None)
                found.setdefault(task, []).append((carry.samples(rows, mask)[:, 0], carry.fold(rows, mask)))
        ids = torch.cat([tokens for parts in found.values() for tokens, _ in parts]).unique()
        stage[:] = [replace(stage[0], ids=ids)]
        self.walker.views[stage[0].name] = stage[0]
        base = stage[0].matrix(self.base)
        moments = self._zeros(stage, n=1, m=base.shape[1], g=len(ids), shared=True)
        for task, parts in found.items():
            update = stage[0].matrix(self.experts[task]) - base
            for tokens, folds in parts:
                places = folds * len(ids) + torch.searchsorted(ids, tokens)
                moments.count_copies(task, places.bincount(minlength=self.folds * len(ids)).reshape(self.folds, -1), update)
        return moments

    def _solve(self, stage, moments, started):
        row = 0
        for v in stage:
            base = v.matrix(self.base)
            updates = torch.stack([v.matrix(e) - base for e in self.experts.values()])
            part = replace(moments.rows(row, row + base.shape[1]), layer=v.name)
            row += base.shape[1]
            anchor = () if self.anchor is None else (v.matrix(self.anchor) - base,)
            update, facts = self.solver(part, updates, *anchor)
            for name, value in v.parts(base + update, self.merged).items():
                self.merged |= dict.fromkeys(self.walker.tied[name], value.to(self.base[name]).contiguous())
            self.table.append({"layer": v.name, **facts})
        for entry in self.table[-len(stage):]:
            entry["seconds"] = (time.perf_counter() - started) / len(stage)


@torch.no_grad()
def merge_sequentially(base: nn.Module, experts, calibration, solver: Solver, *, inputs: str = "merged", targets: str | float = "own",
                       scope: str = "all", folds: int = 4, blocks: str | None = None, layers: Iterable[str] | None = None,
                       anchor: Mapping[str, Tensor] | None = None, progress: bool = True) -> Merge:
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
        layers: names of the only layers to solve, the others being averaged; all by default.
        anchor: state dict of another merge, which stands in for the average where no layer is solved; the solver is given its update
            (g, m, n) of every layer as a third argument.
    Returns: Merge; rows in forward order. Cost: one run of each expert block, and one partial run of the merged block per stage.
    Raises: MissingLayer, ShapeMismatch, NonFinite, EmptyCalibration; MergeError for an unknown option, a batch that the model does not
        take, or a model that does more between its blocks than pass the hidden state on.
    """
    beta = TARGETS.get(targets, targets) if isinstance(targets, str) else targets
    if inputs not in INPUTS or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise MergeError(f"expected inputs in {INPUTS} and targets in {tuple(TARGETS)} or a number in [0, 1]; found {inputs!r}, {targets!r}")
    with evaluating(base):
        state = _Pass(base, experts, calibration, solver, inputs, float(beta), scope, folds, blocks, layers, anchor)
        for index in tqdm(range(len(state.walker)), desc="merging", unit="chunk", disable=not progress):
            if state.wanted:
                state.chunk(index)
    views = {row["layer"]: state.walker.views[row["layer"]] for row in state.table}
    solved = {tied for v in views.values() for p in v.parameters for tied in state.walker.tied[p]}
    averaged = sorted(k for k, v in state.base.items() if v.is_floating_point() and k not in solved and anchor is None)
    return Merge(state.merged, state.table, averaged, views)
