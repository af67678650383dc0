"""Tables and records of the merge that is chosen without labels, beside baselines that are tuned
with them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from ....choice.automatic import BLENDS, NAMES, auto
from ....methods import qp
from ...suites import Suite
from ..baselines import BASELINES, ENTRIES, HEURISTICS
from ..intervals import Interval, record_mean
from .automatic import LABELS
from .ideas import CHEAP, PRIORS, START

RIVALS = (*HEURISTICS, *BASELINES)
FIRST = next(iter(BLENDS))

Shown = dict[str, tuple[float, Interval | None]]  # label -> mean and interval


def by_method(rows: list[dict], others: list[dict]):
    """Normalised test accuracy, mean over tasks, as a ``pandas.DataFrame``: a row per seed, columns
    ``auto`` and the baselines.

    Args:
        rows: of ``automatic.automatic``. others: of ``benchmark.comparison``.
    """
    import pandas as pd

    cells: dict[str, dict[int, float]] = {"auto": {}}
    for row in rows:
        cells["auto"][row["seed"]] = row["normalised"]["mean"]
    for row in others:
        if row["method"] in RIVALS:
            cells.setdefault(row["method"], {})[row["seed"]] = row["normalised"]["mean"]
    return pd.DataFrame(cells).dropna().sort_index()


def record_leads(record: Callable, name: str, table) -> dict[str, Shown]:
    """Record the accuracy of ``auto`` and its lead over every baseline, paired over seeds.

    Args:
        name: of the suite, or ``mean``.
        table: a ``pandas.DataFrame`` as of :func:`by_method`.
    Returns: label of a baseline -> the lead, as rows of a figure, smallest first.
    """
    record_mean(record, f"auto.{name}.accuracy", table["auto"], note="over seeds, normalised")
    leads = {}
    for method in table.columns.drop("auto"):
        lead = table["auto"] - table[method]
        note = "over seeds, paired; tuned with labels"
        id = f"auto.{name}.minus_{method}"
        leads[ENTRIES[method].label] = record_mean(record, id, lead, note=note)
    ordered = sorted(leads.items(), key=lambda item: item[1][0])
    return {label: {"lead": lead} for label, lead in ordered}


def record_choice(record: Callable, name: str, rows: list[dict]) -> dict[str, list[float]]:
    """Record what the choice loses and saves, and how many labels would choose as well.

    Returns: rule -> mean test accuracy for every number of labels in ``LABELS``.
    """
    rules = by_rule(rows)
    note = "over seeds, paired, of the candidates"
    best, chosen = rules["the best of them"], rules["predictions"]
    record_mean(record, f"auto.{name}.regret", best - chosen, note=note)
    for id, rule in (("first", "always the first"), ("energy", "energy of the output")):
        record_mean(record, f"auto.{name}.minus_{id}", chosen - rules[rule], note=note)
    worth = [count for count in LABELS if rules[labelled(count)].mean() >= chosen.mean()]
    none = "0 where no number that was tried chooses as well"
    record(f"auto.{name}.labels_worth", min(worth, default=0), unit="per task", note=none)
    switched = sum(row["chosen"]["with heads"] != FIRST for row in rows)
    record(f"auto.{name}.switched", switched, n=len(rows), note="seeds where another was clearly")
    curves = {"labels": [float(rules[labelled(count)].mean()) for count in LABELS]}
    for rule in ("predictions", "always the first", "energy of the output", "the best of them"):
        curves[rule] = [float(rules[rule].mean())] * len(LABELS)
    return curves


def labelled(count: int) -> str:
    """What the rule is called that chooses by so many labels a task."""
    return f"{count} labels"


def by_rule(rows: list[dict]):
    """Test accuracy of what a rule chooses, as a ``pandas.DataFrame``: a row per seed, a column per
    rule."""
    import pandas as pd

    by_seed = {}
    for row in rows:
        tests = {name: facts["test"] for name, facts in row["candidates"].items()}
        energies = {name: facts["energy"] for name, facts in row["candidates"].items()}
        rules = {
            "predictions": row["normalised"]["mean"],
            "always the first": tests[FIRST],
            "energy of the output": tests[max(energies, key=energies.__getitem__)],
            "the best of them": max(tests.values()),
        }
        rules |= {labelled(count): row["labels"][str(count)] for count in LABELS}
        by_seed[row["seed"]] = rules
    return pd.DataFrame(by_seed).T.sort_index()


def record_cost(record: Callable, suite: Suite, size: int) -> None:
    """Record how many times as long as one programme over single entries, its ridge cross-fitted,
    the choice takes on this machine, on so many calibration examples per task."""
    inputs = suite.calibration(size)

    def seconds(method: Callable, **options) -> float:
        started = time.perf_counter()
        method(suite.base, suite.experts, inputs, **options)
        return time.perf_counter() - started

    one = seconds(qp, basis="elements")
    ratio = seconds(auto, heads=suite.classifiers()) / one
    record(f"auto.{suite.name}.cost", ratio, note="times as long as qp, timed once")


def candidates(rows: list[dict]):
    """Criteria and test accuracy of every candidate, means over seeds, and on how many seeds it was
    chosen: a ``pandas.DataFrame``."""
    import pandas as pd

    table: dict[str, dict] = {name: {} for name in NAMES}
    for name in NAMES:
        facts = [row["candidates"][name] for row in rows]
        for column in ("divergence", "energy", "test"):
            table[name][column] = sum(fact[column] for fact in facts) / len(facts)
        table[name]["chosen"] = sum(row["chosen"]["with heads"] == name for row in rows)
    return pd.DataFrame(table).T.astype({"chosen": int})


def effects(rows: list[dict], record: Callable, name: str) -> dict[str, Shown]:
    """Record what every change of one choice does to test accuracy, paired over seeds; changes of
    the programme against the programme alone, mixtures against it too.

    Args:
        rows: of ``factors.factors``.
    Returns: change -> its effect, as rows of a figure.
    """
    import pandas as pd

    table = pd.DataFrame(rows).pivot(index="seed", columns=["factor", "level"], values="test")
    start = table["nothing", "the programme"]
    shown: dict[str, Shown] = {}
    for factor, level in table.columns:
        if factor == "nothing":
            continue
        id = f"auto.{name}.factor.{factor}.{_in_id(level)}"
        note = "over seeds, paired: test accuracy less that of the programme"
        effect = record_mean(record, id, table[factor, level] - start, note=note)
        shown[f"{factor}: {level}"] = {"effect": effect}
    return shown


def _in_id(words: str) -> str:
    """Words as a part of a record's id."""
    return re.sub("[^a-z0-9]+", "_", words.lower())


def idea_effects(rows: list[dict], record: Callable, name: str) -> dict[str, Shown]:
    """Record what every way of an idea does to accuracy on validation and on test data, paired over
    seeds, against the programme as it is.

    Args:
        rows: of ``ideas.ideas``.
    Returns: idea and way -> split -> the effect, as rows of a figure.
    """
    import pandas as pd

    table = pd.DataFrame(rows).pivot(index="seed", columns=["idea", "level"])
    shown: dict[str, Shown] = {}
    for idea, level in table["test"].columns:
        if (idea, level) == START:
            continue
        shown[f"{idea}: {level}"] = effect = {}
        for split in ("validation", "test"):
            id = f"auto.{name}.idea.{_in_id(idea)}.{_in_id(level)}.{split}"
            lead = table[split][idea, level] - table[split][START]
            effect[split] = record_mean(record, id, lead, note="over seeds, paired")
    return shown


def by_coefficients(rows: list[dict]):
    """Normalised test accuracy, mean over seeds, of the bases that have fewer coefficients than
    single entries, by prior: a ``pandas.DataFrame`` of numbers in words, fewest coefficients
    first."""
    import pandas as pd

    cells: dict[str, dict] = {}
    for (idea, level), own in pd.DataFrame(rows).groupby(["idea", "level"]):
        accuracy = own["test"].mean()
        basis, prior = _basis_and_prior(idea, level)
        if basis:
            cells.setdefault(basis, {"coefficients": own["coefficients"].iloc[0]})
            cells[basis][prior] = accuracy
    priors = [*(f"prior {prior}" for prior in PRIORS), "prior by layer"]
    table = pd.DataFrame(cells).T.sort_values("coefficients")
    shown = table[priors].map("{:.4f}".format).replace("nan", "")  # not every basis has every prior
    return pd.concat([table["coefficients"].astype(int), shown], axis=1)


def _basis_and_prior(idea: str, level: str) -> tuple[str | None, str]:
    """What a way of an idea is called in :func:`by_coefficients`; None where it is no part of
    it."""
    if idea.replace(" ", "_") in CHEAP:
        return idea, level
    if idea == "groups of rows":
        return f"{level} groups of rows", "prior 4"
    if (idea, level) == START:
        return "elements", "prior 4"
    if (idea, level) == ("prior by layer", "with its ridge"):
        return "elements", "prior by layer"
    return None, ""


def record_taken(record: Callable, gains: dict[str, dict[str, Shown]]) -> None:
    """Record how many ways of ideas there are, and how many gain on validation data of every suite
    with an interval clear of zero.

    Args:
        gains: suite -> as of :func:`idea_effects`.
    """
    first, *others = gains.values()
    everywhere = [way for way in first if all(way in other for other in others)]
    taken = [way for way in everywhere if all(_gains(own[way]) for own in gains.values())]
    record("auto.ideas.tried", len(everywhere), note="changes that were tried on every suite")
    record("auto.ideas.taken", len(taken), note=", ".join(taken) or "none gains on both suites")


def _gains(effect: Shown) -> bool:
    interval = effect["validation"][1]
    return interval is not None and interval.low > 0


def leading(effects: dict[str, Shown]) -> dict[str, Shown]:
    """Of :func:`idea_effects` what keeps all coefficients and all tokens: what has fewer is far
    off, and the others could not be told apart beside it."""
    apart = (*(basis.replace("_", " ") for basis in CHEAP), "groups of rows", "sequences")
    return {way: effect for way, effect in effects.items() if not way.startswith(apart)}
