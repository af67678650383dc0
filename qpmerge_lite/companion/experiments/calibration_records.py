"""What the studies of the calibration set say, as tables and records under ids that begin with
``calibration.<suite>``."""

from __future__ import annotations

from ...diagnostic import OPTIMISM
from .intervals import pooled_spread, record_mean

# factor -> what varies beside the draws, as ``factor`` of the table of merges
FACTORS = {
    "draw": (),
    "size": ("sizes",),
    "selection": ("selection",),
    "domain": ("domain",),
    "experts": ("experts",),
    "basis": ("rows",),
}


def plain(table, name: str):
    """The random draws of a suite, by seed of the experts and draw."""
    return _by_draw(table[(table.suite == name) & (table.factor == "draw")])


def _by_draw(rows):
    return rows.set_index(["seed", "draw"]).sort_index()


def _independent(values):
    """Of values by seed and draw, the means of seeds, whose draws share their experts; the draws
    where there is one seed."""
    by_seed = values.groupby(level="seed").mean()
    return by_seed if len(by_seed) > 1 else values


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
    unit = "seed" if gaps.seed.nunique() > 1 else "draw"
    sums = gaps.groupby(unit)[["measured", *OPTIMISM]].sum()
    for by in OPTIMISM:
        id = f"{prefix}.ratio" if by == "refit" else f"{prefix}.{by}.ratio"
        note = f"predicted over measured, over {unit}s"
        record_mean(record, id, sums[by] / sums.measured, note=note)


def record_merges(record, table, others) -> None:
    """Record every level's accuracy and output energy, their paired differences from random draws,
    and the spread of these and of other methods.

    Args:
        table: ``pandas.DataFrame`` of rows of ``calibration.sensitivity``.
        others: of rows of ``calibration.other_methods``.
    """
    for (name, factor, level), part in table.groupby(["suite", "factor", "level"]):
        _record_level(record, _by_draw(part), plain(table, name), name, factor, level)
    for name in table.suite.unique():
        _record_draws(record, name, plain(table, name), others[others.suite == name])


def _record_mean(record, id: str, values) -> None:
    """Record the mean of values by seed and draw."""
    independent = _independent(values)
    unit = "draws" if len(independent) == len(values) else "seeds, draws averaged"
    record_mean(record, f"calibration.{id}", independent, note=f"over {unit}")


def _record_level(record, part, random, name: str, factor: str, level) -> None:
    """Record one level of a factor, and its differences from the ``random`` draws of the suite."""
    words = {"draw": "size", "sizes": "size", "rows": "rows.size"}
    id = f"{name}.{words.get(factor, factor)}.{level}"
    for column, difference in (("accuracy", "minus_random"), ("output", "minus_random.output")):
        _record_mean(record, f"{id}.{column}", part[column])
        if factor not in ("draw", "experts"):
            paired = (part[column] - random[column]).dropna()
            _record_mean(record, f"{id}.{difference}", paired)


def _record_draws(record, name: str, random, others) -> None:
    """Record the spread of a suite's random draws, and that of methods with their own defaults,
    both inside seeds."""
    from scipy.stats import spearmanr

    prefix, count = f"calibration.{name}", len(random)
    note = "standard deviation of normalised accuracy inside seeds; chi-square interval"
    for id, rows in (("draws", random), ("methods", others)):
        sd, interval = pooled_spread([part.accuracy for _, part in rows.groupby("seed")])
        record(f"{prefix}.{id}.sd", sd, n=len(rows), interval=interval, note=note)
    inside = random.groupby(level="seed")
    record(f"{prefix}.draws.output_sd", float(inside.output.std().mean()), n=count)
    ranks = [spearmanr(part.output, part.accuracy)[0] for _, part in inside]
    note = "output energy and accuracy inside seeds, averaged"
    record(f"{prefix}.draws.ranks", sum(ranks) / len(ranks), n=count, note=note)
    soup = others[others.label == "soup"].set_index("seed").accuracy
    _record_mean(record, f"{name}.draws.minus_soup", random.accuracy.sub(soup, level="seed"))
    record(f"{prefix}.soup.accuracy", float(soup.mean()), n=len(soup))


def spreads(record, table):
    """Standard deviation of accuracy over the levels of every factor (means over draws; over the
    draws themselves for the factor ``draw``) inside seeds, averaged over these; recorded and as a
    ``pandas.DataFrame``. Factors that were not varied are left out."""
    import pandas as pd

    columns: dict[str, dict] = {}
    note = "standard deviation of accuracy inside seeds, averaged"
    for name in table.suite.unique():
        columns[name] = {}
        for factor, varied in FACTORS.items():
            if varied and not table.factor.isin(varied).any():
                continue
            part = table[(table.suite == name) & table.factor.isin(("draw", *varied))]
            level = ["factor", "level"] if varied else ["draw"]
            levels = part.groupby(["seed", *level]).accuracy.mean()
            columns[name][factor] = float(levels.groupby(level="seed").std().mean())
            id = f"calibration.{name}.factors.{factor}"
            record(id, columns[name][factor], n=len(levels), note=note)
    return pd.DataFrame(columns)
