"""What is written down of a merge: its inputs with their hashes, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from .compatibility import Report
from .digests import sha256
from .findings import WARNING
from .folders import INDEX, OTHERS, TOKENIZER, Checkpoint
from .hub import origin_of
from .moments.files import MomentsFile
from .output import versions
from .planning import READERS, Plan

if TYPE_CHECKING:
    pass


def manifest_of(plan: Plan) -> dict:
    """What was merged and how, without a path or a date: the same order has the same manifest."""
    order, report, inputs = plan.order, plan.report, plan.inputs
    runs = inputs is not None
    models = [input_of(report.base, (*OTHERS, *TOKENIZER))]
    for expert in report.experts:
        others = READERS if runs or report.heads else ()
        models.append(input_of(expert, (expert.config_file, *others)))
    shared = {"processes": str(plan.processes)} if plan.processes > 1 else {}
    return {
        "manifest": 1,
        "versions": versions(runs) | shared,
        "method": plan.method,
        "why": plan.why,
        "options": order.options,
        "recipe": order.recipe and order.recipe.as_json(order.random_seed),
        "inputs": models,
        "calibration": {} if inputs is None else inputs.as_json(),
        "moments": {name: _measured(files) for name, files in plan.moments.items()},
        "heads": {},
        "kept": report.kept,
        "warnings": warnings_of(report),
        "notes": [] if inputs is None else inputs.notes,
    }


def _measured(files: Sequence[MomentsFile]) -> list[dict]:
    """Name and hash of an expert's files of moments, and what they say of themselves."""
    return [{"file": f.path.name, "sha256": sha256(f.path)} | f.about for f in files]


def warnings_of(report: Report) -> list[dict]:
    """Warnings of a report, with names of checkpoints in place of their paths."""
    rows = []
    for finding in report.at(WARNING):
        where = finding.where
        for checkpoint in (report.base, *report.experts):
            where = _within(checkpoint, where)
        rows.append(asdict(replace(finding, where=where)))
    return rows


def _within(checkpoint: Checkpoint, where: str) -> str:
    """A place in a checkpoint's folder with its name in place of the folder; others as they are."""
    folder = str(checkpoint.folder)
    behind = where.removeprefix(folder)
    is_in_it = where.startswith(folder) and behind[:1] in ("", "/", ",")
    return checkpoint.name + behind if is_in_it else where


def input_of(checkpoint: Checkpoint, patterns: Sequence[str]) -> dict:
    """Name, origin and hashes of one checkpoint; of its files besides weights, those that fit."""
    names = checkpoint.matching(patterns)
    if checkpoint.is_sharded:
        names.append(INDEX)
    digests = {name: sha256(checkpoint.folder / name) for name in names}
    digests |= {name: digest.finish() for name, digest in checkpoint.digests.items()}
    files = dict(sorted(digests.items()))
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
