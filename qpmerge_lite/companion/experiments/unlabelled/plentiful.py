"""What the merge that is chosen without labels reaches where calibration inputs are plentiful."""

from __future__ import annotations

from ....choice.automatic import auto
from ...suites import Suite, load
from ..cache import kept


def plentiful(name: str, seed: int, tier="smoke", device="cpu", *, size: int) -> list[dict]:
    """An experiment as of ``evidence``: one row on one suite and seed.

    Args:
        size: calibration examples per task.
    Returns: the name of what is ``chosen``, and ``accuracy`` and ``normalised`` of the merge by
        task on the test split.
    """
    suite = load(name, tier, seed, device, progress=False)
    return [kept(suite, "plentiful", [size], lambda: merged(suite, size))]


def merged(suite: Suite, size: int) -> dict:
    """The row of :func:`plentiful`."""
    inputs = suite.calibration(size)
    merge = auto(suite.base, suite.experts, inputs, heads=suite.classifiers())
    accuracy = suite.evaluate(merge.state_dict)
    return {
        "suite": suite.name,
        "seed": suite.seed,
        "chosen": merge.chosen,
        "accuracy": accuracy,
        "normalised": suite.over_experts(accuracy),
    }
