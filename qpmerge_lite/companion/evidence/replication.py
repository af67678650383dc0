"""Rows that this run measured, compared number by number with the committed ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...errors import MergeError
from ..experiments.merge_specs import BAD
from .units import RENEW

# A chosen option may change where two were as good, without anything that it leads to changing; and
# what it is chosen by may be a mean over a few inputs of which some weigh very much.
CHOSEN = ("options", "scores", "ridge", "chosen", "divergence")
# Where another option was chosen, only how good that is has to agree.
QUALITY = ("accuracy", "normalised", "validation", "test")
# Where experts are trained in float32, another processor or another number of threads gives
# slightly different ones. Of a number, or of one where that is larger than the number.
TOLERANCE = 0.05


class ReplicationError(MergeError):
    """A part of the evidence that this run measured again and found otherwise."""


def compared(live, stored, where: str) -> list[float]:
    """Differences between the numbers of rows and of the committed rows of the same problems, of
    numbers above one relative to them.

    Raises: ReplicationError at the first that is out of tolerance, or where the two have not the
        same form.
    """
    problems = {row.get("problem") for row in live}
    return list(_differences(live, [r for r in stored if r.get("problem") in problems], where))


def _differences(live, stored, where: str) -> Iterator[float]:
    """Walks through two values of like form."""
    if isinstance(live, dict) and isinstance(stored, dict):
        if live.keys() != stored.keys():
            odd = ", ".join(sorted(live.keys() ^ stored.keys()))
            raise _error(where, f"the same entries, found {odd} on one side only")
        for key in [key for key in live if _has_to_agree(key, live, stored)]:
            yield from _differences(live[key], stored[key], f"{where}, {key}")
    elif isinstance(live, list) and isinstance(stored, list):
        live, stored = ([row for row in rows if _is_held(row)] for rows in (live, stored))
        if len(live) != len(stored):
            raise _error(where, f"{len(stored)} entries, found {len(live)}")
        for number, (one, other) in enumerate(zip(live, stored, strict=True)):
            yield from _differences(one, other, f"{where}, {_name(one, number)}")
    elif _is_number(live) and _is_number(stored):
        difference = abs(live - stored) / max(1.0, abs(stored))
        if not difference <= TOLERANCE:
            raise _error(where, f"{stored:.6g} within {TOLERANCE:g}, found {live:.6g}")
        yield difference
    elif _are_flags(live, stored):
        share = sum(one != other for one, other in zip(live, stored, strict=True)) / len(live)
        if not share <= TOLERANCE:
            raise _error(where, f"the same examples right within {TOLERANCE:g}, found {share:.2g}")
        yield share
    elif live != stored:
        raise _error(where, f"{stored!r}, found {live!r}")


def _has_to_agree(key: str, live: dict, stored: dict) -> bool:
    """Whether two rows have to agree in an entry.

    Rows of other options have to be of one quality only. So do the steps of a path from a merge
    that validation chose, which do not say what was chosen: a ``ridge`` with its ``validation``
    accuracy and energies in sample, ``calibration``, and ``disjoint``.
    """
    is_step = {"ridge", "calibration", "disjoint"} <= live.keys()
    if is_step or live.get("options") != stored.get("options"):
        return key in QUALITY
    return key not in CHOSEN


def _is_held(row) -> bool:
    """Whether a row is no merge that rounding decides: one without a ridge, or made to be bad."""
    if not isinstance(row, dict):
        return True
    free = row.get("method") == "lot" or (row.get("options") or {}).get("ridge") == 0.0
    return not free and row.get("kind") != BAD


def _error(where: str, wanted: str) -> ReplicationError:
    return ReplicationError(
        f"{where}: expected, as in the committed evidence, {wanted}. Either the code changed what "
        f"is measured, or this machine computes otherwise; if the new number is right, renew the "
        f"evidence of this tier with `{RENEW}` and say why in the commit"
    )


def _name(row, number: int) -> str:
    """What a row is called in messages."""
    if isinstance(row, dict):
        for key in ("method", "layer", "choice", "start", "label"):
            if key in row:
                return str(row[key])
    return str(number)


def _are_flags(live, stored) -> bool:
    """Whether both say of as many examples which were right, as a string of 0 and 1."""
    if not (isinstance(live, str) and isinstance(stored, str)) or len(live) != len(stored):
        return False
    return bool(live) and set(live + stored) <= {"0", "1"}


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
