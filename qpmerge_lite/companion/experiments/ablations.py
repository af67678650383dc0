"""What the sequential programme makes of one choice at a time, judged on validation data."""

from __future__ import annotations

from collections.abc import Iterator

from ..records import Records
from ..suites import Suite
from . import benchmark
from .intervals import record_mean

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
