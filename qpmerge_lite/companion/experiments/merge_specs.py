"""The merges that a population may have: how each is made, on which examples, and how those of a
problem are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import datafree, methods
from ...merge import Merge
from ..suites import Suite, training
from .baselines import BASELINES, ENTRIES, FAMILIES, HEURISTICS, Entry, no_options, qp_label

# The word for baselines is the one that records and caches of results hold.
HEURISTIC, BASELINE, PROGRAMME, BAD = KINDS = (
    "heuristics",
    "neighbours",
    "programme",
    "made to be bad",
)


def kind_of(method: str) -> str:
    """What chapters count a method to: one of the first three of ``KINDS``."""
    if method.startswith("qp_"):
        return PROGRAMME
    return BASELINE if method in BASELINES else HEURISTIC


@dataclass(frozen=True)
class Spec:
    """One merge to be made: a method of ``CALLS`` and its options, and which examples it is solved
    on.

    ``source`` is ``own`` (examples of the expert's task), ``foreign`` (of another task),
    ``scrambled`` (its own, entries in random places), or ``none``; ``size`` how many per task.
    """

    kind: str
    label: str
    method: str
    options: dict
    size: int = 0
    source: str = "none"


def random_coefficients(base, experts, calibration=None, *, seed: int) -> Merge:
    """Every expert's update in every parameter times a normal number of its own: mean 1/K, as much
    spread."""
    generator, base_state = torch.Generator().manual_seed(seed), base.state_dict()
    state = dict(base_state)
    for name, vectors in datafree.task_vectors(base, experts).items():
        scales = (1 + torch.randn(len(vectors), generator=generator).to(vectors)) / len(vectors)
        state[name] = (base_state[name].double() + torch.tensordot(scales, vectors, 1)).to(
            base_state[name]
        )
    return Merge(state)


CALLS = ENTRIES | {
    "random": Entry("random coefficients", random_coefficients, no_options),
    "qp": Entry("QP", methods.qp, no_options),
}
FREE = (
    *HEURISTICS,
    "tsv_merge",
    "iso_c",
    "dc_merge",
    "wudi",
)  # of the baselines, those that need no data
# examples per task, as a gradient for every one would take longer than all else
MOST = {"fisher": 64, "adamerging": 64}
SIZES = (4, 8, 16, 32, 64, 128, 256, 512)


def possible(experts: int, seed: int, largest: int) -> dict[str, list[Spec]]:
    """All merges that may be drawn, by kind: every baseline with every option of its grid in
    ``baselines``, on sets of every size up to the ``largest``."""
    sizes = [size for size in SIZES if size <= largest]
    return {
        HEURISTIC: list(_baseline_specs(HEURISTIC, HEURISTICS, experts, seed, sizes)),
        BASELINE: list(_baseline_specs(BASELINE, BASELINES, experts, seed, sizes)),
        PROGRAMME: list(_programme_specs(sizes)),
        BAD: list(_bad_specs(seed)),
    }


def _baseline_specs(kind: str, names, experts: int, seed: int, sizes: list[int]):
    """Every option of the grid of every method, but for the soup by another name."""
    uniform = {
        "task_arithmetic": {"scale": 1 / experts},
        "weighted_soup": {"weights": [1 / experts] * experts},
    }
    for method in names:
        for options in CALLS[method].grid(experts, seed):
            if options == uniform.get(method):
                continue
            if method in FREE:
                yield Spec(kind, _label(method, options), method, options)
                continue
            for size in sizes:
                if size <= MOST.get(method, size):
                    yield Spec(kind, _label(method, options), method, options, size, "own")


def _programme_specs(sizes: list[int]):
    """The programme over every family, with every ridge, on every kind of inputs and targets."""
    passes = ({"inputs": "expert"}, {"targets": "propagated"}, {"targets": "own"})
    for family in FAMILIES:
        for ridge in (0.0, 1e-2, 1.0, "cross-fitted"):
            for inputs_or_targets in passes:
                options = {"basis": family, "ridge": ridge, **inputs_or_targets}
                for size in sizes:
                    yield Spec(PROGRAMME, _label("qp", options), "qp", options, size, "own")


def _bad_specs(seed: int):
    """Merges against the updates, far beyond them or along none of them, and such as are solved on
    two examples or on examples that tell nothing of the task."""

    def bad(method, options, size=0, source="none"):
        return Spec(BAD, _label(method, options), method, options, size, source)

    yield bad("task_arithmetic", {"scale": -0.3})
    yield bad("task_arithmetic", {"scale": 1.5})
    yield bad("random", {"seed": seed})
    overfitted = {"basis": "elements", "ridge": 0.0, "prior": 0.0, "folds": 1}
    yield bad("qp", overfitted, size=2, source="own")
    for method, options in (
        ("regmean", {}),
        ("qp", {"basis": "elements"}),
        ("qp", {"basis": "rows"}),
    ):
        for source in ("foreign", "scrambled"):
            yield bad(method, options, size=32, source=source)


def _label(method: str, options: dict) -> str:
    """What tells methods apart in tables and in the search for the best fixed one: sizes, ridges
    and strengths do not."""
    return qp_label(options["basis"]) if method == "qp" else CALLS[method].label


def subsets(tasks: list[str], sizes, seed: int) -> list[list[str]]:
    """One subset of a suite's tasks of each size, in the suite's order."""
    chosen = []
    for size in sizes:
        generator = training.seeded(seed, str(size), "subset")
        places = torch.randperm(len(tasks), generator=generator)[:size].sort().values
        chosen.append([tasks[place] for place in places.tolist()])
    return chosen


def drawn(tasks: list[str], seed: int, counts, largest: int) -> list[Spec]:
    """The merges of one problem: so many of each kind, without repetition; methods are as likely as
    each other, however many options they have."""
    chosen, generator = [], training.seeded(seed, *tasks, "population")
    kinds = possible(len(tasks), seed, largest).values()
    for count, specs in zip(counts, kinds, strict=True):
        labels = [spec.label for spec in specs]
        odds = torch.tensor([1 / labels.count(label) for label in labels], dtype=torch.float64)
        places = torch.multinomial(odds, count, generator=generator)
        chosen += [specs[place] for place in places.tolist()]
    return chosen


def scrambled(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """A batch (B, …) with the entries of every argument in random places; what is padding stays
    padding."""
    mask = batch.get("attention_mask")
    mixed = {}
    for name, value in batch.items():
        if mask is not None and value.shape == mask.shape:
            real = mask.bool()
        else:
            real = torch.ones_like(value, dtype=torch.bool)
        entries = value[real]
        order = torch.randperm(len(entries), generator=generator).to(entries.device)
        mixed[name] = value.clone()
        mixed[name][real] = entries[order]
    return mixed


def examples(suite: Suite, tasks: list[str], spec: Spec) -> dict[str, list[dict]] | None:
    """What a merge is solved on, batches by task; None for one that needs no data."""
    if spec.source == "none":
        return None
    following = dict(zip(suite.tasks, suite.tasks[1:] + suite.tasks[:1]))
    batches = {}
    for task in tasks:
        source = following[task] if spec.source == "foreign" else task
        batches[task] = suite.calibration(spec.size, tasks=[source])[source]
    if spec.source == "scrambled":
        generator = training.seeded(suite.seed, "scrambled")
        for task, ordered in batches.items():
            batches[task] = [scrambled(batch, generator) for batch in ordered]
    return batches
