"""What the studies of the calibration set say, as tables and records under ids that begin with
``calibration.<suite>``."""

from __future__ import annotations

from ...diagnostic import OPTIMISM
from . import calibration
from .summary import seed_interval

ELEMENTS = {"basis": "elements", "targets": "own"}
FACTORS = {
    "draw": (),
    "size": ("sizes",),
    "selection": ("selection",),
    "domain": ("domain",),
    "experts": ("experts",),
    "basis": ("rows",),
}


def merges(suites: dict, draws: int, few: int, tasks: int):
    """All merges of the studies as a ``pandas.DataFrame``: suite, factor, level, draw, accuracy,
    output; ``draw`` is the factor of random draws."""
    import pandas as pd

    size = calibration.SIZE
    plan = [
        ("draw", "size", [size], draws, ELEMENTS),
        ("sizes", "size", [4, 64, 256], 2, ELEMENTS),
        ("selection", "selection", [r for r in calibration.RULES if r != "random"], few, ELEMENTS),
        ("domain", "domain", ["another", "mixed", "scrambled"], few, ELEMENTS),
        ("experts", "experts", [2, 8], 1, ELEMENTS),
        ("rows", "size", [size], few, ELEMENTS | {"basis": "rows"}),
    ]
    return pd.DataFrame(
        [
            {"suite": name, "factor": factor, **row}
            for name, suite in suites.items()
            for factor, study, levels, n, merge in plan
            for row in calibration.study(suite, study, levels, n, merge, tasks)
        ]
    )


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
        for group, p in {"": part, **{f"{f}.": p for f, p in part.groupby("family")}}.items():
            sums = p.groupby(["seed", "draw"])[["measured", *OPTIMISM]].sum()
            for by in OPTIMISM:
                mean, interval = seed_interval(sums[by] / sums.measured)
                record(
                    f"calibration.{name}.optimism.{group}{'' if by == 'refit' else by + '.'}ratio",
                    mean,
                    n=len(sums),
                    interval=interval,
                    note="predicted over measured, over draws and seeds",
                )
        record(
            f"calibration.{name}.optimism.uncorrected_error",
            float(part.measured.abs().mean()),
            n=len(part),
        )
        record(
            f"calibration.{name}.optimism.corrected_error",
            float((part.measured - part.refit).abs().mean()),
            n=len(part),
        )
        means = part.groupby(["family", "size"])[["measured", "refit"]].mean()
        for id, end in (("lowest", min), ("highest", max)):
            record(
                f"calibration.{name}.optimism.{id}",
                float(end(means.refit / means.measured)),
                n=len(means),
                note="over bases and sizes, of means over draws",
            )
    return gaps.groupby(["suite", "family", "size"])[["measured", *OPTIMISM]].mean()


def record_merges(record, table, rivals: dict) -> None:
    """Record every level's accuracy and output energy, their paired differences from random draws,
    and the spread of these and of methods."""
    from scipy.stats import chi2, spearmanr

    def keep(id, values, note):
        mean, interval = seed_interval(values)
        record(f"calibration.{id}", mean, n=len(values), interval=interval, note=note)

    words = {"draw": "size", "sizes": "size", "rows": "rows.size"}
    for (name, factor, level), p in table.groupby(["suite", "factor", "level"]):
        id = f"{name}.{words.get(factor, factor)}.{level}"
        for e, word in (("accuracy", "minus_random"), ("output", "minus_random.output")):
            keep(f"{id}.{e}", p[e], "over draws")
            if factor not in ("draw", "experts"):
                keep(
                    f"{id}.{word}",
                    (p.set_index("draw")[e] - plain(table, name)[e]).dropna(),
                    "paired over draws",
                )
    for name in table.suite.unique():
        p, others = plain(table, name), [r["accuracy"] for r in rivals[name].values()]
        sd, free = float(p.accuracy.std()), len(p) - 1
        ends = [sd * float(free / chi2.ppf(q, free)) ** 0.5 for q in (0.975, 0.025)]
        record(
            f"calibration.{name}.draws.sd",
            sd,
            n=len(p),
            interval=ends,
            note="of normalised accuracy; chi-square interval",
        )
        record(f"calibration.{name}.draws.output_sd", float(p.output.std()), n=len(p))
        record(
            f"calibration.{name}.draws.ranks",
            spearmanr(p.output, p.accuracy)[0],
            n=len(p),
            note="output energy and accuracy",
        )
        keep(
            f"{name}.draws.minus_soup", p.accuracy - rivals[name]["soup"]["accuracy"], "over draws"
        )
        record(f"calibration.{name}.soup.accuracy", rivals[name]["soup"]["accuracy"])
        record(
            f"calibration.{name}.methods.range",
            max(others) - min(others),
            n=len(others),
            note="own defaults",
        )


def spreads(record, table):
    """Range, and its standard deviation, of accuracy over the levels of every factor, means over
    draws; recorded and as a ``pandas.DataFrame``."""
    import pandas as pd

    found: dict[str, dict] = {}
    for name in table.suite.unique():
        for factor, kept in FACTORS.items():
            p = table[(table.suite == name) & table.factor.isin(("draw", *kept))]
            levels = p.groupby(["factor", "level"]).accuracy.mean() if kept else p.accuracy
            record(
                f"calibration.{name}.factors.{factor}",
                float(levels.max() - levels.min()),
                n=len(levels),
                note="range of accuracy",
            )
            found.setdefault(f"{name}, range", {})[factor] = float(levels.max() - levels.min())
            found.setdefault(f"{name}, sd", {})[factor] = float(levels.std())
    return pd.DataFrame(found)
