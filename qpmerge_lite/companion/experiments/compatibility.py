"""What a merge keeps on published architectures (copies, batches, padding), and what it solves.

Every property holds for any weights or for none, so models are tiny and random
(``small_problems``).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...errors import MergeError
from ...methods import qp
from .architectures import ARCHITECTURES
from .small_problems import TASKS, Problem, padded, problem, quiet

SIDES = ("right", "left")
TOLERANCE = {"float64": 1e-6, "float32": 1e-4}  # relative, by the precision of the model
HOLDS, FAILS, REFUSED = "holds", "fails", "refused"
THE_MODELS_OWN = "the model's own"  # its output changes too
WITHOUT = "no mask"


def deviation(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest over parameters, of shapes (…), of ``max|one - other| / max|other|``."""
    largest = 0.0
    for name, value in other.items():
        if value.is_floating_point() or value.is_complex():
            scale = float(value.abs().max()) if value.numel() else 0.0
            difference = float((one[name] - value).abs().max()) if value.numel() else 0.0
            largest = max(largest, difference / scale if scale else difference)
    return largest


def merge(case: Problem, calibration=None, experts=None, **options):
    """The unrestricted programme with a small fixed ridge, which no order of sequences touches."""
    options = {"basis": "elements", "ridge": 0.01, "folds": 1, **options}
    calibration = case.calibration if calibration is None else calibration
    return qp(case.base, case.experts if experts is None else experts, calibration, **options)


def copies_come_back(case: Problem) -> float:
    """Deviation of the merge of equal experts from them; there is no ridge, and no prior."""
    expert = case.experts[TASKS[0]]
    merged = merge(case, experts=dict.fromkeys(TASKS, expert), basis="rows", ridge=0.0, prior=0.0)
    return deviation(merged.state_dict, expert)


def reversed_and_split(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches (B, …) as batches of one sequence each, (1, …), the last one first."""
    split = []
    for batch in batches:
        rows = zip(*(value.split(1) for value in batch.values()))
        split += [dict(zip(batch, row)) for row in rows]
    return split[::-1]


@torch.no_grad()
def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The first tensor that a model returns for a batch (B, …), (B, …); where it has one row per
    token, those that are no padding, (N, d)."""
    outputs = model(**batch)
    first = outputs if isinstance(outputs, Tensor) else outputs.to_tuple()[0]
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    return first[mask.bool()] if first.shape[:2] == mask.shape else first


def own_change(case: Problem, side: str) -> float:
    """Largest relative change of the base's own output when its batches are padded on that side.

    Infinite where the padded batch gives NaN, as rows do that attend to padding only.
    """
    largest = 0.0
    for batches in case.calibration.values():
        for batch in batches:
            alone = output(case.base, batch)
            change = output(case.base, padded(case.base, batch, side)) - alone
            relative = float(change.abs().max() / alone.abs().max())
            largest = max(largest, relative) if math.isfinite(relative) else math.inf
    return largest


def shares(base: nn.Module, merged) -> dict:
    """Shares of the parameters that were ``solved``, ``averaged`` or ``untouched``, and the most
    common ``reason`` to average, all by number of entries."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    layers = {row["layer"] for row in merged.table}
    counts, reasons = Counter(), Counter()
    for parameter in base.parameters():
        aliases = names[id(parameter)]
        listed = [name for name in aliases if name in merged.averaged]
        if listed:
            counts["averaged"] += parameter.numel()
            reasons[merged.averaged[listed[0]]] += parameter.numel()
        elif any(name.rpartition(".")[0] in layers for name in aliases):
            counts["solved"] += parameter.numel()
        else:
            counts["untouched"] += parameter.numel()
    total = sum(counts.values())
    shares = {kind: counts[kind] / total for kind in ("solved", "averaged", "untouched")}
    return {**shares, "reason": reasons.most_common(1)[0][0] if reasons else ""}


# ----------------------------------------------------------------------------------- table


def check(name: str, seed: int = 0, device: str = "cpu") -> dict:
    """All properties of one architecture.

    Returns: a row with ``architecture``, ``group``, ``dtype``, ``layers`` (solved), ``copies``
        (deviation of the merge of equal experts from them), ``batches`` (change of the merge when
        they are reversed and split), ``right`` and ``left`` (change when padding is added there),
        ``right_model`` and ``left_model`` (that of the model's own output), the shares of
        :func:`shares`, and ``seconds``. What was not asked is None; ``refused``, ``right_refused``
        and ``left_refused`` are the messages of refusals, empty where there was none.
    Raises: MergeError for a name that is not in the registry.
    """
    started = time.perf_counter()
    with quiet():
        case = problem(name, seed, device)
        row = _empty_row(name, next(case.base.parameters()).dtype)
        try:
            reference = merge(case)
            row["copies"] = copies_come_back(case)
            row["batches"] = _change_of_batches(case, reference)
        except MergeError as error:
            row["refused"] = str(error)
        else:
            row |= {"layers": len(reference.table), **shares(case.base, reference)}
            for side in SIDES:
                row |= _padding(case, reference, side)
    return row | {"seconds": time.perf_counter() - started}


def _empty_row(name: str, dtype: torch.dtype) -> dict:
    row = {
        "architecture": name,
        "group": ARCHITECTURES[name].group,
        "dtype": str(dtype).removeprefix("torch."),
    }
    measured = ("layers", "copies", "batches", "solved", "averaged", "untouched")
    row |= dict.fromkeys((*measured, *SIDES, *(f"{side}_model" for side in SIDES)))
    return row | {"refused": "", "right_refused": "", "left_refused": "", "reason": ""}


def _change_of_batches(case: Problem, reference) -> float:
    other = {task: reversed_and_split(batches) for task, batches in case.calibration.items()}
    return deviation(merge(case, other).state_dict, reference.state_dict)


def _padding(case: Problem, reference, side: str) -> dict:
    if not any("mask" in key for key in case.calibration[TASKS[0]][0]):
        return {}
    longer = {}
    for task, batches in case.calibration.items():
        longer[task] = [padded(case.base, batch, side) for batch in batches]
    result = {f"{side}_model": own_change(case, side)}
    try:
        result[side] = deviation(merge(case, longer).state_dict, reference.state_dict)
    except MergeError as error:
        result[f"{side}_refused"] = str(error)
    return result


def table(
    names: Iterable[str] = ARCHITECTURES, seed: int = 0, device: str = "cpu", progress: bool = False
) -> list[dict]:
    """One row of :func:`check` per architecture, all by default."""
    bar = tqdm(list(names), desc="architectures", disable=not progress)
    return [check(name, seed, device) for name in bar]


def verdict(row: dict, what: str) -> str:
    """One word for a property of a row: ``copies``, ``batches``, ``right`` or ``left``."""
    tolerance = TOLERANCE[row["dtype"]]
    own = row.get(f"{what}_model")
    if row["refused"]:
        return REFUSED
    if own is not None and own > tolerance:
        return THE_MODELS_OWN
    if row.get(f"{what}_refused"):
        return REFUSED
    if row[what] is None:
        return WITHOUT
    return HOLDS if row[what] <= tolerance else FAILS


def slug(group: str) -> str:
    """A group's name as part of a record's id."""
    return group.lower().replace(" ", "_").replace("-", "_")


def groups(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Rows by group, in the order of the registry."""
    by_group: dict[str, list[dict]] = {}
    for row in rows:
        by_group.setdefault(row["group"], []).append(row)
    return by_group


def record_table(record, rows: list[dict]) -> None:
    """Record what holds for how many architectures, by how much, and the shares of every group."""
    merged = [row for row in rows if not row["refused"]]
    record("compatibility.architectures", len(rows))
    record("compatibility.merged", len(merged), n=len(rows))
    for what in ("copies", "batches", *SIDES):
        verdicts = Counter(verdict(row, what) for row in rows)
        asked = len(rows) - verdicts[WITHOUT]
        record(f"compatibility.{what}.asked", asked)
        record(f"compatibility.{what}.holds", verdicts[HOLDS], n=asked)
        record(f"compatibility.{what}.own", verdicts[THE_MODELS_OWN], n=asked)
        record(f"compatibility.{what}.fails", verdicts[FAILS], n=asked)
        measured = [row[what] for row in rows if verdict(row, what) in (HOLDS, FAILS)]
        largest = max(measured, default=0.0)
        record(f"compatibility.{what}.largest", largest, n=asked, note="relative")
    untouched = sum(row["untouched"] > 0 for row in merged)
    record("compatibility.untouched", untouched, note="architectures with untouched parameters")
    record("compatibility.fully_solved", sum(row["solved"] == 1 for row in merged))
    for group, part in groups(merged).items():
        for kind in ("solved", "averaged"):
            share = sum(row[kind] for row in part) / len(part)
            record(f"compatibility.{slug(group)}.{kind}", share, n=len(part), note="of parameters")


# ----------------------------------------------------------------------------------- pages


def shown(rows: Iterable[dict], group: str) -> pd.DataFrame:
    """The rows of a group for a reader: deviations, or a word where there is none to show, and a
    dash where there is nothing to say."""
    columns: dict[str, dict] = {}
    for row in rows:
        if row["group"] == group:
            columns[row["architecture"]] = {
                "layers": row["layers"],
                "copies": _cell(row, "copies"),
                "batches": _cell(row, "batches"),
                "padding right": _cell(row, "right"),
                "padding left": _cell(row, "left"),
                "solved": _share(row["solved"]),
                "averaged": _share(row["averaged"]),
                "mostly because": row["refused"] or row["reason"],
            }
    return pd.DataFrame(columns).T.replace("", "—")


def _cell(row: dict, what: str) -> str:
    word = verdict(row, what)
    return f"{row[what]:.0e}" if word in (HOLDS, FAILS) else word


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def bars(rows: Iterable[dict]) -> tuple[dict, dict]:
    """What ``figures.bars`` draws: group -> names, and group -> part -> their shares."""
    names, panels = {}, {}
    for group, part in groups(row for row in rows if not row["refused"]).items():
        names[group] = [row["architecture"] for row in part]
        panels[group] = {}
        for kind in ("solved", "averaged", "untouched"):
            panels[group][kind] = [row[kind] for row in part]
    return names, panels
