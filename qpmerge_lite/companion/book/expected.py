"""Regression: fresh records against the expected ones, each under its own kind of tolerance."""

from dataclasses import dataclass
from pathlib import Path

from ...errors import MergeError
from ..paths import records_folder, repository
from ..records import load_records, read_json, write_json

ROUNDING = 1e-6  # a smaller value is what rounding left of zero
TRAINED = (
    "vision.",
    "language.",
    "single.",
    "sequential.",
    "diagnostic.",
    "points.",
    "trial.",
    "calibration.",
    "auto.",
    "checkpoints.",
)  # ids of results that hang on experts trained in float32
DEFAULTS = {
    "exact": (None, "a count or a truth value: the same on every machine"),
    "present": (None, "names the winner; winners within their intervals may change places"),
    "interval": (None, "the fresh interval has to meet the expected one"),
    "relative": (1e-3, "same code and seed; another BLAS may round differently"),
    "trained": (0.1, "experts are trained in float32; another CPU trains slightly different ones"),
    "at_most": (ROUNDING, "rounding error"),
    "absolute": (ROUNDING, "rounding error"),
}


class RegressionError(MergeError):
    """An expectation that is malformed."""


@dataclass(frozen=True)
class Finding:
    """One id that does not agree: ``missing``, ``extra``, or outside its tolerance."""

    id: str
    notebook: str
    problem: str


def compare(tier="smoke", root=None, only=None):
    """Findings of the records of a tier against ``tests/expected/<tier>``; an empty list means
    agreement.

    Args:
        only: beginning of the notebooks' names; default all.
    """
    root = Path(root or repository())
    fresh = _chosen(load_records(tier, records_folder(root)), only)
    expected = load_expected(tier, root, only)
    findings = [
        Finding(i, e["notebook"], "missing: expected, but not recorded")
        for i, e in expected.items()
        if i not in fresh
    ]
    findings += [
        Finding(i, r.notebook, "extra: recorded, but not expected")
        for i, r in fresh.items()
        if i not in expected
    ]
    for id in sorted(set(fresh) & set(expected)):
        problem = disagreement(fresh[id], expected[id])
        if problem:
            findings.append(Finding(id, fresh[id].notebook, problem))
    return findings


def load_expected(tier, root, only=None):
    """``{id: expectation}`` of ``tests/expected/<tier>/*.json``, each with the notebook it belongs
    to."""
    expected = {}
    for path in sorted((Path(root) / "tests" / "expected" / tier).glob("*.json")):
        if only is None or path.stem.startswith(only):
            for id, entry in read_json(path).items():
                missing = {"value", "tolerance", "why"} - set(entry)
                if entry.get("tolerance", {}).get("kind") == "interval":
                    missing |= {"interval"} - set(entry)
                if missing:
                    raise RegressionError(f"{path.name}: {id} lacks {', '.join(sorted(missing))}")
                expected[id] = entry | {"notebook": path.stem}
    return expected


def disagreement(record, expected):
    """Why a record is outside its expectation, in words; None when it is inside."""
    kind, by = expected["tolerance"]["kind"], expected["tolerance"].get("by")
    if kind not in JUDGES:
        raise RegressionError(
            f"{record.id}: tolerance {kind!r}; expected one of {', '.join(JUDGES)}"
        )
    if _fits(record, kind) and JUDGES[kind](record, expected, by):
        return None
    ends = kind == "interval" and record.interval
    shown = f"[{ends[0]:.6g}, {ends[1]:.6g}]" if ends else repr(record.value)
    wanted = expected.get("interval" if kind == "interval" else "value")
    if kind.startswith("at_"):
        wanted = by
    within = f" within {by:g}" if kind in ("relative", "absolute") else ""
    return (
        f"found {shown}, expected {kind.replace('_', ' ')} {wanted!r}{within} ({expected['why']})"
    )


def _overlap(record, expected, by):
    low, high = expected["interval"]
    return record.interval[0] <= high and low <= record.interval[1]


JUDGES = {
    "exact": lambda r, e, by: type(r.value) is type(e["value"]) and r.value == e["value"],
    "relative": lambda r, e, by: abs(r.value - e["value"]) <= by * abs(e["value"]),
    "absolute": lambda r, e, by: abs(r.value - e["value"]) <= by,
    "present": lambda r, e, by: bool(r.value.strip()),
    "interval": _overlap,
    "at_least": lambda r, e, by: r.value >= by,
    "at_most": lambda r, e, by: r.value <= by,
}


def update(tier="smoke", root=None, only=None):
    """Write the fresh values as the expected ones; ids that are gone go, new ones get the default
    of their type.

    Tolerances and reasons stay, so a bar (``at_least``) that the fresh value misses is still missed
    afterwards. Only a kind that the record no longer has the type or the interval for gives way to
    the default.

    Returns: paths written.
    """
    root = Path(root or repository())
    fresh = _chosen(load_records(tier, records_folder(root)), only)
    known = load_expected(tier, root, only)
    folder = root / "tests" / "expected" / tier
    files = {}
    for id, record in fresh.items():
        entry = {"value": record.value} | (
            {"interval": list(record.interval)} if record.interval else {}
        )
        old = known.get(id)
        stays = old is not None and _fits(record, old["tolerance"]["kind"])
        entry |= {key: old[key] for key in ("tolerance", "why")} if stays else _default(record)
        files.setdefault(record.notebook, {})[id] = entry
    for name in {entry["notebook"] for entry in known.values()} - set(files):
        (folder / f"{name}.json").unlink()
    for name, entries in files.items():
        write_json(folder / f"{name}.json", entries)
    return [folder / f"{name}.json" for name in sorted(files)]


def _fits(record, kind):
    """Whether a record is of the type that a kind of tolerance judges."""
    if kind == "interval":
        return record.interval is not None
    return kind == "exact" or (kind == "present") == isinstance(record.value, str)


def _default(record):
    name = _default_name(record)
    by, why = DEFAULTS[name]
    kind = "relative" if name == "trained" else name
    return {"tolerance": {"kind": kind} | ({"by": by} if by is not None else {}), "why": why}


def _default_name(record):
    if isinstance(record.value, str):
        return "present"
    if record.interval:
        return "interval"
    if not isinstance(record.value, float):
        return "exact"
    if abs(record.value) < ROUNDING:
        return "absolute" if record.value < 0 else "at_most"
    return "trained" if record.id.startswith(TRAINED) else "relative"


def _chosen(records, only):
    return {id: r for id, r in records.items() if only is None or r.notebook.startswith(only)}
