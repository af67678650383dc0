"""The table behind a figure: what it draws, as numbers, for those who cannot see it or want to
compute with it.

A notebook keeps it as the figure's text, where others have the name of a class; the book puts it
under the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

DATA, SHADES, PICTURES = "Data of the figure", "Data of the figure, in shades", "Pictures"
NODES = 25  # of contours, which are smooth between them


def attach(figure: Figure, table: pd.DataFrame | None, shades: bool = False) -> None:
    """Give a figure its table, with ``shades`` where colours stand for values that a reversed
    picture would turn round. Pictures have no table."""
    figure.table = table
    text = PICTURES
    if table is not None:
        csv = table.to_csv(index=False, float_format="%.4g", lineterminator="\n")
        text = f"{SHADES if shades else DATA}\n{csv}"
    figure._repr_mimebundle_ = partial(_bundle, text)


def _bundle(text: str, **_) -> dict[str, str]:
    """What IPython shows beside the image that it makes itself."""
    return {"text/plain": text}


def curves(first: str, steps: Iterable, panels: Mapping) -> pd.DataFrame:
    """Panel title -> label -> values, one row per step and one column per curve."""
    columns = {
        ", ".join(filter(None, (title, str(label)))): pd.Series(list(values))
        for title, labelled in panels.items()
        for label, values in labelled.items()
    }
    return pd.DataFrame({first: pd.Series(list(steps)), **columns})


def named(rows: Mapping, columns: Iterable[str]) -> pd.DataFrame:
    """Name -> values, one row per name."""
    rows = [(name.replace("_", " "), *values) for name, values in rows.items()]
    return pd.DataFrame(rows, columns=["shown", *columns])


def surfaces(panels: Mapping, points: Mapping) -> pd.DataFrame:
    """Named points, then nodes of every panel, title -> (grid, values, …) with d2 first: all, or
    evenly spread ones, no more than NODES along an axis."""
    rows = [(name, *map(float, point), None) for name, point in points.items()]
    for title, (grid, values, *_) in panels.items():
        step = -(-len(grid) // NODES)
        for d2, row in zip(grid[::step], values[::step]):
            rows += [(title, d1, d2, value) for d1, value in zip(grid[::step], row[::step])]
    return pd.DataFrame(rows, columns=["shown", "d1", "d2", "value"])


def maps(x: Iterable, y: Iterable, panels: Mapping, columns: Iterable, ylabel: str):
    """Title -> (columns, b, a) values as rows of a values each, named by title, column and y."""
    parts = []
    for title, values in panels.items():
        for column, grid in zip(columns, values):
            part = pd.DataFrame(grid, columns=[f"{float(value):.3g}" for value in x])
            part.insert(0, ylabel, list(y))
            part.insert(0, "column", column)
            part.insert(0, "panel", title)
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def clouds(panels: Mapping, groups: Iterable) -> pd.DataFrame:
    """Title -> (x, y, xlabel, ylabel), one row per point and two columns per panel; a panel without
    a ylabel has that of the first."""
    shared = next(iter(panels.values()))[3]
    columns = {"group": list(groups)}
    for title, (x, y, xlabel, ylabel) in panels.items():
        columns[f"{title}: {xlabel}"] = list(x)
        columns[f"{title}: {ylabel or shared}"] = list(y)
    return pd.DataFrame(columns)


def stacked(frames: Mapping, columns: Mapping) -> pd.DataFrame:
    """Frames below each other, each with its title and the chosen columns under new names."""
    parts = [frame[list(columns)].assign(panel=title) for title, frame in frames.items()]
    return pd.concat(parts, ignore_index=True)[["panel", *columns]].rename(columns=columns)


def ranked(seeds: Mapping, intervals: Mapping, live: Mapping | None) -> pd.DataFrame:
    """Label -> values per seed with label -> (mean, (low, high)), one row per label; those of
    ``live`` last."""
    rows = []
    for label, values in seeds.items():
        mean, (low, high) = intervals[label]
        row = {"shown": label, "mean": mean, "low": low, "high": high}
        row |= {f"tick {number}": value for number, value in enumerate(values, 1)}
        here = () if live is None else live[label]
        rows.append(row | {f"circle {number}": value for number, value in enumerate(here, 1)})
    return pd.DataFrame(rows)


def cells(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose rows have names, which become its first column."""
    names = pd.Series(table.index.astype(str), table.index)
    columns = {str(column): table[column] for column in table.columns}
    return pd.DataFrame({table.index.name or "row": names, **columns})


def parts(names: Mapping, panels: Mapping) -> pd.DataFrame:
    """Title -> part -> heights, one row per bar."""
    tables = []
    for title, labelled in panels.items():
        heights = {label: list(values) for label, values in labelled.items()}
        tables.append(pd.DataFrame({"panel": title, "bar": list(names[title]), **heights}))
    return pd.concat(tables, ignore_index=True)


def estimates(panels: Mapping) -> pd.DataFrame:
    """Title -> row -> label -> (value, interval or None), one row per value."""
    rows = [
        {"panel": title, "row": row, "shown": label, "value": value}
        | dict(zip(("low", "high"), interval or ()))
        for title, found in panels.items()
        for row, labelled in found.items()
        for label, (value, interval) in labelled.items()
    ]
    return pd.DataFrame(rows)
