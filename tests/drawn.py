"""One figure of every kind that the book has, of a few made-up numbers."""

import numpy as np
import pandas as pd

from qpmerge_lite.companion.book import figures
from qpmerge_lite.companion.book.points import points


def drawn():
    grid, values = [0.0, 0.5, 1.0], np.add.outer([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])
    yield figures.plane(
        {"left": (grid, values, [1, 2, 3]), "right": (grid, values, [1, 2])},
        {"a": (0, 0), "b": (1, 1)},
        {"way": [(0, 0), (1, 1)]},
    )
    yield figures.ridge_path(
        [1e-3, 1, 1e3],
        [[1, 0], [0.7, 0.3], [0.5, 0.5]],
        0.5,
        {"in sample": [3, 2, 1], "cross-fitted": [1, 2, 1]},
    )
    yield figures.nesting(
        {"layer": (2, 0.4, 0.4), "rotated_rows": (8, 0.6, 0.5)}, [("layer", "rotated_rows")]
    )
    yield figures.projection({"layer": 0.4, "elements": 1.0}, {"soup": (0.3, 0.9)})
    yield figures.cumulative({"a": [0.2, 0.6, 1.0], "b": [0.1, 0.2, 0.3]}, "x", "y")
    yield figures.phases(
        [0, 1, 2],
        [0, 1, 2],
        {"wins": np.stack([values, values]), "loses": np.stack([values - 2, -values])},
        ["K = 2", "K = 4"],
        "x",
        "y",
    )
    yield figures.bands([1, 2, 3], {"a": values, "b": -values}, "x", "y")
    yield figures.agreement(
        {"a": ([1, 2], [1, 2], "x", "y"), "b": ([1, 2], [2, 1], "x", "y")}, ["p", "q"]
    )
    frame = pd.DataFrame({"x": [1, 2, 3], "y": [1, 2, 3], "kind": ["p", "q", "p"]})
    yield figures.agreement(
        {"a": ([1e-4, 1], [-1e-4, 1], "x", "y"), "b": ([1, 2], [2, 1], "x", "y")},
        ["p", "q"],
        lined=2,
        linear=1e-3,
    )
    yield figures.correlations({"a": frame, "b": frame, "c": frame}, "x", "y", "x", "y")
    yield figures.depth(
        ["one", "a longer name"],
        {"a": {"p": [1, 2], "q": [2, 1]}, "b": {"p": [1, 2], "q": [1, 1]}},
        "layer",
    )
    yield figures.depth(
        ["embed", "blocks.0.up", "blocks.0.down", "blocks.1.up"],
        {title: {"p": [1, 2, 3, 4], "level": [2, 2, 2, 2]} for title in ("a", "b", "c")},
        "layer",
        "y",
        columns=2,
    )
    yield figures.bars(
        ["one", "two"],
        {"a": {"p": [1, 2], "q": [2, 1]}, "b": {"p": [1, 2], "q": [0, 1]}, "c": {"p": [1, 1]}},
        "y",
    )
    yield figures.scatter(
        {"a": ([1, 2, 3], [1, 2, 3], "x", "y"), "b": ([3, 2, 1], [1, 2, 3], "x", "")},
        [2, 2, 4],
        "K = ",
    )
    row, short = {"p": (0.5, (0.4, 0.6)), "q": (0.6, None)}, {"q": (0.7, (0.5, 0.8))}
    yield points({"a": {"one": row, "two": short}, "b": {"one": short, "two": row}}, "x", 1.0)
    ticks = {"QP": [0.5, 0.7], "soup": [0.25, 0.375]}
    yield figures.ranking(
        ticks,
        {name: (sum(v) / 2, tuple(v)) for name, v in ticks.items()},
        "x",
        1.0,
        {"QP": [0.75], "soup": []},
    )
    yield figures.heat(
        pd.DataFrame({"a": [0.125, 0.25], "b": [0.375, 0.75]}, ["p", "q"]), "z", 0, 1
    )
    yield figures.gallery({"a": np.zeros((2, 3, 3)), "b": np.ones((2, 3, 3))}, 2)
