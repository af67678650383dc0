r"""Methods that solve layers on calibration inputs, and tuning: ``method(base, experts, calibration, **options) -> Merge``."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bases import build
from .diagnostic import RIDGES, cross_fitted, gap
from .errors import MergeError
from .moments import Moments
from .programme import programme
from .sequential import Merge, merge_sequentially
from .solve import RTOL, Factored, minimise


@dataclass(frozen=True)
class QP:
    """The programme as a layer solver.

    Args:
        basis: a family, or several to choose from per layer by cross-fitted captured energy.
        ridge: λ relative to Γ, or ``cross-fitted`` to choose it from ``ridges`` per layer.
        prior: the ridge, and where H is singular the choice among minimisers, pull towards ``prior · Σ_k Δ_k``: 0 is the base
            (then ridge 0 gives ``-H⁺f``), 1/K the soup, the default: where calibration is silent, average. Towards the anchor where
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

    @property
    def full_energy(self) -> bool:
        """Whether the moments must hold all of M."""
        return "rotated_rows" in self._families

    @property
    def _families(self):
        families = [self.basis] if isinstance(self.basis, str) else list(self.basis)
        if not families:
            raise MergeError("basis: expected a family or several to choose from, found none")
        return families

    def __call__(self, moments: Moments, updates: Tensor, anchor: Tensor | None = None) -> tuple[Tensor, dict]:
        """Update (g, m, n) of one layer and its table row; ``anchor`` (g, m, n) is another merge's update."""
        if self.ridge != "cross-fitted" and not isinstance(self.ridge, (int, float)):
            raise MergeError(f"ridge: expected a number ≥ 0 or 'cross-fitted', found {self.ridge!r}")
        prior: float | Tensor = 1 / len(updates) if self.prior is None else self.prior
        if anchor is not None:
            updates, prior = torch.cat([updates, anchor[None]]), torch.eye(len(updates) + 1)[-1]
        pooled = moments.pool(weights=self.weights)
        family, ridge, score = self._choose(moments, updates, prior)
        basis = build(family, updates, pooled, groups=self._labels(moments))
        solution = Factored(programme(pooled, basis), self.penalty).solve(ridge, basis.arithmetic(prior))
        update = basis.combine(solution.d)
        row = {"basis": family, "p": solution.p, "rank": solution.rank, "ridge": ridge, "cross_fitted": score}
        return update, row | _shares(pooled, update)

    def _labels(self, moments):
        if self.groups is None:
            return None
        copies, features = moments.A.shape[2:4]
        rows = features if moments.shared else copies * features
        if self.groups < 1 or rows % self.groups:
            raise MergeError(f"groups: {rows} output rows do not fall into {self.groups} equal groups")
        return (torch.arange(rows) // (rows // self.groups)).repeat(copies if moments.shared else 1)

    def _choose(self, moments, updates, prior):
        """(family, ridge, cross-fitted captured energy), by the latter where there is a choice."""
        families = self._families
        ridges = self.ridges if self.ridge == "cross-fitted" else (float(self.ridge),)
        if moments.folds == 1:
            if len(families) * len(ridges) > 1:
                raise MergeError("one fold leaves nothing to choose by: give a number as ridge and one basis, or use more folds")
            return families[0], ridges[0], None
        options = {"weights": self.weights, "penalty": self.penalty, "prior": prior, "groups": self._labels(moments)}
        scores = [(f, *cross_fitted(moments, updates, f, ridges, **options)) for f in families]
        return max(scores, key=lambda s: s[2])


def qp(base, experts, calibration, *, inputs="merged", targets="own", folds=4, scope="all", blocks=None, layers=None, anchor=None,
       progress=False, **solver) -> Merge:
    """The merge programme through all layers, or some; ``solver`` takes the fields of :class:`QP`.

    Args:
        anchor: state dict of any merge. The ridge then runs from it (λ → ∞) to the programme over a basis that contains it.
    """
    return merge_sequentially(base, experts, calibration, QP(**solver), inputs=inputs, targets=targets, folds=folds, scope=scope,
                              blocks=blocks, layers=layers, anchor=anchor, progress=progress)


@dataclass(frozen=True)
class RegMean:
    """RegMean's closed form as a layer solver: elements, on Gram matrices whose off-diagonal entries are multiplied by ``alpha``."""

    alpha: float = 0.95
    full_energy = False

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise MergeError(f"alpha: expected a number in [0, 1], found {self.alpha}")

    def __call__(self, moments: Moments, updates: Tensor):
        pooled, plain = moments.shrink(updates, self.alpha).pool(), moments.pool()
        basis = build("elements", updates, pooled)
        solution = minimise(programme(pooled, basis))
        update = basis.combine(solution.d)
        return update, {"basis": "elements", "p": solution.p, "rank": solution.rank, "ridge": 0.0, "cross_fitted": None} | _shares(plain, update)


def _shares(pooled, update) -> dict:
    """Captured energy, and the gap to the unrestricted optimum, as fractions of the residual energy; None where there is none to share."""
    if pooled.energy == 0:
        return {"captured": 1.0 if pooled.captured(update) == 1 else None, "gap": None}
    return {"captured": pooled.captured(update), "gap": gap(pooled, update) / pooled.energy}


def regmean(base, experts, calibration, *, alpha=0.95, blocks=None, progress=False) -> Merge:
    """RegMean (arXiv:2212.09849): ``(Σ C'_t/N_t)⁻¹ Σ C'_t/N_t W_t``, ``C' = αC + (1-α) diag C``, on every expert's own inputs.

    Weights of dense layers only; biases, norms and embeddings are averaged.
    """
    return merge_sequentially(base, experts, calibration, RegMean(alpha), inputs="expert", targets="propagated", scope="weights",
                              folds=1, blocks=blocks, progress=progress)


def regmean_plus_plus(base, experts, calibration, *, alpha=0.95, blocks=None, progress=False) -> Merge:
    """RegMean++ (arXiv:2508.03121): RegMean on the merged model's block inputs, the expert running within the block."""
    return merge_sequentially(base, experts, calibration, RegMean(alpha), inputs="block", targets="propagated", scope="weights",
                              folds=1, blocks=blocks, progress=progress)


def lot(base, experts, calibration, *, blocks=None, progress=False) -> Merge:
    """LOT Merging (arXiv:2505.23859): layer-wise feature drift on every expert's own inputs, ``W_0 + (Σ Δ_t C_t) (Σ C_t)⁺``.

    The programme over single entries with no ridge. Biases are folded into their layers; the authors' treatment of them is not known to us.
    """
    return qp(base, experts, calibration, basis="elements", ridge=0.0, prior=0.0, inputs="expert", folds=1, scope="dense", blocks=blocks,
              progress=progress)


@dataclass(frozen=True)
class FeatCal:
    """FeatCal's closed form as a layer solver: elements, ``ω_t = 1/‖C_t‖``, an absolute ``ridge`` towards ``anchor · Σ_k Δ_k``."""

    ridge: float = 0.05
    anchor: float = 0.66
    full_energy = False

    def __call__(self, moments: Moments, updates: Tensor):
        C, A = (z.sum(1) for z in (moments.C, moments.A))  # (T, g, ·, n)
        norms = C.flatten(2).norm(dim=2)[:, :, None, None].clamp(min=torch.finfo(C.dtype).tiny)
        C, A, anchor = (C / norms).sum(0), (A / norms).sum(0), self.anchor * updates.to(C).sum(0)
        H = C + (self.ridge + 1e-8) * torch.eye(C.shape[-1]).to(C)
        update = torch.linalg.solve(H, A + self.ridge * anchor, left=False)
        row = {"basis": "elements", "p": update.numel(), "rank": update.numel(), "ridge": self.ridge, "cross_fitted": None}
        return update, row | _shares(moments.pool(), update)


def featcal(base, experts, calibration, *, ridge=0.05, anchor=0.66, blocks=None, progress=False) -> Merge:
    """FeatCal (arXiv:2605.13030): in forward order, a ridge regression of each layer to a quarter own and three quarters propagated targets.

    The authors' constants: ridge 0.05, anchor ``2.2 · 0.3`` times the sum of the updates. Their reduced weight of all but the class
    token in the last block is not applied here, biases are folded into their layers, and what no layer covers is averaged.
    """
    return merge_sequentially(base, experts, calibration, FeatCal(ridge, anchor), targets=0.25, folds=1, scope="dense", blocks=blocks,
                              progress=progress)


@dataclass(frozen=True)
class Sketched:
    r"""The programme over single entries for very wide layers, with ``C`` known only through a Nyström sketch ``Y = CΩ`` of ``rank`` columns.

    ``P + (A - PC) V (S + μ + τ)⁻¹ Vᵀ`` with ``Ĉ = Y(ΩᵀY)⁺Yᵀ = V S Vᵀ``, P the soup or ``prior · Σ_k Δ_k``, μ = ``ridge`` times the mean of
    diag C, and τ the mean eigenvalue that the sketch missed. Directions outside V stay at P: dividing them by μ, as the inverse of ``Ĉ + μI``
    would, takes a step far too long wherever C is larger than Ĉ + μ. Y is (n, rank) and ``A - PC`` (m, n); both, and diag C, are sums over
    samples: no eigenvectors of an (n, n) matrix. As much rank as inputs gives the ridge solution, rank 0 gives P.
    """

    rank: int = 32
    ridge: float = 0.01
    prior: float | None = None
    seed: int = 0
    full_energy = False

    def __post_init__(self):
        if self.rank < 0 or self.ridge <= 0:
            raise MergeError(f"sketch: expected a rank ≥ 0 and a ridge > 0, found {self.rank} and {self.ridge}")

    def __call__(self, moments: Moments, updates: Tensor) -> tuple[Tensor, dict]:
        """Update (g, m, n) of one layer and its table row."""
        pooled = moments.pool()
        C, rank = pooled.C, min(self.rank, pooled.C.shape[-1])
        start = (1 / len(updates) if self.prior is None else self.prior) * updates.to(C).sum(0)
        Omega = torch.randn(C.shape[-1], rank, generator=torch.Generator().manual_seed(self.seed), dtype=C.dtype).to(C.device)
        Omega = torch.linalg.qr(Omega).Q
        Y, G = C @ Omega, pooled.A - start @ C
        values, vectors = torch.linalg.eigh((Omega.mT @ Y + Y.mT @ Omega) / 2)  # of the core, (g, rank, rank)
        kept = values > RTOL * values.amax(-1, keepdim=True) if rank else values > 0
        B = Y @ (vectors * torch.where(kept, values.clamp(min=torch.finfo(C.dtype).tiny).rsqrt(), 0.0).unsqueeze(-2))  # BBᵀ = Ĉ
        trace = C.diagonal(dim1=-2, dim2=-1)
        missed = (trace.sum(-1) - B.square().sum((-2, -1))).clamp(min=0) / max(C.shape[-1] - rank, 1)
        floor = ((self.ridge * trace.mean() or 1.0) + missed).unsqueeze(-1)
        seen, scales, _ = torch.linalg.svd(B, full_matrices=False)
        update = start + G @ (seen / (scales.square() + floor).unsqueeze(-2)) @ seen.mT
        row = {"basis": "elements", "p": update.numel(), "rank": rank * update.shape[0] * update.shape[1], "ridge": self.ridge, "cross_fitted": None}
        return update, row | _shares(pooled, update)


def sketched(base, experts, calibration, *, inputs="merged", targets="own", scope="all", blocks=None, progress=False, **solver) -> Merge:
    """The unrestricted programme through all layers from sketches of what they read; ``solver`` takes the fields of :class:`Sketched`."""
    return merge_sequentially(base, experts, calibration, Sketched(**solver), inputs=inputs, targets=targets, folds=1, scope=scope,
                              blocks=blocks, progress=progress)


def tune(method: Callable[..., Merge], grid: Iterable[dict], score: Callable[[dict], float], base, experts, calibration=None) -> tuple[Merge, dict, list[float]]:
    """The merge with the highest ``score`` of its state dict over a grid of options, those options, and all scores.

    ``score`` must look at validation data only. Ties go to the earlier entry. Raises: MergeError for an empty grid.
    """
    best, scores = None, []
    for options in grid:
        merge = method(base, experts, calibration, **options)
        scores.append(score(merge.state_dict))
        if scores[-1] == max(scores) and scores.count(scores[-1]) == 1:
            best = (merge, options)
    if best is None:
        raise MergeError("grid: expected at least one set of options, found none")
    return *best, scores
