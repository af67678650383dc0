r"""Merging methods, all called alike: ``method(base, experts, calibration, **options) -> Merge``.

Data-free methods ignore the calibration inputs. ``θ_0`` is the base, ``τ_k = θ_k - θ_0`` the task vectors.
"""
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
from .sequential import Merge, average, check_experts, merge_sequentially
from .solve import Factored, minimise


@dataclass(frozen=True)
class QP:
    """The programme as a layer solver.

    Args:
        basis: a family, or several to choose from per layer by cross-fitted captured energy.
        ridge: λ relative to Γ, or ``cross-fitted`` to choose it from ``ridges`` per layer.
        prior: the ridge, and where H is singular the choice among minimisers, pull towards ``prior · Σ_k Δ_k``: 0 is the base
            (then ridge 0 gives ``-H⁺f``), 1/K the soup, the default: where calibration is silent, average.
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

    def __call__(self, moments: Moments, updates: Tensor) -> tuple[Tensor, dict]:
        """Update (g, m, n) of one layer and its table row."""
        if self.ridge != "cross-fitted" and not isinstance(self.ridge, (int, float)):
            raise MergeError(f"ridge: expected a number ≥ 0 or 'cross-fitted', found {self.ridge!r}")
        pooled = moments.pool(weights=self.weights)
        family, ridge, score = self._choose(moments, updates)
        basis = build(family, updates, pooled, groups=self._labels(updates))
        solution = Factored(programme(pooled, basis), self.penalty).solve(ridge, basis.uniform(self._prior(updates)))
        update = basis.combine(solution.d)
        row = {"basis": family, "p": solution.p, "rank": solution.rank, "ridge": ridge, "cross_fitted": score}
        return update, row | _shares(pooled, update)

    def _prior(self, updates):
        return 1 / len(updates) if self.prior is None else self.prior

    def _labels(self, updates):
        if self.groups is None:
            return None
        rows = updates.shape[1] * updates.shape[2]
        if self.groups < 1 or rows % self.groups:
            raise MergeError(f"groups: {rows} output rows do not fall into {self.groups} equal groups")
        return torch.arange(rows) // (rows // self.groups)

    def _choose(self, moments, updates):
        """(family, ridge, cross-fitted captured energy), by the latter where there is a choice."""
        families = self._families
        ridges = self.ridges if self.ridge == "cross-fitted" else (float(self.ridge),)
        if moments.folds == 1:
            if len(families) * len(ridges) > 1:
                raise MergeError("one fold leaves nothing to choose by: give a number as ridge and one basis, or use more folds")
            return families[0], ridges[0], None
        options = {"weights": self.weights, "penalty": self.penalty, "prior": self._prior(updates), "groups": self._labels(updates)}
        scores = [(f, *cross_fitted(moments, updates, f, ridges, **options)) for f in families]
        return max(scores, key=lambda s: s[2])


def qp(base, experts, calibration, *, inputs="merged", targets="own", folds=4, scope="all", blocks=None, layers=None, progress=False,
       **solver) -> Merge:
    """The merge programme through all layers, or some; ``solver`` takes the fields of :class:`QP`."""
    return merge_sequentially(base, experts, calibration, QP(**solver), inputs=inputs, targets=targets, folds=folds, scope=scope,
                              blocks=blocks, layers=layers, progress=progress)


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


def soup(base, experts, calibration=None, *, weights: Sequence[float] | None = None) -> Merge:
    """Model soup ``Σ_k w_k θ_k``; uniform by default. Raises: MergeError unless the weights sum to one."""
    if weights is not None and (len(weights) != len(experts) or abs(sum(weights) - 1) > 1e-9):
        raise MergeError(f"soup weights: expected {len(experts)} numbers with sum 1, found {list(weights)}; task_arithmetic scales freely")
    state = average(base, check_experts(base, experts), weights)
    return Merge(state, averaged=sorted(state))


def _add(base, update: dict[str, Tensor], scale: float) -> Merge:
    state = {k: (v.double() + scale * update[k]).to(v) if k in update else v.clone() for k, v in base.state_dict().items()}
    return Merge(state)


def _task_vectors(base, experts) -> list[dict[str, Tensor]]:
    reference = {k: v.double() for k, v in base.state_dict().items() if v.is_floating_point()}
    return [{k: e[k].double() - v for k, v in reference.items()} for e in check_experts(base, experts).values()]


def task_arithmetic(base, experts, calibration=None, *, scale: float = 0.3) -> Merge:
    """Task arithmetic (arXiv:2212.04089): ``θ_0 + λ Σ_k τ_k``, the sum and not the mean; ``scale`` is λ."""
    vectors = _task_vectors(base, experts)
    return _add(base, {k: sum(v[k] for v in vectors) for k in vectors[0]}, scale)


def dare(base, experts, calibration=None, *, drop: float = 0.5, scale: float = 0.3, seed: int = 0) -> Merge:
    """DARE (arXiv:2311.03099): every entry of τ_k is dropped with probability ``drop``, the rest divided by ``1 - drop``; then task arithmetic."""
    if not 0 <= drop < 1:
        raise MergeError(f"drop: expected a probability in [0, 1), found {drop}")
    generator = torch.Generator().manual_seed(seed)
    total: dict[str, Tensor] = {}
    for vector in _task_vectors(base, experts):
        for k in sorted(vector):
            kept = torch.rand(vector[k].shape, generator=generator).to(vector[k].device) >= drop
            total[k] = total.get(k, 0) + kept * vector[k] / (1 - drop)
    return _add(base, total, scale)


def ties(base, experts, calibration=None, *, density: float = 0.2, scale: float = 1.0) -> Merge:
    """TIES (arXiv:2306.01708): trim each τ_k to its largest entries, elect a sign per entry, average the entries that agree; ``θ_0 + λ τ``.

    As the authors' code: one trim over the whole flat vector of a model, keeping entries not below the (d - ⌊d·density⌋)-th smallest
    magnitude; entries whose signs cancel take the sign of the majority; the mean is over non-zero agreeing entries.
    """
    if not 0 < density <= 1:
        raise MergeError(f"density: expected a fraction in (0, 1], found {density}")
    vectors = _task_vectors(base, experts)
    names = sorted(vectors[0])
    flat = torch.stack([torch.cat([v[k].flatten() for k in names]) for v in vectors])
    cut = flat.shape[1] - int(flat.shape[1] * density)
    if cut > 0:
        flat = flat * (flat.abs() >= flat.abs().kthvalue(cut, dim=1, keepdim=True).values)
    sign = flat.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agree = torch.where(sign > 0, flat > 0, flat < 0)
    merged = (flat * agree).sum(0) / agree.sum(0).clamp(min=1)
    pieces = merged.split([vectors[0][k].numel() for k in names])
    return _add(base, {k: p.reshape(vectors[0][k].shape) for k, p in zip(names, pieces)}, scale)


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
