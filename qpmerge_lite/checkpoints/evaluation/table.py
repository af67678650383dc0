"""An evaluation on a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from ..diagnosis.summary import INTERVAL, aligned, told, wrapped
from .subjects import LABELS

TITLES = {
    "accuracy": "accuracy",
    "perplexity": "perplexity",
    "ratio": "ratio to expert",
    "difference": "less expert's",
    "agreement": "agreement",
}
MEANINGS = {
    LABELS: {
        "accuracy": "share of the inputs whose label is the model's first choice; in brackets, "
        "Wilson's 95 % interval",
        "ratio": "the model's accuracy over the expert's; in brackets, a 95 % interval of a "
        "bootstrap over inputs, which stay paired",
        "difference": "the model's accuracy less the expert's; in brackets, as for the ratio",
    },
    "tokens": {
        "perplexity": "how many tokens the model wavers between, on average: lower is better",
        "ratio": "the model's perplexity over the expert's, on the same texts: above 1 is worse",
        "agreement": "share of places in which model and expert choose the same next token",
    },
}
FEW = "no bracket where inputs are fewer than eight, or all alike"


def as_text(evaluation: Mapping) -> str:
    """The evaluation for a terminal, in lines of at most 100 letters."""
    lines: list[str] = []
    for kind, meanings in MEANINGS.items():
        tasks = {name: t for name, t in evaluation["tasks"].items() if t["kind"] == kind}
        if not tasks:
            continue
        shown = [name for name in meanings if any(_has(task, name) for task in tasks.values())]
        rows = []
        for name, task in tasks.items():
            for model, numbers in task["models"].items():
                cells = [told(numbers.get(column)) for column in shown]
                rows.append([name, model, str(task["data"]["inputs"]), *cells])
        head = ["task", "model", "inputs", *(TITLES[name] for name in shown)]
        lines += [*([""] if lines else []), *aligned(head, rows), ""]
        for name in shown:
            lines += wrapped(f"{TITLES[name]}: {meanings[name]}")
        lines += wrapped(FEW if kind == LABELS else INTERVAL)
    for note in evaluation["notes"]:
        lines += wrapped(f"note: {note}")
    for warning in evaluation["warnings"]:
        said = f"expected {warning['expected']}, found {warning['found']}; {warning['cure']}"
        lines += wrapped(f"warning: {warning['where']}: {said}")
    return "\n".join(line.rstrip() for line in lines)


def _has(task: Mapping, name: str) -> bool:
    """Whether some model has a number of that name."""
    return any(name in numbers for numbers in task["models"].values())
