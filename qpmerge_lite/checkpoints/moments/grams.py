r"""Sums of files of moments: packed, read, added, and made into moments of a merge.

On the experts' own inputs, where own and propagated targets agree, ``A_t = Δ_t C_t`` and
``M_t = A_t Δ_tᵀ``. ``C_t`` hangs on one expert and its data: not on the base, on other experts, or
on the basis. So it is measured once, and used in any merge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...engine.products import mirror, propagated
from ...engine.sums import RTOL
from ...moments import Moments, diagonal
from ..findings import Refused
from ..tensors import read_tensor
from .files import MEASURE_AGAIN, Layer, MomentsFile, names_of_sums


class Gram(NamedTuple):
    """What a layer of one expert reads, added up.

    Attributes:
        C: ``Σ x xᵀ`` (F, g, n, n) float64, F folds.
        counts: samples (F,) int64.
        ids: of a table, the g tokens that occur, int64 and in their order; None of other layers.
        rtol: rounding noise of C, relative to its largest eigenvalue.
    """

    C: Tensor
    counts: Tensor
    ids: Tensor | None
    rtol: float


def packed(C: Tensor) -> Tensor:
    """Rows of the lower triangles of C (…, n, n) end to end: (…, n (n + 1) / 2)."""
    return torch.cat([C[..., row, : row + 1] for row in range(C.shape[-1])], -1)


def unpacked(triangles: Tensor) -> Tensor:
    """The symmetric C (…, n, n), float64, of what :func:`packed` gives."""
    n = (math.isqrt(8 * triangles.shape[-1] + 1) - 1) // 2
    C = torch.empty(*triangles.shape[:-1], n, n, dtype=torch.float64)
    start = 0
    for row in range(n):
        C[..., row, : row + 1] = triangles[..., start : start + row + 1]
        start += row + 1
    mirror(C)
    return C


def read_gram(file: MomentsFile, layer: Layer, tokens: int) -> Gram:
    """The sums of one layer.

    Args:
        tokens: how many rows a table has.
    Raises: Refused where they are those of no data.
    """
    names = names_of_sums(layer)
    triangles, counts, *rest = (read_tensor(file.header, name) for name in names)
    C = unpacked(triangles)
    if not bool(triangles.isfinite().all()):
        raise _no_sums(file, names[0], "finite sums", "NaN or infinity")
    if bool((diagonal(C) < 0).any()):
        raise _no_sums(file, names[0], "sums of squares, at least 0", "negative ones")
    if bool((counts < 1).any()):
        raise _no_sums(file, names[1], "numbers of samples, at least 1", f"{counts.tolist()}")
    if rest and not _are_tokens(rest[0], tokens):
        raise _no_sums(file, names[2], f"tokens below {tokens} in their order", "others")
    return Gram(C, counts, rest[0] if rest else None, RTOL[triangles.dtype])


def _no_sums(file: MomentsFile, name: str, expected: str, found: str) -> Refused:
    """The refusal of an entry that no data can have given."""
    return Refused(f"{file.path}, tensor {name!r}", expected, found, MEASURE_AGAIN)


def _are_tokens(ids: Tensor, tokens: int) -> bool:
    """Whether ids (g,) are rows of a table of so many, in their order, none of them twice."""
    inside = bool(((ids >= 0) & (ids < tokens)).all())
    return inside and bool((ids.diff() > 0).all())


def union(ids: Sequence[Tensor | None]) -> Tensor | None:
    """All tokens that occur, in their order; None for layers that are no tables."""
    given = [some for some in ids if some is not None]
    return torch.cat(given).unique() if given else None


def on_tokens(gram: Gram, ids: Tensor | None) -> Gram:
    """The sums of a table with a place for each of these tokens, its own among them; those of
    another layer as they are."""
    if gram.ids is None or ids is None:
        return gram
    C = gram.C.new_zeros(gram.C.shape[0], len(ids), 1, 1)
    C[:, torch.searchsorted(ids, gram.ids)] = gram.C
    return gram._replace(C=C, ids=ids)


def added(grams: Sequence[Gram]) -> Gram:
    """What a layer reads of several sets of data together, of as many folds each."""
    ids = union([gram.ids for gram in grams])
    total, *others = (on_tokens(gram, ids) for gram in grams)
    for other in others:
        counts, rtol = total.counts + other.counts, max(total.rtol, other.rtol)
        total = Gram(total.C + other.C, counts, ids, rtol)
    return total


def moments_of(
    layer: str,
    tasks: Sequence[str],
    C: Tensor,
    counts: Tensor,
    updates: Tensor,
    *,
    full_energy: bool = True,
    rtol: float = 1e-10,
) -> Moments:
    """Moments of a layer on the experts' own inputs.

    Args:
        C: ``Σ x xᵀ`` (T, F, g, n, n) float64. counts: samples (T, F).
        updates: Δ_t (T, g, m, n) float64, of the tasks in their order.
        full_energy: whether all of M is kept, not only its diagonal.
        rtol: rounding noise of C, relative to its largest eigenvalue.
    """
    of_tasks = [propagated(c, update, full_energy) for c, update in zip(C, updates.to(C))]
    A, M = (torch.stack(sums) for sums in zip(*of_tasks))
    return Moments(layer, tuple(tasks), C, A, M, counts.to(C), rtol)


def moments_of_table(
    layer: str, tasks: Sequence[str], counts: Tensor, updates: Tensor, *, full_energy: bool = True
) -> Moments:
    """Moments of a table of g tokens, from how often each occurs.

    Args:
        counts: occurrences (T, F, g) float64.
        updates: Δ_t (T, g, m, 1) float64, of the tasks in their order.
        full_energy: whether all of M is kept, not only its diagonal.
    """
    _, folds, g = counts.shape
    m = updates.shape[2]
    moments = Moments.zeros(
        tasks, 1, m, g=g, folds=folds, layer=layer, full_energy=full_energy, shared=True
    )
    for task, occurrences, update in zip(tasks, counts, updates):
        moments.count_copies(task, occurrences, update)
    return moments
