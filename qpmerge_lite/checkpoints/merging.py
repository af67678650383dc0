"""A merge from folders to a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .compatibility import Report, check, refuse_errors
from .findings import WARNING, Refused
from .folders import INDEX, OTHERS, TOKENIZER, Checkpoint, sha256
from .hub import check_places, local, origin_of, reference_of
from .methods import (
    BY_MOMENTS,
    CALIBRATED,
    FROM_MOMENTS,
    SETTLED,
    WEIGHTS_ONLY,
    check_options,
    chosen,
)
from .moments_files import MomentsFile, read_all
from .output import (
    CARD,
    MANIFEST,
    all_or_nothing,
    card,
    check_place,
    copy_files,
    versions,
    write_json,
)
from .sources import SAMPLES

if TYPE_CHECKING:
    from ..merge import Merge
    from .feeds import Feed

READERS = (*TOKENIZER, "preprocessor_config.json", "processor_config.json")


@dataclass
class Order:
    """What is to be merged, how, and where to.

    Attributes:
        base: folder of the model that the experts were tuned from, or its reference at the Hub.
        experts: name -> folder, or reference.
        out: the folder to be made.
        method: a name, None for the default.
        calibration: expert's name -> file, folder, or address at the Hub, see ``sources``.
        columns: expert's name -> fields to read, where they are not called as is usual.
        moments: expert's name -> files of moments, in place of calibration; several are added.
        options: of the method.
        samples: calibration inputs of an expert at the most.
        max_length: tokens of a calibration text at the most.
        batch_size: inputs of a forward.
    """

    base: Path
    experts: dict[str, Path]
    out: Path
    method: str | None = None
    calibration: dict[str, str | Path] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    moments: dict[str, list[Path]] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)
    samples: int = SAMPLES
    max_length: int = 128
    batch_size: int = 8


def merge_folders(order: Order, *, progress: bool = False) -> dict:
    """Merge checkpoints and write the result as one more; what its manifest says.

    The result has the base's files, names, dtypes and layout, and loads with ``from_pretrained``.
    The same order on the same machine gives the same bytes.

    Raises: MergeError before any weight is read for whatever can be seen by then, and later for
        weights that are not finite; nothing is left of the output then.
    """
    method, why = chosen(order.method, bool(order.calibration), bool(order.moments))
    if order.moments and order.method is None:
        order = replace(order, options=BY_MOMENTS | order.options)
    check_options(method, order.options)
    if order.moments:
        check_moments(order, method)
    else:
        check_calibration(order, method)
    check_place(order.out, [order.base, *order.experts.values()])
    order = downloaded(order, progress)
    report = check(order.base, order.experts)
    refuse_errors(report)
    moments = read_all(order.moments, report.base, report.experts) if order.moments else {}
    inputs = None
    if method in WEIGHTS_ONLY:
        from .weights_only import rehearse

        rehearse(method, list(order.experts), order.options)
    elif not moments:
        inputs = _feed(order, report)
    with all_or_nothing(order.out) as folder:
        merges = _merges(order, method, report, inputs, moments, progress)
        told = _written(method, report, merges, folder, progress)
        manifest = _manifest(order, method, why, report, inputs, moments) | told
        copy_files(report.base, folder)
        write_json(folder / MANIFEST, manifest)
        (folder / CARD).write_text(card(manifest), encoding="utf-8")
    return manifest


def downloaded(order: Order, progress: bool = False) -> Order:
    """The order with folders in place of references to the Hub; nothing is downloaded but headers
    where these show that no merge is made."""
    if not any(reference_of(place) for place in (order.base, *order.experts.values())):
        return order
    report, _ = check_places(order.base, order.experts)
    refuse_errors(report)
    base = local(order.base, progress=progress)
    experts = {name: local(place, progress=progress) for name, place in order.experts.items()}
    return replace(order, base=base, experts=experts)


def check_calibration(order: Order, method: str) -> None:
    """Refused unless there is calibration for every expert where the method needs it, and none
    where it does not."""
    check_names("--calibration", order.calibration, order.experts)
    check_names("--column", order.columns, order.experts)
    if method in CALIBRATED:
        cure = "or choose a method that needs none"
        check_all_named(order.calibration, order.experts, method, cure)
    if method in WEIGHTS_ONLY and order.calibration:
        cure = f"leave it out, or choose one of {', '.join(CALIBRATED)}"
        raise Refused("--calibration", f"none, as {method} looks at weights only", "some", cure)
    check_sizes(order, "samples", "max_length", "batch_size")


def check_sizes(order, *fields: str) -> None:
    """Refused where one of these fields of an order is below one."""
    for name in fields:
        value = getattr(order, name)
        if value < 1:
            option = f"--{name.replace('_', '-')}"
            raise Refused(option, "a whole number from 1 on", f"{value}", "give one")


def check_all_named(
    calibration: Iterable[str], experts: Iterable[str], user: str, other_cure: str
) -> None:
    """Refused for an expert without calibration; ``user`` is what needs it."""
    given = list(calibration)
    missing = [name for name in experts if name not in given]
    if missing:
        lacking = f"none for {', '.join(map(repr, missing))}"
        cure = f"add --calibration {missing[0]}=FILE, {other_cure}"
        raise Refused("--calibration", f"a file for every expert, for {user}", lacking, cure)


def check_moments(order: Order, method: str) -> None:
    """Refused unless there are moments for every expert, nothing beside them, and a method that
    needs no more."""
    if order.calibration:
        cure = "leave one of them out: moments stand in for the data"
        raise Refused("--moments", "no --calibration beside them", "both", cure)
    check_names("--moments", order.moments, order.experts)
    missing = [name for name in order.experts if name not in order.moments]
    if missing:
        found = f"none for {', '.join(map(repr, missing))}"
        cure = f"add --moments {missing[0]}=FILE, which qpmerge moments writes"
        raise Refused("--moments", "a file for every expert", found, cure)
    if method not in FROM_MOMENTS:
        expected = f"one of {', '.join(FROM_MOMENTS)}, which moments are enough for"
        cure = "choose one of them, or leave --moments out"
        raise Refused("--method", expected, repr(method), cure)
    for name in order.options:
        if name in SETTLED:
            expected = f"none of {', '.join(SETTLED)}, which moments have settled"
            cure = "leave it out: inputs are the experts' own"
            raise Refused("--option", expected, repr(name), cure)


def check_names(option: str, names: Iterable[str], experts: Mapping[str, Path]) -> None:
    """Refused for a name that no expert has."""
    for name in names:
        if name not in experts:
            known = ", ".join(experts)
            cure = "name an expert as it is called, NAME=FILE"
            raise Refused(option, f"one of the experts ({known})", repr(name), cure)


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
        from .by_moments import merged_layers

        return merged_layers(base, experts, moments, method, order.options)
    if inputs is None:
        from .weights_only import merged_groups

        return merged_groups(base, experts, method, order.options)
    return _one_merge(order, method, report, inputs, progress)


def _written(
    method: str, report: Report, merges: Iterable[Merge], folder: Path, progress: bool
) -> dict:
    """Write the merged weights; entries of the manifest that only the merge knows."""
    from tqdm import tqdm

    from .tensors import Shards

    base = report.base
    shards = Shards(folder, base.headers)
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
    from .feeds import feed

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


def without_time(row: Mapping) -> dict:
    """A row of a merge's table but for how long its layer took, which is never the same."""
    return {name: value for name, value in row.items() if name != "seconds"}


def choice_of(merge) -> dict | None:
    """How ``auto`` chose: name, criterion and candidates; None for other methods."""
    if not hasattr(merge, "chosen"):
        return None
    named = {"chosen": merge.chosen, "criterion": merge.criterion}
    return named | {"candidates": merge.candidates}


def _manifest(
    order: Order,
    method: str,
    why: str,
    report: Report,
    inputs: Feed | None,
    moments: Mapping[str, Sequence[MomentsFile]],
) -> dict:
    """What was merged and how, without a path or a date: the same order has the same manifest."""
    runs = inputs is not None
    models = [input_of(report.base, (*OTHERS, *TOKENIZER))]
    for expert in report.experts:
        models.append(input_of(expert, (expert.config_file, *(READERS if runs else ()))))
    return {
        "manifest": 1,
        "versions": versions(runs),
        "method": method,
        "why": why,
        "options": order.options,
        "inputs": models,
        "calibration": {} if inputs is None else _calibration(order, inputs),
        "moments": {name: _measured(files) for name, files in moments.items()},
        "warnings": warnings_of(report),
        "notes": [] if inputs is None else inputs.notes,
    }


def _calibration(order: Order, inputs: Feed) -> dict[str, dict]:
    """What every expert was calibrated on, by its name."""
    said = {}
    for name, source in inputs.sources.items():
        said[name] = source.as_json()
        said[name] |= {"max_length": order.max_length, "batch_size": order.batch_size}
    return said


def _measured(files: Sequence[MomentsFile]) -> list[dict]:
    """Name and hash of an expert's files of moments, and what they say of themselves."""
    return [{"file": f.path.name, "sha256": sha256(f.path)} | f.about for f in files]


def warnings_of(report: Report) -> list[dict]:
    """Warnings of a report, with names of checkpoints in place of their paths."""
    rows = []
    for finding in report.at(WARNING):
        row = asdict(finding)
        for checkpoint in (report.base, *report.experts):
            row["where"] = row["where"].replace(str(checkpoint.folder), checkpoint.name)
        rows.append(row)
    return rows


def input_of(checkpoint: Checkpoint, patterns: Sequence[str]) -> dict:
    """Name, origin and hashes of one checkpoint; of its files besides weights, those that fit."""
    names = [*checkpoint.headers, *checkpoint.matching(patterns)]
    if checkpoint.is_sharded:
        names.append(INDEX)
    files = {name: sha256(checkpoint.folder / name) for name in sorted(names)}
    return {"name": checkpoint.name, **origin_of(checkpoint.folder), "files": files}
