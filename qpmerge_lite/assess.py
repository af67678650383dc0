r"""What any finished merge is worth, whichever method made it: captured energies on any inputs, and certificates in closed form."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .diagnostic import gap
from .errors import MissingLayer
from .layers import View
from .moments import Moments
from .sequential import check_experts, evaluating, merge_sequentially
from .walk import Walker, carries, tensor

Layers = dict[str, tuple[View, Moments, Tensor]]


def layer_moments(base: nn.Module, experts, calibration, layers=None, *, along: Mapping[str, Tensor] | None = None, scope: str = "all",
                  folds: int = 4, blocks: str | None = None, full_energy: bool = True) -> Layers:
    """For every layer (or the named ones) its view, moments and residual updates (K, g, m, n), on the experts' own inputs.

    That is RegMean's setting: no merge is needed to know what a layer reads, own and propagated targets agree, and the programme of
    any basis and the loss of any merge follow in closed form. Memory: the moments of all layers asked for.

    Args:
        along: state dict of a finished merge. Layers then read what its own earlier layers produce, and targets are the experts' outputs.
        full_energy: keep all of M, which rotated rows need. The others, and errors, as in :func:`merge_sequentially`.
    """
    kept: Layers = {}

    def keep(moments, updates, anchor=None):
        kept[moments.layer] = moments, updates
        return torch.zeros_like(updates[0]) if anchor is None else anchor, {}

    keep.full_energy = full_energy
    merge = merge_sequentially(base, experts, calibration, keep, inputs="expert" if along is None else "merged", scope=scope, folds=folds,
                               blocks=blocks, layers=layers, anchor=along, progress=False)
    for name in layers or ():
        if name not in kept:
            raise MissingLayer(f"layer {name!r}: expected to be called once in a forward pass, found none or several calls; choose another layer")
    return {name: (merge.views[name], *found) for name, found in kept.items()}


def certify(layers: Layers, base: nn.Module, state: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """How far a merge is from what its calibration data allow, layer by layer and as fractions of the residual energy E.

    Args:
        layers: of :func:`layer_moments`. state: merged state dict, by any method.
    Returns: layer -> ``captured`` (``1 - L(W)/E`` of the merge) and ``gap`` (``(L(W) - L(W*))/E ≥ 0``, W* the unrestricted least squares).
        Layers without residual energy are left out.
    """
    state, reference = check_experts(base, {"merge": state})["merge"], base.state_dict()
    found = {}
    for name, (view, moments, _) in layers.items():
        pooled, update = moments.pool(), view.matrix(state) - view.matrix(reference)
        if pooled.energy:
            found[name] = {"captured": pooled.captured(update), "gap": gap(pooled, update) / pooled.energy}
    return found


def audit(base: nn.Module, state, experts, calibration, *, blocks: str | None = None) -> dict:
    r"""Captured energy ``1 - L(W)/E`` of any merge on any inputs, layer by layer and end to end; no programme is solved.

    In every layer, ``L`` compares what it puts out in the merged model with what it puts out in each expert, both on their own
    streams; ``E`` puts the base's weights in its place. On inputs that no layer was solved on this is the strictly disjoint figure.
    Tasks weigh the same per token; activations keep the model's precision, sums are float64.

    Args:
        state: merged state dict, by any method. The other arguments are those of :func:`merge_sequentially`.
    Returns: ``layers`` (name -> captured energy, in forward order); ``drift`` (per block, ``Σ‖h - h_t‖² / Σ‖h_base - h_t‖²`` of the hidden
        state behind it); ``output``, one minus that of what the model returns, which is what heads read. None where there is no residual energy.
    """
    return Auditor(base, experts, calibration, blocks=blocks, hold=False)(state)


class Auditor:
    """:func:`audit` of many merges on the same inputs; what base and experts put out there is held, unless ``hold`` is false."""

    @torch.no_grad()
    def __init__(self, base: nn.Module, experts, calibration, *, blocks: str | None = None, hold: bool = True):
        self.base, self.experts, self.reference = base, check_experts(base, experts), base.state_dict()
        self.streams = carries(calibration, list(self.experts), 1, next(base.parameters()).device)
        self.walker, probe = Walker(base, blocks), next(iter(self.streams.values()))[0]
        with evaluating(base):
            self.walker.check(self.reference, probe)
            self.chunks = _views_by_chunk(self.walker, self.reference, probe)
            self.held = {t: [list(self._aims(carry)) for carry in stream] for t, stream in self.streams.items()} if hold else None

    def _aims(self, carry):
        """Chunk by chunk what the base puts out, what the task's expert does, and what the expert's layers do."""
        plain = aim = carry
        for index, views in enumerate(self.chunks):
            put = {}
            plain, _ = self.walker.run(index, self.reference, plain)
            aim, _ = self.walker.run(index, self.experts[carry.task], aim, [v.name for v in views], puts=put)
            yield tensor(plain.hidden), tensor(aim.hidden), put

    @torch.no_grad()
    def __call__(self, state, tasks=None) -> dict:
        """One merge, on the inputs of all tasks or of some."""
        state, sums = check_experts(self.base, {"merge": state})["merge"], {}
        with evaluating(self.base):
            for task in self.streams if tasks is None else tasks:
                for i, carry in enumerate(self.streams[task]):
                    self._add(state, carry, self.held[task][i] if self.held else self._aims(carry), sums)
        shares = {}
        for key, found in sums.items():
            lost, energy = (sum(t[i] / t[2] for t in found.values()) for i in (0, 1))
            shares[key] = lost / energy if energy else None
        captured = lambda share: None if share is None else 1 - share
        return {"layers": {v.name: captured(shares[v.name]) for views in self.chunks for v in views},
                "drift": [shares[i] for i in range(1, len(self.chunks) - 1)], "output": captured(shares[len(self.chunks) - 1])}

    def _add(self, state, carry, aims, sums):
        """Add to ``sums[layer name or chunk][task]`` the squared errors of merge and base, and the number of tokens."""
        def add(key, mask, made, plain, aim):
            made, plain, aim = (carry.samples(z, mask) for z in (made, plain, aim))
            total = sums.setdefault(key, {}).setdefault(carry.task, [0.0, 0.0, 0])
            for i, z in enumerate((made, plain)):
                total[i] += float((z - aim).square().sum(dtype=torch.float64))
            total[2] += len(aim)

        behind, walker = carry, self.walker
        for index, (views, (plain, aim, put)) in enumerate(zip(self.chunks, aims)):
            before, made = behind, {}
            behind, read = walker.run(index, state, before, [v.name for v in views], puts=made)
            for v in views:
                outputs = made[v.name], v.output(self.reference, read[v.name]), put[v.name]
                add(v.name, walker.mask(index, before, v.name, read[v.name]), *(v.outputs(y, len(carry.folds)) for y in outputs))
            add(index, walker.mask(index, behind), tensor(behind.hidden), plain, aim)


def _views_by_chunk(walker, state, carry) -> list[list[View]]:
    chunks = []
    for index in range(len(walker)):
        chunks.append([v for stage in walker.stages(index, state, carry) for v in stage])
        carry, _ = walker.run(index, state, carry)
    return chunks
