"""What a choice without labels reaches, what it loses against the best of its own candidates, and
how many labels would choose as well."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ....choice import automatic as choice
from ....choice.criteria import Criterion
from ....experts import check_experts
from ...suites import Suite, load, training
from ..cache import kept
from ..judging import CHUNK, features

LABELS = (1, 2, 4, 8, 16, 32, 64)  # labelled validation examples per task
DRAWS = 200


def automatic(name: str, seed: int, tier="smoke", device="cpu", *, size: int) -> list[dict]:
    """An experiment as of ``evidence``: one row on one suite and seed.

    Args:
        size: calibration examples per task, those of ``benchmark.comparison``.
    Returns: the name of what is ``chosen`` with and without heads, ``accuracy`` and ``normalised``
        of the merge by task on the test split, ``labels`` as of :func:`by_labels`, and
        ``candidates``: by name the criterion with and without heads, validation and test accuracy
        when solved on all inputs.
    """
    suite = load(name, tier, seed, device, progress=False)
    return [kept(suite, "automatic", [size, LABELS, DRAWS], lambda: chosen(suite, size))]


def plentiful(name: str, seed: int, tier="smoke", device="cpu", *, size: int) -> list[dict]:
    """An experiment as of ``evidence``: the choice on more inputs than the baselines have.

    Args:
        size: calibration examples per task.
    Returns: one row, as of :func:`automatic` without ``candidates`` and ``labels``.
    """
    suite = load(name, tier, seed, device, progress=False)

    def row() -> dict:
        inputs = suite.calibration(size)
        judges, errors = judged(suite, inputs)
        names = choices(judges, errors)
        final = choice.Candidates(suite.base, suite.experts, inputs, names["with heads"])
        accuracy = suite.evaluate(final.merge(names["with heads"]).state_dict)
        normalised = suite.over_experts(accuracy)
        facts = {"chosen": names, "accuracy": accuracy, "normalised": normalised}
        return {"suite": suite.name, "seed": suite.seed} | facts

    return [kept(suite, "plentiful", [size], row)]


def judged(suite: Suite, inputs) -> tuple[dict[str, Criterion], dict[str, dict]]:
    """Both criteria, by name, and by the same names the errors of every candidate that is solved on
    half of the inputs and judged on the others."""
    batches = choice.checked(suite.base, suite.experts, inputs, suite.classifiers())
    halved, left_out = choice.halves(batches)
    # without the longest of a batch, its last columns may be all padding, which models here cut off
    solved_on = {task: [training.trim(batch) for batch in own] for task, own in halved.items()}
    experts = check_experts(suite.base, suite.experts, cast=True)
    tried = choice.Candidates(suite.base, suite.experts, solved_on)
    judges = {
        "divergence": Criterion(suite.base, experts, left_out, suite.classifiers()),
        "energy": Criterion(suite.base, experts, left_out),
    }
    states = {name: tried.merge(name).state_dict for name in choice.NAMES}
    errors = {
        by: {name: judge.errors(state) for name, state in states.items()}
        for by, judge in judges.items()
    }
    return judges, errors


def choices(judges: dict[str, Criterion], errors: dict[str, dict]) -> dict[str, str]:
    """What is chosen with and without heads."""
    rules = {"with heads": "divergence", "without heads": "energy"}
    return {rule: choice.choose(judges[by], errors[by]) for rule, by in rules.items()}


def chosen(suite: Suite, size: int) -> dict:
    """The row of :func:`automatic`."""
    started = time.perf_counter()
    inputs = suite.calibration(size)
    judges, errors = judged(suite, inputs)
    names = choices(judges, errors)
    final = choice.Candidates(suite.base, suite.experts, inputs)
    candidates, right = {}, {}
    for other in choice.NAMES:
        state = final.merge(other).state_dict
        right[other] = correct(suite, state)
        accuracy = suite.evaluate(state)
        captured = {by: judge.captured(errors[by][other]) for by, judge in judges.items()}
        candidates[other] = captured | {
            "accuracy": accuracy,
            "validation": suite.normalised(state, "validation")["mean"],
            "test": suite.over_experts(accuracy)["mean"],
        }
    accuracy = candidates[names["with heads"]]["accuracy"]
    return {
        "suite": suite.name,
        "seed": suite.seed,
        "chosen": names,
        "accuracy": accuracy,
        "normalised": suite.over_experts(accuracy),
        "candidates": candidates,
        "labels": by_labels(suite, right, candidates),
        "seconds": time.perf_counter() - started,
    }


def correct(suite: Suite, state) -> dict[str, Tensor]:
    """Task -> which of the validation examples that labels are drawn from are right (n,)."""
    right = {}
    for task in suite.tasks:
        inputs, labels = suite.tensors(task, "validation")
        order = torch.randperm(len(labels), generator=training.seeded(suite.seed, task, "labels"))
        rows = order[: max(LABELS)]
        drawn = {name: value[rows].to(suite.device) for name, value in inputs.items()}
        batches = [training.trim(batch) for batch in training.batches(drawn, CHUNK)]
        predicted = suite.classifiers()[task](features(suite, state, batches)).argmax(1)
        right[task] = (predicted.cpu() == labels[rows]).double()
    return right


def by_labels(suite: Suite, right: dict, candidates: dict) -> dict[str, float]:
    """Number of labelled examples a task -> mean test accuracy, over draws, of the candidate that
    they call the best; of equals the mean.

    Args:
        right: candidate -> task -> which examples are right (n,).
    """
    names = list(candidates)
    test = torch.tensor([candidates[name]["test"] for name in names], dtype=torch.float64)
    experts = {task: suite.expert_accuracy(task, "validation") for task in suite.tasks}
    generator, means = torch.Generator().manual_seed(suite.seed), dict[str, float]()
    for count in LABELS:
        total = 0.0
        for _ in range(DRAWS):
            score = torch.zeros(len(names), dtype=torch.float64)
            for task in suite.tasks:
                hits = torch.stack([right[name][task] for name in names])
                drawn = torch.randperm(hits.shape[1], generator=generator)[:count]
                score += hits[:, drawn].mean(1) / experts[task]
            total += float(test[score == score.max()].mean())
        means[str(count)] = total / DRAWS
    return means
