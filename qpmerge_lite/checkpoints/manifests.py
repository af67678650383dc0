"""What is written down of a merge: its inputs with their hashes, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from .compatibility import Report
from .findings import WARNING
from .folders import INDEX, OTHERS, TOKENIZER, Checkpoint, sha256
from .hub import origin_of
from .moments.files import MomentsFile
from .orders import Order
from .output import versions

if TYPE_CHECKING:
    from .calibration.feeds import Feed

READERS = (*TOKENIZER, "preprocessor_config.json", "processor_config.json")


def manifest_of(
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
        "recipe": order.recipe and order.recipe.as_json(order.random_seed),
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


def without_time(row: Mapping) -> dict:
    """A row of a merge's table but for how long its layer took, which is never the same."""
    return {name: value for name, value in row.items() if name != "seconds"}


def choice_of(merge) -> dict | None:
    """How ``auto`` chose: name, criterion and candidates; None for other methods."""
    if not hasattr(merge, "chosen"):
        return None
    named = {"chosen": merge.chosen, "criterion": merge.criterion}
    return named | {"candidates": merge.candidates}
