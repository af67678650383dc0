r"""What any finished merge is worth, whichever method made it: captured energies on any inputs, and
certificates in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .calibration import Batch, check_calibration
from .diagnostic import certificate
from .engine.effects import blaming, first_tensor
from .engine.layouts import Layout
from .engine.lockstep import Stage
from .engine.orders import Point
from .engine.recipes import LayerMoments, Recipe
from .engine.recording import first_output
from .engine.rows import counted
from .engine.survey import block_paths, survey
from .engine.views import View
from .errors import MergeError, MissingLayer
from .experts import State, check_experts
from .forwards import evaluating, is_encoder_decoder, main_output, refuse_what_cannot_run
from .sequential import Pass, PassOptions

Layers = dict[str, LayerMoments]
OUTPUT = ("output", "")  # what the model returns, beside the points of layers and blocks


def layer_moments(
    base: nn.Module,
    experts,
    calibration,
    layers=None,
    *,
    along: Mapping[str, Tensor] | None = None,
    scope: str = "all",
    folds: int = 4,
    blocks: str | None = None,
    full_energy: bool = True,
    products: str = "activations",
) -> Layers:
    """For every layer (or the named ones) its view, moments and residual updates (K, g, m, n), on
    the experts' own inputs.

    That is RegMean's setting: no merge is needed to know what a layer reads, own and propagated
    targets agree, and the programme of any basis and the loss of any merge follow in closed form.
    Memory: the moments of all layers asked for.

    Args:
        along: state dict of a finished merge. Layers then read what its own earlier layers produce,
            and targets are the experts' outputs.
        full_energy: keep all of M, which rotated rows need.
        base, experts, calibration, layers, scope, folds, blocks, products: as in
            :func:`merge_sequentially`.
    Returns: layer -> :class:`engine.recipes.LayerMoments`, a tuple of the three.
    Raises: what :func:`merge_sequentially` raises.
    """
    inputs = "expert" if along is None else "merged"
    recipe = Recipe(None, inputs, "own", scope, folds, layers, along, full_energy)
    options = PassOptions(blocks, products)
    gathering = Pass(base, experts, calibration, {"moments": recipe}, options)
    making = gathering.makings()[0]
    for name in making.recipe.layers or ():
        if name not in making.moments:
            reason = making.left_out.get(name) or gathering.known.left_out.get(name)
            raise MissingLayer(
                f"layer {name!r}: expected to be called once in a forward pass, but: {reason}; "
                "choose another layer"
            )
    return making.moments


def _check_layers(layers) -> None:
    """MergeError for anything but what :func:`layer_moments` returns."""
    entries = layers.values() if isinstance(layers, Mapping) else [None]
    if not all(isinstance(entry, LayerMoments) for entry in entries):
        raise MergeError(
            f"layers: expected what layer_moments returns, found {type(layers).__name__}"
        )


def certify(
    layers: Layers, base: nn.Module, state: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """How far a merge is from what its calibration data allow, layer by layer and as fractions of
    the residual energy E.

    Args:
        layers: of :func:`layer_moments`.
        state: merged state dict, by any method.
    Returns: layer -> ``captured`` (``1 - L(W)/E`` of the merge) and ``gap``
        (``(L(W) - L(W*))/E ≥ 0``, W* the unrestricted least squares). Layers without residual
        energy are left out.
    """
    _check_layers(layers)
    state, reference = check_experts(base, {"merge": state})["merge"], base.state_dict()
    certificates = {}
    for name, layer in layers.items():
        update = layer.view.matrix(state) - layer.view.matrix(reference)
        certificates[name] = certificate(layer.moments.pool(), update)
    return {name: facts for name, facts in certificates.items() if facts}


def audit(base: nn.Module, state, experts, calibration, *, blocks: str | None = None) -> dict:
    r"""Captured energy ``1 - L(W)/E`` of any merge on any inputs, layer by layer and end to end; no
    programme is solved.

    In every layer, ``L`` compares what it puts out in the merged model with what it puts out in
    each expert, both on their own streams; ``E`` puts the base's weights in its place. On inputs
    that no layer was solved on this is the strictly disjoint figure. Tasks weigh the same per
    token; activations keep the model's precision, sums are float64.

    Args:
        state: merged state dict, by any method. The other arguments are those of
            :func:`merge_sequentially`.
    Returns: ``layers`` (name -> captured energy, in forward order); ``drift`` (per block,
        ``Σ‖h - h_t‖² / Σ‖h_base - h_t‖²`` of the hidden state behind it); ``output``, one minus
        that of what the model returns, which is what heads read. None where there is no residual
        energy, or where rows cannot be told from padding. Layers that no merge can solve are not
        there.
    """
    return Auditor(base, experts, calibration, blocks=blocks, hold=False)(state)


class _Sight:
    """What one forward showed: what layers read and put out, what blocks and the model returned."""

    def __init__(self, copying: bool):
        self.copying = copying
        self.reads: dict[str, Tensor] = {}
        self.outputs: dict[Point, Tensor] = {}
        self._versions: list[tuple[Tensor, int]] = []

    def as_it_is(self, seen: Tensor) -> Tensor:
        """A tensor of any shape as it is now: itself, or a copy where the model works in place or
        torch does not count what it writes."""
        if self.copying or seen.is_inference():
            return seen.clone()
        self._versions.append((seen, seen._version))
        return seen

    def overwritten(self) -> bool:
        """Whether the model has worked in place on what was seen."""
        return any(seen._version != version for seen, version in self._versions)


@dataclass
class _Errors:
    """Squared errors of merge and base against an expert's outputs, over a number of rows."""

    merge: float = 0.0
    base: float = 0.0
    rows: int = 0


Sums = dict[Point, dict[str, _Errors]]  # layer, block or output -> task -> errors


class Auditor:
    """:func:`audit` of many merges on the same inputs; what base and experts put out there is
    cached, unless ``hold`` is false."""

    @torch.no_grad()
    def __init__(
        self, base: nn.Module, experts, calibration, *, blocks: str | None = None, hold: bool = True
    ):
        refuse_what_cannot_run(base)
        self.base, self.reference = base, base.state_dict()
        self.experts = check_experts(base, experts, cast=True)
        device = next(base.parameters()).device
        self.batches = check_calibration(
            calibration, list(self.experts), device, is_encoder_decoder(base)
        )
        every = [batch for batches in self.batches.values() for batch in batches]
        with evaluating(base):
            self.known = survey(base, every, block_paths(base, blocks), self.reference)
        self.padded = any(batch.padded for batch in every)
        sequence, left_out = self.known.sequence, self.known.left_out
        self.layers = [name for kind, name in sequence if kind == "layer" and name not in left_out]
        self.blocks = [name for kind, name in sequence if kind == "leave"]
        self._cache: dict[tuple, tuple[_Sight, _Sight]] | None = {} if hold else None

    @torch.no_grad()
    def __call__(self, state, tasks=None) -> dict:
        """One merge, on the inputs of all tasks or of some."""
        state = check_experts(self.base, {"merge": state}, cast=True)["merge"]
        stage = Stage(self.base)
        sums: Sums = {}
        unmatched = set[Point]()
        stage.keep(self.known.traces)
        try:
            with (
                evaluating(self.base),
                _Watch(stage, self.known.views, self.layers, self.blocks) as watch,
            ):
                for task in self.batches if tasks is None else tasks:
                    for batch in self.batches[task]:
                        expected = self._references(watch, batch)
                        made = watch.run(state, batch, True)
                        self._add(batch, state, (made, *expected), sums, unmatched)
        finally:
            stage.restore()
        shares = {point: _share(e) for point, e in sums.items() if point not in unmatched}
        return {
            "layers": {name: _captured(shares.get(("layer", name))) for name in self.layers},
            "drift": [shares.get(("leave", name)) for name in self.blocks],
            "output": _captured(shares.get(OUTPUT)),
        }

    def _references(self, watch: _Watch, batch: Batch) -> tuple[_Sight, _Sight]:
        """What base and expert put out on a batch."""
        key = batch.task, batch.number
        if self._cache is not None and key in self._cache:
            return self._cache[key]
        base = watch.run(self.reference, batch, False)
        expert = watch.run(self.experts[batch.task], batch, False)
        if self._cache is not None:
            base.outputs = {k: v for k, v in base.outputs.items() if k[0] != "layer"}
            self._cache[key] = base, expert
        return base, expert

    def _add(
        self,
        batch: Batch,
        state: State,
        sights: tuple[_Sight, _Sight, _Sight],
        sums: Sums,
        unmatched: set[Point],
    ) -> None:
        """Add the squared errors of merge and base on a batch to ``sums``.

        Args:
            state: the merge. sights: of merge, base and expert.
            unmatched: to which points are added whose rows cannot be told from padding.
        """
        for point, layout, outputs in self._outputs(batch, state, *sights):
            if any(z.shape != outputs[0].shape for z in outputs):
                continue  # routed otherwise: these rows are other tokens
            if self.padded and (layout is None or not layout.fits(outputs[0], batch)):
                unmatched.add(point)
                continue
            merged, base, expert = (self._without_padding(z, layout, batch) for z in outputs)
            errors = sums.setdefault(point, {}).setdefault(batch.task, _Errors())
            errors.merge += float((merged - expert).square().sum(dtype=torch.float64))
            errors.base += float((base - expert).square().sum(dtype=torch.float64))
            errors.rows += len(expert)
            if not math.isfinite(errors.merge + errors.base):
                kind, name = point
                where = f"layer {name!r}" if kind == "layer" else f"the model's {kind} {name}"
                raise MergeError(
                    f"task {batch.task!r}, batch {batch.number}, {where.strip()}: squares of its "
                    "outputs are not finite; look for damaged or far too large inputs and weights"
                )

    def _outputs(
        self, batch: Batch, state: State, made: _Sight, base: _Sight, expert: _Sight
    ) -> Iterator[tuple[Point, Layout | None, list[Tensor]]]:
        """Layer, block or output, its layout, and what merge, base and expert put out there, (…,
        d); once for every call of a table."""
        expert_state = self.experts[batch.task]
        for point, output in made.outputs.items():
            if point not in expert.outputs:
                continue
            (kind, name), expert_output = point, expert.outputs[point]
            layout = self.known.layout_at(point, batch)
            if kind != "layer":
                yield point, layout, [output, base.outputs[point], expert_output]
                continue
            v = self.known.views[name]
            three = output, v.output(self.reference, made.reads[name]), expert_output
            yield point, layout, [v.output_rows(z) for z in three]
            for argument, layout in self.known.later_lookups(name, batch):
                tokens, states = batch.arguments[argument], (state, self.reference, expert_state)
                yield point, layout, [v.output(entries, tokens) for entries in states]

    def _without_padding(self, z: Tensor, layout: Layout | None, batch: Batch) -> Tensor:
        """Rows (N, d) that are no padding, of outputs (…, d)."""
        if layout is None or not layout.fits(z, batch):
            return z.reshape(-1, z.shape[-1])
        z = layout.arrange(z, batch.size)
        mask = batch.mask(layout.mask)
        return z.flatten(0, -2) if mask is None else z[counted(mask, z.shape[:-1])]


class _Watch:
    """Runs a model under a state on a batch and tells what layers and blocks put out; hooks are
    there while it is entered."""

    def __init__(
        self, stage: Stage, views: Mapping[str, View], layers: list[str], blocks: list[str]
    ):
        self.stage, self.copying, self.sight = stage, False, _Sight(False)
        self._hooks: list[RemovableHandle] = []
        for name in layers:
            module = views[name].module
            self._hooks.append(
                module.register_forward_pre_hook(self._reading(name), with_kwargs=True)
            )
            self._hooks.append(module.register_forward_hook(self._putting_out(name)))
        for name in blocks:
            module = stage.model.get_submodule(name)
            self._hooks.append(module.register_forward_hook(self._leaving(name)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def _reading(self, name: str):
        """Hook of a layer, before it is called."""

        def hook(module, args, kwargs):
            read = first_tensor(args, kwargs)
            if read is not None and name not in self.sight.reads:  # a table may be called again
                self.sight.reads[name] = self.sight.as_it_is(read)

        return hook

    def _putting_out(self, name: str):
        """Hook of a layer, behind it."""

        def hook(module, args, output):
            if ("layer", name) not in self.sight.outputs:
                self.sight.outputs["layer", name] = self.sight.as_it_is(output)

        return hook

    def _leaving(self, name: str):
        """Hook of a block, behind it."""

        def hook(module, args, output):
            main = first_output(output)
            if main is not None:
                self.sight.outputs["leave", name] = self.sight.as_it_is(main)

        return hook

    def run(self, state: State, batch: Batch, with_reads: bool) -> _Sight:
        """One forward; what layers read is kept on request. Run again with copies where the model
        works in place."""
        self.sight = sight = _Sight(self.copying)
        self.stage.begin(state)
        with blaming(batch):
            sight.outputs[OUTPUT] = main_output(self.stage.model(**self.stage.arguments(batch)))
        if sight.overwritten():
            self.copying = True
            return self.run(state, batch, with_reads)
        if not with_reads:
            sight.reads = {}
        return sight


def _share(by_task: dict[str, _Errors]) -> float | None:
    """Lost energy over all energy, tasks weighing the same per row; None where there is none."""
    lost = sum(errors.merge / errors.rows for errors in by_task.values())
    energy = sum(errors.base / errors.rows for errors in by_task.values())
    return lost / energy if energy else None


def _captured(share: float | None) -> float | None:
    return None if share is None else 1 - share
