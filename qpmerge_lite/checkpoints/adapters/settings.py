"""The configuration of an adapter of peft: what of it is computed with, and what is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from math import sqrt
from pathlib import Path

from ..findings import ERROR, Finding

# fields of the configuration whose meaning is computed with
USED = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "use_dora",
    "bias",
    "lora_bias",
    "init_lora_weights",
    "trainable_token_indices",
)
# fields that say where the adapter came from, how it was trained, or what its file shows anyhow
BOOKKEEPING = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # that leave the base alone
FOLD = "fold it into its model with peft's merge_and_unload(), save that, and name its folder"


def settings_errors(where: Path, settings: Mapping) -> list[Finding]:
    """An error for every field of adapter_config.json that asks for what is not folded here."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        return [Finding(ERROR, f"{where}, peft_type", "'LORA'", repr(kind), FOLD)]
    errors = []
    for name, value in settings.items():
        if value and name not in (*USED, *BOOKKEEPING):
            place, found = f"{where}, {name}", f"{value!r:.80}"
            errors.append(Finding(ERROR, place, "no such field, or an empty one", found, FOLD))
    for name, (expected, fits) in FIELDS.items():
        value = settings.get(name)
        if name in settings and not fits(value):
            errors.append(Finding(ERROR, f"{where}, {name}", expected, f"{value!r:.80}", FOLD))
    return errors


def _is_number(value) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _is_rank(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_flag(value) -> bool:
    return value is None or isinstance(value, bool)


def _is_bias(value) -> bool:
    return value in ("none", "all", "lora_only")


def _is_start(value) -> bool:
    return isinstance(value, (bool, str, type(None))) and value in STARTS


def _are_ranks(value) -> bool:
    return value is None or _is_pattern(value) and all(map(_is_rank, value.values()))


def _are_alphas(value) -> bool:
    return value is None or _is_pattern(value) and all(map(_is_number, value.values()))


def _is_pattern(value) -> bool:
    """Whether it maps what ``re`` understands."""
    if not isinstance(value, dict):
        return False
    try:
        for pattern in value:
            re.compile(pattern)
    except re.error:
        return False
    return True


def _are_rows(value) -> bool:
    """Whether it lists rows, or those of several layers by name."""
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return value is None or all(isinstance(rows, list) and _all_rows(rows) for rows in lists)


def _all_rows(rows: list) -> bool:
    return all(isinstance(row, int) and row >= 0 for row in rows) and len({*rows}) == len(rows)


FIELDS = {  # field -> what it has to be, in words and as a function
    "r": ("a whole number from 1 on", _is_rank),
    "lora_alpha": ("a finite number", _is_number),
    "use_rslora": ("true or false", _is_flag),
    "use_dora": ("true or false", _is_flag),
    "lora_bias": ("true or false", _is_flag),
    "fan_in_fan_out": ("true or false", _is_flag),
    "bias": ("'none', 'all' or 'lora_only'", _is_bias),
    "rank_pattern": ("patterns of names and their ranks", _are_ranks),
    "alpha_pattern": ("patterns of names and their alphas", _are_alphas),
    "trainable_token_indices": ("different rows, or such by name", _are_rows),
    "init_lora_weights": ("a start that leaves the base as it is", _is_start),
}


def scale_of(settings: Mapping, module: str) -> float:
    """What peft multiplies the update of a layer by."""
    alpha = of_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8))
    rank = rank_of(settings, module)
    return alpha / (sqrt(rank) if settings.get("use_rslora") else rank)


def rank_of(settings: Mapping, module: str) -> int:
    """The rank that a layer's update has by the configuration."""
    return of_pattern(settings.get("rank_pattern"), module, settings.get("r", 8))


def of_pattern(patterns: Mapping | None, module: str, default):
    """The value of the first pattern that fits the end of a layer's name, or the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def indices_of(settings: Mapping, module: str) -> list[int]:
    """Rows that the configuration says to be trained in an embedding."""
    given = settings.get("trainable_token_indices") or []
    if isinstance(given, list):
        return given
    found = (rows for name, rows in given.items() if f".{module}".endswith(f".{name}"))
    return next(found, [])
