"""What a merge costs: estimated from headers before it, measured after it.

Memory is what the merge adds to Python, torch and transformers themselves. How long a merge takes
depends on the machine, so it is not guessed: the progress bar says how much time is left.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

from .compatibility import Report
from .folders import Checkpoint
from .headers import Entry
from .methods import CALIBRATED, SHAPES, at_once, groups_of

DOUBLE = 8  # bytes of a number while it is merged
FOLDS = {"qp": 4}  # groups of calibration inputs with sums of their own, by default; else one


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
    # the mean, two experts' tensors that are compared, and where they agree
    "soup": [Step(0, 0, 0, 3.25)],
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


class Kept(NamedTuple):
    """What a method that runs the models holds besides base, experts and the sums of one layer.

    Attributes:
        merges: whole models that are made.
        each, besides: copies of the model in double precision, for every expert and besides.
    """

    merges: int
    each: int
    besides: int


ONE_MERGE = Kept(1, 0, 0)
KEPT = {
    # four programmes, two spectral merges and the blend; updates of three of them, and their mean
    "auto": Kept(7, 1, 4),
    # task vectors, and the updates
    "esm": Kept(1, 1, 1),
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


def estimated(report: Report, method: str, options: Mapping[str, object]) -> Costs:
    """Costs of a merge of checkpoints that fit, from their headers."""
    base, read = report.base, report.bytes
    if method in CALIBRATED:
        memory = _with_calibration(report, method, options)
        read += base.bytes  # once to run it, once for its digest
    else:
        groups = groups_of(base, method, options)
        memory = max((_of_group(report, method, names) for names in groups), default=0)
    if at_once(method, options) == SHAPES:  # not in the order of the files: digests read them again
        read += report.bytes
    return Costs(memory, read, base.bytes, at_once(method, options))


def _of_group(report: Report, method: str, names: Sequence[str]) -> int:
    """Bytes that are held to merge some tensors in one call."""
    stored = _stored(report.base, names)  # the merged ones
    for checkpoint in (report.base, *report.experts):
        stored += _stored(checkpoint, names)
    experts = len(report.experts)
    sizes = [prod(report.base.entries[name].shape) for name in names]
    copies = 0.0
    for step in STEPS[method]:
        group = (step.group_each * experts + step.group) * sum(sizes)
        tensor = (step.tensor_each * experts + step.tensor) * max(sizes)
        copies = max(copies, group + tensor)
    if method == "wudi":
        copies += _moments(report.base, names) * (experts + 0.5)
    return stored + int(DOUBLE * copies)


def _moments(base: Checkpoint, names: Sequence[str]) -> int:
    """Numbers of ``τᵀτ`` (n, n) of matrices (m, n), of which WUDI holds two in single precision for
    every expert, and their sum."""
    shapes = [base.entries[name].shape for name in names]
    return sum(shape[1] ** 2 for shape in shapes if len(shape) == 2)


def _stored(checkpoint: Checkpoint, names: Sequence[str]) -> int:
    """Bytes of some tensors as the files have them."""
    return sum(checkpoint.entries[name].stop - checkpoint.entries[name].start for name in names)


def _with_calibration(report: Report, method: str, options: Mapping[str, object]) -> int:
    """Bytes that are held to merge by a pass: whole models, and the sums of the layer that takes
    most. What forwards hold while they wait comes on top: it depends on the texts.
    """
    kept, experts = KEPT.get(method, ONE_MERGE), len(report.experts)
    models = report.bytes + kept.merges * report.base.bytes
    models += DOUBLE * (kept.each * experts + kept.besides) * report.parameters
    given = options.get("folds")
    folds = given if isinstance(given, int) else FOLDS.get(method, 1)
    layers = [_sums(entry) for entry in report.base.entries.values() if len(entry.shape) == 2]
    return models + DOUBLE * experts * folds * max(layers, default=0)


def _sums(entry: Entry) -> int:
    """Numbers that are kept of a matrix (m, n) for an expert and fold: second moments of its inputs
    and a factor of them, (n, n); their products with the update and with the residual, (m, n)."""
    m, n = entry.shape
    return 2 * n**2 + 2 * m * n


def peak_memory() -> int:
    """Bytes of memory that this process has taken at most so far."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:  # on Linux, where the other number begins with that of the parent
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def measured() -> Iterator[dict]:
    """What is done inside costs: filled in at its end, ``memory`` in bytes, by which the peak of
    the process grew, that ``peak`` itself, and ``seconds``."""
    found: dict = {}
    started, before = time.perf_counter(), peak_memory()
    yield found
    peak = peak_memory()
    found |= {"memory": peak - before, "peak": peak, "seconds": time.perf_counter() - started}
