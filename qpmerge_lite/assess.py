r"""What any finished merge is worth, whichever method made it: captured energies on any inputs, and
certificates in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .calibration import Batch, check_calibration
from .diagnostic import gap
from .engine.effects import blaming, first_tensor
from .engine.layouts import Layout
from .engine.lockstep import Stage
from .engine.recipes import Recipe
from .engine.recording import first_output
from .engine.rows import counted
from .engine.survey import block_paths, survey
from .engine.views import View
from .errors import MergeError, MissingLayer
from .experts import check_experts
from .forwards import evaluating, is_encoder_decoder, main_output, refuse_what_cannot_run
from .moments import Moments
from .options import words
from .sequential import Pass

Layers = dict[str, tuple[View, Moments, Tensor]]


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
    targets agree, and the programme of
    any basis and the loss of any merge follow in closed form. Memory: the moments of all layers
    asked for.

    Args:
        along: state dict of a finished merge. Layers then read what its own earlier layers produce,
            and targets are the experts' outputs.
        full_energy: keep all of M, which rotated rows need. The others, and errors, as in
            :func:`merge_sequentially`.
    """
    named = None if layers is None else tuple(words("layers", layers))
    inputs = "expert" if along is None else "merged"
    recipe = Recipe(None, inputs, "own", scope, folds, named, along, full_energy)
    gathering = Pass(base, experts, calibration, {"moments": recipe}, blocks, products)
    making = gathering.makings()[0]
    for name in making.recipe.layers or ():
        if name not in making.moments:
            reason = making.left_out.get(name) or gathering.known.left_out.get(name)
            raise MissingLayer(
                f"layer {name!r}: expected to be called once in a forward pass, but: {reason}; choose another layer"
            )
    return making.moments


def _check_layers(layers) -> None:
    """MergeError for anything but what :func:`layer_moments` returns."""
    fits = isinstance(layers, Mapping)
    for found in layers.values() if fits else ():
        fits = fits and isinstance(found, tuple) and len(found) == 3
        fits = fits and isinstance(found[0], View) and isinstance(found[1], Moments)
    if not fits:
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
    found = {}
    for name, (view, moments, _) in layers.items():
        pooled, update = moments.pool(), view.matrix(state) - view.matrix(reference)
        if pooled.energy:
            found[name] = {
                "captured": pooled.captured(update),
                "gap": gap(pooled, update) / pooled.energy,
            }
    return found


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
        self.outputs: dict[object, Tensor] = {}
        self._versions: list[tuple[Tensor, int]] = []

    def kept(self, seen: Tensor) -> Tensor:
        """A tensor as it is now: itself, or a copy where the model works in place or torch does not
        count what it writes."""
        if self.copying or seen.is_inference():
            return seen.clone()
        self._versions.append((seen, seen._version))
        return seen

    def overwritten(self) -> bool:
        """Whether the model has worked in place on what was seen."""
        return any(seen._version != version for seen, version in self._versions)


class Auditor:
    """:func:`audit` of many merges on the same inputs; what base and experts put out there is held,
    unless ``hold`` is false."""

    @torch.no_grad()
    def __init__(
        self, base: nn.Module, experts, calibration, *, blocks: str | None = None, hold: bool = True
    ):
        refuse_what_cannot_run(base)
        self.base, self.experts, self.reference = (
            base,
            check_experts(base, experts, cast=True),
            base.state_dict(),
        )
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
        self.held: dict[tuple, tuple[_Sight, _Sight]] | None = {} if hold else None

    @torch.no_grad()
    def __call__(self, state, tasks=None) -> dict:
        """One merge, on the inputs of all tasks or of some."""
        state, stage = (
            check_experts(self.base, {"merge": state}, cast=True)["merge"],
            Stage(self.base),
        )
        sums, unmatched = {}, set()
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
        shares = {key: _share(found) for key, found in sums.items() if key not in unmatched}
        return {
            "layers": {name: _captured(shares.get(name)) for name in self.layers},
            "drift": [shares.get(("leave", name)) for name in self.blocks],
            "output": _captured(shares.get("output")),
        }

    def _references(self, watch, batch: Batch) -> tuple[_Sight, _Sight]:
        """What base and expert put out on a batch."""
        key = batch.task, batch.number
        if self.held is not None and key in self.held:
            return self.held[key]
        found = (
            watch.run(self.reference, batch, False),
            watch.run(self.experts[batch.task], batch, False),
        )
        if self.held is not None:
            found[0].outputs = {k: v for k, v in found[0].outputs.items() if k not in self.layers}
            self.held[key] = found
        return found

    def _add(
        self, batch: Batch, state, sights: tuple[_Sight, _Sight, _Sight], sums, unmatched: set
    ) -> None:
        """Add to ``sums[layer, block or output][task]`` the squared errors of merge and base, and
        the number of rows.

        Args:
            state: the merge. sights: of merge, base and expert.
            unmatched: where it goes what has rows that cannot be told from padding.
        """
        for key, layout, rows in self._outputs(batch, state, *sights):
            if any(z.shape != rows[0].shape for z in rows):
                continue  # routed otherwise: these rows are other tokens
            if self.padded and (layout is None or not layout.fits(rows[0], batch)):
                unmatched.add(key)
                continue
            merged, plain, aim = (self._kept(z, layout, batch) for z in rows)
            total = sums.setdefault(key, {}).setdefault(batch.task, [0.0, 0.0, 0])
            for i, z in enumerate((merged, plain)):
                total[i] += float((z - aim).square().sum(dtype=torch.float64))
            total[2] += len(aim)
            if not math.isfinite(total[0] + total[1]):
                where = f"layer {key!r}" if key in self.layers else f"the model's {key!r}"
                raise MergeError(
                    f"task {batch.task!r}, batch {batch.number}, {where}: squares of its outputs are not finite; look for "
                    "damaged or far too large inputs and weights"
                )

    def _outputs(self, batch: Batch, state, made: _Sight, base: _Sight, expert: _Sight):
        """Layer, block or output, its layout, and what merge, base and expert put out there; once
        for every call of a table."""
        for key, put in made.outputs.items():
            if key not in expert.outputs:
                continue
            if key not in self.layers:
                point = key if key != "output" else ("output", "")
                yield (
                    key,
                    self.known.layout_at(point, batch),
                    [put, base.outputs[key], expert.outputs[key]],
                )
                continue
            v = self.known.views[key]
            three = put, v.output(self.reference, made.reads[key]), expert.outputs[key]
            yield (
                key,
                self.known.layout_at(("layer", key), batch),
                [v.output_rows(z) for z in three],
            )
            for argument, layout in self.known.later_lookups(key, batch):
                states = state, self.reference, self.experts[batch.task]
                yield (
                    key,
                    layout,
                    [v.output(entries, batch.arguments[argument]) for entries in states],
                )

    def _kept(self, z: Tensor, layout: Layout | None, batch: Batch) -> Tensor:
        """Rows (N, d) that are no padding."""
        if layout is None or not layout.fits(z, batch):
            return z.reshape(-1, z.shape[-1])
        z = layout.arrange(z, batch.size)
        mask = batch.masks.get(layout.mask)
        return z.flatten(0, -2) if mask is None else z[counted(mask, z.shape[:-1])]


class _Watch:
    """Runs a model under a state on a batch and tells what layers and blocks put out; hooks are
    there while it is entered."""

    def __init__(self, stage: Stage, views, layers, blocks):
        self.stage, self.copying, self.sight, self._hooks = stage, False, _Sight(False), []
        for name in layers:
            module = views[name].module
            self._hooks.append(
                module.register_forward_pre_hook(self._reading(name), with_kwargs=True)
            )
            self._hooks.append(module.register_forward_hook(self._putting(name)))
        for name in blocks:
            module = stage.model.get_submodule(name)
            self._hooks.append(module.register_forward_hook(self._leaving(name)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def _reading(self, name):
        def hook(module, args, kwargs):
            if name not in self.sight.reads:  # a table may be called again
                self.sight.reads[name] = self.sight.kept(first_tensor(args, kwargs))

        return hook

    def _putting(self, name):
        def hook(module, args, output):
            if name not in self.sight.outputs:
                self.sight.outputs[name] = self.sight.kept(output)

        return hook

    def _leaving(self, name):
        def hook(module, args, output):
            put = first_output(output)
            if put is not None:
                self.sight.outputs["leave", name] = self.sight.kept(put)

        return hook

    def run(self, state, batch: Batch, with_reads: bool) -> _Sight:
        """One forward; what layers read is kept on request. Run again with copies where the model
        works in place."""
        self.sight = found = _Sight(self.copying)
        self.stage.begin(state)
        with blaming(batch):
            found.outputs["output"] = main_output(self.stage.model(**self.stage.arguments(batch)))
        if found.overwritten():
            self.copying = True
            return self.run(state, batch, with_reads)
        if not with_reads:
            found.reads = {}
        return found


def _share(found: dict[str, list]) -> float | None:
    """Lost energy over all energy, tasks weighing the same per row; None where there is none."""
    lost = sum(total[0] / total[2] for total in found.values())
    energy = sum(total[1] / total[2] for total in found.values())
    return lost / energy if energy else None


def _captured(share: float | None) -> float | None:
    return None if share is None else 1 - share
