r"""ESM, essential subspace merging: leading eigenvectors of every expert's output shifts.

What an expert adds to the outputs of a dense layer on its own inputs has second moments
``M_t = Δ_t C_t Δ_tᵀ``, whose eigenvectors are the right singular vectors of ``X_tᵀΔ_tᵀ``, one row
for every sample; so sums over samples are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..engine.recipes import Recipe
from ..merge import Merge, check_experts, differences_one_by_one
from ..moments import Moments
from ..options import number, words
from ..sequential import Pass, PassOptions
from .triplets import finished, merge_triplets, polar

# how libraries call the projection behind attention, the dense layer that the authors leave out
OUT_PROJECTIONS = (
    "attention.output",
    "attention.output.dense",
    "attention.out_lin",
    "attn.out_proj",
    "attn.c_proj",
    "attn.proj",
    "attn.o_proj",
    "SelfAttention.o",
    "EncDecAttention.o",
)
FLATTENING = 0.15  # power of the eigenvalues
TWICE = 2.0  # of the product of both factors
EMPHASIS = 2.0  # power of the scales of tasks, columns and layers


def esm(
    base,
    experts,
    calibration,
    *,
    scale: float = 1.0,
    by_weights: Sequence[str] = OUT_PROJECTIONS,
    blocks=None,
    group=None,
    progress: bool = False,
) -> Merge:
    """ESM (arXiv:2606.19164): the leading eigenvectors of every expert's output shifts, made
    orthonormal.

    In every dense layer, of m outputs, each of the K experts gives the first ⌊m/K⌋ eigenvectors of
    ``Δ_t C_t Δ_tᵀ`` on its own inputs and its update's coordinates along them, see
    :func:`merge_subspaces`. All other matrices are merged as by :func:`tsv_merge`, everything else
    is averaged. At last every matrix is scaled by ``(‖Δ‖ / mean ‖Δ‖)²``, the mean over matrices of
    one kind: those whose names are the same but for numbers, such as that of the block, that have
    the same shape, and that an expert has changed.

    Args:
        base, experts, calibration, blocks, group, progress: as in :func:`merge_sequentially`.
        scale: of the whole update; the authors search it on validation data.
        by_weights: how the names of dense layers end that are merged by TSV-M all the same. The
            authors do so with the projection behind attention, which libraries call by these names.
    Raises: what :func:`merge_sequentially` raises. Cost: forwards of the experts and, per layer,
        the eigenvectors of K matrices (m, m), in double precision as are the moments.
    """
    merges = esm_at_scales(
        base,
        experts,
        calibration,
        [scale],
        by_weights=by_weights,
        blocks=blocks,
        group=group,
        progress=progress,
    )
    return next(merges)


def esm_at_scales(
    base,
    experts,
    calibration,
    scales: Sequence[float],
    *,
    by_weights: Sequence[str] = OUT_PROJECTIONS,
    blocks=None,
    group=None,
    progress: bool = False,
) -> Iterator[Merge]:
    """:func:`esm` at several scales, for one pass and one decomposition."""
    checked = [number("scale", scale) for scale in scales]
    endings = tuple(words("by_weights", by_weights))
    options = PassOptions(blocks, "float64", group=group)
    solved = _solved(base, experts, calibration, endings, options, progress)
    experts = check_experts(base, experts)
    update = {}
    for name, vectors in differences_one_by_one(base, experts).items():
        if name in solved:
            update[name] = solved[name]
        else:
            update[name] = merge_triplets(vectors) if vectors.dim() == 3 else vectors.mean(0)
    update = _scaled_over_depth(update)
    for scale in checked:
        yield finished("ESM", base, experts, update, scale)


class _Solver:
    """ESM of one layer as a layer solver, which keeps the updates (1, m, n) of the layers whose
    names do not end in one of ``endings``."""

    full_energy = False

    def __init__(self, endings: tuple[str, ...]):
        self.endings = endings
        self.updates: dict[str, Tensor] = {}

    def __call__(self, moments: Moments, updates: Tensor) -> tuple[Tensor, dict]:
        """Update (1, m, n) of one layer, for updates (K, 1, m, n), and an empty table row."""
        if any(f".{moments.layer}".endswith(f".{ending}") for ending in self.endings):
            return updates.mean(0), {}
        update = merge_subspaces(moments.C[:, 0, 0], updates[:, 0]).unsqueeze(0)
        self.updates[moments.layer] = update
        return update, {}


def _solved(
    base: nn.Module,
    experts,
    calibration,
    endings: tuple[str, ...],
    options: PassOptions,
    progress: bool,
) -> dict[str, Tensor]:
    """Updates of the weights of dense layers, in the shapes of the model: parameter name -> (m, n)
    or, where it is stored transposed, (n, m)."""
    solver = _Solver(endings)
    recipe = Recipe(solver, "expert", "propagated", "weights", folds=1)
    making = Pass(base, experts, calibration, {"esm": recipe}, options).makings(progress)[0]
    parts: dict[str, Tensor] = {}
    for row in making.table:
        if row["layer"] in solver.updates:
            view = making.views[row["layer"]]
            parts |= view.parts(solver.updates[view.name])
    return parts


def merge_subspaces(C: Tensor, updates: Tensor) -> Tensor:
    """ESM of one dense layer: the update (m, n) of updates ``Δ_t`` (K, m, n).

    With ``r = ⌊m/K⌋`` and the eigenvectors U_t of ``Δ_t C_t Δ_tᵀ``, the first of which have the
    largest eigenvalues λ: ``u_t = U_t[:, :r] · s`` and
    ``v_t = s · (U_tᵀΔ_t)[:r] · (‖Δ_t‖/mean ‖Δ_t‖)²``
    with ``s = (λ/mean λ)^0.15``, brought to a mean of one. Both are put side by side, columns of
    the second multiplied by the square of their norm over the mean norm, and replaced by polar
    factor times mean singular value; the update is twice their product.

    Args:
        C: second moments (K, n, n) of the inputs of every task, not centred, of any scale.
    """
    rank = updates.shape[1] // len(updates)
    if rank == 0 or not updates.any():
        return torch.zeros_like(updates[0])
    size = updates.abs().max()
    updates = updates / size  # whose squares are finite
    directions, strengths = _leading_directions(updates @ C @ updates.mT, rank)
    norms = updates.flatten(1).norm(dim=1)
    tasks = (norms / norms.mean()) ** EMPHASIS
    left = directions * strengths.unsqueeze(1)
    right = strengths.unsqueeze(2) * (directions.mT @ updates) * tasks[:, None, None]
    left, right = torch.cat([*left], 1), torch.cat([*right], 0)
    columns = right.norm(dim=0)
    right = right * (columns / _positive(columns.mean())) ** EMPHASIS
    (left, left_mean), (right, right_mean) = polar(left), polar(right)
    return size * TWICE * left_mean * right_mean * left @ right


def _leading_directions(energies: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first ``rank`` eigenvectors (K, m, rank) of energies (K, m, m), and ``s`` (K, rank), of
    mean one; of a task without energy, zero. Eigenvalues within rounding of zero are zero."""
    values, vectors = torch.linalg.eigh(energies)
    values, vectors = values.flip(1), vectors.flip(2)
    rounding = values.shape[1] * torch.finfo(values.dtype).eps * values[:, :1]
    values = torch.where(values > rounding, values, 0.0)[:, :rank]
    strengths = (values / _positive(values.mean(1, keepdim=True))) ** FLATTENING
    strengths = strengths / _positive(strengths.mean(1, keepdim=True))
    return vectors[..., :rank], strengths


def _positive(value: Tensor) -> Tensor:
    """A number ≥ 0 to divide by, with one in the place of zero."""
    return torch.where(value > 0, value, 1.0)


def _scaled_over_depth(update: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix times the square of its norm over the mean norm of its kind, of those that are
    not zero."""
    norms: dict[tuple, dict[str, Tensor]] = {}
    for name, value in update.items():
        if value.dim() == 2 and value.any():
            norms.setdefault((_without_numbers(name), value.shape), {})[name] = value.norm()
    scaled = dict(update)
    for alike in norms.values():
        mean = torch.stack(list(alike.values())).mean()
        for name, norm in alike.items():
            scaled[name] = update[name] * (norm / mean) ** EMPHASIS
    return scaled


def _without_numbers(name: str) -> str:
    """A parameter's name with a star for every part that is a number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
