"""A merge from folders to a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .folders import MANIFEST, Checkpoint
from .heads.files import write_heads
from .large.budget import allowance
from .large.estimates import disk_of_pass
from .large.heap import give_back
from .manifests import choice_of, manifest_of, without_time
from .methods import CALIBRATED
from .orders import Order
from .output import CARD, card, check_room, copy_files, say_dtype, write_json
from .partial import Partial, all_or_nothing
from .planning import Plan, plan_of, refuse_changes, settled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..merge import Merge


def silent(_: str) -> None:
    """Say nothing."""


def merge_folders(order: Order, *, progress: bool = False) -> dict:
    """Merge checkpoints and write the result as one more; what its manifest says.

    The result has the base's files, names, dtypes and layout, and loads with ``from_pretrained``.
    The same order on the same machine gives the same bytes, also where it goes on with what a run
    of it has left that was interrupted or killed.

    Raises: MergeError before any weight is read for whatever can be seen by then, and later for
        weights that are not finite; nothing is left of the output then.
    """
    return carry_out(plan_of(order, progress=progress), progress=progress)


def carry_out(plan: Plan, *, progress: bool = False, say: Callable[[str], None] = silent) -> dict:
    """Merge as planned; what the manifest of the output says.

    Args:
        say: is told what was found of earlier runs, a line each.
    Raises: as :func:`merge_folders`.
    """
    from ..engine.rerun import holding

    report, order, headers = plan.report, plan.order, plan.headers
    if plan.inputs is not None:  # tensor by tensor the next piece is as large as the last one was
        give_back(tight=order.memory is not None)
    allowed = allowance(plan)
    sizes = {file: header.size for file, header in headers.items()}
    partial = Partial(order.out, plan.digest, sizes if plan.goes_by_tensor else {})
    meanwhile = disk_of_pass(plan.report, plan.method) if plan.inputs is not None else 0
    check_room(order.out, sum(sizes.values()) - partial.room + meanwhile)
    with all_or_nothing(partial, say):
        if partial.finished:
            count = f"{len(partial.finished)} of {len(headers)} files of weights"
            say(f"{count} are there from an earlier run of this order, and are taken as they are")
        if partial.solved_groups:
            say(f"{partial.solved_groups} groups of layers were solved by an earlier run")
        with holding(allowed):
            told = _written(plan, partial, progress)
        manifest = manifest_of(plan) | told
        copy_files(report.base, partial.merged)
        manifest["heads"] = write_heads(report, partial.merged)
        if order.recipe is not None and order.recipe.out_dtype is not None:
            say_dtype(partial.merged, order.recipe.out_dtype)
        write_json(partial.merged / MANIFEST, manifest)
        (partial.merged / CARD).write_text(card(manifest), encoding="utf-8")
        refuse_changes(plan)
    return manifest


def take_part(order: Order, group: ProcessGroup) -> None:
    """Run a share of a merge's forwards, for the process of a group that writes the merge. Nothing
    is done for a merge that has no forwards."""
    from ..engine.rerun import holding

    _, method, _ = settled(order)
    if method in CALIBRATED and not order.moments:
        plan = plan_of(order, group=group, writes=False)
        give_back(tight=order.memory is not None)
        with holding(allowance(plan)):
            for _ in _merges(plan, {}, None, progress=False):
                pass


def _written(plan: Plan, partial: Partial, progress: bool) -> dict:
    """Write the merged weights; entries of the manifest that only the merge knows."""
    from tqdm import tqdm

    from .tensors import Shards, read_tensors

    base = plan.report.base
    averaged = dict(partial.averaged)

    def finish(file: str) -> None:
        partial.finish(file, averaged)

    shards = Shards(partial.merged, plan.headers, partial.finished, finish)
    told: dict = {"table": [], "choice": None}
    bar = tqdm(
        total=_bytes_of(base, base.entries),
        initial=_bytes_of(base, base.entries.keys() - shards.missing.keys()),
        desc=plan.method,
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    with bar:
        for merge in _merges(plan, shards.missing, partial.solved, progress):
            averaged |= merge.averaged
            for name, value in merge.state_dict.items():
                if name in shards.missing:
                    shards.write(name, value)
                    bar.update(_bytes_of(base, [name]))
            told["table"] += [without_time(row) for row in merge.table]
            told["choice"] = choice_of(merge)
        for name in plan.report.kept:
            if name in shards.missing:
                shards.write(name, read_tensors(base, [name])[name])
                bar.update(_bytes_of(base, [name]))
    shards.finish()
    by_reason: dict[str, list[str]] = {}
    for name, reason in averaged.items():
        by_reason.setdefault(reason, []).append(name)
    return {"averaged": by_reason} | told


def _bytes_of(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    """Bytes of some tensors in their files."""
    return sum(checkpoint.entries[name].stop - checkpoint.entries[name].start for name in names)


def _merges(
    plan: Plan, wanted: Mapping[str, str], solved: Path | None, progress: bool
) -> Iterator[Merge]:
    """Merges of parts of the model that together have the wanted tensors; a pass keeps what it has
    solved in a folder, where there is one for it."""
    base, experts, order = plan.report.backbone, plan.report.experts, plan.order
    if plan.moments:
        from .moments.solving import merged_layers

        yield from merged_layers(base, experts, plan.moments, plan.method, order.options)
    elif order.recipe is not None:
        from .recipes.arithmetic import recipe_merges
        from .recipes.plans import plans

        planned = plans(order.recipe, plan.report)
        yield from recipe_merges(order.recipe, base, experts, planned, order.random_seed, wanted)
    elif plan.inputs is None:
        from .weights_only import merged_groups

        yield from merged_groups(base, experts, plan.method, order.options, wanted)
    else:
        from .calibrated import merged_model
        from .large.solved import SolvedLayers

        yield merged_model(
            plan.report,
            plan.inputs.batches,
            plan.method,
            order.options,
            group=plan.group,
            solved=None if solved is None else SolvedLayers(solved),
            progress=progress,
        )
