r"""Layer solvers: what a pass calls with the moments and updates of a layer,
``(moments, updates) -> (update, table row)``.

Moments are those of :class:`moments.Moments`, updates (K, g, m, n); the answer is the layer's
merged update (g, m, n), float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bases import FAMILIES, build
from .cholesky import solve_definite
from .diagnostic import RIDGES, choose, cross_fitted
from .engine.recipes import looks_at
from .errors import MergeError
from .held_out import unchecked
from .moments import WEIGHTS, Moments, Pooled
from .options import number, one_of, seeded, whole, words
from .programme import programme
from .solve import PENALTIES, RTOL, minimise, penalty_weights


@dataclass(frozen=True)
class QP:
    """The programme as a layer solver.

    Args:
        basis: a family, or several to choose from per layer by cross-fitted captured energy.
        ridge: λ relative to Γ, or ``cross-fitted`` to choose it from ``ridges`` per layer.
        prior: the ridge, and where H is singular the choice among minimisers, pull towards
            ``prior · Σ_k Δ_k``: 0 is the base (then ridge 0 gives ``-H⁺f``), 1/K the soup, the
                default: where calibration is silent, average. Towards the anchor where
            one is given, which joins the updates that the basis is built from.
        groups: number of equal groups of output rows (family ``groups``), e.g. attention heads.
        weights, penalty: see ``moments.pool`` and ``solve.Factored``.
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
                f"ridges: expected a list of numbers ≥ 0, found {type(self.ridges).__name__} {self.ridges!r}"
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
    def _families(self):
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
        if (
            solution.factored is None and family == "elements"
        ):  # U C, from what U solves: U C + λγ (U - P) = A
            gamma = penalty_weights(solution.programme, self.penalty).unsqueeze(-2)
            moved = pooled.A - ridge * gamma * (update - basis.arithmetic(prior))
        return update, _row(pooled, update, family, basis.p, ridge, score, moved)

    def _labels(self, moments):
        if self.groups is None:
            return None
        copies, features = moments.A.shape[2:4]
        rows = features if moments.shared else copies * features
        if self.groups < 1 or rows % self.groups:
            raise MergeError(
                f"groups: {rows} output rows do not fall into {self.groups} equal groups"
            )
        return (torch.arange(rows) // (rows // self.groups)).repeat(copies if moments.shared else 1)

    def _choose(self, moments, updates, prior):
        """(family, ridge, cross-fitted captured energy), by the latter where there is a choice."""
        families = self._families
        ridges = self.ridges if self.ridge == "cross-fitted" else (float(self.ridge),)
        if moments.folds == 1:
            if len(families) * len(ridges) > 1:
                raise MergeError(
                    "one fold leaves nothing to choose by: give a number as ridge and one basis, or use more folds"
                )
            return families[0], ridges[0], None
        options = {
            "weights": self.weights,
            "penalty": self.penalty,
            "prior": prior,
            "groups": self._labels(moments),
        }
        if len(families) == 1 and not looks_at(moments.C.device):
            place, score = choose(moments, updates, families[0], ridges, **options)
            return families[0], moments.C.new_tensor(ridges).take(place), score
        scores = [(f, *cross_fitted(moments, updates, f, ridges, **options)) for f in families]
        return max(scores, key=lambda s: s[2])


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
        C.diagonal(dim1=-2, dim2=-1).copy_(pooled.C.diagonal(dim1=-2, dim2=-1))
        spread = moments.C.diagonal(dim1=-2, dim2=-1).sum(1) / moments.count.sum(1)[:, None, None]
        diagonal = (updates.to(C) * spread.unsqueeze(-2)).sum(0)  # Σ_t Δ_t diag(C_t)/N_t
        A = self.alpha * pooled.A + (1 - self.alpha) * diagonal
        mean = updates.to(C).mean(0)
        if self.alpha == 1:
            shrunk = replace(pooled, C=C, A=A)
            solved = minimise(programme(shrunk, build("elements", updates, shrunk)), prior=mean)
            update = solved.d
        else:
            residual = A - mean @ C
            diagonal = C.diagonal(dim1=-2, dim2=-1)  # a view: inputs that are never on get a one
            diagonal += (diagonal == 0).to(C)
            update = mean + solve_definite(C, residual)
        moved = None
        if 0 < self.alpha < 1:  # U C, from what U solves: U (α C + (1 - α) diag C) = A
            own = pooled.C.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
            moved = (A - (1 - self.alpha) * update * own) / self.alpha
        return update, _row(pooled, update, "elements", update.numel(), 0.0, None, moved)


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

    def __call__(self, moments: Moments, updates: Tensor):
        C, A = (
            z.sum(1) if moments.folds > 1 else z[:, 0] for z in (moments.C, moments.A)
        )  # (T, g, ·, n)
        norms = C.flatten(2).norm(dim=2)[:, :, None, None].clamp(min=torch.finfo(C.dtype).tiny)
        C, A, anchor = (
            (C / norms).sum(0),
            (A / norms).sum(0),
            float(self.anchor) * updates.to(C).sum(0),
        )
        H = C + (float(self.ridge) + 1e-8) * torch.eye(C.shape[-1]).to(C)
        update = solve_definite(H, A + float(self.ridge) * anchor)
        return update, _row(moments.pooled(), update, "elements", update.numel(), self.ridge, None)


@dataclass(frozen=True)
class Sketched:
    r"""The programme over single entries for very wide layers, with ``C`` known only through a
    Nyström sketch ``Y = CΩ`` of ``rank`` columns.

    ``P + (A - PC) V (S + μ + τ)⁻¹ Vᵀ`` with ``Ĉ = Y(ΩᵀY)⁺Yᵀ = V S Vᵀ``, P the soup or
    ``prior · Σ_k Δ_k``, μ = ``ridge`` times the mean of
    diag C, and τ the mean eigenvalue that the sketch missed. Directions outside V stay at P:
    dividing them by μ, as the inverse of ``Ĉ + μI`` would, takes a step far too long wherever C is
    larger than Ĉ + μ. Y is (n, rank) and ``A - PC`` (m, n); both, and diag C, are sums over
    samples: no eigenvectors of an (n, n) matrix. As much rank as inputs gives the ridge solution,
    rank 0 gives P.
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
        C, rank = pooled.C, min(self.rank, pooled.C.shape[-1])
        start = (1 / len(updates) if self.prior is None else float(self.prior)) * updates.to(C).sum(
            0
        )
        Omega = torch.randn(C.shape[-1], rank, generator=seeded(self.seed), dtype=C.dtype).to(
            C.device
        )
        Omega = torch.linalg.qr(Omega).Q
        Y, G = C @ Omega, pooled.A - start @ C
        values, vectors = torch.linalg.eigh(
            (Omega.mT @ Y + Y.mT @ Omega) / 2
        )  # of the core, (g, rank, rank)
        kept = values > RTOL * values.amax(-1, keepdim=True) if rank else values > 0
        B = Y @ (
            vectors
            * torch.where(kept, values.clamp(min=torch.finfo(C.dtype).tiny).rsqrt(), 0.0).unsqueeze(
                -2
            )
        )  # BBᵀ = Ĉ
        trace = C.diagonal(dim1=-2, dim2=-1)
        missed = (trace.sum(-1) - B.square().sum((-2, -1))).clamp(min=0) / max(
            C.shape[-1] - rank, 1
        )
        mean = trace.mean()
        floor = (torch.where(mean > 0, float(self.ridge) * mean, 1.0) + missed).unsqueeze(-1)
        seen, scales, _ = torch.linalg.svd(B, full_matrices=False)
        update = start + G @ (seen / (scales.square() + floor).unsqueeze(-2)) @ seen.mT
        return update, _row(pooled, update, "elements", update.numel(), self.ridge, None)


def _row(
    pooled: Pooled, update: Tensor, basis: str, p: int, ridge, score, moved: Tensor | None = None
) -> dict:
    """Table row of a solved layer; ``captured`` is None where there is no residual energy, as in an
    audit.

    ``moved`` is ``U C`` of the update U, where it is known already.
    """
    if moved is None:
        loss = pooled.loss_tensor(update)
    else:
        loss = ((moved / 2 - pooled.A) * update).sum() + pooled.energy
    captured = torch.where(pooled.energy > 0, 1 - loss / pooled.energy, torch.nan)
    if looks_at(captured.device):  # else the pass does when all is done
        captured = None if captured.isnan() else captured.item()
    return {"basis": basis, "p": p, "ridge": ridge, "cross_fitted": score, "captured": captured}
