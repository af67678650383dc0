"""How a figure to play with gets into a notebook, and what all of them look like."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from bokeh.document import Document
from bokeh.embed import json_item
from bokeh.models import (
    Column,
    ColumnDataSource,
    CustomJS,
    Div,
    LayoutDOM,
    PanTool,
    Range1d,
    Row,
    Slider,
    Widget,
)
from bokeh.plotting import figure
from IPython.display import HTML
from matplotlib.colors import to_hex

from ..axes import marks

HERE = Path(__file__).parent
# a marker of ``figures``: the same shape in bokeh, and as a letter for a key
SHAPES = {
    "o": ("circle", "●"),
    "s": ("square", "■"),
    "^": ("triangle", "▲"),
    "D": ("diamond", "◆"),
    "v": ("inverted_triangle", "▼"),
    "P": ("plus", "✚"),
    "X": ("hex", "⬢"),
    "*": ("star", "★"),
    "p": ("square_pin", "✦"),
    "<": ("triangle_pin", "◀"),
}
# fields to fill in stay light where the page is dark
STYLE = "text-align: left; color-scheme: light;"
LETTERING = """
:host { font-size: 0.9rem; line-height: 1.4; overflow-x: auto; }
table { border-collapse: collapse; }
td, th { padding: 0.1em 0.4em; text-align: right; }
.name { margin-right: 1em; white-space: nowrap; }
:is(td, th):first-child { padding-left: 0; text-align: left; }
"""
# the value of a slider under the pointer, if it has one on this axis
FOLLOW = """
for (const [slider, value] of [[across, cb_obj.x], [up, cb_obj.y]]) {
  if (!slider) continue;
  const step = slider.start + Math.round((value - slider.start) / slider.step) * slider.step;
  slider.value = Math.min(Math.max(step, slider.start), slider.end);
}
"""


def looks(names: Sequence[str]) -> list[dict[str, str]]:
    """Colour, marker and letter of what a figure tells apart, those that ``figures`` gives them."""
    found = []
    for marker, colour in marks(names).values():
        shape, letter = SHAPES[marker]
        found.append({"marker": shape, "colour": to_hex(colour), "letter": letter})
    return found


def script(name: str, **args) -> CustomJS:
    """The script ``name.js`` of this folder, with models and plain values under their names."""
    return CustomJS(args=args, code=(HERE / f"{name}.js").read_text(encoding="utf-8"))


def words(text: str = "", role: str = "note") -> Div:
    """Text, most of it written by a script; with the role ``status`` changes are read out aloud."""
    attributes, width = {"role": role}, "stretch_width"
    return Div(text=text, html_attributes=attributes, sizing_mode=width, stylesheets=[LETTERING])


def key(names: Sequence[str]) -> Div:
    """Names of what :func:`looks` tells apart, each behind its letter."""
    marks = [
        f'<span class="name"><span style="color: {look["colour"]}" aria-hidden="true">'
        f"{look['letter']}</span> {name}</span>"
        for name, look in zip(names, looks(names))
    ]
    return words(" ".join(marks))


def panel(title: str, x: tuple, y: tuple, **options) -> figure:
    """An empty plot that follows the width of the page.

    Args:
        x, y: label, lower and upper end of an axis.
    """
    ranges = [Range1d(low, high, bounds=(low, high)) for _, low, high in (x, y)]
    common = {
        "sizing_mode": "stretch_width",
        "min_width": 270,
        "height": 380,
        "tools": "",
        "toolbar_location": None,
        "background_fill_alpha": 0,
        "border_fill_alpha": 0,
    }
    plot = figure(
        title=title,
        x_range=ranges[0],
        y_range=ranges[1],
        x_axis_label=x[0],
        y_axis_label=y[0],
        **common | options,
    )
    plot.grid.visible = False
    for text in (plot.title, *plot.axis):
        size = "text_font_size" if text is plot.title else "axis_label_text_font_size"
        setattr(text, size, "10pt")
    plot.axis.major_label_text_font_size = "9pt"
    return plot


def grab(plot: figure, across: Slider | None, up: Slider | None) -> None:
    """Have sliders follow the pointer where it is pressed or dragged. The plot itself does not
    move, as its axes end where they are; a finger on it moves no page either."""
    plot.add_tools(PanTool())
    for event in ("tap", "panstart", "pan"):
        plot.js_on_event(event, CustomJS(args={"across": across, "up": up}, code=FOLLOW))


def ring(plot: figure, x: str, y: str, source: ColumnDataSource) -> None:
    """The point that the reader moves: a ring that is seen on any ground."""
    for colour, width in (("white", 5), ("black", 2)):
        plot.scatter(
            x, y, source=source, size=17, fill_alpha=0, line_color=colour, line_width=width
        )


def beside(*children: LayoutDOM) -> Row:
    """Side by side where there is room, else below each other."""
    styles = {"flex-wrap": "wrap", "gap": "0.4em 1em"}
    return Row(children=list(children), sizing_mode="stretch_width", styles=styles)


def shown(name: str, draw: CustomJS, controls: Iterable[Widget], *parts: LayoutDOM) -> HTML:
    """A figure as HTML of a notebook: hidden, until its own script finds what draws it.

    Args:
        draw: fills in what the figure shows, at the beginning and when a control has a new value.
        parts: from top to bottom.
    """
    for control in controls:
        control.js_on_change("value", draw)
    document, layout = Document(), Column(*parts, sizing_mode="stretch_width")
    document.add_root(layout)
    document.js_on_event("document_ready", draw)
    item = json.dumps(json_item(layout)).replace("</", "<\\/")
    code = (HERE / "embedding.js").read_text(encoding="utf-8")
    return HTML(
        f'<div id="play-{name}" class="play" style="{STYLE}" hidden></div>\n'
        f'<script>\n{code}\nplay("play-{name}", {item});\n</script>'
    )
