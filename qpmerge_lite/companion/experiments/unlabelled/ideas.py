"""Ideas for a better programme, tried one by one: each on validation data first, then once on test
data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ....choice.automatic import RIDGE
from ....datafree import wudi
from ....engine.recipes import Recipe
from ....methods import batched
from ....sequential import merge_together
from ....spectral.essential import esm
from ....spectral.triplets import iso_c
from ...suites import Suite, load, training
from ..cache import kept
from .factors import PASS
from .layer_rules import (
    ByKind,
    BySensitivity,
    FittedPrior,
    evened,
    programme,
    sensitivities,
)

Level = tuple[str, str]  # an idea, and one way of doing it
Inputs = Mapping[str, list[dict]]
START: Level = ("nothing", "the programme")
FOLDS = 4
PRIORS = {"short": None, "1": 1.0, "4": 4.0}  # None is 1/K, the mean of the updates
CHEAP = ("rows", "rotated_rows", "rotated_columns")
GROUPS = (2, 4, 8, 16, 32)


def ideas(name: str, seed: int, tier="smoke", device="cpu", *, size: int) -> list[dict]:
    """An experiment as of ``evidence``: a row for every way of every idea.

    Args:
        size: calibration examples per task.
    Returns: rows with ``seed``, ``idea``, ``level``, how many ``coefficients`` were solved for, and
        ``validation`` and ``test``, normalised accuracies as means over tasks.
    """
    suite = load(name, tier, seed, device, progress=False)
    return kept(suite, "ideas", [size], lambda: {"rows": measured(suite, size)})["rows"]


def measured(suite: Suite, size: int) -> list[dict]:
    """The rows of :func:`ideas`."""
    rows = []
    for inputs, recipes in tried(suite, size):
        for some in batched(list(recipes), 4):
            solved = {": ".join(level): recipes[level] for level in some}
            merges = merge_together(suite.base, suite.experts, inputs, solved)
            for (idea, level), merge in zip(some, merges.values(), strict=True):
                row = {"suite": suite.name, "seed": suite.seed, "idea": idea, "level": level}
                row["coefficients"] = sum(layer["p"] for layer in merge.table)
                for split in ("validation", "test"):
                    row[split] = suite.normalised(merge.state_dict, split)["mean"]
                rows.append(row)
    return rows


def tried(suite: Suite, size: int) -> Iterator[tuple[Inputs, dict[Level, Recipe]]]:
    """Calibration inputs, and what is solved on them."""
    inputs = suite.calibration(size)
    yield inputs, solvers(suite, inputs)
    yield inputs, anchors(suite, inputs)
    fitted = made(programme(ridge="cross-fitted"), folds=FOLDS)
    yield inputs, {("folds", "by chance"): fitted}
    yield (
        {task: in_clusters(suite, own) for task, own in inputs.items()},
        {("folds", "by cluster"): fitted},
    )
    if "input_ids" in next(iter(inputs.values()))[0]:
        more = suite.calibration(2 * size)
        yield cut(inputs), {("sequences", "half as long"): made(programme())}
        yield cut(more), {("sequences", "half as long, twice as many"): made(programme())}


def made(solver, **options) -> Recipe:
    """The programme's pass with another solver."""
    return Recipe(solver, **PASS | options)


def solvers(suite: Suite, inputs: Inputs) -> dict[Level, Recipe]:
    """Ideas that are another solver of layers."""
    slopes = sensitivities(suite, inputs)
    found = {
        START: made(programme()),
        ("prior by layer", "with its ridge"): made(FittedPrior(), folds=FOLDS),
        ("prior by layer", "alone"): made(FittedPrior(ridges=(RIDGE,)), folds=FOLDS),
        ("prior by kind", "norms short"): made(ByKind(("norm",), 1.0)),
        ("prior by kind", "attention short"): made(ByKind(("attention",), 1.0)),
        ("prior by kind", "perceptrons short"): made(ByKind(("up", "down"), 1.0)),
        ("sensitivity", "of tasks and outputs"): made(BySensitivity(slopes)),
        ("sensitivity", "of outputs"): made(BySensitivity(evened(slopes))),
    }
    for basis in CHEAP:
        word = basis.replace("_", " ")
        for name, prior in PRIORS.items():
            found[word, f"prior {name}"] = made(programme(basis=basis, prior=prior))
        found[word, "prior by layer"] = made(FittedPrior(basis), folds=FOLDS)
    for count in GROUPS:
        found["groups of rows", f"{count}"] = made(programme(basis="groups", groups=count))
    return found


def anchors(suite: Suite, inputs: Inputs) -> dict[Level, Recipe]:
    """Other merges in the place of the prior; the programme's own result is the second of two
    sweeps."""
    first = merge_together(suite.base, suite.experts, inputs, {"first": made(programme())})
    states = {
        "ESM": esm(suite.base, suite.experts, inputs).state_dict,
        "Iso-C": iso_c(suite.base, suite.experts).state_dict,
        "WUDI": wudi(suite.base, suite.experts).state_dict,
        "the first sweep": first["first"].state_dict,
    }
    solver = programme(prior=None)
    return {("anchor", name): made(solver, anchor=state) for name, state in states.items()}


@torch.no_grad()
def in_clusters(suite: Suite, batches: list[dict]) -> list[dict]:
    """Inputs in another order, so that folds are clusters: each is a part of the inputs in the
    order of the first principal component of the base's features."""
    together = {key: join([batch[key] for batch in batches]) for key in batches[0]}
    features = suite.base(**together).double()
    centred = features - features.mean(0)
    along = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0]
    parts = along.argsort().tensor_split(FOLDS)  # fold f takes every FOLDS-th input from f on
    most = min(len(part) for part in parts)
    order = torch.stack([part[:most] for part in parts], 1).flatten()
    return [{key: value[order] for key, value in together.items()}]


def join(values: list[Tensor]) -> Tensor:
    """Batches (N, T, …) one below the other, shorter ones padded with zeros."""
    if values[0].dim() != 2:
        return torch.cat(values)
    longest = max(value.shape[1] for value in values)
    pad = torch.nn.functional.pad
    return torch.cat([pad(value, (0, longest - value.shape[1])) for value in values])


def cut(inputs: Inputs) -> dict[str, list[dict]]:
    """The first half of the tokens of every sequence."""
    halves = {}
    for task, batches in inputs.items():
        halves[task] = []
        for batch in batches:
            length = batch["attention_mask"].sum(1, keepdim=True)
            place = torch.arange(batch["attention_mask"].shape[1])
            first = batch["attention_mask"] * (2 * place < length)
            shorter = batch | {"attention_mask": first}
            halves[task].append(training.trim(shorter))
    return halves
