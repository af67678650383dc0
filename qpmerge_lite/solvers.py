r"""Layer solvers: what a pass calls with the moments and updates of a layer,
``(moments, updates) -> (update, table row)``.

Moments are those of :class:`moments.Moments`, updates (K, g, m, n); the answer is the layer's
merged update (g, m, n), float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bases import FAMILIES, build
from .cholesky import solve_definite
from .diagnostic import RIDGES, choose, cross_fitted
from .engine.products import propagated
from .engine.recipes import looks_at, plain
from .errors import MergeError
from .held_out import unchecked
from .moments import WEIGHTS, Moments, Pooled, diagonal
from .options import number, one_of, seeded, whole, words
from .programme import programme
from .solve import PENALTIES, RTOL, Ridge, minimise, penalty_weights


class Choice(NamedTuple):
    """Basis family and ridge of a layer, and their cross-fitted captured energy, None where nothing
    was chosen by it."""

    family: str
    ridge: Ridge
    score: float | Tensor | None


@dataclass(frozen=True)
class QP:
    """The programme as a layer solver.

    Args:
        basis: a family, or several to choose from per layer by cross-fitted captured energy.
        ridge: λ relative to Γ, or ``cross-fitted`` to choose it from ``ridges`` per layer.
        prior: the ridge, and where H is singular the choice among minimisers, pull towards
            ``prior · Σ_k Δ_k``: 0 is the base (then ridge 0 gives ``-H⁺f``), 1/K the soup, the
            default: where calibration is silent, average. Towards the anchor where one is given,
            which joins the updates that the basis is built from.
        groups: number of equal groups of output rows (family ``groups``), e.g. attention heads.
        weights: of the tasks, ``tokens`` (1/N_t) or ``energy`` (1/‖R_t‖²).
        penalty: Γ of the ridge, ``mean`` of diag H or ``diagonal``, diag H itself.
    """

    basis: str | Sequence[str] = "rows"
    ridge: float | str = "cross-fitted"
    prior: float | None = None
    groups: int | None = None
    weights: str = "tokens"
    penalty: str = "mean"
    ridges: tuple[float, ...] = RIDGES

    def __post_init__(self):
        for family in self._families:
            one_of("basis", family, FAMILIES)
        if not (isinstance(self.ridge, str) and self.ridge == "cross-fitted"):
            if isinstance(self.ridge, str):
                raise MergeError(
                    f"ridge: expected a number ≥ 0 or 'cross-fitted', found {self.ridge!r}"
                )
            number("ridge", self.ridge, low=0)
        if isinstance(self.ridges, (str, Mapping)) or not isinstance(self.ridges, Sequence):
            raise MergeError(
                "ridges: expected a list of numbers ≥ 0, found "
                f"{type(self.ridges).__name__} {self.ridges!r}"
            )
        for ridge in self.ridges:
            number("ridges", ridge, low=0)
        if self.prior is not None:
            number("prior", self.prior)
        if self.groups is not None:
            whole("groups", self.groups, 1)
        one_of("weights", self.weights, WEIGHTS)
        one_of("penalty", self.penalty, PENALTIES)

    @property
    def full_energy(self) -> bool:
        """Whether the moments must hold all of M."""
        return "rotated_rows" in self._families

    @property
    def _families(self) -> list[str]:
        """The families to choose from, in the order given."""
        families = words("basis", self.basis)
        if not families:
            raise MergeError("basis: expected a family or several to choose from, found none")
        return families

    def __call__(
        self, moments: Moments, updates: Tensor, anchor: Tensor | None = None
    ) -> tuple[Tensor, dict]:
        """Update (g, m, n) of one layer and its table row; ``anchor`` (g, m, n) is another merge's
        update."""
        prior: float | Tensor = 1 / len(updates) if self.prior is None else float(self.prior)
        if anchor is not None:
            updates, prior = torch.cat([updates, anchor[None]]), torch.eye(len(updates) + 1)[-1]
        pooled = moments.pooled(weights=self.weights)
        family, ridge, score = self._choose(moments, updates, prior)
        make = build if looks_at(moments.C.device) else unchecked
        basis = make(family, updates, pooled, groups=self._labels(moments))
        solution = minimise(programme(pooled, basis), ridge, basis.arithmetic(prior), self.penalty)
        update = basis.combine(solution.d)
        moved = None
        if solution.factored is None and family == "elements":
            # U C, from what U solves: U C + λγ (U - P) = A
            gamma = penalty_weights(solution.programme.H, self.penalty).unsqueeze(-2)
            moved = pooled.A - ridge * gamma * (update - basis.arithmetic(prior))
        return update, _row(pooled, update, family, basis.p, ridge, score, moved)

    def _labels(self, moments: Moments) -> Tensor | None:
        """Group (g·m,) of every output row; None where there are no groups."""
        if self.groups is None:
            return None
        copies, features = moments.A.shape[2:4]
        rows = features if moments.shared else copies * features
        if self.groups < 1 or rows % self.groups:
            raise MergeError(
                f"groups: {rows} output rows do not fall into {self.groups} equal groups"
            )
        return (torch.arange(rows) // (rows // self.groups)).repeat(copies if moments.shared else 1)

    def _choose(self, moments: Moments, updates: Tensor, prior: float | Tensor) -> Choice:
        """Family and ridge, by cross-fitted captured energy where there is a choice, for updates
        (K, g, m, n)."""
        families = self._families
        ridges = self.ridges if self.ridge == "cross-fitted" else (float(self.ridge),)
        if moments.folds == 1:
            if len(families) * len(ridges) > 1:
                raise MergeError(
                    "one fold leaves nothing to choose by: give a number as ridge and one basis, "
                    "or use more folds"
                )
            return Choice(families[0], ridges[0], None)
        options: dict[str, Any] = {
            "weights": self.weights,
            "penalty": self.penalty,
            "prior": prior,
            "groups": self._labels(moments),
        }
        if len(families) == 1 and not looks_at(moments.C.device):
            place, average = choose(moments, updates, families[0], ridges, **options)
            return Choice(families[0], moments.C.new_tensor(ridges).take(place), average)
        scores: dict[Choice, float] = {}
        for family in families:
            ridge, score = cross_fitted(moments, updates, family, ridges, **options)
            scores[Choice(family, ridge, score)] = score
        return max(scores, key=scores.__getitem__)  # the first of equals


def shrink(moments: Moments, updates: Tensor, alpha: float) -> Moments:
    """Moments with RegMean's ``C' = α C + (1 - α) diag C`` per task, and the propagated targets
    ``A' = Δ_t C'_t``, ``M' = A' Δ_tᵀ`` of updates (T, g, m, n)."""
    C = alpha * moments.C + (1 - alpha) * torch.diag_embed(diagonal(moments.C))
    A, M = propagated(C, updates.to(C).unsqueeze(1), moments.full_energy)
    return replace(moments, C=C, A=A, M=M)


@dataclass(frozen=True)
class RegMean:
    """RegMean's closed form as a layer solver: elements, on Gram matrices whose off-diagonal
    entries are multiplied by ``alpha``."""

    alpha: float = 0.95
    full_energy = False

    def __post_init__(self):
        number("alpha", self.alpha, 0, 1)

    def __call__(self, moments: Moments, updates: Tensor) -> tuple[Tensor, dict]:
        """Update (g, m, n) of one layer and its table row; moments are of propagated targets,
        ``A_t = Δ_t C_t``.

        Inputs that no calibration input reaches keep the average of the experts' weights.
        """
        pooled = moments.pooled()
        C = self.alpha * pooled.C
        diagonal(C).copy_(diagonal(pooled.C))
        spread = diagonal(moments.C).sum(1) / moments.count.sum(1)[:, None, None]
        of_diagonals = (updates.to(C) * spread.unsqueeze(-2)).sum(0)  # Σ_t Δ_t diag(C_t)/N_t
        A = self.alpha * pooled.A + (1 - self.alpha) * of_diagonals
        mean = updates.to(C).mean(0)
        if self.alpha == 1:
            shrunk = replace(pooled, C=C, A=A)
            solved = minimise(programme(shrunk, build("elements", updates, shrunk)), prior=mean)
            update = solved.d
        else:
            residual = A - mean @ C
            silent = (diagonal(C) == 0).to(C)
            diagonal(C).add_(silent)  # inputs that are never on get a one
            update = mean + solve_definite(C, residual)
        moved = None
        if 0 < self.alpha < 1:  # U C, from what U solves: U (α C + (1 - α) diag C) = A
            own = diagonal(pooled.C).unsqueeze(-2)
            moved = (A - (1 - self.alpha) * update * own) / self.alpha
        return update, _row(pooled, update, "elements", update.numel(), 0.0, moved=moved)


@dataclass(frozen=True)
class FeatCal:
    """FeatCal's closed form as a layer solver: elements, ``ω_t = 1/‖C_t‖``, an absolute ``ridge``
    towards ``anchor · Σ_k Δ_k``."""

    ridge: float = 0.05
    anchor: float = 0.66
    full_energy = False

    def __post_init__(self):
        number("ridge", self.ridge, low=0)
        number("anchor", self.anchor)

    def __call__(self, moments: Moments, updates: Tensor) -> tuple[Tensor, dict]:
        """Update (g, m, n) of one layer, for updates (K, g, m, n), and its table row."""
        C_of_tasks, A_of_tasks = moments.C[:, 0], moments.A[:, 0]  # (T, g, ·, n)
        if moments.folds > 1:
            C_of_tasks, A_of_tasks = moments.C.sum(1), moments.A.sum(1)
        norms = C_of_tasks.flatten(2).norm(dim=2)[:, :, None, None]
        norms = norms.clamp(min=torch.finfo(norms.dtype).tiny)
        C, A = (C_of_tasks / norms).sum(0), (A_of_tasks / norms).sum(0)
        ridge, anchor = float(self.ridge), float(self.anchor) * updates.to(C).sum(0)
        H = C + (ridge + 1e-8) * torch.eye(C.shape[-1]).to(C)
        update = solve_definite(H, A + ridge * anchor)
        return update, _row(moments.pooled(), update, "elements", update.numel(), ridge)


@dataclass(frozen=True)
class Sketched:
    r"""The programme over single entries for very wide layers, with ``C`` known only through a
    Nyström sketch ``Y = CΩ`` of ``rank`` columns.

    ``P + (A - PC) V (S + μ + τ)⁻¹ Vᵀ`` with ``Ĉ = Y(ΩᵀY)⁺Yᵀ = V S Vᵀ``, P the soup or
    ``prior · Σ_k Δ_k``, μ = ``ridge`` times the mean of diag C, and τ the mean eigenvalue that the
    sketch missed. Directions outside V stay at P: dividing them by μ, as the inverse of
    ``Ĉ + μI`` would, takes a step far too long wherever C is larger than Ĉ + μ.

    Y is (n, rank) and ``A - PC`` (m, n); both, and diag C, are sums over samples: no eigenvectors
    of an (n, n) matrix. As much rank as inputs gives the ridge solution, rank 0 gives P.
    """

    rank: int = 32
    ridge: float = 0.01
    prior: float | None = None
    seed: int = 0
    full_energy = False

    def __post_init__(self):
        whole("rank", self.rank, -(2**63))
        number("ridge", self.ridge)
        seeded(self.seed)
        if self.prior is not None:
            number("prior", self.prior)
        if self.rank < 0 or self.ridge <= 0:
            raise MergeError(
                f"sketch: expected a rank ≥ 0 and a ridge > 0, found {self.rank} and {self.ridge}"
            )

    def __call__(self, moments: Moments, updates: Tensor) -> tuple[Tensor, dict]:
        """Update (g, m, n) of one layer and its table row."""
        pooled = moments.pooled()
        C, n = pooled.C, pooled.C.shape[-1]
        prior = 1 / len(updates) if self.prior is None else float(self.prior)
        start = prior * updates.to(C).sum(0)
        root = self._root(C)
        missed = (diagonal(C).sum(-1) - root.square().sum((-2, -1))).clamp(min=0)
        missed = missed / max(n - root.shape[-1], 1)  # τ (g,)
        mean = diagonal(C).mean()
        floor = (torch.where(mean > 0, float(self.ridge) * mean, 1.0) + missed).unsqueeze(-1)
        V, scales, _ = torch.linalg.svd(root, full_matrices=False)
        slope = pooled.A - start @ C
        update = start + slope @ (V / (scales.square() + floor).unsqueeze(-2)) @ V.mT
        return update, _row(pooled, update, "elements", update.numel(), self.ridge)

    def _root(self, C: Tensor) -> Tensor:
        """B (g, n, rank) with ``BBᵀ = Ĉ``, the Nyström approximation of C (g, n, n)."""
        n, rank = C.shape[-1], min(self.rank, C.shape[-1])
        drawn = torch.randn(n, rank, generator=seeded(self.seed), dtype=C.dtype)
        Omega = torch.linalg.qr(drawn.to(C.device)).Q
        Y = C @ Omega
        core = (Omega.mT @ Y + Y.mT @ Omega) / 2  # (g, rank, rank)
        values, vectors = torch.linalg.eigh(core)
        significant = values > RTOL * values.amax(-1, keepdim=True) if rank else values > 0
        inverse_root = values.clamp(min=torch.finfo(C.dtype).tiny).rsqrt()
        return Y @ (vectors * torch.where(significant, inverse_root, 0.0).unsqueeze(-2))


def _row(
    pooled: Pooled,
    update: Tensor,
    basis: str,
    p: int,
    ridge: Ridge,
    score: float | Tensor | None = None,
    moved: Tensor | None = None,
) -> dict:
    """Table row of a solved layer; ``captured`` is None where there is no residual energy, as in an
    audit.

    Args:
        update: U (g, m, n). p: number of coefficients.
        score: cross-fitted captured energy, None where nothing was chosen by it.
        moved: ``U C`` (g, m, n), where it is known already.
    """
    if moved is None:
        loss = pooled.loss_tensor(update)
    else:
        loss = ((moved / 2 - pooled.A) * update).sum() + pooled.energy
    energy = torch.as_tensor(pooled.energy)
    captured = torch.where(energy > 0, 1 - loss / energy, torch.nan)
    row = {"basis": basis, "p": p, "ridge": ridge, "cross_fitted": score, "captured": captured}
    return plain(row) if looks_at(captured.device) else row  # else the pass looks when all is done
