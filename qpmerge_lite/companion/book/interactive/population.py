"""Every merge of the trial: any energy against accuracy, and how it orders a part of them."""

from __future__ import annotations

import numpy as np
from bokeh.models import (
    BooleanFilter,
    BoxSelectTool,
    Button,
    CDSView,
    ColumnDataSource,
    CustomJS,
    GroupFilter,
    HoverTool,
    RangeSlider,
    Select,
)
from bokeh.plotting import figure
from IPython.display import HTML

from ..axes import CALLED
from .embedding import beside, key, looks, panel, script, shown, words

EVERY = "all"
LOWEST = -1.0  # energies below are drawn here, as in the static figure
CHOICES = {"kind": "kind", "method": "method", "size": "calibration examples"}
RESET = """
for (const choice of choices) choice.value = every;
between.value = [between.start, between.end];
merges.selected.indices = [];
"""


def _kinds(frames: dict) -> list[str]:
    """Kinds of merges in the order of ``figures.correlations``."""
    kinds = sorted({kind for table in frames.values() for kind in table["kind"]})
    return [CALLED.get(kind, kind) for kind in kinds]


def _merges(frames: dict, forms: list[str]) -> ColumnDataSource:
    """All merges in one source: an array per form of energy, words, and looks by kind."""
    import pandas as pd

    table = pd.concat(frames.values())
    kinds = [CALLED.get(kind, kind) for kind in table["kind"]]
    columns = {form: table[form].to_numpy(dtype=float) for form in forms}
    columns |= {name: table[name].astype(str).tolist() for name in ("suite", "problem", "size")}
    columns |= {"kind": kinds, "method": table["label"].tolist(), "energy": np.zeros(len(table))}
    columns["accuracy"] = table["accuracy"].to_numpy(dtype=float)
    names = _kinds(frames)
    look = dict(zip(names, looks(names)))
    for name in ("marker", "colour"):
        columns[name] = [look[kind][name] for kind in kinds]
    return ColumnDataSource(columns)


def _cloud(suite: str, merges: ColumnDataSource, wanted: BooleanFilter, low: float) -> figure:
    """The merges of one suite that are wanted; a box drawn with the pointer selects among them."""
    plot = panel(suite, ("captured energy", LOWEST - 0.05, 1.02), ("accuracy / expert", low, 1.02))
    plot.scatter(
        "energy",
        "accuracy",
        source=merges,
        view=CDSView(filter=wanted & GroupFilter(column_name="suite", group=suite)),
        marker="marker",
        fill_color="colour",
        line_color="black",
        line_width=0.5,
        size=8,
        nonselection_alpha=0.15,
    )
    brush = BoxSelectTool()
    plot.add_tools(brush, HoverTool(tooltips="@method, @kind, examples: @size"))
    plot.toolbar.active_drag = brush
    return plot


def population(frames: dict, form: str) -> HTML:
    """All merges of the trial, to be filtered and brushed, with the rank correlation within
    problems, and over all, of those that are left.

    Args:
        frames: suite -> table as of ``statistics.frame``.
        form: the column whose energy is shown first.
    """
    forms = [name for name in next(iter(frames.values())) if name.endswith(("sample", "disjoint"))]
    merges = _merges(frames, forms)
    data, wanted = merges.data, BooleanFilter(booleans=[True] * len(merges.data["energy"]))
    low = float(data["accuracy"].min()) - 0.02
    clouds = [_cloud(suite, merges, wanted, low) for suite in frames]
    called = [(name, name.replace(".", ", ").replace("_", " ")) for name in forms]
    energy = Select(title="energy or rival", value=form, options=called)
    suite = Select(title="suite", value=EVERY, options=[EVERY, *frames])
    choices = {"suite": suite}
    for column, title in CHOICES.items():
        options = sorted(set(data[column]), key=int if column == "size" else str)
        choices[column] = Select(title=title, value=EVERY, options=[EVERY, *options])
    between = RangeSlider(title="between", start=LOWEST, end=1, step=0.01, value=(LOWEST, 1))
    reset = Button(label="all merges again")
    table = words(role="status")
    draw = script(
        "population",
        merges=merges,
        wanted=wanted,
        energy=energy,
        choices=choices,
        between=between,
        table=table,
        every=EVERY,
        lowest=LOWEST,
        clouds=dict(zip(frames, clouds)),
    )
    merges.selected.js_on_change("indices", draw)
    again = {"choices": list(choices.values()), "between": between, "merges": merges}
    reset.js_on_event("button_click", CustomJS(args=again | {"every": EVERY}, code=RESET))
    controls = energy, *choices.values(), between
    parts = beside(*clouds), key(_kinds(frames)), beside(*controls, reset), table
    return shown("population", draw, controls, *parts)
