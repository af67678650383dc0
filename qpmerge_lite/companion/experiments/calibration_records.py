"""What the studies of the calibration set say, as tables and records under ids that begin with
``calibration.<suite>``."""

from __future__ import annotations

from typing import NamedTuple

from ...diagnostic import OPTIMISM
from . import calibration
from .intervals import seed_interval, spread_interval

ELEMENTS = {"basis": "elements", "targets": "own"}
ROWS = ELEMENTS | {"basis": "rows"}
# factor -> what varies beside the draws, as ``factor`` of the table of merges
FACTORS = {
    "draw": (),
    "size": ("sizes",),
    "selection": ("selection",),
    "domain": ("domain",),
    "experts": ("experts",),
    "basis": ("rows",),
}


class Study(NamedTuple):
    """A study of one factor: its name in tables, and the arguments of ``calibration.study``."""

    name: str
    factor: str
    levels: list
    draws: int
    merge: dict


def merges(suites: dict, draws: int, few: int, tasks: int):
    """All merges of the studies as a ``pandas.DataFrame``: suite, factor, level, draw, accuracy,
    output; ``draw`` is the factor of random draws."""
    import pandas as pd

    size = calibration.SIZE
    rules = [rule for rule in calibration.RULES if rule != "random"]
    studies = (
        Study("draw", "size", [size], draws, ELEMENTS),
        Study("sizes", "size", [4, 64, 256], 2, ELEMENTS),
        Study("selection", "selection", rules, few, ELEMENTS),
        Study("domain", "domain", ["another", "mixed", "scrambled"], few, ELEMENTS),
        Study("experts", "experts", [2, 8], 1, ELEMENTS),
        Study("rows", "size", [size], few, ROWS),
    )
    rows = []
    for name, suite in suites.items():
        for study in studies:
            place = {"suite": name, "factor": study.name}
            for row in calibration.study(suite, *study[1:], tasks):
                rows.append(place | row)
    return pd.DataFrame(rows)


def plain(table, name: str):
    """The random draws of a suite, by draw."""
    return table[(table.suite == name) & (table.factor == "draw")].set_index("draw")


def record_gaps(record, gaps):
    """Record predicted over measured optimism, and what correcting leaves; the means over draws by
    suite, family and size are returned.

    A ratio is that of sums over sizes (and bases) within one draw and seed of experts; intervals
    are taken over these.
    """
    for name, part in gaps.groupby("suite"):
        prefix = f"calibration.{name}.optimism"
        _record_ratios(record, prefix, part)
        for family, of_family in part.groupby("family"):
            _record_ratios(record, f"{prefix}.{family}", of_family)
        uncorrected, corrected = part.measured.abs(), (part.measured - part.refit).abs()
        record(f"{prefix}.uncorrected_error", float(uncorrected.mean()), n=len(part))
        record(f"{prefix}.corrected_error", float(corrected.mean()), n=len(part))
        means = part.groupby(["family", "size"])[["measured", "refit"]].mean()
        ratios, note = means.refit / means.measured, "over bases and sizes, of means over draws"
        record(f"{prefix}.lowest", float(min(ratios)), n=len(means), note=note)
        record(f"{prefix}.highest", float(max(ratios)), n=len(means), note=note)
    return gaps.groupby(["suite", "family", "size"])[["measured", *OPTIMISM]].mean()


def _record_ratios(record, prefix: str, gaps) -> None:
    """Record the ratio of predicted to measured optimism for every way of predicting it."""
    sums = gaps.groupby(["seed", "draw"])[["measured", *OPTIMISM]].sum()
    for by in OPTIMISM:
        mean, interval = seed_interval(sums[by] / sums.measured)
        record(
            f"{prefix}.ratio" if by == "refit" else f"{prefix}.{by}.ratio",
            mean,
            n=len(sums),
            interval=interval,
            note="predicted over measured, over draws and seeds",
        )


def record_merges(record, table, rivals: dict) -> None:
    """Record every level's accuracy and output energy, their paired differences from random draws,
    and the spread of these and of methods."""
    for (name, factor, level), part in table.groupby(["suite", "factor", "level"]):
        _record_level(record, part.set_index("draw"), plain(table, name), name, factor, level)
    for name in table.suite.unique():
        _record_draws(record, name, plain(table, name), rivals[name])


def _record_mean(record, id: str, values, note: str) -> None:
    mean, interval = seed_interval(values)
    record(f"calibration.{id}", mean, n=len(values), interval=interval, note=note)


def _record_level(record, part, random, name: str, factor: str, level) -> None:
    """Record one level of a factor, and its differences from the ``random`` draws of the suite."""
    words = {"draw": "size", "sizes": "size", "rows": "rows.size"}
    id = f"{name}.{words.get(factor, factor)}.{level}"
    for column, difference in (("accuracy", "minus_random"), ("output", "minus_random.output")):
        _record_mean(record, f"{id}.{column}", part[column], "over draws")
        if factor not in ("draw", "experts"):
            paired = (part[column] - random[column]).dropna()
            _record_mean(record, f"{id}.{difference}", paired, "paired over draws")


def _record_draws(record, name: str, random, rivals: dict[str, dict]) -> None:
    """Record the spread of a suite's random draws, and that of methods with their own defaults."""
    from scipy.stats import spearmanr

    prefix, count = f"calibration.{name}", len(random)
    others = [judged["accuracy"] for judged in rivals.values()]
    note = "standard deviation of normalised accuracy; chi-square interval"
    for id, accuracies in (("draws", random.accuracy), ("methods", others)):
        sd, interval = spread_interval(accuracies)
        record(f"{prefix}.{id}.sd", sd, n=len(accuracies), interval=interval, note=note)
    record(f"{prefix}.draws.output_sd", float(random.output.std()), n=count)
    correlation = spearmanr(random.output, random.accuracy)[0]
    record(f"{prefix}.draws.ranks", correlation, n=count, note="output energy and accuracy")
    soup = rivals["soup"]["accuracy"]
    _record_mean(record, f"{name}.draws.minus_soup", random.accuracy - soup, "over draws")
    record(f"{prefix}.soup.accuracy", soup)


def spreads(record, table):
    """Standard deviation of accuracy over the levels of every factor (means over draws; over the
    draws themselves for the factor ``draw``), recorded and as a ``pandas.DataFrame``."""
    import pandas as pd

    columns: dict[str, dict] = {}
    for name in table.suite.unique():
        columns[name] = {}
        for factor, varied in FACTORS.items():
            part = table[(table.suite == name) & table.factor.isin(("draw", *varied))]
            levels = part.accuracy
            if varied:
                levels = part.groupby(["factor", "level"]).accuracy.mean()
            columns[name][factor] = float(levels.std())
            id, note = f"calibration.{name}.factors.{factor}", "standard deviation of accuracy"
            record(id, columns[name][factor], n=len(levels), note=note)
    return pd.DataFrame(columns)
