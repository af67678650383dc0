r"""Bases of the merge programme: families of matrices built from the residual updates Δ_k = W_k -
W0.

A basis never lists its elements. It knows the blocks its Gram matrix falls into and works on them:
coefficients ``d`` and linear term have shape (b, s, q), the quadratic term (b, q, q): b blocks that
do not couple, s right-hand sides that share a block, q coefficients each. p = b·s·q. Updates have
shape (K, g, m, n), see ``moments``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from .errors import MergeError, NonFinite, ShapeMismatch, is_finite
from .moments import Pooled, diagonal


class Basis:
    """p matrices of shape (g, m, n) in block form; ``size`` is (b, s, q)."""

    name: str
    size: tuple[int, int, int]
    by_expert = False  # whether the q coefficients of a block are one per expert
    # whether rounding noise in H is relative to each block; not where blocks are eigenvectors
    own_noise = True

    @property
    def p(self) -> int:
        """Number of coefficients."""
        b, s, q = self.size
        return b * s * q

    def quadratic(self, C: Tensor) -> Tensor:
        """Blocks of ``H_ij = tr(B_i C B_jᵀ)``: (b, q, q) for C (g, n, n); PSD when C is."""
        raise NotImplementedError

    def linear(self, A: Tensor) -> Tensor:
        """``tr(B_j Aᵀ)`` = -f_j for A (g, m, n): (b, s, q)."""
        raise NotImplementedError

    def combine(self, d: Tensor) -> Tensor:
        """Merged update ``Σ_j d_j B_j``: (g, m, n) for d (b, s, q)."""
        raise NotImplementedError

    def arithmetic(self, scales: float | Tensor) -> Tensor:
        """Coefficients (b, s, q) whose merge is the task arithmetic ``Σ_k λ_k Δ_k``, λ (K,) or one
        number (the soup for 1/K)."""
        raise NotImplementedError

    def elements(self) -> Tensor:
        """Every basis matrix, (p, g, m, n): for proofs and small examples only."""
        unit = torch.eye(self.p, dtype=torch.float64).reshape(self.p, *self.size)
        return torch.stack([self.combine(e) for e in unit])


class RowBasis(Basis):
    """``u_j u_jᵀ Δ_k`` summed over groups of output directions: layer, groups, rows, rotated rows
    and explicit lists.

    Args:
        updates: (K, g, m, n).
        U: (g, m, r) orthonormal columns, or (1, m, r) for all copies; the coordinate axes if None.
        groups: label of each of the g·r directions; one block per label.
    """

    def __init__(self, name: str, updates: Tensor, groups: Tensor, U: Tensor | None = None):
        self.name, self.U, self.by_expert, self.own_noise = name, U, True, U is None
        self.D = updates if U is None else U.mT @ updates  # (K, g, r, n)
        if groups.numel() != self.D[0, ..., 0].numel():
            raise ShapeMismatch(
                f"basis {name}, group labels",
                (self.D[0, ..., 0].numel(),),
                groups.shape,
                "one label per output row",
            )
        labels, self.groups = torch.unique(groups.flatten().to(updates.device), return_inverse=True)
        self.size = (len(labels), 1, len(updates))

    def _sum(self, rows: Tensor) -> Tensor:
        """Sums (b, …) over the rows of a group, of values (g, r, …)."""
        return rows.new_zeros(self.size[0], *rows.shape[2:]).index_add_(
            0, self.groups, rows.flatten(0, 1)
        )

    def quadratic(self, C: Tensor) -> Tensor:
        return self._sum(torch.einsum("kgrn,lgrn->grkl", self.D @ C, self.D))

    def linear(self, A: Tensor) -> Tensor:
        A = A if self.U is None else self.U.mT @ A
        return self._sum(torch.einsum("kgrn,grn->grk", self.D, A)).unsqueeze(1)

    def combine(self, d: Tensor) -> Tensor:
        per_row = d.to(self.D)[:, 0][self.groups].reshape(*self.D.shape[1:3], -1)
        rows = torch.einsum("grk,kgrn->grn", per_row, self.D)
        return rows if self.U is None else self.U @ rows

    def arithmetic(self, scales: float | Tensor) -> Tensor:
        if self.U is not None and self.U.shape[-1] < self.U.shape[-2]:
            raise MergeError(
                f"basis {self.name} keeps {self.U.shape[-1]} of {self.U.shape[-2]} directions: "
                "task arithmetic is outside its span"
            )
        return _each(scales, self.D).expand(self.size)


class ColumnBasis(Basis):
    """``Δ_k v_i v_iᵀ``: columns (V the axes; one dense block ``(Δ_kᵀΔ_l) ∘ C`` per copy) and
    rotated columns.

    Args:
        V: (g, n, n) eigenvectors of the C the programme will be solved with, which decouples it
            into g·n blocks of K×K.
    """

    def __init__(self, name: str, updates: Tensor, V: Tensor | None = None):
        self.name, self.V, self.by_expert, self.own_noise = name, V, V is not None, V is None
        self.D = updates if V is None else updates @ V  # (K, g, m, n)
        K, g, _, n = updates.shape
        self.size = (g, 1, K * n) if V is None else (g * n, 1, K)

    def quadratic(self, C: Tensor) -> Tensor:
        if self.V is None:
            H = torch.einsum("kgmi,lgmj->gkilj", self.D, self.D) * C[:, None, :, None, :]
            return H.reshape(self.size[0], self.size[2], self.size[2])
        C = self.V.mT @ C @ self.V
        spread = diagonal(C)
        if (C - torch.diag_embed(spread)).abs().max() > 1e-8 * spread.abs().max():
            raise MergeError(
                f"basis {self.name} was rotated for other moments: build it from the ones it is "
                "solved with"
            )
        return torch.einsum("kgmi,lgmi,gi->gikl", self.D, self.D, spread).flatten(0, 1)

    def linear(self, A: Tensor) -> Tensor:
        if self.V is None:
            return torch.einsum("kgmi,gmi->gki", self.D, A).reshape(self.size)
        return torch.einsum("kgmi,gmi->gik", self.D, A @ self.V).reshape(self.size)

    def _per_column(self, d: Tensor) -> Tensor:
        """Coefficients (g, K, n) of d (b, s, q)."""
        K, g, _, n = self.D.shape
        d = d.to(self.D)
        return d.reshape(g, K, n) if self.V is None else d.reshape(g, n, K).mT

    def combine(self, d: Tensor) -> Tensor:
        update = torch.einsum("gki,kgmi->gmi", self._per_column(d), self.D)
        return update if self.V is None else update @ self.V.mT

    def arithmetic(self, scales: float | Tensor) -> Tensor:
        scales = _each(scales, self.D)
        if self.V is None:
            scales = scales.repeat_interleave(self.D.shape[-1])
        return scales.expand(self.size)


class SingularBasis(Basis):
    """Singular pairs ``u_i v_iᵀ`` of every Δ_k; one dense block ``(UᵀU) ∘ (VᵀCV)`` per copy.

    Args:
        updates: (K, g, m, n). rtol: singular values below it, relative to the largest, are noise.
    Attributes:
        U, S, V: (g, m, q), (g, q) and (g, n, q) for q pairs per copy. owner: update of each pair.
    """

    name = "singular"

    def __init__(self, updates: Tensor, rtol: float = 1e-10):
        self.D, self.owner, parts = updates, list[int](), []
        for k, update in enumerate(updates):
            U, S, Vh = torch.linalg.svd(update, full_matrices=False)
            rank = int((S > rtol * S.amax(-1, keepdim=True)).sum(-1).max())
            self.owner += [k] * rank
            parts.append((U[..., :rank], S[..., :rank], Vh.mT[..., :rank]))
        left, values, right = zip(*parts)
        self.U, self.S, self.V = torch.cat(left, -1), torch.cat(values, -1), torch.cat(right, -1)
        self.size = (self.S.shape[0], 1, self.S.shape[1])

    def quadratic(self, C: Tensor) -> Tensor:
        return (self.U.mT @ self.U) * (self.V.mT @ C @ self.V)

    def linear(self, A: Tensor) -> Tensor:
        return ((self.U.mT @ A).mT * self.V).sum(-2).reshape(self.size)

    def combine(self, d: Tensor) -> Tensor:
        return (self.U * d.to(self.U).reshape(self.size)) @ self.V.mT

    def arithmetic(self, scales: float | Tensor) -> Tensor:
        return (_each(scales, self.D)[self.owner] * self.S).reshape(self.size)


class ElementBasis(Basis):
    """Single entries: the whole of R^{m×n}. Every output row solves with the same C, so the block
    is shared.

    With K updates the K·m·n scaled entries span no more than the m·n unit ones used here.
    """

    name = "elements"

    def __init__(self, updates: Tensor):
        self.D, self.size = updates, cast(tuple[int, int, int], tuple(updates.shape[1:]))

    def quadratic(self, C: Tensor) -> Tensor:
        return C

    def linear(self, A: Tensor) -> Tensor:
        return A

    def combine(self, d: Tensor) -> Tensor:
        return d.to(self.D).reshape(self.size)

    def arithmetic(self, scales: float | Tensor) -> Tensor:
        return torch.tensordot(_each(scales, self.D), self.D, 1)


def _each(scales: float | Tensor, updates: Tensor) -> Tensor:
    """One scale per update, (K,), from as many or from one for all."""
    return torch.as_tensor(scales, dtype=updates.dtype, device=updates.device).expand(len(updates))


def _eigenvectors(S: Tensor, keep: int | None) -> Tensor:
    """Leading ``keep`` eigenvectors (largest eigenvalue first) of symmetric S (g, r, r)."""
    return torch.linalg.eigh(S).eigenvectors.flip(-1)[..., :keep]


def _directions(updates: Tensor, pooled: Pooled, keep: int | None = None) -> Tensor:
    """Label (g·r,) of every output direction of every copy, r of them kept, for updates (K, g, m,
    n); the copies of an embedding have theirs in common."""
    g, r = updates.shape[1], keep or updates.shape[2]
    return torch.arange(r).repeat(g) if pooled.shared else torch.arange(g * r)


def _rotated_rows(updates: Tensor, pooled: Pooled, keep: int | None) -> Basis:
    """The basis of updates (K, g, m, n) along the ``keep`` leading eigenvectors of M."""
    if pooled.M is None:
        raise MergeError(
            "basis rotated_rows needs the whole residual energy matrix M; collect the moments with "
            "full_energy=True"
        )
    U = _eigenvectors(pooled.M, keep)
    return RowBasis("rotated_rows", updates, _directions(updates, pooled, U.shape[-1]), U)


# family -> basis of updates (K, g, m, n) and moments, given the labels of the output rows, which
# ``groups`` cannot do without, and the number of directions that ``rotated_rows`` keeps
FAMILIES: dict[str, Callable[[Tensor, Pooled, Tensor | None, int | None], Basis]] = {
    "layer": lambda D, pooled, groups, keep: RowBasis(
        "layer", D, torch.zeros_like(_directions(D, pooled))
    ),
    "groups": lambda D, pooled, groups, keep: RowBasis("groups", D, cast(Tensor, groups)),
    "rows": lambda D, pooled, groups, keep: RowBasis("rows", D, _directions(D, pooled)),
    "rotated_rows": lambda D, pooled, groups, keep: _rotated_rows(D, pooled, keep),
    "columns": lambda D, pooled, groups, keep: ColumnBasis("columns", D),
    "rotated_columns": lambda D, pooled, groups, keep: ColumnBasis(
        "rotated_columns", D, _eigenvectors(pooled.C, None)
    ),
    "singular": lambda D, pooled, groups, keep: SingularBasis(D),
    "elements": lambda D, pooled, groups, keep: ElementBasis(D),
    "explicit": lambda D, pooled, groups, keep: RowBasis(
        "explicit", D, torch.zeros_like(_directions(D, pooled))
    ),
}


def build(
    family: str,
    updates: Tensor,
    pooled: Pooled,
    *,
    groups: Tensor | None = None,
    keep: int | None = None,
) -> Basis:
    r"""The basis of a family for given residual updates.

    Args:
        family: a key of ``FAMILIES``; ``explicit`` takes any list of matrices as ``updates``.
        updates: (K, g, m, n), or (K, m, n) for a dense layer.
        pooled: moments the rotations are taken from: eigenvectors of M (rotated rows) or C (rotated
            columns).
        groups: label of each of the g·m output rows (family ``groups``), e.g. attention heads.
        keep: number of leading directions kept by ``rotated_rows``; all by default.
    Raises: MergeError for an unknown family, an absent label or a bad ``keep``; ShapeMismatch,
        NonFinite for the updates.
    """
    if family not in FAMILIES:
        raise MergeError(f"basis family: expected one of {sorted(FAMILIES)}, found {family!r}")
    if (groups is None) == (family == "groups"):
        raise MergeError(
            f"basis family {family!r}: group labels are "
            f"{'required' if groups is None else 'only used by groups'}"
        )
    if keep is not None and family != "rotated_rows":
        raise MergeError(
            f"basis family {family!r} keeps all its directions; only rotated_rows takes keep, "
            f"found keep={keep}"
        )
    updates = updates.unsqueeze(1) if updates.dim() == 3 else updates
    if updates.shape[1:] != pooled.A.shape:
        raise ShapeMismatch(f"basis {family}, residual updates", pooled.A.shape, updates.shape[1:])
    if not is_finite(updates):
        raise NonFinite(
            f"basis {family}, residual updates", updates, "check the checkpoints they come from"
        )
    if keep is not None and not 1 <= keep <= updates.shape[2]:
        raise MergeError(
            f"basis rotated_rows: expected to keep 1 to {updates.shape[2]} directions, found {keep}"
        )
    return FAMILIES[family](updates.to(pooled.C), pooled, groups, keep)
