"""What a model does with a calibration batch: which layers it calls, in which order, and which rows
are whose.

Everything is found out by running the model on a few sequences of a batch: as they are, with one
sequence less and the others in another order, with one token less, and with one token throughout.
What changes its size with the sequences is the axis of sequences, what changes it with the tokens
is theirs, and by which of the model's masks; what changes it with what the tokens hold is no layer
of theirs. No list of architectures, and no guess from shapes that happen to agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..aliases import sharing, tied
from ..calibration import Batch
from ..errors import MergeError, MissingLayer
from ..experts import State
from ..options import words
from .effects import Traces
from .layers import view
from .layouts import Layout, find_layout
from .lockstep import LeftOut
from .lookups import Lookup, calls_of, families, later_lookups
from .orders import Point, insert, place_the_rest
from .probes import kind_of, numbers
from .recording import Call, Recordings, call_at, read_outside, recordings
from .views import Convolution, Table, View

FITS = 0.03  # relative error of a view, which bfloat16 stays below
EXTRA_SURVEYS = 4  # batches surveyed beyond one of each kind, in search of layers not called so far


@dataclass
class Survey:
    """Layers that a pass can solve, and why the others cannot be.

    Attributes:
        paths: every path of a layer's module, which may be shared -> the layer.
        stages: for every group of layers that read the same tensor, their names in calling order.
        sequence: every layer, and every entrance to and exit from a block, in calling order.
        layouts: by kind of batch (its keys), of what a layer reads and of what a block or the model
            returns.
        left_out: layer -> why it is averaged.
        refusals: layer -> why no merge is made if the layer is to be solved.
        held: point -> bytes that a forward holds while it waits there, per number in the arguments
            of its batch.
        read: layer -> bytes that it reads, per number in the arguments of its batch.
        families: table -> tables with its weights; the first one called stands for all, with their
            tokens.
        lookups: by kind of batch and table, what is looked up behind the first call.
    """

    views: dict[str, View]
    paths: dict[str, str] = field(default_factory=dict)
    stages: list[list[str]] = field(default_factory=list)
    sequence: list[Point] = field(default_factory=list)
    layouts: dict[tuple, Layout] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    held: dict[Point, float] = field(default_factory=dict)
    traces: Traces = field(default_factory=Traces)
    read: dict[str, float] = field(default_factory=dict)
    families: dict[str, list[str]] = field(default_factory=dict)
    lookups: dict[tuple, list[Lookup]] = field(default_factory=dict)

    def later_lookups(self, table: str, batch: Batch) -> list[Lookup]:
        """What a table looks up in a batch behind its first call."""
        return self.lookups.get((kind_of(batch), table), [])

    def views_in(self, scope: str) -> dict[str, View]:
        """The views of a scope, as the survey found them to be."""
        views = {}
        for name, v in self.views.items():
            of_scope = view(name, v.module, scope)
            if of_scope is not None:
                views[name] = replace(v, bias=of_scope.bias)
        return views

    def put_apart(self, layer: str) -> None:
        """Make a layer a stage of its own."""
        for group in self.stages:
            if layer in group:
                group.remove(layer)
        self.stages.append([layer])

    def layout(self, layer: str, batch: Batch) -> Layout:
        """Where the sequences of a batch lie in what a layer reads."""
        layout = self.layout_at(("layer", layer), batch)
        if layout is None:
            raise LeftOut(layer, "called for some kinds of calibration batches only")
        return layout

    def layout_at(self, point: Point, batch: Batch) -> Layout | None:
        """Where the sequences of a batch lie in what a layer reads, or a block or the model
        returns; None where it is not known."""
        return self.layouts.get((kind_of(batch), point))


def block_paths(model: nn.Module, blocks=None) -> list[str]:
    """Paths of a model's blocks in the order of its modules: members of its outermost lists of
    modules, or of the named ones.

    Raises: MissingLayer where a name is not a list of modules of the model.
    """
    kinds = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    lists = {k: m for k, m in model.named_modules() if isinstance(m, kinds) and len(m)}
    named = [] if blocks is None else words("blocks", blocks)
    for name in named:
        if name not in lists:
            raise MissingLayer(
                f"blocks: expected the path of an nn.ModuleList of the model, found {name!r}; "
                f"the model has {sorted(lists)}"
            )
    if not named:
        for name in lists:
            if not any(name.startswith(f"{other}.") or other == "" for other in named):
                named.append(name)
    paths = []
    for name in named:
        for key, _ in lists[name].named_children():
            paths.append(f"{name}.{key}".lstrip("."))
    return paths


def survey(model: nn.Module, batches: list[Batch], blocks=(), state=None) -> Survey:
    """Survey a model in evaluation mode, under its own weights, on its calibration batches.

    Args:
        blocks: paths of blocks whose borders are to be ranked too.
    Raises: MergeError for a batch that the model does not take, and for forwards that draw random
        numbers.
    """
    views, reasons = _views(model)
    state = model.state_dict() if state is None else state
    known = Survey(views, _paths(model, views), left_out=reasons, families=families(views, state))
    padded = any(batch.padded for batch in batches)
    seen, extra = set(), 0
    for batch in sorted(batches, key=_tells, reverse=True):
        new_kind = kind_of(batch) not in seen
        if not new_kind:
            if extra == EXTRA_SURVEYS or all(("layer", name) in known.sequence for name in views):
                continue
            extra += 1
        seen.add(kind_of(batch))
        _add(known, model, batch, blocks, state, padded)
    place_the_rest(known.sequence, model, views, blocks)
    for name in views:
        if name not in known.left_out and not any(
            point == ("layer", name) for _, point in known.layouts
        ):
            known.left_out[name] = "no calibration batch was seen to call its module"
    return known


def _tells(batch: Batch) -> tuple[bool, float]:
    """How much a batch tells of its kind: padded ones and long ones most."""
    return batch.padded, numbers(batch) / batch.size


def _views(model) -> tuple[dict[str, View], dict[str, str]]:
    """Views by layer, and reasons against those whose weights are tied to others."""
    state = model.state_dict(keep_vars=True)
    views = {}
    for name, module in model.named_modules():
        as_layer = view(name, module)
        if as_layer is not None and all(p in state for p in as_layer.parameters):
            views[name] = as_layer
    tables = set[str]()
    for v in views.values():
        tables |= set(v.parameters) if isinstance(v, Table) else set()
    same, reasons = tied(model), {}
    owners = {name: names for names in sharing(model) for name in names}
    for name, v in views.items():
        others: set[str] = set()
        for parameter in v.parameters:
            for other in set(owners.get(parameter, ())) - {parameter}:
                is_one = state[other] is state[parameter] and _same_module(other, parameter, model)
                others |= set() if is_one else {other}
        one_table = isinstance(v, Table) and others <= tables & set(same[v.parameters[0]])
        if others and not one_table:
            reasons[name] = f"tied to {', '.join(sorted(others))}"
    return views, reasons


def _paths(model, views: dict[str, View]) -> dict[str, str]:
    layers = {v.module: name for name, v in views.items()}
    return {
        path: layers[module]
        for path, module in model.named_modules(remove_duplicate=False)
        if module in layers
    }


def _same_module(one: str, other: str, model) -> bool:
    """Whether two names of a state dict are one parameter of one module, met twice."""
    modules = [model.get_submodule(name.rpartition(".")[0]) for name in (one, other)]
    return modules[0] is modules[1]


def _add(found: Survey, model, batch: Batch, blocks, state, padded: bool) -> None:
    """Add to a survey what one batch shows."""
    recorded = recordings(found.views, model, batch, blocks, found.traces)
    for layer in (
        read_outside(found.views, model, recorded.batch, found.traces) - found.left_out.keys()
    ):
        found.left_out[layer] = "its weights are read without a call of its module"
    insert(found.sequence, [call.point for call in recorded.some if call.point[0] != "output"])
    groups: dict[object, list[str]] = {}
    _leave_out_tied_tables(found, recorded)
    for call in recorded.some:
        kind, name = call.point
        found.held[call.point] = max(call.held, found.held.get(call.point, 0.0))
        if call.read is not None:
            found.read[name] = (
                call.read.numel() * call.read.element_size() / numbers(recorded.batch)
            )
        if (
            kind == "enter"
            or (kind_of(batch), call.point) in found.layouts
            or name in found.left_out
        ):
            continue
        if kind == "layer":
            _judge(found, call, recorded, state, padded)
            if name not in found.left_out and not any(name in stage for stage in found.stages):
                alone = bool(found.later_lookups(name, batch))
                groups.setdefault(name if alone else call.identity, []).append(name)
        elif call.output is not None and call.output.dim() > 1:
            _place(found, call, recorded, padded)
    found.stages.extend(groups.values())


def _leave_out_tied_tables(found: Survey, recorded: Recordings) -> None:
    """In a survey, of tables with the same weights leave out all but the first one called; that one
    too, where batches differ in it."""
    for name, family in found.families.items():
        calls = calls_of(family, recorded.some)
        if len(family) == 1 or not calls or name == calls[0].point[1]:
            continue
        if ("layer", name) in {point for _, point in found.layouts}:
            found.left_out |= dict.fromkeys(
                family, "another table with its weights is called first by some batches"
            )
        found.left_out.setdefault(
            name, f"its weights are those of {calls[0].point[1]}, which is called first"
        )


def _place(found: Survey, call: Call, recorded: Recordings, padded: bool) -> None:
    """Settle in a survey the layout of what a block or the model returns, where it has one."""

    def output(calls: list[Call] | None) -> Tensor | None:
        other = call_at(calls, call.point)
        return None if other is None else other.output

    fewer = output(recorded.fewer)
    if fewer is None or call.output is None:
        return
    try:
        shorter = {mask: output(calls) for mask, calls in recorded.shorter.items()}
        layout = find_layout("", call.output, fewer, shorter, recorded.batch, padded=padded)
    except (LeftOut, MergeError):
        return
    found.layouts[kind_of(recorded.batch), call.point] = layout


def _judge(found: Survey, call: Call, recorded: Recordings, state: State, padded: bool) -> None:
    """Settle in a survey the layout of what a layer reads, or why the layer is left out."""
    layer = call.point[1]
    v, times = found.views[layer], sum(other.point == call.point for other in recorded.some)

    def rows(calls: list[Call] | None) -> Tensor | None:
        other = call_at(calls, call.point)
        return None if other is None or other.read is None else v.rows(other.read)

    fewer, even = rows(recorded.fewer), rows(recorded.even)
    if times > 1 and not isinstance(v, Table):
        found.left_out[layer] = "called more than once in a forward"
    elif call.read is None or call.output is None:
        found.left_out[layer] = "called without a tensor"
    elif v.rows(call.read).dim() < 2:
        found.left_out[layer] = "called without an axis of sequences"
    elif recorded.fewer is not None and fewer is None or recorded.even is not None and even is None:
        found.left_out[layer] = "which sequences call it depends on what they hold"
    elif even is not None and fewer is not None and even.shape != fewer.shape:
        found.left_out[layer] = "which rows it reads depends on what they hold"
    elif not _fits_module(found, layer, state, call):
        found.left_out[layer] = (
            f"{type(v.module).__name__} puts out something else than {v.puts_out}"
        )
    else:
        shorter = {mask: rows(calls) for mask, calls in recorded.shorter.items()}
        try:
            layout = find_layout(
                layer,
                v.rows(call.read),
                fewer,
                shorter,
                recorded.batch,
                padded=padded,
                table=isinstance(v, Table),
            )
            if isinstance(v, Table):
                found.lookups[kind_of(recorded.batch), layer] = later_lookups(
                    v, found.families[layer], recorded, padded
                )
        except LeftOut as reason:
            found.left_out[layer] = reason.reason
        except MergeError as error:
            found.left_out[layer] = "its rows cannot be matched to the mask"
            if not isinstance(v, Convolution):  # whose rows are patches, not tokens
                found.refusals[layer] = f"layer {layer!r}: {error}"
        else:
            found.layouts[kind_of(recorded.batch), call.point] = layout


def _fits_module(found: Survey, layer: str, state: State, call: Call) -> bool:
    """Whether a layer's view gives what its module put out; the survey then has, of its readings,
    the first that fits about as well as any."""
    if call.read is None or call.output is None:
        return False
    readings = found.views[layer].readings()
    misfits = [v.misfit(state, call.read, call.output) for v in readings]
    if min(misfits) > FITS:
        return False
    about_the_best = (
        v for v, misfit in zip(readings, misfits) if misfit <= 2 * min(misfits) + 1e-6
    )
    found.views[layer] = next(about_the_best)
    return True
