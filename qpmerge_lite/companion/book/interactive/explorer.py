"""Bases between the coordinate axes and the eigenvectors of ``M``: what each captures, and the
ceiling over it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from bokeh.models import ColumnDataSource, Slider
from IPython.display import HTML
from torch import Tensor

from ....bases import RowBasis
from ....moments import Pooled
from ....programme import programme
from ....solve import minimise
from .embedding import beside, grab, looks, panel, ring, script, shown, words

FARTHEST, STEPS = 1.5, 60  # turns from 0, the axes, past 1, the eigenvectors

KEY = (
    "Dashed: ceiling. Solid: captured. In the right half, grey: the same of rows (dotted) and of "
    "rotated rows (dots and dashes)."
)


class Turned(NamedTuple):
    """``turns`` (T,), and of each basis turned so far and cut to its first 1..m directions the
    energy that it captures and its spectral capture, ``captured`` and ``ceiling`` (T, m)."""

    turns: np.ndarray
    captured: np.ndarray
    ceiling: np.ndarray


def _eigenvectors(M: Tensor) -> Tensor:
    """Eigenvectors of M (m, m) as columns in the order and with the signs that bring them nearest
    to the axes, as a rotation."""
    from scipy.optimize import linear_sum_assignment

    vectors = torch.linalg.eigh(M).eigenvectors
    vectors = vectors[:, linear_sum_assignment(-vectors.abs().cpu().numpy())[1]]
    vectors = vectors * vectors.diagonal().sign()
    if torch.linalg.det(vectors) < 0:
        vectors[:, vectors.diagonal().argmin()] *= -1
    return vectors


def turned(updates: Tensor, pooled: Pooled) -> Turned:
    """Turn a layer's output directions along a geodesic from the axes to the eigenvectors of M, and
    farther. Of every basis the directions with most residual energy come first.

    Args:
        updates: (K, m, n).
    """
    from scipy.linalg import logm

    M = pooled.M[0]
    whole = torch.from_numpy(np.real(logm(_eigenvectors(M).cpu().numpy()))).to(M)
    turns, captured, ceiling = np.linspace(0, FARTHEST, STEPS + 1), [], []
    for turn in turns:
        U = torch.matrix_exp(turn * whole)
        energies, order = ((M @ U) * U).sum(0).sort(descending=True)
        directions = torch.arange(len(order))
        basis = RowBasis("turned", updates.unsqueeze(1), directions, U[None, :, order])
        posed = programme(pooled, basis)
        reached = -(minimise(posed).d * posed.f).sum((1, 2)) / 2  # by direction: they do not couple
        captured.append((reached.cumsum(0) / pooled.energy).tolist())
        ceiling.append((energies.cumsum(0) / energies.sum()).tolist())
    return Turned(turns, np.array(captured), np.array(ceiling))


def _curves(plot, x: str, source: ColumnDataSource, point: ColumnDataSource) -> None:
    """Ceiling and captured energy of the turned basis along one axis, and the point on either that
    the sliders stand at."""
    lines = ("ceiling", "captured")
    for name, look, dash in zip(lines, looks(lines), ("dashed", "solid")):
        plot.line(x, name, source=source, color=look["colour"], line_width=3, line_dash=dash)
        ring(plot, x, name, point)


def explorer(updates: Tensor, pooled: Pooled) -> HTML:
    """The figure of spectral capture as a basis that the reader turns and cuts; it begins as rows.

    Args:
        updates: (K, m, n).
    """
    bases = turned(updates, pooled)
    turns, count = bases.turns, bases.captured.shape[1]
    share = "share of residual energy", 0.0, 1.06
    by_number = panel(
        "any number of directions", ("output directions kept", 0.2, count + 0.8), share
    )
    by_turn = panel("any turn", ("turn", turns[0] - 0.06, turns[-1] + 0.06), share)
    turn = Slider(
        title="turn (0: axes, 1: eigenvectors)",
        start=turns[0],
        end=turns[-1],
        step=turns[1] - turns[0],
        value=0,
        format="0.000",
    )
    keep = Slider(title="output directions kept", start=1, end=count, step=1, value=count)
    names = "turn", "kept", "captured", "ceiling"
    along_kept, along_turn, here = (
        ColumnDataSource({name: [] for name in names}) for _ in range(3)
    )
    for at, dash in ((0, "dotted"), (int(np.abs(turns - 1).argmin()), "dotdash")):
        for values in (bases.ceiling, bases.captured):
            by_number.line(list(range(1, count + 1)), values[at], color="#808080", line_dash=dash)
    _curves(by_number, "kept", along_kept, here)
    _curves(by_turn, "turn", along_turn, here)
    grab(by_number, keep, None)
    grab(by_turn, turn, None)
    sentence = words(role="status")
    draw = script(
        "explorer",
        turns=turns.tolist(),
        captured=bases.captured.tolist(),
        ceiling=bases.ceiling.tolist(),
        along_kept=along_kept,
        along_turn=along_turn,
        here=here,
        turn=turn,
        keep=keep,
        sentence=sentence,
        by_number=by_number,
        by_turn=by_turn,
    )
    plots, sliders = beside(by_turn, by_number), beside(turn, keep)
    return shown("explorer", draw, (turn, keep), plots, sliders, sentence, words(KEY))
