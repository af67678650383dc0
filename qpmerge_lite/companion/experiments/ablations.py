"""One choice at a time, changed: what the sequential programme makes of it on validation data, and
what any merge does with heads of its own."""

from __future__ import annotations

from ..suites import Suite, load
from ..suites.probes import ROWS, fresh_head
from . import benchmark
from .cache import kept

PROBED = ("base", "soup", "ties", "regmean", "featcal", "qp_elements")
HEADS = {"kept": "kept head", "fresh": "fresh head"}
CHOICES = {"merged, blend": {"targets": "blend"}, "expert": {"inputs": "expert"}}


def choices(name: str, seed: int, tier="smoke", device="cpu", *, size: int) -> list[dict]:
    """An experiment as of ``evidence``: whose inputs, which targets; rows of suite, seed, basis,
    choice and validation score.

    Own and propagated targets on merged inputs are entries of the grid that ``benchmark`` tunes
    over, those with the soup as prior; the others are solved here.
    """
    suite = load(name, tier, seed, device, progress=False)
    soup, rows = 1 / len(suite.experts), []

    def add(family, choice, score):
        place = {"suite": name, "seed": seed, "basis": family}
        rows.append(place | {"choice": choice, "score": score})

    for family in ("rows", "elements"):
        grid = benchmark.ENTRIES[f"qp_{family}"].grid(len(suite.experts), seed)
        scores = benchmark.result(suite, f"qp_{family}", size)["scores"]
        for options, score in zip(grid, scores, strict=True):
            if options["prior"] == soup:
                add(family, f"merged, {options['targets']}", score)
        for choice, options in CHOICES.items():
            result = benchmark.variant(suite, size, basis=family, **options)
            add(family, choice, result["validation"])
    return rows


def scopes(name: str, seed: int, tier="smoke", device="cpu", *, size: int) -> list[dict]:
    """An experiment as of ``evidence``: a row with the validation accuracy of the programme over
    elements when everything is solved, when the table of an embedding is averaged, and when only
    weights are solved."""
    suite = load(name, tier, seed, device, progress=False)

    def own_targets(method):
        return benchmark.result(suite, method, size)["scores"][0]  # a grid begins with them

    scores = {
        "everything": own_targets("qp_elements"),
        "table averaged": benchmark.variant(suite, size, basis="elements", scope="dense")[
            "validation"
        ],
        "weights only": own_targets("qp_weights"),
    }
    return [{"suite": name, "seed": seed, "score": scores}]


def probed(suite: Suite, size: int, methods=PROBED) -> dict[str, dict]:
    """``probes.fresh_head`` of the experts, each on its own task, under ``experts``, and of the
    merges that validation chose of some methods; cached."""
    options = {method: benchmark.result(suite, method, size)["options"] for method in methods}

    def make():
        accuracies = {"experts": fresh_head(suite, suite.experts)}
        for method in methods:
            state = benchmark.chosen_merge(suite, method, size).state_dict
            accuracies[method] = fresh_head(suite, dict.fromkeys(suite.tasks, state))
        return accuracies

    return kept(suite, "fresh_heads", [size, options, ROWS], make)


def fresh_heads(name: str, seed: int, tier="smoke", device="cpu", *, size: int) -> list[dict]:
    """An experiment as of ``evidence``: a row per method with its accuracy over the experts', both
    with kept heads and both with fresh ones, by head and task."""
    accuracies = probed(load(name, tier, seed, device, progress=False), size)
    experts, rows = accuracies.pop("experts"), []
    for method, tasks in accuracies.items():
        ratios = {
            head: {task: values[head] / experts[task][head] for task, values in tasks.items()}
            for head in HEADS
        }
        rows.append({"suite": name, "seed": seed, "method": method, "accuracy": ratios})
    return rows
