"""One choice at a time, changed: what the sequential programme makes of it on validation data, and
what any merge does with heads of its own."""

from __future__ import annotations

from collections.abc import Iterator

from ..records import Records
from ..suites import Suite, load
from ..suites.probes import ROWS, fresh_head
from . import benchmark
from .cache import kept
from .intervals import record_mean

PROBED = ("base", "soup", "ties", "regmean", "featcal", "qp_elements")
HEADS = {"kept": "kept head", "fresh": "fresh head"}
CHOICES = {"merged, blend": {"targets": "blend"}, "expert": {"inputs": "expert"}}


def inputs_and_targets(suite: Suite, size: int) -> Iterator[dict]:
    """Whose inputs, which targets: rows of basis, choice and validation score.

    Own and propagated targets on merged inputs are entries of the grid that ``benchmark`` tunes
    over, those with the soup as prior; the others are solved here.
    """
    soup = 1 / len(suite.experts)
    for family in ("rows", "elements"):
        grid = benchmark.ENTRIES[f"qp_{family}"].grid(len(suite.experts), suite.seed)
        scores = benchmark.result(suite, f"qp_{family}", size)["scores"]
        for options, score in zip(grid, scores, strict=True):
            if options["prior"] == soup:
                choice = f"merged, {options['targets']}"
                yield {"basis": family, "choice": choice, "score": score}
        for choice, options in CHOICES.items():
            found = benchmark.variant(suite, size, basis=family, **options)
            yield {"basis": family, "choice": choice, "score": found["validation"]}


def record_scope(records: Records, suites: list[Suite], size: int):
    """Validation accuracy of the programme over elements when everything is solved, when the table
    of an embedding is averaged, and when only weights are solved: a ``pandas.DataFrame`` with a row
    per seed.

    What solving everything gains over either is recorded, paired over seeds.
    """
    import pandas as pd

    def own_targets(suite, method):
        return benchmark.result(suite, method, size)["scores"][0]  # a grid begins with them

    def table_averaged(suite):
        return benchmark.variant(suite, size, basis="elements", scope="dense")["validation"]

    scores = pd.DataFrame(
        {
            "everything": [own_targets(suite, "qp_elements") for suite in suites],
            "table averaged": [table_averaged(suite) for suite in suites],
            "weights only": [own_targets(suite, "qp_weights") for suite in suites],
        }
    )
    for column in scores.columns[1:]:
        gain = scores["everything"] - scores[column]
        id = f"{suites[0].name}.scope.{column.replace(' ', '_')}"
        record_mean(
            records.record, id, gain, note="validation accuracy, everything solved minus this"
        )
    return scores


def probed(suite: Suite, size: int, methods=PROBED) -> dict[str, dict]:
    """``probes.fresh_head`` of the experts, each on its own task, under ``experts``, and of the
    merges that validation chose of some methods; cached."""
    options = {method: benchmark.result(suite, method, size)["options"] for method in methods}

    def make():
        found = {"experts": fresh_head(suite, suite.experts)}
        for method in methods:
            state = benchmark.chosen_merge(suite, method, size).state_dict
            found[method] = fresh_head(suite, dict.fromkeys(suite.tasks, state))
        return found

    return kept(suite, "fresh_heads", [size, options, ROWS], make)


def fresh_heads(name: str, seeds: int, size: int, tier="smoke", device="cpu", first_seed=0):
    """Accuracy of merges over the experts', both with kept heads and both with fresh ones: a
    ``pandas.DataFrame`` with a row per seed, method, ``head`` (``kept`` or ``fresh``) and task."""
    import pandas as pd

    rows = []
    for seed in range(first_seed, first_seed + seeds):
        found = probed(load(name, tier, seed, device, progress=False), size)
        experts = found.pop("experts")
        for method, tasks in found.items():
            for task, values in tasks.items():
                place = {"seed": seed, "method": method, "task": task}
                for head in HEADS:
                    ratio = values[head] / experts[task][head]
                    rows.append(place | {"head": head, "accuracy": ratio})
    return pd.DataFrame(rows)


def record_fresh_heads(records: Records, name: str, table) -> dict[str, dict]:
    """Record normalised accuracy with fresh heads, of every method of a table of
    :func:`fresh_heads`, and how much that is above kept heads, ``gain``; over seeds, or over tasks
    where there is one seed.

    Returns: label of a method -> of a head -> (mean, interval).
    """
    unit = "seed" if table.seed.nunique() > 1 else "task"
    means = table.groupby(["method", "head", unit]).accuracy.mean()
    records.record(f"{name}.fresh_head.examples", ROWS["train"], unit="per task, at most")
    shown = {}
    for method in table.method.unique():
        id, kept_head, fresh = f"{name}.fresh_head.{method}", *(means[method, h] for h in HEADS)
        note = f"over {unit}s, drawn examples; merge and expert both with"
        values = {
            "kept": record_mean(records.record, f"{id}.kept", kept_head, note=f"{note} kept heads"),
            "fresh": record_mean(records.record, id, fresh, note=f"{note} fresh heads"),
        }
        gain = f"over {unit}s, fresh minus kept heads"
        record_mean(records.record, f"{id}.gain", fresh - kept_head, note=gain)
        label = benchmark.ENTRIES[method].label
        shown[label] = {HEADS[head]: found for head, found in values.items()}
    return shown
