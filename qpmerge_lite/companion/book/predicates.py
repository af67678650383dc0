"""Predicates over recorded intervals: whether they hold, fail or are undecided, and how many more
samples would decide them."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from ...errors import MergeError
from ..records import Record

TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.Gt, ast.LtE: ast.GtE}


class ClaimError(MergeError):
    """A malformed claim; the message names it and the field."""


class Range(NamedTuple):
    """An estimate between the two ends of its interval, and the records that it was made from."""

    value: float
    low: float
    high: float
    records: tuple[Record, ...] = ()

    def __neg__(self) -> Range:
        return Range(-self.value, -self.high, -self.low, self.records)

    def plus(self, other: Range) -> Range:
        """The sum of two estimates; its interval holds every sum of values of theirs."""
        both = self.records + other.records
        return Range(self.value + other.value, self.low + other.low, self.high + other.high, both)


class Standing(NamedTuple):
    """Where a predicate stands on an axis that all claims share.

    Attributes:
        truth: see :func:`evaluate`.
        at, low, high: the estimate and the ends of its interval, as distances from the threshold in
            units of the interval's half width; positive where the predicate is met. Without an
            interval all three are infinite, with the sign of the truth.
        records: that the estimate is made of; of all comparisons that stand there, where there are
            more than one.
    """

    truth: bool | None
    at: float
    low: float
    high: float
    records: tuple[Record, ...] = ()


class Outlook(NamedTuple):
    """What a predicate would come to if its estimates are right.

    Attributes:
        truth: of the predicate at the estimates themselves.
        factor: how many times as many samples decide it, intervals narrowing as one over the root
            of their number; 0 where it is decided, infinite where no number does.
        records: whose intervals are in the way.
    """

    truth: bool
    factor: float
    records: tuple[Record, ...] = ()

    @property
    def samples(self) -> int | None:
        """How many samples would do, from the fewest of its records; None where these do not say
        how many they have."""
        counts = [record.n for record in self.records if record.n is not None]
        return math.ceil(self.factor * min(counts)) if counts else None


def evaluate(predicate: str, records: Mapping[str, Record]) -> bool | None:
    """Three-valued truth of a comparison of intervals: True, False, or None where the intervals
    overlap.

    Ids, numbers, ``+ - < <= > >= ==``, ``and or not`` and parentheses; nothing else is evaluated. A
    record stands for its interval [low, high], or for its value when it has none. ``a >= b`` is
    True when a's low end reaches b's high end, False when a's high end stays below b's low end, and
    None in between.

    Raises: ClaimError for anything else in the expression.
    """
    tree, names = _parsed(predicate, records)
    return _truth(tree, names)


def outlook(
    predicate: str, records: Mapping[str, Record], rounding: Mapping[str, float] | None = None
) -> Outlook:
    """What would decide a predicate, see :class:`Outlook`.

    Args:
        rounding: id -> half a unit of the last digit that is shown of it. An estimate as near as
            that to what it is compared with sits on it, and no number of samples is given.
    Raises: ClaimError as :func:`evaluate` does.
    """
    tree, names = _parsed(predicate, records)
    return _outlook(tree, names, rounding or {})


def standing(predicate: str, records: Mapping[str, Record]) -> Standing:
    """Where the comparison that decides a predicate stands, see :class:`Standing`.

    Of comparisons that all have to be met it is the one furthest from it, of those of which one is
    enough the one nearest to it or furthest beyond.

    Raises: ClaimError as :func:`evaluate` does.
    """
    tree, names = _parsed(predicate, records)
    return _standing(tree, names)


def _parsed(predicate: str, records: Mapping[str, Record]):
    """The syntax tree of a predicate whose ids are replaced by names, and record by name."""
    names = {}
    for number, id in enumerate(sorted(records, key=len, reverse=True)):
        names[f"r{number}"] = records[id]
        predicate = re.sub(rf"(?<![\w.]){re.escape(id)}(?![\w.])", f"r{number}", predicate)
    try:
        return ast.parse(predicate, mode="eval").body, names
    except SyntaxError as error:
        raise ClaimError(f"predicate {predicate!r}: {error.msg}") from error


def _truth(node, names) -> bool | None:
    if isinstance(node, ast.BoolOp):
        values = [_truth(part, names) for part in node.values]
        decisive = isinstance(node.op, ast.Or)
        if decisive in values:
            return decisive
        return None if None in values else not decisive
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _truth(node.operand, names)
        return None if value is None else not value
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _compare(type(node.ops[0]), *_sides(node, names))
    return _yes_or_no(node, names)


def _standing(node, names) -> Standing:
    if isinstance(node, ast.BoolOp):
        parts = [_standing(part, names) for part in node.values]
        decisive = (max if isinstance(node.op, ast.Or) else min)(parts, key=_by_truth)
        there = [part for part in parts if _by_truth(part) == _by_truth(decisive)]
        return decisive._replace(records=sum((part.records for part in there), ()))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        truth, at, low, high, measured = _standing(node.operand, names)
        return Standing(None if truth is None else not truth, -at, -high, -low, measured)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _distance(type(node.ops[0]), *_sides(node, names))
    return _exactly(_yes_or_no(node, names), _range(node, names).records)


def _by_truth(part: Standing) -> tuple[int, float]:
    """Order from failing over undecided to holding, by distance within each."""
    return (False, None, True).index(part.truth), part.at


def _distance(op, left: Range, right: Range) -> Standing:
    """One comparison, in half widths of the interval of the difference of its sides."""
    truth = _compare(op, left, right)
    ahead = right.plus(-left) if op in TURNED else left.plus(-right)
    half = (ahead.high - ahead.low) / 2
    if op is ast.Eq or half == 0:
        return _exactly(truth, ahead.records)
    ends = (ahead.value / half, ahead.low / half, ahead.high / half)
    return Standing(truth, *ends, ahead.records)


def _exactly(truth: bool | None, measured: tuple[Record, ...]) -> Standing:
    """What is at no distance: met or not, or equal as far as intervals tell."""
    at = {True: math.inf, False: -math.inf, None: 0.0}[truth]
    return Standing(truth, at, at, at, measured)


def _outlook(node, names, rounding) -> Outlook:
    if isinstance(node, ast.BoolOp):
        parts = [_outlook(part, names, rounding) for part in node.values]
        decisive = [part for part in parts if part.truth is isinstance(node.op, ast.Or)]
        if decisive:  # one of these is enough, and all else takes the last
            return min(decisive, key=_by_factor)
        return max(parts, key=_by_factor)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _outlook(node.operand, names, rounding)
        return inner._replace(truth=not inner.truth)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _foreseen(type(node.ops[0]), *_sides(node, names), rounding)
    return Outlook(_yes_or_no(node, names), 0.0)


def _by_factor(part: Outlook) -> float:
    return part.factor


def _foreseen(op, left: Range, right: Range, rounding) -> Outlook:
    """The outlook of one comparison: how far the estimate is from the other side, against how far
    its interval reaches there."""
    points = [Range(side.value, side.value, side.value) for side in (left, right)]
    truth = bool(_compare(op, *points))
    difference = left.plus(-right)
    measured = tuple(record for record in difference.records if record.interval)
    if _compare(op, left, right) is not None:
        return Outlook(truth, 0.0, measured)
    distance = abs(difference.value)
    ends = (difference.low, difference.high)
    reach = difference.value - ends[0] if difference.value > 0 else ends[1] - difference.value
    nearest = sum(rounding.get(record.id, 0.0) for record in measured)
    if distance <= nearest or op is ast.Eq:
        return Outlook(truth, math.inf, measured)
    return Outlook(truth, (reach / distance) ** 2, measured)


def _yes_or_no(node, names) -> bool:
    value, low, high, _ = _range(node, names)
    if not (isinstance(low, bool) and low == high):
        raise ClaimError(
            f"predicate: {ast.unparse(node)!r} is neither a comparison nor a yes-or-no record"
        )
    return value


def _decided(true, false) -> bool | None:
    """True, False, or None where neither is sure."""
    if true or false:
        return bool(true)
    return None


def _compare(op, left: Range, right: Range) -> bool | None:
    """Truth of a comparison of two intervals; None where they do not decide it."""
    if op in TURNED:
        return _compare(TURNED[op], right, left)
    if op is ast.Eq:
        one_value = left[:3] == right[:3] and left.low == left.high
        are_disjoint = left.low > right.high or right.low > left.high
        return _decided(one_value, are_disjoint)
    if op is ast.GtE:
        return _decided(left.low >= right.high, left.high < right.low)
    if op is ast.Gt:
        return _decided(left.low > right.high, left.high <= right.low)
    raise ClaimError(f"predicate: comparison {op.__name__} is not among < <= > >= ==")


def _sides(node: ast.Compare, names) -> tuple[Range, Range]:
    return _range(node.left, names), _range(node.comparators[0], names)


def _range(node, names) -> Range:
    if isinstance(node, ast.Name) and node.id in names:
        return _of_record(names[node.id])
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Range(node.value, node.value, node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_range(node.operand, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        left, right = _range(node.left, names), _range(node.right, names)
        return left.plus(right if isinstance(node.op, ast.Add) else -right)
    raise ClaimError(
        f"predicate: {ast.unparse(node)!r} is not among the claim's records, and not a number"
    )


def _of_record(record: Record) -> Range:
    if isinstance(record.value, str):
        raise ClaimError(f"record {record.id}: a word cannot stand in a predicate")
    low, high = record.interval or (record.value, record.value)
    return Range(record.value, low, high, (record,))
