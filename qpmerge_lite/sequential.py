r"""The forward-order pass: layers are solved one after another on what the already merged part
produces.

Several merges go through in one pass and share the experts' forwards. Every layer is visited once,
when all forwards that read it wait there (``lockstep``); what is done there is the business of each
merge's :class:`Recipe`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .aliases import tied
from .calibration import Batch, check_calibration
from .engine.agreement import digests, refuse_differences
from .engine.gather import Gatherer, Reads, Unreached
from .engine.keeping import Keeper, keeper_of_next_pass
from .engine.lockstep import Apart, Disordered, Forward, LeftOut, Stage, Stream, hand_over, run
from .engine.orders import Point, predecessors, sort
from .engine.pauses import pausing
from .engine.processes import processes_of, refuse_idle
from .engine.reasons import reasons_to_average
from .engine.recipes import (
    Making,
    PassOptions,
    Recipe,
    Solver,
    check_recipes,
    is_solution,
    plain,
    shown,
    with_known_layers,
)
from .engine.rerun import Room
from .engine.rows import check_folds
from .engine.survey import Survey, block_paths, survey
from .engine.views import Table, View
from .errors import MergeError
from .experts import check_experts, is_number, stored
from .forwards import evaluating, is_encoder_decoder, refuse_what_cannot_run
from .merge import Merge, average


class Pass:
    """One pass over the calibration batches, in which several merges are made.

    Args:
        base: the common initialisation, whose device is where everything runs; the same afterwards.
        experts: task -> state dict. calibration: task -> batches.
        recipes: name -> how that merge is made.
        options: what holds for all of them.
    Attributes:
        doing: what a progress bar calls it.
    """

    doing = "merging"

    def __init__(
        self,
        base: nn.Module,
        experts,
        calibration,
        recipes: Mapping[str, Recipe],
        options: PassOptions,
    ):
        self.model, self.options = base, options
        self.processes = processes_of(options.group)
        look = partial(self._look, experts, calibration, recipes)
        refuse_differences(self.processes.each(look))
        self.batches = self.processes.own(self.every_batch)
        self.gatherer = Gatherer(
            self.known,
            self.tasks,
            self.batches,
            base=self.base,
            experts=self.experts,
            products=options.products,
            processes=self.processes,
        )

    def _look(self, experts, calibration, recipes: Mapping[str, Recipe]) -> dict[str, str]:
        """Check what the pass is given, and find out what the model does with it. Returns what all
        processes that share the pass must agree on, name -> digest."""
        base, options = self.model, self.options
        refuse_what_cannot_run(base)
        check_recipes(recipes)
        self.experts = check_experts(base, experts, cast=True)
        self.base = {k: v.detach() for k, v in base.state_dict().items()}
        self.tied = tied(base)
        device = next(iter(self.base.values())).device
        by_task = check_calibration(
            calibration, list(self.experts), device, is_encoder_decoder(base)
        )
        self.every_batch: list[Batch] = [b for batches in by_task.values() for b in batches]
        refuse_idle(self.processes, self.every_batch)
        self.tasks: list[str] = list(by_task)
        check_folds(by_task, max(recipe.folds for recipe in recipes.values()))
        self.blocks = block_paths(base, options.blocks)
        by_block = any(recipe.inputs == "block" for recipe in recipes.values())
        self.bordering = self.blocks if by_block else []
        self.reruns = True  # whether blocks may be run again
        self.orders: list[list[Point]] = []  # in which batches came to layers
        self.keeper = Keeper()
        with evaluating(base):
            self.known: Survey = survey(base, self.every_batch, self.blocks, self.base)
        self.recipes = {name: with_known_layers(r, self.known) for name, r in recipes.items()}
        given = self.base, self.experts, self.every_batch, self.known, self.recipes
        how = {"blocks": self.blocks, "products": options.products}
        return {} if self.processes.count == 1 else digests(*given, how)

    def run(self, progress: bool = False) -> dict[str, Merge]:
        """Make all merges."""
        if self.processes.count == 1:  # others would have to know what this one need not solve
            self.keeper = keeper_of_next_pass()
        return {making.name: self._finished(making) for making in self.makings(progress)}

    @torch.no_grad()
    def makings(self, progress: bool = False) -> list[Making]:
        """Visit every layer. One that turns out not to be one that can be solved is left out, and
        the pass made again."""
        stage = Stage(self.model)
        stage.keep(self.known.traces)
        with evaluating(self.model):
            while True:
                try:
                    return self._sweep(stage, progress)
                except LeftOut as layer:
                    self.known.left_out[layer.layer] = layer.reason
                except Apart as layer:
                    self.known.put_apart(layer.layer)
                except Disordered as layers:
                    self._settle_order(stage, layers.orders)
                finally:
                    stage.restore()

    def _settle_order(self, stage: Stage, orders: list[list[Point]]) -> None:
        """Leave out layers to which batches come in different orders, or visit them as all batches
        do.

        Blocks that are run again hide the order: then first without them.
        """
        if any(self.processes.each(lambda: bool(stage.parking))):
            self.reruns = False
            return
        self.orders += orders
        earlier = predecessors(self.orders)
        disputed = [layer for _, layer in earlier if ("layer", layer) in earlier["layer", layer]]
        self.known.left_out |= dict.fromkeys(disputed, "batches come to it in different orders")
        if not disputed:
            sort(self.known.sequence, earlier)

    def _sweep(self, stage: Stage, progress: bool) -> list[Making]:
        """One attempt: all forwards in lockstep, every stage visited once."""
        self.keeper.begin(self.known, self.reruns)
        makings = [self._begun(name, recipe) for name, recipe in self.recipes.items()]
        wanted = set().union(*(making.views for making in makings))
        self.groups: dict[str, list[str]] = {}  # the first of the layers that read a tensor -> all
        for group in self.known.stages:
            if layers := [layer for layer in group if layer in wanted]:
                self.groups[layers[0]] = layers
        tables = {layer for layer in wanted if isinstance(self.known.views[layer], Table)}
        left, everything = len(self.groups), all(r.layers is None for r in self.recipes.values())
        shown = progress and self.processes.number == 0
        bar = tqdm(total=left, desc=self.doing, unit="layer", disable=not shown)

        def visit(point, arrived):
            nonlocal left
            if point[0] != "layer":
                hand_over(arrived)
                return True
            reads = {(f.kind, f.batch.task, f.batch.number): f for f in arrived}
            self._visit(self.groups[point[1]], reads, makings)
            left -= 1
            bar.update()
            return left > 0 or everything  # to the end, where a layer might be called again

        leaders = {leader: group[1:] for leader, group in self.groups.items()}
        forwards = self._forwards(stage, makings)
        with bar, pausing(stage, leaders, self.bordering, tables):
            try:
                run(forwards, self.known.sequence, visit, self.processes)
            except torch.linalg.LinAlgError:
                self.gatherer.check()  # what is not finite has no factors
                raise
        self.gatherer.check()
        return makings

    def _begun(self, name: str, recipe: Recipe) -> Making:
        """A merge of which nothing is solved yet."""
        if recipe.anchor is None:
            anchor, state = None, average(self.model, self.experts)
        else:
            anchor = check_experts(self.model, {"anchor": recipe.anchor})["anchor"]
            state = {key: value.clone() for key, value in anchor.items()}
        state = {key: state[self.tied[key][0]] for key in state}
        views = self.known.views_in(recipe.scope)
        asked_for = set(views if recipe.layers is None else recipe.layers)
        solved = asked_for - self.known.left_out.keys()
        views = {layer: v for layer, v in views.items() if layer in solved}
        return Making(name, recipe, views, state, anchor)

    def _forwards(self, stage: Stage, makings: list[Making]) -> list[Forward]:
        """Those of one state next to each other, so that the model is seldom pointed to another."""
        # whose inputs -> the state that runs on every batch, None for the expert of its task
        streams: list[tuple[Stream, dict[str, Tensor] | None]] = []
        if any(m.recipe.inputs == "expert" or m.recipe.own_weight for m in makings):
            streams.append(("expert", None))
        for making in makings:
            if making.recipe.inputs == "block":
                streams.append((making.stream, None))
            if making.recipe.inputs != "expert":
                streams.append((("merged", making.name), making.state))
        room = Room(
            stage,
            self.known,
            list(self.groups),
            self.blocks if self.reruns and not self.bordering else [],
            batches=self.batches,
            streams=len(streams),
            allowed=self.options.activations,
        )
        forwards = []
        for stream, state in streams:
            for batch in self.batches:
                own = self.experts[batch.task] if state is None else state
                forwards.append(room.forward(stage, own, batch, stream))
        return forwards

    def _visit(self, group: list[str], reads: Reads, makings: list[Making]) -> None:
        """Solve the layers of a stage for every merge."""
        shared: dict | None = {} if len(makings) > 1 else None
        for making in makings:
            alike: dict[object, list[View]] = {}
            for v in (making.views[layer] for layer in group if layer in making.views):
                alike.setdefault(v.reads, []).append(v)
            for views in alike.values():
                if self.keeper.sets(views, making, self.tied):
                    continue
                first = len(making.table)
                try:
                    self._solve(views, reads, making, shared)
                except Unreached as reason:
                    making.left_out |= dict.fromkeys((v.name for v in views), str(reason))
                else:
                    self.keeper.keep(views, making, first)

    def _solve(self, views: list[View], reads: Reads, making: Making, shared: dict | None) -> None:
        """Solve layers that read alike, for one merge."""
        started, first = time.perf_counter(), len(making.table)
        for layer in self.gatherer.moments(views, reads, making, shared):
            v, moments, updates = layer
            if making.recipe.solver is None:
                making.moments[v.name] = layer
                continue
            base = v.matrix(self.base)
            anchor = () if making.anchor is None else (v.matrix(making.anchor) - base,)
            solution = making.recipe.solver(moments, updates, *anchor)
            if not is_solution(solution, base):
                raise MergeError(
                    f"layer {v.name!r}: expected the solver to return an update of shape "
                    f"{tuple(base.shape)} and a table row (a mapping), found {shown(solution)}"
                )
            update, facts = solution
            self._settle(v, base + self.processes.from_first(update), making)
            making.table.append({"layer": v.name, **facts})
        for row in making.table[first:]:
            row["seconds"] = (time.perf_counter() - started) / len(views)

    def _settle(self, v: View, W: Tensor, making: Making) -> None:
        """Set the weights W (g, m, n) of a solved layer in the merge's state, which all forwards in
        flight read."""
        for name, value in v.parts(W, making.state).items():
            if self.gatherer.looks:
                value = stored(
                    f"layer {v.name!r}, merged parameter {name!r}", value, self.base[name]
                )
            making.state[name].copy_(value)
            making.solved.update(self.tied[name])

    def _finished(self, making: Making) -> Merge:
        """The merge, with a reason for every floating entry that was plainly averaged."""
        for name in making.solved if not self.gatherer.looks else ():
            stored(f"merged parameter {name!r}", making.state[name], self.base[name])
        averaged = {}
        if making.anchor is None:
            reasons = reasons_to_average(self.model, self.known, making)
            for name, value in self.base.items():
                if is_number(value) and name not in making.solved:
                    averaged[name] = reasons[name]
        return Merge(making.state, [plain(row) for row in making.table], averaged)


def merge_together(
    base: nn.Module,
    experts,
    calibration,
    recipes: Mapping[str, Recipe],
    *,
    blocks: str | Iterable[str] | None = None,
    products: str = "activations",
    activations: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    progress: bool = False,
) -> dict[str, Merge]:
    """Several merges in one pass, sharing the experts' forwards: name -> merge, the same as each by
    itself.

    Args:
        base, experts, calibration, blocks, products, activations, group: as in
            :func:`merge_sequentially`.
        recipes: name -> :class:`Recipe`. Merges on the experts' own inputs share all their sums
            too.
    Cost: one forward of every expert batch where a recipe needs it, one of the merged model per
        recipe with merged inputs.
    """
    refuse_what_cannot_run(base)
    options = PassOptions(blocks, products, activations, group)
    check_recipes(recipes)
    for name, recipe in recipes.items():
        if recipe.solver is None:
            raise MergeError(
                f"recipes: {name!r}: expected a solver, found None; layer_moments keeps moments "
                "without one"
            )
    return Pass(base, experts, calibration, recipes, options).run(progress)


def merge_sequentially(
    base: nn.Module,
    experts,
    calibration,
    solver: Solver,
    *,
    inputs: str = "merged",
    targets: str | float = "own",
    scope: str = "all",
    folds: int = 4,
    blocks: str | Iterable[str] | None = None,
    layers: Iterable[str] | None = None,
    anchor: Mapping[str, Tensor] | None = None,
    products: str = "activations",
    activations: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    progress: bool = True,
) -> Merge:
    """Merge experts into one model, layer by layer in forward order.

    Args:
        base: the common initialisation; not changed. Its device is where everything runs.
        experts: state dicts of the same architecture by task.
        calibration: for every task, batches of unlabelled inputs: keyword arguments of
            ``base.forward``. Tokens under a zero ``attention_mask`` or ``decoder_attention_mask``
            are not counted, nor is what a decoder reads of labels of -100.
        solver, inputs, targets, scope, folds, layers, anchor: of :class:`Recipe`.
        blocks: paths of the lists whose members are blocks, for ``inputs="block"``.
        products: precision of products of activations: that of the ``activations``, at least
            float32 (relative error of second moments 1e-6), or ``float64`` (1e-14).
        activations: bytes that paused forwards may hold, at the price of time: the same merge. By
            default half a GiB, or what the layers of one block read together, if that is more.
        group: of ``torch.distributed``, such as ``torch.distributed.group.WORLD``, whose N
            processes share the forwards: each calls this with all of the same arguments, runs
            every N-th batch, and returns the merge of all batches, which is that of one process up
            to rounding. By default a process merges by itself, whether or not it is in a group.
    Returns: Merge; rows in forward order. Cost: one forward of every expert batch and one of the
        merged model. With a group, one all-reduce per stage, which is the layers that read one
        tensor alike (those without a bias by themselves), of all that is added up there.
    Raises: MissingLayer, ShapeMismatch, NonFinite, EmptyCalibration; MergeError for an unknown
        option, a batch that the model does not take, or a mask that cannot be matched to what a
        layer reads; of a group, in all processes what is raised in one, and LostProcess where one
        has ended or was silent for longer than the group's timeout.
    """
    recipe = Recipe(solver, inputs, targets, scope, folds, layers, anchor)
    return merge_together(
        base,
        experts,
        calibration,
        {"merge": recipe},
        blocks=blocks,
        products=products,
        activations=activations,
        group=group,
        progress=progress,
    )["merge"]
