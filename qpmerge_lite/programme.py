r"""The merge programme ``L(d) = ½ dᵀHd + fᵀd + E`` of one layer, in the independent blocks of its
basis.

``H`` and ``f`` are formed by ``bases.Basis``, E by ``moments.Moments.pooled``; ``solve`` adds the
ridge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bases import Basis
from .moments import Pooled


@dataclass(frozen=True)
class Programme:
    r"""``H`` (b, q, q) PSD, ``f`` (b, s, q), both float64, and ``energy = E``; coefficients ``d``
    have the shape of ``f``.

    ``rtol``: eigenvalues below it, relative to the largest, are rounding noise of the products that
    the moments were made of.

    ``f`` lies in the range of ``H``: if Hw = 0 then Σ_j w_j B_j vanishes on every calibration input
    of positive weight, so fᵀw = -Σ_t ω_t tr(R_tᵀ (Σ_j w_j B_j) X_t) = 0. Hence a minimiser always
    exists.
    """

    basis: Basis
    H: Tensor
    f: Tensor
    energy: float | Tensor
    rtol: float = 1e-10

    def gradient(self, d: Tensor) -> Tensor:
        """``Hd + f`` (b, s, q) of coefficients d (b, s, q)."""
        return d @ self.H + self.f

    def objective(self, d: Tensor) -> float:
        """``L(d)`` of coefficients d (b, s, q): half the weighted squared output error that the
        merge leaves."""
        return float((d * (d @ self.H / 2 + self.f)).sum()) + float(self.energy)

    def dense(self) -> tuple[Tensor, Tensor]:
        """H (p, p) and f (p,) without block structure: for small examples and generic solvers."""
        b, s, q = self.f.shape
        return torch.block_diag(*self.H.repeat_interleave(s, 0)), self.f.flatten()


def programme(pooled: Pooled, basis: Basis) -> Programme:
    """The programme of a basis under given moments; the moments may come from other data than the
    basis."""
    H = basis.quadratic(pooled.C)
    symmetric = H is pooled.C and H.shape[-1] > 384  # wide C is, see engine.products.mirror
    H = H if symmetric else (H + H.mT) / 2
    return Programme(basis, H, -basis.linear(pooled.A), pooled.energy, pooled.rtol)
