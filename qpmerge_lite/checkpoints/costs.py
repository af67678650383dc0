"""What a merge costs, estimated from headers before it.

Memory is what the merge adds to Python, torch and transformers themselves, without files that the
system reads in as they are used and lets go of when memory is short. How long it takes is counted
in ``large.times``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from .compatibility import Report
from .folders import Checkpoint
from .large.estimates import memory_of_layer, memory_of_pass, memory_of_recipe
from .large.running import Amount, amount_of, usual_amount
from .methods import CALIBRATED, SHAPES, TENSORS, at_once, groups_of

if TYPE_CHECKING:
    from .planning import Plan

DOUBLE = 8  # bytes of a number while it is merged
PIECE = 1 << 15  # numbers that are averaged at a time, as of ``merge.average``
OF_PIECE = 5  # copies of these in double precision: mean, summand, two that are compared, both
LAYERS = "layers that read alike"


class Step(NamedTuple):
    """Copies in double precision that a method holds at one moment of a merge.

    Attributes:
        group_each, group: of the tensors merged in one call, for every expert, and besides.
        tensor_each, tensor: of the largest tensor of these, for every expert, and besides.
    """

    group_each: float
    group: float
    tensor_each: float
    tensor: float


VECTORS = Step(1, 0, 1, 1)  # all task vectors, and of one tensor its experts' weights and the base
RETURN = Step(1, 1, 0, 3)  # task vectors, updates, and a tensor as base + scale * update
STEPS = {
    "soup": [Step(0, 0, 0, 0)],  # piece by piece
    "task_arithmetic": [VECTORS, RETURN],
    # a flat model: itself, its magnitudes twice, and what sorting holds; then the election
    "ties": [VECTORS, Step(1, 6, 0, 0), Step(1, 1, 2, 3)],
    # sums of all tensors; of one the drawn numbers, what is kept of them, and that rescaled
    "dare": [VECTORS, Step(1, 1, 0, 3)],
    # magnitudes, sorted with their places, and what is kept
    "breadcrumbs": [VECTORS, Step(1, 0, 4, 1)],
    # magnitudes, sorted with their places, sorted again, ranks, chances, draws; then the election
    "della": [VECTORS, Step(1, 1, 5, 1)],
    # both tensors, their directions, the product of these, and both parts of the arc
    "slerp": [Step(0, 0, 0, 7)],
    "model_stock": [VECTORS, RETURN],
    # a copy to decompose, left and right vectors; then these side by side, and decomposed
    "tsv_merge": [VECTORS, Step(1, 0, 3, 0), Step(1, 0, 2, 6)],
    # the sum, a copy to decompose, left and right vectors, and their product
    "iso_c": [VECTORS, Step(1, 0, 0, 6)],
    # as tsv_merge, and the tasks' coordinates in the basis of all, with those that are kept
    "dc_merge": [VECTORS, Step(1, 0, 3, 0), Step(1, 0, 6, 6)],
    # vectors and, in single precision, these thrice; the state of Adam
    "wudi": [VECTORS, Step(2.5, 4, 0, 0)],
}


class Costs(NamedTuple):
    """Costs of a merge, in bytes.

    Attributes:
        memory: at its peak, beside what Python and its packages take.
        read, written: of weights.
        at_once: how much of the model the method sees together.
    """

    memory: int
    read: int
    written: int
    at_once: str


def estimated_plan(plan: Plan) -> Costs:
    """Costs of a merge as planned, from headers."""
    report, order = plan.report, plan.order
    every = report.bytes
    if order.recipe is not None:
        written = sum(header.size for header in plan.headers.values())
        return Costs(memory_of_recipe(order.recipe, report), every, written, TENSORS)
    if plan.moments:
        files = [file.header.size for of_expert in plan.moments.values() for file in of_expert]
        stored = max((_of_all(report, [name]) for name in report.backbone.entries), default=0)
        memory = stored + memory_of_layer(report, plan.method, order.options)
        return Costs(memory, 2 * every + sum(files), _written(report), LAYERS)
    return estimated(report, plan.method, order.options, amount_of(plan))


def estimated(
    report: Report, method: str, options: Mapping[str, object], amount: Amount | None = None
) -> Costs:
    """Costs of a merge of checkpoints that fit, from their headers.

    Args:
        amount: of calibration inputs; by default as many as are taken at most.
    """
    base, read = report.backbone, report.bytes
    if method in CALIBRATED:
        amount = amount or usual_amount(len(report.experts))
        memory = memory_of_pass(report, method, options, amount).most
        read += report.bytes + base.bytes  # to be run, for digests, and the base to be built
    else:
        groups = groups_of(base, method, options)
        memory = max((_of_group(report, method, names) for names in groups), default=0)
    if at_once(method, options) == SHAPES:  # not in the order of the files: digests read them again
        read += report.bytes
    return Costs(memory, read, _written(report), at_once(method, options))


def _written(report: Report) -> int:
    """Bytes of a merge's files of weights, with heads that are kept."""
    heads = [_stored(head, head.entries) for head in report.heads.values()]
    return report.base.bytes + sum(heads)


def _of_group(report: Report, method: str, names: Sequence[str]) -> int:
    """Bytes that are held to merge some tensors in one call."""
    base, experts = report.backbone, len(report.experts)
    stored = _of_all(report, names)
    sizes = [prod(base.entries[name].shape) for name in names]
    copies = 0.0
    for step in STEPS[method]:
        group = (step.group_each * experts + step.group) * sum(sizes)
        tensor = (step.tensor_each * experts + step.tensor) * max(sizes)
        copies = max(copies, group + tensor)
    if method == "soup":
        copies = OF_PIECE * min(PIECE, max(sizes))
    if method == "wudi":
        copies += _moments(base, names) * (experts + 0.5)
    return stored + int(DOUBLE * copies)


def _of_all(report: Report, names: Sequence[str]) -> int:
    """Bytes of some tensors of base, experts and merge, as the files have them."""
    read = sum(_stored(checkpoint, names) for checkpoint in (report.backbone, *report.experts))
    return read + _stored(report.backbone, names)


def _moments(base: Checkpoint, names: Sequence[str]) -> int:
    """Numbers of ``τᵀτ`` (n, n) of matrices (m, n), of which WUDI holds two in single precision for
    every expert, and their sum."""
    shapes = [base.entries[name].shape for name in names]
    return sum(shape[1] ** 2 for shape in shapes if len(shape) == 2)


def _stored(checkpoint: Checkpoint, names: Collection[str]) -> int:
    """Bytes of some tensors as the files have them."""
    return sum(checkpoint.entries[name].stop - checkpoint.entries[name].start for name in names)
