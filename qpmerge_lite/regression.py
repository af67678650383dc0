"""Regression: fresh records against the expected ones, each under its own kind of tolerance."""

from dataclasses import dataclass
from pathlib import Path

from .errors import MergeError
from .records import load_records, read_json, repository, write_json

DEFAULTS = {
    "exact": ("exact", None, "a count, a word or a truth value: the same on every machine"),
    "interval": ("interval", None, "the fresh interval has to meet the expected one"),
    "float": ("relative", 1e-3, "same code and seed; another BLAS may round differently"),
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
    """Findings of the records of a tier against ``tests/expected/<tier>``; an empty list means agreement.

    Args:
        only: beginning of the notebooks' names; default all.
    """
    root = Path(root or repository())
    fresh = _chosen(load_records(tier, root / "book" / "_records"), only)
    expected = load_expected(tier, root, only)
    findings = [Finding(i, e["notebook"], "missing: expected, but not recorded") for i, e in expected.items() if i not in fresh]
    findings += [Finding(i, r.notebook, "extra: recorded, but not expected") for i, r in fresh.items() if i not in expected]
    for id in sorted(set(fresh) & set(expected)):
        problem = disagreement(fresh[id], expected[id])
        if problem:
            findings.append(Finding(id, fresh[id].notebook, problem))
    return findings


def load_expected(tier, root, only=None):
    """``{id: expectation}`` of ``tests/expected/<tier>/*.json``, each with the notebook it belongs to."""
    expected = {}
    for path in sorted((Path(root) / "tests" / "expected" / tier).glob("*.json")):
        if only is None or path.stem.startswith(only):
            for id, entry in read_json(path).items():
                missing = {"value", "tolerance", "why"} - set(entry)
                if missing:
                    raise RegressionError(f"{path.name}: {id} lacks {', '.join(sorted(missing))}")
                expected[id] = entry | {"notebook": path.stem}
    return expected


def disagreement(record, expected):
    """Why a record is outside its expectation, in words; None when it is inside."""
    kind, by = expected["tolerance"]["kind"], expected["tolerance"].get("by")
    if kind not in JUDGES:
        raise RegressionError(f"{record.id}: tolerance {kind!r}; expected one of {', '.join(JUDGES)}")
    if JUDGES[kind](record, expected, by):
        return None
    shown = f"[{record.interval[0]:.6g}, {record.interval[1]:.6g}]" if kind == "interval" else repr(record.value)
    aim = expected.get("interval") if kind == "interval" else by if kind.startswith("at_") else expected["value"]
    within = f" within {by:g}" if kind in ("relative", "absolute") else ""
    return f"found {shown}, expected {kind.replace('_', ' ')} {aim!r}{within} ({expected['why']})"


def _overlap(record, expected, by):
    low, high = expected["interval"]
    return record.interval is not None and record.interval[0] <= high and low <= record.interval[1]


JUDGES = {
    "exact": lambda r, e, by: type(r.value) is type(e["value"]) and r.value == e["value"],
    "relative": lambda r, e, by: abs(r.value - e["value"]) <= by * abs(e["value"]),
    "absolute": lambda r, e, by: abs(r.value - e["value"]) <= by,
    "interval": _overlap,
    "at_least": lambda r, e, by: r.value >= by,
    "at_most": lambda r, e, by: r.value <= by,
}


def update(tier="smoke", root=None, only=None):
    """Write the fresh values as the expected ones; tolerances and reasons stay, new ids get the default of their type.

    Returns: paths written.
    """
    root = Path(root or repository())
    fresh = _chosen(load_records(tier, root / "book" / "_records"), only)
    known = load_expected(tier, root, only)
    folder = root / "tests" / "expected" / tier
    files = {}
    for id, record in fresh.items():
        entry = {"value": record.value} | ({"interval": list(record.interval)} if record.interval else {})
        old = known.get(id)
        entry |= {key: old[key] for key in ("tolerance", "why")} if old else _default(record)
        files.setdefault(record.notebook, {})[id] = entry
    for name in {entry["notebook"] for entry in known.values()} - set(files):
        (folder / f"{name}.json").unlink()
    for name, entries in files.items():
        write_json(folder / f"{name}.json", entries)
    return [folder / f"{name}.json" for name in sorted(files)]


def _default(record):
    key = "exact" if not isinstance(record.value, float) else "interval" if record.interval else "float"
    kind, by, why = DEFAULTS[key]
    return {"tolerance": {"kind": kind} | ({"by": by} if by is not None else {}), "why": why}


def _chosen(records, only):
    return {id: r for id, r in records.items() if only is None or r.notebook.startswith(only)}
