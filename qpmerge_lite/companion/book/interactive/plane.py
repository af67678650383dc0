"""The loss over two coefficients, with a merge to be dragged about."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from bokeh.models import ColumnDataSource, CustomJS, HoverTool, Select, Slider
from bokeh.plotting import figure
from IPython.display import HTML
from matplotlib.colors import BoundaryNorm, to_hex

from ....programme import Programme
from ....solve import minimise
from ..figures import SEQUENTIAL
from .embedding import beside, grab, looks, panel, ring, script, shown, words

START, ELSEWHERE = "soup", "elsewhere"
STEP = 0.01
JUMP = "if (cb_obj.value in places) [first.value, second.value] = places[cb_obj.value];"


def _map(title: str, grid, values, levels, points: ColumnDataSource, lines: dict) -> figure:
    """Contours as of ``figures.plane`` with paths, and points that tell their names under the
    pointer."""
    ends = "d₁", grid[0], grid[-1]
    plot = panel(title, ends, ("d₂", *ends[1:]), height=400, background_fill_alpha=1)
    values = np.asarray(values)
    bounds = [min(values.min(), levels[0]) - 1, *levels, max(values.max(), levels[-1]) + 1]
    scale = plt.get_cmap(SEQUENTIAL), BoundaryNorm(levels, 256, extend="both")
    fills = [to_hex(scale[0](scale[1]((a + b) / 2))) for a, b in zip(bounds, bounds[1:])]
    plot.contour(grid, grid, values, bounds, fill_color=fills, fill_alpha=0.6, line_color="#262626")
    for path, dash in zip(lines.values(), ("solid", "dashed")):
        plot.line(*np.array(path, dtype=float).T, color="black", line_dash=dash)
    marks = plot.scatter(
        "d1",
        "d2",
        source=points,
        marker="marker",
        fill_color="colour",
        line_color="black",
        size=10,
    )
    plot.add_tools(HoverTool(renderers=[marks], tooltips="@name"))
    return plot


def plane(programme: Programme, panels: dict, points: dict, lines: dict, accuracies: dict) -> HTML:
    """The figure ``figures.plane`` with a merge that the pointer drags over both maps, or sliders
    move: what it captures, its gap to the optimum, and its place among the methods.

    Args:
        programme: of two coefficients.
        panels: as of ``figures.plane``, the loss and then the accuracy; the second's grid of
            numbers is read at its node that is nearest to the merge.
        points, lines: as of ``figures.plane``; the merge begins at the soup.
        accuracies: method -> accuracy, of those that have one.
    """
    H, f = programme.dense()
    names, d = list(points), np.array(list(points.values()), dtype=float)
    marks = looks(names)
    columns = {key: [look[key] for look in marks] for key in marks[0]}
    methods = ColumnDataSource({"name": names, "d1": d[:, 0], "d2": d[:, 1], **columns})
    merge = ColumnDataSource({"d1": [0], "d2": [0]})
    maps = [_map(title, *contours, methods, lines) for title, contours in panels.items()]
    (low, *_, high), _, _ = next(iter(panels.values()))
    first, second = (
        Slider(title=title, start=low, end=high, step=STEP, value=value, format="0.000", width=220)
        for title, value in zip(("d₁", "d₂"), points[START])
    )
    jump = Select(title="put the merge at", value=START, options=[ELSEWHERE, *names])
    sentence, table = words(role="status"), words()
    for plot in maps:
        ring(plot, "d1", "d2", merge)
        grab(plot, first, second)
    nodes, accuracy, _ = list(panels.values())[1]
    draw = script(
        "plane",
        H=H.tolist(),
        f=f.tolist(),
        energy=float(programme.energy),
        optimum=minimise(programme).d.flatten().tolist(),
        nodes=list(nodes),
        accuracy=np.asarray(accuracy).tolist(),
        accuracies=[accuracies.get(name) for name in names],
        methods=methods,
        merge=merge,
        first=first,
        second=second,
        jump=jump,
        elsewhere=ELSEWHERE,
        sentence=sentence,
        table=table,
    )
    places = {"first": first, "second": second, "places": dict(zip(names, d.tolist()))}
    jump.js_on_change("value", CustomJS(args=places, code=JUMP))
    controls = beside(first, second, jump)
    return shown("plane", draw, (first, second), beside(*maps), controls, sentence, table)
