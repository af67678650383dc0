"""A figure of values with intervals, several beside each other in a row; style and widths are those
of ``figures``."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from . import behind
from .figures import MARKERS, WIDTH, finish

FILLS = ("black", "white", "0.65")  # told apart without colour, and by marker too
APART = 0.22  # between the values of a row


def _panel(axis, found: dict, labels: list[str]) -> None:
    """Rows from top to bottom, the labels' values a little apart, each with its interval."""
    for place, (label, marker, fill) in enumerate(zip(labels, MARKERS, FILLS)):
        step = APART * (place - (len(labels) - 1) / 2)
        for y, row in enumerate(found.values()):
            if label in row and row[label][1] is not None:
                axis.hlines(y + step, *row[label][1], color="0.35", linewidth=1.6)
        shown = [(row[label][0], y + step) for y, row in enumerate(found.values()) if label in row]
        x, y = np.array(shown).T
        axis.plot(
            x,
            y,
            marker,
            color=fill,
            markeredgecolor="black",
            markersize=6,
            linestyle="none",
            label=label,
        )


def points(panels: dict, xlabel: str, line: float | None = None) -> Figure:
    """Values with intervals, panels side by side with the same rows.

    Args:
        panels: title -> row -> label -> (value, interval or None); at most three labels, told apart
            by marker and fill. A row may lack some of them.
        line: where a dotted line stands.
    """
    first = next(iter(panels.values()))
    labels = list(dict.fromkeys(label for row in first.values() for label in row))
    size = WIDTH, 0.16 * len(first) * (1 + len(labels)) + 1.2
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (title, estimates) in zip(axes[0], panels.items()):
        _panel(axis, estimates, labels)
        if line is not None:
            axis.axvline(line, color="black", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel=xlabel)
        axis.set_yticks(range(len(estimates)), list(estimates))
        axis.grid(axis="y", visible=False)
        if len(panels) > 1:
            axis.locator_params(axis="x", nbins=9 // len(panels) + 1)
    axes[0, 0].set_ylim(len(first) - 0.4, -0.6)
    return finish(
        figure, behind.estimates(panels), axes[0, 0] if len(labels) > 1 else None, len(labels)
    )
