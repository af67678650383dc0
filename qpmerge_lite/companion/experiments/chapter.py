"""What the chapters on whole suites share: the tables they show and the records they write, under
ids that begin with the suite's name."""

from __future__ import annotations

from collections.abc import Iterable

from ..records import Records
from ..suites import Suite
from ..suites.probes import ROWS
from . import ablations, benchmark, summary
from .intervals import record_mean


def task_table(suite: Suite):
    """Classes, rows of every split, and test accuracy of base and expert: a
    ``pandas.DataFrame`` with a row per task."""
    import pandas as pd

    table = pd.DataFrame({task: suite.data[task].num_rows for task in suite.tasks}).T
    table.insert(0, "classes", pd.Series(suite.n_classes))
    table["base"] = pd.Series(suite.evaluate(suite.base.state_dict()))
    table["expert"] = pd.Series(benchmark.own_accuracy(suite))
    return table


def record_setting(records: Records, name: str, size: int, of: str) -> None:
    """Record how many calibration examples (``of`` says of what: images, texts) and the longer of
    the programme's two priors."""
    records.record(f"{name}.calibration_{of}", size, unit="per task")
    records.record(f"{name}.prior", benchmark.ANCHOR)


def record_choices(records: Records, name: str, results: list[dict]):
    """Record how many of the chosen numbers lie at an end of their grid; what was chosen is
    returned as a ``pandas.DataFrame``, see ``summary.choices``."""
    edges = sum(len(summary.at_grid_edge(r)) for r in results)
    numbers = sum(isinstance(v, float) for r in results for v in r["options"].values())
    records.record(f"{name}.choices.at_edge", edges, n=numbers)
    records.record(f"{name}.choices.numbers", numbers)
    return summary.choices(results)


def by_label(results: list[dict]) -> dict[str, list[float]]:
    """Label -> normalised accuracy, mean over tasks, of every seed."""
    accuracy: dict[str, list[float]] = {}
    for result in results:
        accuracy.setdefault(result["label"], []).append(result["normalised"]["mean"])
    return accuracy


def places(results: list[dict], labels: dict[str, str]):
    """Mean, best and worst rank of every merge as a ``pandas.DataFrame``, best first."""
    import pandas as pd

    ranks = summary.ranks(results).rename(columns=labels)
    table = pd.DataFrame({"mean rank": ranks.mean(), "best": ranks.min(), "worst": ranks.max()})
    return table.sort_values("mean rank")


def by_task(results: list[dict], order: Iterable[str], tasks: Iterable[str]):
    """Normalised accuracy, mean over seeds, as a ``pandas.DataFrame``: rows are labels in the given
    order, columns tasks."""
    table = summary.frame(results)
    cells = table.pivot_table(index="label", columns="task", values="normalised")
    return cells.loc[list(order), list(tasks)]


def layer_tables(results: list[dict], seed: int) -> dict:
    """Family of basis -> what its programme reports layer by layer, as a ``pandas.DataFrame``: one
    seed, with the experts' own outputs as targets."""
    import pandas as pd

    by_method = {r["method"]: r for r in results if r["seed"] == seed}
    return {
        # a grid begins with own targets
        family: pd.DataFrame(by_method[f"qp_{family}"]["tables"][0])
        for family in benchmark.FAMILIES
        if f"qp_{family}" in by_method
    }


def record_energies(records: Records, name: str, tables: dict, seed: int):
    """Record every family's captured energy, in sample and cross-fitted, as a mean over layers, and
    return the means of :func:`layer_tables` as a ``pandas.DataFrame``."""
    import pandas as pd

    columns = ["p", "captured", "cross_fitted", "ridge"]
    note = "mean over layers, own targets"
    for family, table in tables.items():
        for column in ("captured", "cross_fitted"):
            id = f"{name}.qp_{family}.{column}"
            records.record(id, table[column].mean(), seed=seed, note=note)
    means = pd.DataFrame({family: table[columns].mean() for family, table in tables.items()}).T
    return means.astype({"p": int}).rename(index=lambda family: family.replace("_", " "))


def record_scopes(records: Records, name: str, rows: list[dict]):
    """Record what solving everything gains over either other scope, paired over seeds; the scores
    of ``ablations.scopes`` are returned as a ``pandas.DataFrame`` with a row per seed."""
    import pandas as pd

    scores = pd.DataFrame({row["seed"]: row["score"] for row in rows}).T
    note = "validation accuracy, everything solved minus this"
    for column in scores.columns[1:]:
        gain = scores["everything"] - scores[column]
        record_mean(records.record, f"{name}.scope.{column.replace(' ', '_')}", gain, note=note)
    return scores


def record_fresh_heads(records: Records, name: str, rows: list[dict]) -> dict[str, dict]:
    """Record normalised accuracy with fresh heads, of every method of ``ablations.fresh_heads``,
    and how much that is above kept heads, ``gain``; over seeds, or over tasks where there is one
    seed.

    Returns: label of a method -> of a head -> (mean, interval).
    """
    table = _by_head(rows)
    unit = "seed" if table.seed.nunique() > 1 else "task"
    means = table.groupby(["method", "head", unit]).accuracy.mean()
    records.record(f"{name}.fresh_head.examples", ROWS["train"], unit="per task, at most")
    shown = {}
    for method in table.method.unique():
        id = f"{name}.fresh_head.{method}"
        kept_head, fresh = means[method, "kept"], means[method, "fresh"]
        note = f"over {unit}s, drawn examples; merge and expert both with"
        values = {
            "kept": record_mean(records.record, f"{id}.kept", kept_head, note=f"{note} kept heads"),
            "fresh": record_mean(records.record, id, fresh, note=f"{note} fresh heads"),
        }
        gain = f"over {unit}s, fresh minus kept heads"
        record_mean(records.record, f"{id}.gain", fresh - kept_head, note=gain)
        label = benchmark.ENTRIES[method].label
        shown[label] = {ablations.HEADS[head]: estimate for head, estimate in values.items()}
    return shown


def _by_head(rows: list[dict]):
    """Rows of ``ablations.fresh_heads`` as a ``pandas.DataFrame``: a row per seed, method, head and
    task."""
    import pandas as pd

    flat = []
    for row in rows:
        for head, accuracies in row["accuracy"].items():
            for task, accuracy in accuracies.items():
                place = {"seed": row["seed"], "method": row["method"]}
                flat.append(place | {"head": head, "task": task, "accuracy": accuracy})
    return pd.DataFrame(flat)
