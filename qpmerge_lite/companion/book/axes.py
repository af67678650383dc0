"""How axes of ``figures`` are divided, what the book calls what stands along them, and how points
look on them."""

from __future__ import annotations

import re

import numpy as np
import seaborn as sns

CALLED = {"neighbours": "baselines"}  # a kind of merges: what records call it, and the book
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p", "<")
BASES = ("layer", "rows", "rotated rows", "rotated columns", "elements", "columns", "groups",
         "singular")  # fmt: skip
# of kinds of merges: the place of their marker, and that of their colour
KINDS = {"programme": (3, 0), "baselines": (0, 1), "heuristics": (2, 2)}
KINDS |= {"made to be bad": (1, 3), "drawn to be plausible": (0, 7)}
SOUP = (9, 9)
NAMED = {"soup": SOUP, "uniform soup": SOUP}


def marks(names) -> dict[str, tuple]:
    """Name -> (marker, colour). A family of bases, a kind of merges, and the soup, has its own, the
    same in every figure; other names have those that follow the families', or the first where
    there is none of these."""
    names, colours = list(dict.fromkeys(names)), sns.color_palette("colorblind")
    places = {name: (place, place) for place, name in enumerate(BASES)} | KINDS | NAMED
    others = [name for name in names if _spelled(name) not in places]
    first = len(BASES) if any(_spelled(name) in BASES or name in KINDS for name in names) else 0
    places |= {_spelled(name): (place, place) for place, name in enumerate(others, first)}
    chosen = {name: places[_spelled(name)] for name in names}
    return {name: (MARKERS[marker], colours[colour]) for name, (marker, colour) in chosen.items()}


def look_of_curve(name: str, values, line: str, marker: str) -> dict:
    """Options of a curve: a line, and a marker unless it is the same everywhere. A name that has a
    marker and a colour of its own in every figure has them here too."""
    look = {"label": name, "linestyle": line, "marker": marker, "markersize": 5}
    if name in NAMED:
        look["marker"], look["color"] = marks([name])[name]
    return look if len(set(values)) > 1 else look | {"marker": None}


def mark_of(method: str) -> tuple:
    """Marker and colour of a method by the name that figures give it: a programme's or a
    baseline's."""
    return marks(KINDS)["programme" if method.startswith("QP") else "baselines"]


def _spelled(name) -> str:
    """A name as the book has it, or code."""
    return str(name).replace("_", " ")


def legible(texts, middle: float) -> None:
    """Numbers on shades from dark to light: white below the middle and black above. Seaborn writes
    in white on shades that black is easier to read on."""
    for text in texts:
        text.set_color("white" if float(text.get_text()) < middle else "black")


def name_layers(axis, names: list[str]) -> None:
    """Ticks of a horizontal axis of steps. Layers of a block, named ``blocks.3.…``, share one name
    in their middle, with lines between the blocks; every other step has its own."""
    blocks = [re.sub(r"^blocks\.(\d+)\..*", r"block \1", name) for name in names]
    places = {block: [i for i, b in enumerate(blocks) if b == block] for block in blocks}
    axis.set_xticks([np.mean(place) for place in places.values()], list(places), fontsize=9)
    if blocks == names:
        return
    axis.grid(axis="x", visible=False)
    for place in range(1, len(blocks)):
        if blocks[place] != blocks[place - 1]:
            axis.axvline(place - 0.5, color="0.8", linewidth=0.8)


def logarithmic(axis, linear: float) -> None:
    """Both axes logarithmic beyond the distance ``linear`` from zero, and linear within."""
    axis.set_xscale("symlog", linthresh=linear)
    axis.set_yscale("symlog", linthresh=linear)


def point(axis, x, y, marker: str, colour, *, size: float, **options) -> None:
    """One or several points with a black edge."""
    axis.plot(
        x,
        y,
        marker,
        color=colour,
        markeredgecolor="black",
        markersize=size,
        linestyle="none",
        **options,
    )
