"""The files of the evidence: rows of one experiment on one suite and seed, the settings that they
were measured under, and where they come from."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...errors import MergeError
from ..experiments.cache import sources
from ..paths import HOME
from ..plans import plan
from ..records import provenance

SCHEMA = 1
DIGITS = 5  # significant ones of what is stored
# What no other run can repeat, or what only the build that made it shows.
PASSING = ("seconds", "tables")
RENEW = "qpmerge book evidence --tier TIER"


class Place(NamedTuple):
    """What decides which definition of a suite is meant: its name and the tier of its data."""

    name: str
    tier: str


def folder(tier: str) -> Path:
    """Where the units of a tier are, a folder per experiment inside."""
    return Path(os.environ.get("QPMERGE_EVIDENCE") or HOME / "book" / "recorded") / tier


def path_of(measure: Callable, suite: str, seed: int, tier: str) -> Path:
    """File of one unit."""
    return folder(tier) / measure.__name__ / f"{suite}-{seed}.json.xz"


def committed(measure: Callable, suite: str, tier: str, settings: dict) -> dict[int, dict]:
    """Seed -> unit of what is committed of an experiment for runs of a tier, under the very
    settings."""
    source = plan(tier).evidence
    if source is None:
        return {}
    units = {}
    for path in (folder(source) / measure.__name__).glob(f"{suite}-*.json.xz"):
        unit = read(path)
        if unit["settings"] == _plain(settings):
            units[unit["seed"]] = unit
    return dict(sorted(units.items()))


def write(measure: Callable, suite: str, seed: int, tier: str, device, settings: dict) -> Path:
    """Measure one unit and file it: written under a temporary name, then renamed."""
    rows = portable(measure(suite, seed, tier, device, **settings))
    unit = {
        "schema": SCHEMA,
        "experiment": measure.__name__,
        "suite": suite,
        "seed": seed,
        "settings": _plain(settings),
        "code": code(measure, suite, tier),
        "provenance": provenance(device),
        "rows": rows,
    }
    path = path_of(measure, suite, seed, tier)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(unit, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    partial.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    os.replace(partial, path)
    return path


def read(path: Path) -> dict:
    """A unit. Raises: MergeError for a file that is none, with what to do."""
    try:
        unit = json.loads(lzma.decompress(path.read_bytes()))
    except (lzma.LZMAError, json.JSONDecodeError) as error:
        raise MergeError(
            f"{path.name}: not a unit of evidence ({error}); delete it and run: {RENEW}"
        ) from error
    if unit.get("schema") != SCHEMA:
        schema = unit.get("schema")
        raise MergeError(f"{path.name}: expected schema {SCHEMA}, found {schema}; run: {RENEW}")
    return unit


def why_due(measure: Callable, suite: str, seed: int, tier: str, settings: dict) -> str:
    """Why a unit is to be measured; empty for one that is there, under these settings and by the
    code as it is."""
    path = path_of(measure, suite, seed, tier)
    if not path.is_file():
        return "missing"
    unit = read(path)
    if unit["settings"] != _plain(settings):
        return "measured under other settings"
    if unit["code"] != code(measure, suite, tier):
        return f"measured by other code, on {unit['provenance']['date'][:10]}"
    return ""


def code(measure: Callable, suite: str, tier: str) -> str:
    """SHA-256 of the modules that the rows of an experiment hang on: those that its module
    imports, and the suite's definition."""
    return sources(Place(suite, plan(tier).data), measure)


def portable(value):
    """Rows as they are stored: numbers to ``DIGITS`` significant digits, without what is
    ``PASSING``."""
    if isinstance(value, dict):
        return {str(k): portable(v) for k, v in value.items() if k not in PASSING}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return value


def _plain(settings: dict) -> dict:
    """Settings as JSON gives them back."""
    return json.loads(json.dumps(settings))
