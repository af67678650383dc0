"""A merge from folders to a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .compatibility import Report, check, refuse_errors
from .manifests import choice_of, manifest_of, without_time
from .methods import BY_MOMENTS, WEIGHTS_ONLY, check_options, chosen
from .moments.files import MomentsFile, read_all
from .orders import Order, check_calibration, check_moments, downloaded
from .output import (
    CARD,
    MANIFEST,
    all_or_nothing,
    card,
    check_place,
    copy_files,
    say_dtype,
    write_json,
)
from .recipes.plans import plans, settle_dtypes, stored_headers

if TYPE_CHECKING:
    from ..merge import Merge
    from .calibration.feeds import Feed


def merge_folders(order: Order, *, progress: bool = False) -> dict:
    """Merge checkpoints and write the result as one more; what its manifest says.

    The result has the base's files, names, dtypes and layout, and loads with ``from_pretrained``.
    The same order on the same machine gives the same bytes.

    Raises: MergeError before any weight is read for whatever can be seen by then, and later for
        weights that are not finite; nothing is left of the output then.
    """
    order, method, why = settled(order)
    check_place(order.out, [order.base, *order.experts.values()])
    order = downloaded(order, progress)
    report = check(order.base, order.experts)
    refuse_errors(report)
    moments = read_all(order.moments, report.base, report.experts) if order.moments else {}
    inputs = None
    if order.recipe is not None:
        settle_dtypes(report)
    elif method in WEIGHTS_ONLY:
        from .weights_only import rehearse

        rehearse(method, list(order.experts), order.options)
    elif not moments:
        inputs = _feed(order, report)
    with all_or_nothing(order.out) as folder:
        merges = _merges(order, method, report, inputs, moments, progress)
        told = _written(order, method, report, merges, folder, progress)
        manifest = manifest_of(order, method, why, report, inputs, moments) | told
        copy_files(report.base, folder)
        if order.recipe is not None and order.recipe.out_dtype is not None:
            say_dtype(folder, order.recipe.out_dtype)
        write_json(folder / MANIFEST, manifest)
        (folder / CARD).write_text(card(manifest), encoding="utf-8")
    return manifest


def settled(order: Order) -> tuple[Order, str, str]:
    """An order with the options that follow from it, its method, and why it is that; refused where
    options or calibration do not fit it."""
    if order.recipe is not None:
        return order, order.recipe.method, "the recipe names it"
    method, why = chosen(order.method, bool(order.calibration), bool(order.moments))
    if order.moments and order.method is None:
        order = replace(order, options=BY_MOMENTS | order.options)
    check_options(method, order.options)
    if order.moments:
        check_moments(order, method)
    else:
        check_calibration(order, method)
    return order, method, why


def _merges(
    order: Order,
    method: str,
    report: Report,
    inputs: Feed | None,
    moments: Mapping[str, Sequence[MomentsFile]],
    progress: bool,
) -> Iterable[Merge]:
    """Merges of parts of the model, which together have all of its tensors.

    Args:
        inputs: calibration of the experts, None where the method needs none.
        moments: expert's name -> its files of moments.
    """
    base, experts = report.base, report.experts
    if moments:
        from .moments.solving import merged_layers

        return merged_layers(base, experts, moments, method, order.options)
    if order.recipe is not None:
        from .recipes.arithmetic import recipe_merges

        planned = plans(order.recipe, report)
        return recipe_merges(order.recipe, base, experts, planned, order.random_seed)
    if inputs is None:
        from .weights_only import merged_groups

        return merged_groups(base, experts, method, order.options)
    return _one_merge(order, method, report, inputs, progress)


def _written(
    order: Order,
    method: str,
    report: Report,
    merges: Iterable[Merge],
    folder: Path,
    progress: bool,
) -> dict:
    """Write the merged weights; entries of the manifest that only the merge knows."""
    from tqdm import tqdm

    from .tensors import Shards

    base = report.base
    shards = Shards(folder, stored_headers(order.recipe, base))
    averaged: dict[str, list[str]] = {}
    told: dict = {"averaged": averaged, "table": [], "choice": None}
    bar = tqdm(total=len(base.entries), desc=method, unit="tensor", disable=not progress)
    for merge in merges:
        for name, value in merge.state_dict.items():
            if name in shards.missing:
                shards.write(name, value)
                bar.update()
        for name, reason in merge.averaged.items():
            averaged.setdefault(reason, []).append(name)
        told["table"] += [without_time(row) for row in merge.table]
        told["choice"] = choice_of(merge)
    bar.close()
    shards.finish()
    return told


def _feed(order: Order, report: Report) -> Feed:
    """The calibration of an order; what may be a mistake in it is added to the report."""
    from .calibration.feeds import feed

    inputs = feed(
        report,
        order.calibration,
        order.columns,
        samples=order.samples,
        max_length=order.max_length,
        batch_size=order.batch_size,
    )
    report.findings += inputs.warnings
    return inputs


def _one_merge(order: Order, method: str, report: Report, inputs: Feed, progress: bool):
    """The merge of whole models, as a sequence of one."""
    from .calibrated import merged_model

    base, experts = report.base, report.experts
    yield merged_model(base, experts, inputs.batches, method, order.options, progress=progress)
