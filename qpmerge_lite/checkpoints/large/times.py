"""What merges do, counted from headers and inputs: a rough guess of how long they take, at the
rates of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from os import cpu_count
from typing import TYPE_CHECKING, NamedTuple

from ..compatibility import Report
from ..costs import Costs
from ..methods import CALIBRATED
from .estimates import FOLDS, IN_DOUBLE, ON_OWN_INPUTS, STREAMS
from .rates import Work
from .running import Amount, alike, amount_of, usual_amount

if TYPE_CHECKING:
    from ..planning import Plan

IN_PIECES = 0.25  # of what an operation costs, where numbers stay in the processor's caches
WUDI_STEPS = 300
OF_CALL, OF_LAYER = 50, 100  # operations of a tensor in a merge, and of a layer in a forward
PROGRAMMES = {"auto": 5}  # that are solved for every layer; else one
# auto runs the models for its programmes, and for all that it judges by what they predict
FORWARDS = {**STREAMS, "auto": 10}


class Counts(NamedTuple):
    """What a method does with every number.

    Attributes:
        each, besides: operations for every expert, and besides.
        sorts: how often those of an expert are sorted.
        each_decomposed, decomposed: of a matrix, singular vectors for every expert, and besides.
    """

    each: float
    besides: float
    sorts: float = 0.0
    each_decomposed: float = 0.0
    decomposed: float = 0.0


PLAIN = Counts(3, 5)
COUNTS = {
    "soup": Counts(5 * IN_PIECES, 3 * IN_PIECES),
    "ties": Counts(8, 6, 0.3),  # of which a place is found, without sorting all
    "dare": Counts(10, 5),
    "breadcrumbs": Counts(8, 5, 1),
    "della": Counts(14, 6, 2),
    "slerp": Counts(4, 8),
    "tsv_merge": Counts(3, 5, 0, 1, 2),
    "iso_c": Counts(3, 5, 0, 0, 1),
    "dc_merge": Counts(6, 8, 1, 1, 2),
    "auto": Counts(20, 40, 0, 1, 3),
    "esm": Counts(3, 5, 0, 0.5, 2),  # eigenvectors of symmetric matrices are had for half
}
THINNED = {None: 0.0, "magnitude": 1.0, "outliers": 1.0, "random": 0.0, "ranks": 2.0}


def work_of_plan(plan: Plan, costs: Costs) -> Work:
    """What a merge does as planned, of the costs that were estimated of it."""
    report, order = plan.report, plan.order
    if order.recipe is not None:
        rule = order.recipe.rule
        sorts = THINNED[rule.thinning] / rule.at_once(1, cpu_count() or 1)
        counts = Counts(8, 8, sorts) if rule.on_base else COUNTS["soup"]
        return _by_number(report, counts, costs)
    if plan.moments:
        return _by_number(report, PLAIN, costs).plus(_solved(report, plan.method, order.options))
    return work_of(report, plan.method, order.options, costs, amount_of(plan), 1 / plan.processes)


def work_of(
    report: Report,
    method: str,
    options: Mapping[str, object],
    costs: Costs,
    amount: Amount | None = None,
    shared: float = 1.0,
) -> Work:
    """What a merge of checkpoints that fit does.

    Args:
        costs: that were estimated of it.
        amount: of calibration inputs; by default as many as are taken at most.
        shared: the part of the forwards that falls to this process.
    """
    work = _by_number(report, COUNTS.get(method, PLAIN), costs)
    if method == "wudi":
        steps = options.get("steps", WUDI_STEPS)
        steps = steps if isinstance(steps, int) else WUDI_STEPS
        work = work.plus(_descended(report, steps))
    if method not in CALIBRATED:
        return work
    amount = amount or usual_amount(len(report.experts))
    batches = int(amount.batches * shared) or 1
    run = _run(report, method, int(amount.tokens * shared), batches)
    return work.plus(run).plus(_solved(report, method, options))


def _by_number(report: Report, counts: Counts, costs: Costs) -> Work:
    """What is done with numbers one by one, and with matrices."""
    experts, base = len(report.experts), report.backbone
    total = sum(prod(entry.shape) for entry in base.entries.values() if entry.is_number)
    cubes = sum(m * n * min(m, n) for m, n in _matrices(report))
    return Work(
        moved=costs.read + costs.written,
        passed=total * (counts.each * experts + counts.besides),
        placed=total * counts.sorts * experts,
        decomposed=cubes * (counts.each_decomposed * experts + counts.decomposed),
        called=OF_CALL * (experts + 1) * len(base.entries),
    )


def _matrices(report: Report) -> list[tuple[int, ...]]:
    """Shapes (m, n) of all matrices."""
    return [e.shape for e in report.backbone.entries.values() if len(e.shape) == 2]


def _descended(report: Report, steps: int) -> Work:
    """Steps of gradient descent on all matrices: two products for every expert."""
    products = sum(m * n * n for m, n in _matrices(report))
    return Work(multiplied=4 * steps * len(report.experts) * products)


def _run(report: Report, method: str, tokens: int, batches: int) -> Work:
    """Forwards, and sums over what layers read."""
    streams, rows = FORWARDS.get(method, 2), report.backbone.config.get("vocab_size")
    layers = [shape for shape in _matrices(report) if shape[0] != rows]
    forwards = 2 * tokens * streams * sum(m * n for m, n in layers)
    sums = 0
    for (_, n), outputs in alike(report.backbone).items():
        drift = 0 if method in ON_OWN_INPUTS else 2 * sum(m for m in outputs if m != rows)
        sums += 2 * tokens * n * (n + drift)
    sums *= PROGRAMMES.get(method, 1)
    doubled = sums if method in IN_DOUBLE else 0
    called = OF_LAYER * streams * batches * len(layers)
    return Work(multiplied=forwards + sums - doubled, doubled=doubled, called=called)


def _solved(report: Report, method: str, options: Mapping[str, object]) -> Work:
    """Layers solved from their sums: a product for every expert and two more, and factors."""
    folds = options.get("folds", FOLDS.get(method, 1))
    folds = folds if isinstance(folds, int) else 1
    total, rows = 0.0, report.backbone.config.get("vocab_size")
    for m, n in _matrices(report):
        if m != rows:
            total += 2 * m * n * n * (len(report.experts) + 2) + n**3 * (folds + 1) / 3
    return Work(doubled=total * PROGRAMMES.get(method, 1))
