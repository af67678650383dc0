r"""Minimisers of the merge programme: closed forms through one eigendecomposition, constraints through Clarabel.

``min L(d) + ½ λ (d - d0)ᵀ Γ (d - d0)`` is solved for the step e = d - d0 from ``(H + λΓ) e = -(H d0 + f)``, so that λ → ∞
returns the prior d0, and λ = 0 the minimiser nearest to d0: ``-H⁺f`` of least norm for d0 = 0.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import Infeasible, MergeError
from .programme import Programme

RTOL = 1e-10  # eigenvalues below RTOL times the largest are noise of float32 activations: (2^-23)² times their number


@dataclass(frozen=True)
class Solution:
    """Coefficients ``d`` (b, s, q) and what is known about them.

    ``objective`` is L(d) without the ridge term; ``rank`` of ``p`` counts eigenvalues of H kept; ``residual`` is the
    stationarity error ``‖(H + λΓ)(d - d0) + H d0 + f‖ / ‖f‖`` (KKT error for a constrained programme).
    """

    d: Tensor
    objective: float
    rank: int
    p: int
    ridge: float
    residual: float
    status: str


class Factored:
    """A programme factored once, to be solved for many ridges.

    Args:
        penalty: Γ as ``mean`` (identity times the mean of diag H: filters weak directions, does not depend on the
            coordinates) or ``diagonal`` (diag H: does not depend on the scale of single elements; RegMean's α is one).
    """

    def __init__(self, programme: Programme, penalty: str = "mean", rtol: float = RTOL):
        if penalty not in ("mean", "diagonal"):
            raise MergeError(f"ridge penalty: expected 'mean' or 'diagonal', found {penalty!r}")
        self.programme, self.penalty = programme, penalty
        diagonal = programme.H.diagonal(dim1=-2, dim2=-1)
        gamma = diagonal if penalty == "diagonal" else torch.full_like(diagonal, float(diagonal.mean()))
        self.gamma = torch.where(gamma > 0, gamma, 1.0)  # (b, q); an element with no output is left at its prior
        root = self.gamma.sqrt()
        values, self.vectors = torch.linalg.eigh(programme.H / (root[:, :, None] * root[:, None, :]))
        self.kept = values > rtol * (values.max().clamp(min=0) if values.numel() else 0)  # p = 0: experts equal to the base
        self.values = torch.where(self.kept, values, 0.0)
        self.rank = int(self.kept.sum()) * programme.f.shape[1]

    def path(self, ridges, prior: Tensor | None = None) -> Tensor:
        """Coefficients (R, b, s, q) of the minimisers for R relative ridges ``λ ≥ 0`` towards ``prior`` (b, s, q), zero by default."""
        if min(ridges) < 0:
            raise MergeError(f"ridge: expected a number ≥ 0, found {min(ridges)}")
        prior = torch.zeros_like(self.programme.f) if prior is None else prior.to(self.programme.f)
        root = self.gamma.sqrt().unsqueeze(1)
        pull = (-self.programme.gradient(prior) / root) @ self.vectors
        steps = []
        for ridge in ridges:
            inverse = torch.where(self.kept, 1 / torch.where(self.kept, self.values + ridge, 1.0), 0.0)
            steps.append(pull * inverse.unsqueeze(1))
        return prior + torch.stack(steps) @ self.vectors.mT / root

    def solve(self, ridge: float = 0.0, prior: Tensor | None = None) -> Solution:
        """Minimiser for a relative ridge ``λ ≥ 0`` towards ``prior`` (b, s, q), zero (the base) by default."""
        P = self.programme
        d = self.path((ridge,), prior)[0]
        step = d if prior is None else d - prior.to(d)
        stationarity = P.gradient(d) + ridge * self.gamma.unsqueeze(1) * step
        residual = float(stationarity.norm() / P.f.norm()) if P.f.norm() > 0 else float(stationarity.norm())
        return Solution(d, P.objective(d), self.rank, P.basis.p, ridge, residual, self._status(ridge))

    def _status(self, ridge):
        p = self.programme.basis.p
        if self.rank == p:
            return f"H positive definite (rank {p}): the minimiser is unique"
        cure = f"ridge {ridge:g} decides" if ridge else "least-norm (nearest to the prior) one returned; more calibration tokens or a ridge would decide"
        return f"H singular (rank {self.rank} of {p}): minimisers differ by ker H with the same calibration outputs; {cure}"


def minimise(programme: Programme, ridge: float = 0.0, prior: Tensor | None = None, penalty: str = "mean") -> Solution:
    """Closed-form minimiser; see :class:`Factored` to solve for several ridges at the cost of one."""
    return Factored(programme, penalty).solve(ridge, prior)


def minimise_constrained(programme: Programme, *, nonnegative: bool = False, sum_to_one: bool = False) -> Solution:
    """Minimiser under ``d ≥ 0`` and/or ``Σ_k d_k = 1`` over the experts in every block, by Clarabel's interior-point method.

    Needs the ``qp`` extra; for small p. ``sum_to_one`` needs blocks indexed by experts (row families, rotated columns).
    Raises: Infeasible with the solver's status; MergeError when no constraint, or a meaningless one, is asked for.
    """
    import clarabel
    import numpy as np
    from scipy import sparse

    if not (nonnegative or sum_to_one):
        raise MergeError("constraints: expected nonnegative and/or sum_to_one, found neither; use minimise for the free programme")
    if sum_to_one and not programme.basis.by_expert:
        raise MergeError(f"basis {programme.basis.name}: its blocks are not indexed by experts, so Σ_k d_k = 1 has no meaning; use a row family")
    b, s, q = programme.f.shape
    scale = float(programme.H.abs().max()) or 1.0
    H = sparse.block_diag(list((programme.H / scale).cpu().numpy().repeat(s, 0)), format="csc")
    f = (programme.f / scale).flatten().cpu().numpy()
    sums = [(sparse.kron(sparse.eye(b * s), np.ones((1, q))), np.ones(b * s), clarabel.ZeroConeT(b * s))] if sum_to_one else []
    signs = [(-sparse.eye(f.size), np.zeros(f.size), clarabel.NonnegativeConeT(f.size))] if nonnegative else []
    rows, bounds, cones = zip(*sums, *signs)
    G = sparse.vstack(rows, format="csc")
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    answer = clarabel.DefaultSolver(sparse.triu(H, format="csc"), f, G, np.concatenate(bounds), list(cones), settings).solve()
    if "Solved" not in str(answer.status):
        raise Infeasible(f"constrained programme over basis {programme.basis.name}: Clarabel reports {answer.status}; check H and f for scale")
    d = np.asarray(answer.x)
    stationarity = np.abs(H @ d + f + G.T @ np.asarray(answer.z)).max() / (np.abs(f).max() or 1.0)
    d = torch.from_numpy(d).to(programme.f).reshape(b, s, q)
    return Solution(d, programme.objective(d), Factored(programme).rank, d.numel(), 0.0, float(stationarity),
                    f"{answer.status} by Clarabel in {answer.iterations} steps")
