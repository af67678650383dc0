"""One choice at a time, changed: what the sequential programme makes of it on validation data, and
what any merge does with heads of its own."""

from __future__ import annotations

from ..suites import load
from ..suites.probes import ROWS, fresh_head
from . import benchmark
from .cache import kept

PROBED = ("base", "soup", "ties", "regmean", "featcal", "qp_elements")
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
            found = benchmark.variant(suite, size, basis=family, **options)
            add(family, choice, found["validation"])
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


def fresh_heads(name: str, seed: int, tier="smoke", device="cpu", *, size: int) -> list[dict]:
    """An experiment as of ``evidence``: a row for the experts, each on its own task, and for every
    one of ``PROBED`` as validation chose it, with ``tasks`` as of ``probes.fresh_head``; cached."""
    suite = load(name, tier, seed, device, progress=False)
    options = {method: benchmark.result(suite, method, size)["options"] for method in PROBED}

    def make():
        found = {"experts": fresh_head(suite, suite.experts)}
        for method in PROBED:
            state = benchmark.chosen_merge(suite, method, size).state_dict
            found[method] = fresh_head(suite, dict.fromkeys(suite.tasks, state))
        return found

    found = kept(suite, "fresh_heads", [size, options, ROWS], make)
    place = {"suite": name, "seed": seed}
    return [place | {"method": method, "tasks": tasks} for method, tasks in found.items()]
