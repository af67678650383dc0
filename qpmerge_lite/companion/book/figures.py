"""The book's one visual style and its figure functions: data in, ``Figure`` out.

Colours are seaborn's colour-blind palette; whatever a colour says, a marker, a line style or a
hatch says too. Figures are drawn at page width, with no lettering below 9 points and keys outside
the data.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from . import behind
from .axes import (
    CALLED,
    MARKERS,
    legible,
    logarithmic,
    look_of_curve,
    mark_of,
    marks,
    name_layers,
    point,
)

WIDTH = 7.4  # inches: the text column
HATCHES = ("", "////", "....", "xx", "++")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
SEQUENTIAL, DIVERGING = "cividis", "PuOr_r"
NOTHING = 2e-3  # differences of captured energy below this are no loss


def style() -> None:
    """Set the style for every later figure of the process."""
    sns.set_theme(
        context="paper",
        style="whitegrid",
        palette="colorblind",
        rc={
            "figure.figsize": (WIDTH, 3.4),
            "figure.dpi": 150,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.labelsize": 10,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "lines.markersize": 6,
            "grid.linewidth": 0.5,
            "grid.color": "0.88",
            "axes.edgecolor": "0.4",
            "hatch.color": "0.25",
            "hatch.linewidth": 0.6,
        },
    )


def _word(name: str) -> str:
    return name.replace("_", " ")


def finish(figure: Figure, table, keyed=None, columns: int = 1, shades: bool = False) -> Figure:
    """The figure with the table behind it (see ``behind``), and with one key under the whole of it
    where there is an axis that it is taken from."""
    behind.attach(figure, table, shades)
    if keyed is not None:
        handles, labels = keyed.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    plt.close(figure)  # shown once, as the value of its cell
    return figure


def plane(panels: dict, points: dict, lines: dict) -> Figure:
    """Contours of functions of two coefficients, with named points and paths on each.

    Args:
        panels: title -> (grid values (a,) of either coefficient, function (a, a) with d2 first,
            contour levels).
        points: name -> (d1, d2).
        lines: name -> (N, 2) path.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 4.4), sharex=True, sharey=True)
    for axis, (title, (grid, values, levels)) in zip(axes, panels.items()):
        axis.contourf(
            grid,
            grid,
            values,
            levels,
            cmap=SEQUENTIAL,
            norm=BoundaryNorm(levels, 256, extend="both"),
            alpha=0.6,
            extend="both",
        )
        contours = axis.contour(grid, grid, values, levels, colors="0.15", linewidths=0.7)
        axis.clabel(contours, levels[1:], fmt="%g", fontsize=9)
        for (name, path), line in zip(lines.items(), LINES):
            axis.plot(*np.asarray(path).T, color="black", linestyle=line, linewidth=1.2, label=name)
        for name, (marker, colour) in marks(points).items():
            point(axis, *points[name], marker, colour, size=9, label=name)
        axis.set(
            title=title,
            xlabel="$d_1$",
            aspect="equal",
            xlim=(grid[0], grid[-1]),
            ylim=(grid[0], grid[-1]),
        )
        axis.grid(False)
    axes[0].set_ylabel("$d_2$")
    return finish(figure, behind.surfaces(panels, points), axis, 3, shades=True)


def ridge_path(ridges, coefficients, prior: float, curves: dict) -> Figure:
    """Left: every coefficient (R, p) along the ridge, towards its prior. Right: curves (R,) on the
    same axis."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharex=True)
    left.plot(ridges, coefficients, color="0.35", linewidth=0.6)
    left.axhline(prior, color="black", linestyle="--", linewidth=1.2)
    left.annotate(
        "prior", (ridges[-1], prior), xytext=(0, 3), textcoords="offset points", ha="right"
    )
    for (name, values), line, marker in zip(curves.items(), LINES, MARKERS):
        right.plot(ridges, values, linestyle=line, marker=marker, markevery=4, label=name)
    left.set(xscale="log", xlabel="ridge λ", ylabel="coefficient", title="coefficients")
    right.set(xlabel="ridge λ", ylabel="captured energy 1 − L/E", title="what the merge captures")
    return finish(
        figure,
        behind.curves(
            "ridge λ",
            ridges,
            {"": curves, "coefficient": dict(enumerate(np.transpose(coefficients), 1))},
        ),
        right,
        3,
    )


def nesting(families: dict, inclusions) -> Figure:
    """Captured energy against the number of coefficients; an arrow for every inclusion of spans.

    Args:
        families: name -> (p, in sample, cross-fitted).
        inclusions: pairs (smaller, larger) of names.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 4.2))
    for small, large in inclusions:
        axis.annotate(
            "",
            families[large][:2],
            families[small][:2],
            arrowprops={
                "arrowstyle": "->",
                "color": "0.6",
                "shrinkA": 6,
                "shrinkB": 6,
                "linewidth": 1,
            },
        )
    for name, (marker, colour) in marks(families).items():
        p, inside, outside = families[name]
        point(axis, p, inside, marker, colour, size=9, label=_word(name))
        point(axis, p, outside, marker, "none", size=9)
    axis.set(xscale="log", xlabel="coefficients p", ylabel="captured energy")
    axis.set_title("filled: in sample; hollow: cross-fitted; arrows: span inclusions")
    return finish(
        figure, behind.named(families, ("coefficients p", "in sample", "cross-fitted")), axis, 4
    )


def projection(projected: dict, others: dict) -> Figure:
    """Thales' circle: the residual R has length 1; every optimum P lies where OP ⟂ PR, at abscissa
    ρ.

    Args:
        projected: name -> ρ.
        others: name -> (‖output of the update‖/‖R‖, ‖error‖/‖R‖) of any merge.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 4.4))
    angle = np.linspace(0, np.pi, 200)
    axis.plot((1 + np.cos(angle)) / 2, np.sin(angle) / 2, color="0.6", linewidth=1)
    axis.plot([0, 1], [0, 0], color="black", linewidth=1.5)
    for x, text in ((0, "0: the base"), (1, "R: the experts")):
        axis.annotate(
            text, (x, 0), xytext=(0, -8), textcoords="offset points", ha="center", va="top"
        )
    places = {name: (rho, np.sqrt(max(rho * (1 - rho), 0))) for name, rho in projected.items()}
    for name, (length, error) in others.items():
        x = (1 + length**2 - error**2) / 2
        places[name] = (x, np.sqrt(max(length**2 - x**2, 0)))
    for name, (marker, colour) in marks(places).items():
        x, y = places[name]
        axis.plot(
            [0, x, 1],
            [0, y, 0],
            color=colour if name in projected else "0.4",
            linewidth=0.8,
            linestyle="-" if name in projected else ":",
        )
        point(axis, x, y, marker, colour, size=9, label=_word(name))
    axis.set(
        aspect="equal",
        xlabel="captured energy of the optima",
        yticks=[],
        ylim=(-0.08, 0.62),
        xlim=(-0.2, 1.2),
        xticks=np.linspace(0, 1, 6),
    )
    return finish(figure, behind.named(places, ("along", "across")), axis, 4)


def cumulative(curves: dict, xlabel: str, ylabel: str) -> Figure:
    """Curves (p,) over 1..p kept directions, told apart by line style and marker."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.6))
    for (name, values), line, marker in zip(curves.items(), LINES, MARKERS):
        axis.plot(
            np.arange(1, len(values) + 1),
            values,
            linestyle=line,
            marker=marker,
            markevery=max(1, len(values) // 12),
            label=name,
        )
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.03))
    return finish(figure, behind.curves(xlabel, range(1, len(values) + 1), {"": curves}), axis, 2)


def phases(x, y, panels: dict, columns, xlabel: str, ylabel: str, label: str = "") -> Figure:
    """Heat maps of a difference around zero: one row per panel, one column per setting.

    Cells that lose more than NOTHING are hatched, and a thick contour bounds them.

    Args:
        x, y: (a,), (b,) grid values.
        panels: row title -> (columns, b, a) values.
        columns: their titles.
        label: of the colour bars.
    """
    figure, axes = plt.subplots(
        len(panels),
        len(columns),
        figsize=(WIDTH, 2.35 * len(panels)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for row, (title, values) in zip(axes, panels.items()):
        bound = np.abs(values).max()
        for axis, column, grid in zip(row, columns, values):
            image = axis.pcolormesh(
                x, y, grid, cmap=DIVERGING, vmin=-bound, vmax=bound, shading="nearest"
            )
            losing = np.ma.masked_where(grid > -NOTHING, grid)
            axis.pcolor(
                x,
                y,
                losing,
                hatch="////",
                cmap=ListedColormap(["none"]),
                edgecolor="0.35",
                linewidth=0,
                shading="nearest",
            )
            if losing.count():
                axis.contour(
                    x, y, grid, [-NOTHING], colors="black", linestyles="solid", linewidths=2
                )
            axis.set_title(f"{title if axis is row[0] else ''}\n{column}")
            axis.grid(False)
        bar = figure.colorbar(image, ax=list(row), shrink=0.9, label=label)
        bar.ax.tick_params(labelsize=9)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    return finish(figure, behind.maps(x, y, panels, columns, ylabel), shades=True)


def bands(x, curves: dict, xlabel: str, ylabel: str) -> Figure:
    """Means over draws with the range of the draws behind them: name -> (draws, len(x))."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.4))
    for (name, values), line, marker in zip(curves.items(), LINES, MARKERS):
        axis.plot(x, values.mean(0), linestyle=line, marker=marker, label=name)
        axis.fill_between(x, values.min(0), values.max(0), alpha=0.15)
    axis.axhline(0, color="black", linewidth=1)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    return finish(
        figure,
        behind.curves(
            xlabel,
            x,
            {
                name: {"mean": v.mean(0), "lowest": v.min(0), "highest": v.max(0)}
                for name, v in curves.items()
            },
        ),
        axis,
        4,
    )


def scatter(panels: dict, groups, label: str) -> Figure:
    """One scatter per panel, title -> (x, y, xlabel, ylabel); ``groups`` (N,) tells points apart by
    marker and colour."""
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.6), squeeze=False)
    groups = np.asarray(groups)
    for axis, (title, (x, y, xlabel, ylabel)) in zip(axes[0], panels.items()):
        for group, marker, colour in zip(np.unique(groups), MARKERS, sns.color_palette()):
            chosen = groups == group
            axis.plot(
                np.asarray(x)[chosen],
                np.asarray(y)[chosen],
                marker,
                color=colour,
                markersize=4,
                alpha=0.6,
                linestyle="none",
                label=f"{label}{group}",
            )
        axis.axhline(0, color="black", linewidth=1)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return finish(figure, behind.clouds(panels, groups), axis, len(np.unique(groups)))


def agreement(panels: dict, labels, lined: int = 1, linear: float | None = None) -> Figure:
    """One scatter per panel, title -> (x, y, xlabel, ylabel), a line at y = 0 and, in the first
    ``lined`` ones, where y = x.

    Args:
        labels: (N,) names of the points' groups, told apart by marker and colour.
        linear: both axes are logarithmic beyond this distance from zero.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.9))
    labels = np.asarray(labels)
    for number, (axis, (title, (x, y, xlabel, ylabel))) in enumerate(zip(axes, panels.items())):
        for label, (marker, colour) in marks(labels).items():
            chosen = labels == label
            point(
                axis,
                np.asarray(x)[chosen],
                np.asarray(y)[chosen],
                marker,
                colour,
                size=6,
                alpha=0.8,
                label=label,
            )
        axis.axhline(0, color="black", linewidth=1)
        if number < lined:
            # a second point would be among what the axes have to show
            through = {"slope": 1} if linear is None else {"xy2": (linear, linear)}
            axis.axline((0, 0), **through, color="0.4", linewidth=1, linestyle="--")
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if linear is None:
            axis.locator_params(axis="x", nbins=3)
        else:
            logarithmic(axis, linear)
    return finish(figure, behind.clouds(panels, labels), axis, 2)


def correlations(
    frames: dict, x: str, y: str, xlabel: str, ylabel: str, columns: int = 2
) -> Figure:
    """One scatter per ``pandas.DataFrame``, title -> frame with columns x, y and ``kind``, which
    marker and colour tell apart."""
    rows = -(-len(frames) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, 2.5 * rows + 0.6), squeeze=False)
    for axis, (title, frame) in zip(axes.flat, frames.items()):
        kinds = {CALLED.get(kind, kind): part for kind, part in frame.groupby("kind")}
        for label, (marker, colour) in marks(kinds).items():
            part = kinds[label]
            point(axis, part[x], part[y], marker, colour, size=5, markeredgewidth=0.5, label=label)
        axis.set(
            title=title,
            ylabel=ylabel if axis in axes[:, 0] else "",
            xlabel=xlabel if axis in axes[-1] else "",
        )
        axis.locator_params(axis="x", nbins=5)
    return finish(
        figure, behind.stacked(frames, {"kind": "kind", x: xlabel, y: ylabel}), axes.flat[0], 3
    )


def gallery(images: dict, columns: int) -> Figure:
    """One row of grey images per title: title -> (at least ``columns``, side, side)."""
    figure, axes = plt.subplots(len(images), columns, figsize=(WIDTH, 0.62 * len(images)))
    for row, (title, pictures) in zip(axes, images.items()):
        for axis, picture in zip(row, pictures):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
    return finish(figure, None)


def ranking(
    seeds: dict, intervals: dict, xlabel: str, line: float | None = None, live: dict | None = None
) -> Figure:
    """Methods from top to bottom in the given order: a light tick per seed, the mean and its
    interval.

    Args:
        seeds: label -> values per seed.
        intervals: label -> (mean, (low, high)).
        live: label -> values of the seeds that the same run measured, as open circles.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 0.27 * len(seeds) + 0.9))
    for y, (label, values) in enumerate(seeds.items()):
        mean, (low, high) = intervals[label]
        axis.hlines(y, low, high, color="0.35", linewidth=1.6)
        axis.plot(values, np.full(len(values), y), "|", color="0.55", markersize=9)
        here = np.asarray([] if live is None else live[label])
        axis.plot(here, np.full(len(here), y), "o", color="black", fillstyle="none", markersize=5)
        point(axis, mean, y, *mark_of(label), size=7)
    if line is not None:
        axis.axvline(line, color="black", linestyle=":", linewidth=1)
    axis.set(
        yticks=range(len(seeds)),
        yticklabels=list(seeds),
        xlabel=xlabel,
        ylim=(len(seeds) - 0.4, -0.6),
    )
    axis.grid(axis="y", visible=False)
    return finish(figure, behind.ranked(seeds, intervals, live))


def heat(table, label: str, low: float, high: float, fmt: str = ".2f") -> Figure:
    """A table of numbers (a ``pandas.DataFrame``) as annotated shades."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.3 * len(table) + 1.1))
    sns.heatmap(
        table,
        annot=True,
        fmt=fmt,
        cmap=SEQUENTIAL,
        vmin=low,
        vmax=high,
        linewidths=0.6,
        annot_kws={"size": 9},
        cbar_kws={"label": label},
        ax=axis,
    )
    legible(axis.texts, (low + high) / 2)
    axis.set(xlabel="", ylabel="")
    plt.setp(axis.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
    return finish(figure, behind.cells(table), shades=True)


def bars(names, panels: dict, ylabel: str, columns: int = 2) -> Figure:
    """Stacked bars: panel title -> label -> heights; hatches tell the parts apart without colour.
    ``names`` of the bars, or those of each panel. A part without height anywhere is left out."""
    there = {label for parts in panels.values() for label, high in parts.items() if np.any(high)}
    panels = {
        title: {label: high for label, high in parts.items() if label in there}
        for title, parts in panels.items()
    }
    rows, shared = -(-len(panels) // columns), not isinstance(names, dict)
    names = dict.fromkeys(panels, names) if shared else names
    height = (1.25 if shared else 2.2) * rows + (2.0 if shared else 0.8)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height), sharex=shared, sharey=True, squeeze=False
    )
    for axis, (title, parts) in zip(axes.flat, panels.items()):
        places = range(len(names[title]))
        floor = np.zeros(len(places))
        for (label, heights), hatch, colour in zip(parts.items(), HATCHES, sns.color_palette()):
            axis.bar(
                places,
                heights,
                0.8,
                bottom=floor,
                color=colour,
                hatch=hatch,
                linewidth=0,
                label=label,
            )
            floor = floor + np.asarray(heights)
        axis.set_title(title)
        axis.grid(axis="x", visible=False)
        axis.set_xticks(places, list(names[title]), rotation=90, fontsize=9)
    figure.supylabel(ylabel, fontsize=10)
    return finish(figure, behind.parts(names, panels), axes.flat[0] if len(parts) > 1 else None, 2)


def depth(names, panels: dict, xlabel: str = "", ylabel: str = "", columns: int = 1) -> Figure:
    """Curves over the layers or blocks of a model, or over any steps: panel title -> label -> value
    per step, the steps' names under the last panels. What is the same at all steps has no markers.

    Args:
        columns: panels side by side, row by row.
    """
    names, rows = list(map(str, names)), -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, 2.1 * rows + 1.4), sharex=True, squeeze=False
    )
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for (label, values), line, marker in zip(curves.items(), LINES, MARKERS):
            axis.plot(range(len(values)), values, **look_of_curve(label, values, line, marker))
        axis.set_title(title)
        name_layers(axis, names)
    plt.setp(axes[-1], xlabel=xlabel)
    figure.supylabel(ylabel, fontsize=10)
    return finish(figure, behind.curves(xlabel or "step", names, panels), axes.flat[0], 3)
