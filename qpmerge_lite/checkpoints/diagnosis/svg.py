"""Small charts as SVG, drawn as trees of XML, so that whatever names hold is only ever text.

A chart has a title and a description for those who do not see it. Its colours are the classes
``ink``, ``bar``, ``quiet`` and ``grid`` of the page that it is in; it can be read without them, as
everything that a colour says a length or a word says too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement

from .summary import fitted

WIDTH = 760.0  # of every chart, in pixels; the page scales it
LEFT, RIGHT = 180.0, 170.0  # room for names and for numbers
ROW, PANEL = 30.0, 96.0  # heights
TEXT = 13.0  # size of letters
LONGEST = 24  # letters of a name that fit to the left


@dataclass(frozen=True)
class Bar:
    """One bar of a chart.

    Attributes:
        name: what it is of.
        value: its length, None for none.
        low, high: ends of its interval, None for none.
        label: its value in words.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """Columns above one axis.

    Attributes:
        name: what they are of.
        values: heights; None for a column that is not there.
        labels: what every column is, for those who point at it.
    """

    name: str
    values: Sequence[float | None]
    labels: Sequence[str]


@dataclass(frozen=True)
class Axis:
    """A straight scale from numbers to pixels; numbers outside are drawn at its ends."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, number: float) -> float:
        """The pixel of a number."""
        inside = min(max(number, self.low), self.high)
        return self.start + (inside - self.low) / (self.high - self.low) * (self.stop - self.start)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``, one, two or five times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(k * power for k in (1, 2, 5, 10) if (high - low) / (k * power) <= most)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [round(number * step, 12) for number in numbers]


def bars(key: str, title: str, description: str, rows: Sequence[Bar], low: float = 0.0) -> Element:
    """Bars beside each other's names with their intervals, on an axis from ``low`` to one.

    Args:
        key: a word that no other chart of the page has.
        low: at most 0; a bar that goes further ends there with an arrow.
    """
    height = ROW * len(rows) + 40
    chart = _chart(key, title, description, height)
    axis = Axis(low, 1.0, LEFT, WIDTH - RIGHT)
    for tick in ticks(low, 1.0):
        _line(chart, (axis.at(tick), 4), (axis.at(tick), height - 34), "grid")
        _write(chart, axis.at(tick), height - 16, _word(tick), "middle")
    for place, row in enumerate(rows):
        _bar(chart, axis, 4 + ROW * place, row)
    _line(chart, (axis.at(0), 4), (axis.at(0), height - 34), "ink")
    return chart


def _bar(chart: Element, axis: Axis, top: float, row: Bar) -> None:
    """One bar with name, interval and label."""
    middle = top + ROW / 2
    _write(chart, LEFT - 10, middle + TEXT / 3, fitted(row.name, LONGEST), "end", row.name)
    _write(chart, WIDTH - RIGHT + 10, middle + TEXT / 3, row.label)
    if row.value is None:
        return
    ends = sorted((axis.at(0), axis.at(row.value)))
    _rectangle(chart, ends[0], top + 6, ends[1] - ends[0], ROW - 12, f"{row.name}: {row.label}")
    if row.value < axis.low:
        _write(chart, axis.start + 4, middle + TEXT / 3, "◀")
    if row.low is not None and row.high is not None:
        left, right = axis.at(row.low), axis.at(row.high)
        _line(chart, (left, middle), (right, middle), "ink")
        for end in (left, right):
            _line(chart, (end, middle - 5), (end, middle + 5), "ink")


def columns(
    key: str,
    title: str,
    description: str,
    panels: Sequence[Panel],
    *,
    low: float,
    high: float,
    below: tuple[str, str],
) -> Element:
    """Panels of columns, one under the other on one scale from ``low`` to ``high``.

    Args:
        key: a word that no other chart of the page has.
        below: what stands under the first and the last column.
    """
    height = PANEL * len(panels) + 30
    chart = _chart(key, title, description, height)
    for place, panel in enumerate(panels):
        top = PANEL * place
        axis = Axis(low, high, top + PANEL - 10, top + 10)
        _write(chart, LEFT - 60, top + 22, fitted(panel.name, LONGEST - 8), "end", panel.name)
        for tick in ticks(low, high, 3):
            _line(chart, (LEFT, axis.at(tick)), (WIDTH - 10, axis.at(tick)), "grid")
            _write(chart, LEFT - 8, axis.at(tick) + TEXT / 3, _word(tick), "end")
        _columns(chart, axis, panel)
        _line(chart, (LEFT, axis.at(0)), (WIDTH - 10, axis.at(0)), "ink")
    _write(chart, LEFT, height - 10, below[0])
    _write(chart, WIDTH - 10, height - 10, below[1], "end")
    return chart


def _columns(chart: Element, axis: Axis, panel: Panel) -> None:
    """The columns of one panel; one that goes further than the axis has a cross at its end."""
    step = (WIDTH - 10 - LEFT) / max(len(panel.values), 1)
    width = min(max(step * 0.7, 1.0), 40.0)
    for place, (value, label) in enumerate(zip(panel.values, panel.labels, strict=True)):
        if value is None:
            continue
        centre = LEFT + step * (place + 0.5)
        ends = sorted((axis.at(0), axis.at(value)))
        tall = max(ends[1] - ends[0], 1.0) if value else 0.0
        _rectangle(chart, centre - width / 2, ends[0], width, tall, label)
        if not axis.low <= value <= axis.high:
            _write(chart, centre, axis.at(value) + TEXT / 3, "×", "middle")


def _chart(key: str, title: str, description: str, height: float) -> Element:
    """An empty chart."""
    words = {"role": "img", "aria-labelledby": f"{key}-title {key}-description"}
    size = {"viewBox": f"0 0 {WIDTH:g} {height:g}", "width": f"{WIDTH:g}", "height": f"{height:g}"}
    chart = Element("svg", {**size, **words, "font-size": f"{TEXT:g}"})
    SubElement(chart, "title", {"id": f"{key}-title"}).text = title
    SubElement(chart, "desc", {"id": f"{key}-description"}).text = description
    return chart


def _line(chart: Element, start: tuple[float, float], stop: tuple[float, float], kind: str) -> None:
    ends = zip(("x1", "y1", "x2", "y2"), (*start, *stop), strict=True)
    SubElement(chart, "line", {**{name: _pixel(p) for name, p in ends}, "class": kind})


def _rectangle(chart: Element, x: float, y: float, width: float, height: float, label: str) -> None:
    """A bar or column, with words for those who point at it."""
    sides = {"x": x, "y": y, "width": width, "height": height}
    place = {name: _pixel(side) for name, side in sides.items()}
    SubElement(SubElement(chart, "rect", {**place, "class": "bar"}), "title").text = label


def _write(
    chart: Element, x: float, y: float, words: str, anchor: str = "start", whole: str = ""
) -> None:
    """Words at a place; ``whole`` is shown to those who point at words that are cut."""
    place = {"x": _pixel(x), "y": _pixel(y), "text-anchor": anchor, "class": "word"}
    written = SubElement(chart, "text", place)
    written.text = words
    if whole and whole != words:
        SubElement(written, "title").text = whole


def _word(tick: float) -> str:
    return f"{tick:g}".replace("-", "−")


def _pixel(number: float) -> str:
    return f"{round(number, 2):g}"
