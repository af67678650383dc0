r"""Minimisers of the merge programme: closed forms, and constraints through Clarabel.

``min L(d) + ½ λ (d - d0)ᵀ Γ (d - d0)`` is solved for the step e = d - d0 from
``(H + λΓ) e = -(H d0 + f)``, so that λ → ∞ returns the prior d0, and λ = 0 the minimiser nearest
to d0: ``-H⁺f`` of least norm for d0 = 0. One ridge takes a Cholesky factorisation, or an
eigendecomposition where the programme may be singular; many ridges share one of the latter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .cholesky import solve_definite
from .errors import Infeasible, MergeError
from .moments import diagonal
from .programme import Programme

RTOL = 1e-10  # eigenvalues below RTOL times the largest are rounding noise of float64 products
RTOL_FLOAT32 = 1e-6  # and those of a float32 factorisation
CHOLESKY_WIDTH = 64  # a Cholesky factorisation is three to nine times as quick from here on
PENALTIES = ("mean", "diagonal")

Ridge = float | Tensor  # a tensor has no axes, is ≥ 0 and never looked at


@dataclass(frozen=True)
class Solution:
    """Coefficients ``d`` (b, s, q) of a minimiser; all else is computed when it is asked for.

    Attributes:
        programme: that ``d`` minimises.
        ridge, prior, penalty: λ, d0 (b, s, q) and Γ that it was asked for with.
        factored: the factorisation it was found with, if by eigenvectors.
    """

    d: Tensor
    programme: Programme = field(repr=False)
    ridge: Ridge = 0.0
    prior: Tensor | None = field(default=None, repr=False)
    penalty: str = "mean"
    factored: Factored | None = field(default=None, repr=False)

    @property
    def p(self) -> int:
        """Number of coefficients."""
        return self.programme.basis.p

    @cached_property
    def objective(self) -> float:
        """``L(d)`` without the ridge term."""
        return float(self.programme.objective(self.d))

    @cached_property
    def rank(self) -> int:
        """Eigenvalues of H above the rounding noise, ``p`` of them if H is positive definite."""
        factored = self.factored or Factored(self.programme, self.penalty)
        return factored.rank

    @cached_property
    def residual(self) -> float:
        """Stationarity error ``‖(H + λΓ)(d - d0) + H d0 + f‖ / ‖f‖``; absolute where f = 0."""
        programme = self.programme
        step = self.d if self.prior is None else self.d - self.prior.to(self.d)
        gamma = penalty_weights(programme.H, self.penalty).unsqueeze(1)
        error = float((programme.gradient(self.d) + self.ridge * gamma * step).norm())
        size = float(programme.f.norm())
        return error / size if size > 0 else error

    @cached_property
    def status(self) -> str:
        """Whether the minimiser is unique, and if not what chose among them."""
        if self.rank == self.p:
            return f"H positive definite (rank {self.p}): the minimiser is unique"
        cure = (
            "least-norm (nearest to the prior) one returned; "
            "more calibration tokens or a ridge would decide"
        )
        if self.ridge:
            cure = f"ridge {float(self.ridge):g} decides"
        return (
            f"H singular (rank {self.rank} of {self.p}): "
            f"minimisers differ by ker H with the same calibration outputs; {cure}"
        )


@dataclass(frozen=True)
class ConstrainedSolution(Solution):
    """A minimiser under constraints; ``residual`` and ``status`` are the iterative solver's."""

    residual: float = 0.0
    status: str = ""


def penalty_weights(H: Tensor, penalty: str = "mean") -> Tensor:
    """Γ of the ridge term as its diagonal (b, q), positive; 1 for elements without any output.

    Args:
        H: quadratic term (b, q, q) of a programme.
        penalty: ``mean``, the mean of diag H for all (filters weak directions, does not depend on
            the coordinates) or ``diagonal``, diag H (does not depend on the scale of single
            elements; RegMean's α is one).
    Raises: MergeError for another penalty.
    """
    if penalty not in PENALTIES:
        raise MergeError(f"ridge penalty: expected 'mean' or 'diagonal', found {penalty!r}")
    gamma = diagonal(H)
    if penalty == "mean":
        gamma = gamma.mean().expand_as(gamma)
    return torch.where(gamma > 0, gamma, 1.0)


class Factored:
    """A programme by its eigenvectors, to be solved for many ridges at the price of one.

    Args:
        penalty: Γ of the ridge term, ``mean`` of diag H or ``diagonal``, diag H itself.
        rtol: eigenvalues below ``rtol`` times the largest of their block (of all blocks, where
            these are eigenvectors) are taken for noise: nothing moves along their directions. By
            default what the programme says of its moments.
        dtype: precision of the eigendecomposition; float32 takes half the time, and is good enough
            to choose a ridge by.

    Attributes:
        gamma: (b, q) float64, diagonal of Γ.
        values: (b, q) eigenvalues of ``Γ^-½ H Γ^-½``, noise set to 0.
        significant: (b, q) boolean, eigenvalues above the noise.
        vectors: (b, q, q) eigenvectors, in ``dtype``.
    """

    def __init__(
        self,
        programme: Programme,
        penalty: str = "mean",
        rtol: float | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        self.programme, self.penalty = programme, penalty
        self.gamma = penalty_weights(programme.H, penalty)
        root = self.gamma.sqrt()
        scaled = programme.H / (root[:, :, None] * root[:, None, :])
        values, self.vectors = torch.linalg.eigh(scaled.to(dtype))
        values = values.to(programme.H)
        noise = programme.rtol if rtol is None else rtol
        if dtype == torch.float32:
            noise = max(noise, RTOL_FLOAT32)
        self.significant = values > noise * self._largest(values)
        self.values = torch.where(self.significant, values, 0.0)

    def _largest(self, values: Tensor) -> Tensor | float:
        """What noise is relative to: the largest eigenvalue of all, or of each block, if not lost
        beside all."""
        if values.numel() == 0:
            return 0.0  # experts equal the base
        largest = values.max().clamp(min=0)
        if not self.programme.basis.own_noise:
            return largest
        return torch.maximum(values.amax(1, keepdim=True), 1e-3 * largest)

    @cached_property
    def rotation(self) -> Tensor:
        """``Γ^-½ V`` (b, q, q) float64: turns steps along the eigenvectors into coefficients."""
        return self.vectors.to(self.gamma) / self.gamma.sqrt()[:, :, None]

    @cached_property
    def rank(self) -> int:
        """Eigenvalues of H above the noise, for all right-hand sides."""
        return int(self.significant.sum()) * self.programme.f.shape[1]

    def inverse(self, ridges: Sequence[Ridge]) -> Tensor:
        """``1 / (w + λ)`` (R, b, q) for the eigenvalues w, 0 for those that are noise."""
        for ridge in ridges:
            check_ridge(ridge)
        damped = torch.stack([self.values + ridge for ridge in ridges])
        return torch.where(self.significant, 1 / damped, 0.0)

    def path(self, ridges: Sequence[Ridge], prior: Tensor | None = None) -> Tensor:
        """Minimisers (R, b, s, q) for R relative ridges ``λ ≥ 0`` towards a prior.

        Args:
            prior: (b, s, q), zero (the base) by default.
        Raises: MergeError for a negative number among the ridges; tensors are not looked at.
        """
        prior = torch.zeros_like(self.programme.f) if prior is None else prior.to(self.programme.f)
        pull = -self.programme.gradient(prior) @ self.rotation
        return prior + (pull * self.inverse(ridges).unsqueeze(2)) @ self.rotation.mT

    def solve(self, ridge: Ridge = 0.0, prior: Tensor | None = None) -> Solution:
        """Minimiser for one relative ridge ``λ ≥ 0`` towards ``prior`` (b, s, q), or zero."""
        d = self.path((ridge,), prior)[0]
        return Solution(d, self.programme, ridge, prior, self.penalty, self)


def check_ridge(ridge: Ridge) -> None:
    """Raise MergeError for a number that is no ridge; tensors stay on their device unseen."""
    if not isinstance(ridge, Tensor) and not ridge >= 0:
        raise MergeError(f"ridge: expected a number ≥ 0, found {ridge}")


def is_definite(programme: Programme, ridge: Ridge) -> bool:
    """Whether a ridge is known to outweigh the noise of a wide programme, for Cholesky to take
    it."""
    b, _, q = programme.f.shape
    if q < CHOLESKY_WIDTH or isinstance(ridge, Tensor):
        return False
    return least_definite(programme.rtol, b, q) <= ridge < math.inf


def least_definite(rtol: float, b: int, q: int) -> float:
    """The least ridge above the noise of b blocks of width q: ``rtol`` times the trace at most."""
    return 2 * rtol * b * q


def minimise(
    programme: Programme, ridge: Ridge = 0.0, prior: Tensor | None = None, penalty: str = "mean"
) -> Solution:
    """Closed-form minimiser of ``L(d) + ½ λ (d - d0)ᵀ Γ (d - d0)``.

    By one Cholesky factorisation where the blocks are wide and the ridge is a number above the
    noise of H, else by eigenvectors, along which nothing moves where H is noise. Use
    :class:`Factored` to solve for several ridges at the cost of one.

    Args:
        ridge: relative ``λ ≥ 0``, a number or a float64 tensor without axes, which is not read.
        prior: d0 (b, s, q), zero (the base) by default.
        penalty: Γ, ``mean`` of diag H or ``diagonal``, diag H itself.
    Returns: a Solution; its ``d`` is NaN where the moments are not those of any data.
    Raises: MergeError for a negative ridge or an unknown penalty.
    """
    check_ridge(ridge)
    if not is_definite(programme, ridge):
        return Factored(programme, penalty).solve(ridge, prior)
    d = _by_cholesky(programme, ridge, prior, penalty_weights(programme.H, penalty))
    return Solution(d, programme, ridge, prior, penalty)


def _by_cholesky(programme: Programme, ridge: Ridge, prior: Tensor | None, gamma: Tensor) -> Tensor:
    """``d`` (b, s, q) for a ridge that makes H definite; NaN if H was not positive semidefinite.

    Args:
        prior: (b, s, q), zero where None. gamma: (b, q), diagonal of Γ.
    """
    H = programme.H.clone()
    diagonal(H).add_(ridge * gamma)
    start = None if prior is None else prior.to(programme.f)
    pull = -programme.f if start is None else -programme.gradient(start)
    step = solve_definite(H, pull)
    return step if start is None else start + step


def minimise_constrained(
    programme: Programme, *, nonnegative: bool = False, sum_to_one: bool = False
) -> Solution:
    """Minimiser under ``d ≥ 0`` and/or ``Σ_k d_k = 1`` over the experts in every block.

    By Clarabel's interior-point method, for small p; needs the ``qp`` extra. ``sum_to_one`` needs
    blocks indexed by experts (row families, rotated columns).
    Raises: Infeasible with the solver's status; MergeError when no constraint, or a meaningless
        one, is asked for.
    """
    import clarabel
    import numpy as np
    from scipy import sparse

    _check_constraints(programme, nonnegative, sum_to_one)
    b, s, q = programme.f.shape
    scale = float(programme.H.abs().max()) or 1.0
    blocks = list((programme.H / scale).cpu().numpy().repeat(s, 0))
    H = sparse.block_diag(blocks, format="csc")
    f = (programme.f / scale).flatten().cpu().numpy()
    rows, bounds, cones = [], [], []
    if sum_to_one:
        rows.append(sparse.kron(sparse.eye(b * s), np.ones((1, q))))
        bounds.append(np.ones(b * s))
        cones.append(clarabel.ZeroConeT(b * s))
    if nonnegative:
        rows.append(-sparse.eye(f.size))
        bounds.append(np.zeros(f.size))
        cones.append(clarabel.NonnegativeConeT(f.size))
    G = sparse.vstack(rows, format="csc")
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    upper = sparse.triu(H, format="csc")
    answer = clarabel.DefaultSolver(upper, f, G, np.concatenate(bounds), cones, settings).solve()
    if "Solved" not in str(answer.status):
        raise Infeasible(
            f"constrained programme over basis {programme.basis.name}: Clarabel reports "
            f"{answer.status}; check H and f for scale"
        )
    x, dual = np.asarray(answer.x), np.asarray(answer.z)
    error = np.abs(H @ x + f + G.T @ dual).max() / (np.abs(f).max() or 1.0)
    d = torch.from_numpy(x).to(programme.f).reshape(b, s, q)
    status = f"{answer.status} by Clarabel in {answer.iterations} steps"
    return ConstrainedSolution(d, programme, residual=float(error), status=status)


def _check_constraints(programme: Programme, nonnegative: bool, sum_to_one: bool) -> None:
    if not (nonnegative or sum_to_one):
        raise MergeError(
            "constraints: expected nonnegative and/or sum_to_one, found neither; "
            "use minimise for the free programme"
        )
    if sum_to_one and not programme.basis.by_expert:
        raise MergeError(
            f"basis {programme.basis.name}: its blocks are not indexed by experts, "
            "so Σ_k d_k = 1 has no meaning; use a row family"
        )
