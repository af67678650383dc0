r"""Methods that drop entries of the task vectors ``τ_k = θ_k - θ_0``, or elect their signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import MergeError
from .merge import Merge, add_update, check_experts, differences, tied
from .options import fraction, number, numbers, one_of, refuse_complex, seeded

RESCALE = ("keep", "l1")


def _flat(vectors: Tensor) -> Tensor:
    """Task vectors (K, …) as (K, d), also of parameters without axes."""
    return vectors.reshape(len(vectors), vectors[0].numel())


def rescaled(vector: Tensor, mask: Tensor, chance: float | Tensor, rescale: str) -> Tensor:
    """Masked entries of a vector (d,) over their ``chance`` of being kept, one number or (d,), or
    scaled to the L1 norm of all."""
    if rescale == "keep":
        return vector * mask / chance
    left = (vector * mask).abs().sum()
    return vector * mask * (vector.abs().sum() / left if left >= 1e-7 else 1.0)


def dare(
    base,
    experts,
    calibration=None,
    *,
    drop: float = 0.5,
    scale: float = 0.3,
    rescale: str = "keep",
    seed: int = 0,
) -> Merge:
    """DARE (arXiv:2311.03099): task arithmetic of task vectors thinned at random.

    Every entry of τ_k is dropped with probability ``drop``, the rest divided by ``1 - drop``.

    Args:
        rescale: ``keep``, or ``l1`` to restore the L1 norm of every tensor instead, as mergekit
            does from 0.1 on.
    Raises: MergeError for options out of range and for experts that do not fit the base.
    """
    fraction("drop", drop, low=True)
    one_of("rescale", rescale, RESCALE)
    number("scale", scale)
    generator = seeded(seed)
    experts = check_experts(base, experts)
    vectors = differences(base, experts)
    total = {name: torch.zeros_like(stacked[0]) for name, stacked in vectors.items()}
    for k in range(len(experts)):
        for name in sorted(vectors):
            vector = vectors[name][k]
            mask = torch.rand(vector.shape, generator=generator).to(vector.device) >= drop
            total[name] += rescaled(vector, mask, 1 - drop, rescale)
    return add_update(base, experts, total, scale)


def breadcrumbs(
    base,
    experts,
    calibration=None,
    *,
    density: float = 0.9,
    outliers: float = 0.01,
    scale: float = 0.3,
) -> Merge:
    """Model Breadcrumbs (arXiv:2312.06795): task arithmetic of entries of middling size.

    Per tensor of d entries, the ⌊outliers·d⌋ largest are dropped, then the smallest until
    ⌊density·d⌋ are left.

    Raises: MergeError for options out of range, complex parameters, and experts that do not fit
        the base.
    """
    fraction("density", density, high=True)
    fraction("outliers", outliers, low=True)
    number("scale", scale)
    experts = check_experts(base, experts)
    vectors, update = differences(base, experts), {}
    refuse_complex("breadcrumbs", vectors)
    for name, stacked in vectors.items():
        flat = _flat(stacked)
        d = flat.shape[1]
        count = d if density == 1 else int(density * d)
        first = max(0, d - count - int(outliers * d))
        chosen = flat.abs().argsort(dim=1, stable=True)[:, first : first + count]
        mask = torch.zeros_like(flat).scatter_(1, chosen, 1.0)
        update[name] = (flat * mask).sum(0).reshape(stacked.shape[1:])
    return add_update(base, experts, update, scale)


@dataclass(frozen=True)
class TiesRule:
    """What implementations of TIES do differently.

    Attributes:
        whole_model: one trim over the flat vector of the whole model, not one per tensor.
        keep_threshold: entries as large as the largest one to be dropped are kept.
        keep_one: at least one entry of a tensor is kept.
        majority: entries that cancel take the sign of the majority of all entries, not plus.
        weighted_votes: task vectors are multiplied by their weights before signs are elected.
        divisor: agreeing entries are divided by their ``count``, ``weights`` or ``nothing``.
    """

    whole_model: bool = False
    keep_threshold: bool = False
    keep_one: bool = False
    majority: bool = False
    weighted_votes: bool = False
    divisor: str = "count"


TIES = {
    "authors": TiesRule(whole_model=True, keep_threshold=True, majority=True),
    "fusion_bench": TiesRule(
        whole_model=True, keep_threshold=True, majority=True, divisor="nothing"
    ),
    "mergekit": TiesRule(keep_one=True, weighted_votes=True, divisor="weights"),
    "peft": TiesRule(),
}


def _trim(vector: Tensor, density: float, rule: TiesRule) -> Tensor:
    """The largest entries of a vector (d,), the others zero."""
    dropped = len(vector) - max(int(len(vector) * density), 1 if rule.keep_one else 0)
    if dropped <= 0:
        return vector
    if rule.keep_threshold:
        return vector * (vector.abs() >= vector.abs().kthvalue(dropped).values)
    return vector.scatter(0, vector.abs().argsort(stable=True)[:dropped], 0.0)


def consensus(
    vectors: Tensor,
    rule: TiesRule,
    weights: Tensor | None = None,
    cancelled: Tensor | float = 1.0,
) -> Tensor:
    """Sign election and mean of the agreeing entries.

    Args:
        vectors: (K, d), trimmed.
        rule: whether votes are weighted, and what agreeing entries are divided by.
        weights: (K,), ones by default.
        cancelled: the sign of entries that cancel.
    Returns: (d,).
    """
    if weights is None:
        weights = torch.ones(len(vectors))
    weights = weights.to(vectors)[:, None]
    votes = vectors * weights if rule.weighted_votes else vectors
    sign = votes.sum(0).sign()
    sign = torch.where(sign == 0, cancelled, sign)
    agree = torch.where(sign > 0, votes > 0, votes < 0)
    total = (vectors * weights * agree).sum(0)
    if rule.divisor == "nothing":
        return total
    parts = (agree if rule.divisor == "count" else agree * weights).sum(0)
    return total / torch.where(parts == 0, 1.0, parts)


def ties(
    base,
    experts,
    calibration=None,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    semantics: str = "authors",
) -> Merge:
    """TIES (arXiv:2306.01708): trim each τ_k, elect a sign per entry, average what agrees.

    The merge is ``θ_0 + scale · τ``.

    Args:
        density: share of the entries that trimming leaves.
        semantics: whose TIES. ``authors``: one trim over the whole flat vector of a model, keeping
            entries not below the (d - ⌊d·density⌋)-th smallest magnitude; entries that cancel take
            the sign of the majority; mean over agreeing entries. ``fusion_bench``: their sum
            instead. ``mergekit``: ⌊d·density⌋ entries per tensor, at least one; τ_k times its
            weight before the election; divided by the agreeing weights. ``peft``: ⌊d·density⌋
            entries, election without weights, divided by the count.
        weights: of the experts, for ``mergekit`` and ``peft``.
    Raises: MergeError for options out of range, complex parameters, and experts that do not fit
        the base.
    """
    fraction("density", density, high=True)
    one_of("semantics", semantics, TIES)
    number("scale", scale)
    rule, experts = TIES[semantics], check_experts(base, experts)
    by_expert = None
    if weights is not None:
        given = numbers("ties weights", weights, len(experts))
        if rule.whole_model:
            raise MergeError(
                f"ties weights: expected none with semantics {semantics}, found "
                f"{given}; semantics mergekit and peft take weights"
            )
        by_expert = torch.tensor(given, dtype=torch.float64)
    vectors = _trimmed_vectors(base, experts, density, rule)
    cancelled: float | Tensor = 1.0
    if rule.majority:
        signs = [v.sum(0).sign().sum() for v in vectors.values()]
        cancelled = sum(signs, torch.zeros(())).sign()
    update, state = {}, base.state_dict()
    for name, flat in vectors.items():
        merged = consensus(flat, rule, by_expert, cancelled)
        update[name] = merged.view_as(state[name])
    return add_update(base, experts, update, scale)


def _trimmed_vectors(base, experts, density: float, rule: TiesRule) -> dict[str, Tensor]:
    """Name -> trimmed task vectors (K, d), in the order of names; tied parameters once."""
    updates, ties_of = differences(base, experts), tied(base)
    refuse_complex("ties", updates)
    vectors = {name: _flat(updates[name]) for name in sorted(updates) if ties_of[name][0] == name}
    together = rule.whole_model and vectors
    groups = [list(vectors)] if together else [[name] for name in vectors]
    for k in range(len(experts)):  # one by one and in place: a whole model's vectors are large
        for names in groups:
            whole = torch.cat([vectors[name][k] for name in names])
            sizes = [vectors[name].shape[1] for name in names]
            for name, piece in zip(names, _trim(whole, density, rule).split(sizes)):
                vectors[name][k] = piece
    return vectors


def della(
    base,
    experts,
    calibration=None,
    *,
    density: float = 0.5,
    spread: float = 0.15,
    scale: float = 1.0,
    rescale: str = "keep",
    seed: int = 0,
) -> Merge:
    """DELLA (arXiv:2406.11617): thinning at random by magnitude, sign election, mean.

    The probability of being kept rises with the rank of an entry within its row, from
    ``density - spread`` to ``density + spread``. Entries that agree in sign are averaged.

    Args:
        rescale: ``keep``: kept entries are divided by their probability; ``l1``: scaled together
            to the L1 norm of the tensor, as mergekit does.
    Raises: MergeError for options out of range, complex parameters, and experts that do not fit
        the base.
    """
    one_of("rescale", rescale, RESCALE)
    for name, value in {"density": density, "spread": spread, "scale": scale}.items():
        number(name, value)
    if not 0 < density - spread <= density + spread < 1:
        range_given = f"{density} ± {spread}"
        raise MergeError(f"della: expected density ± spread within (0, 1), found {range_given}")
    generator = seeded(seed)
    experts = check_experts(base, experts)
    vectors, update = differences(base, experts), {}
    refuse_complex("della", vectors)
    for name, stacked in sorted(vectors.items()):
        rows = stacked.flatten(1, -2) if stacked.dim() > 2 else stacked[:, None]
        ranks = rows.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
        chances = density - spread + 2 * spread * ranks / max(rows.shape[-1] - 1, 1)
        mask = torch.rand(chances.shape, generator=generator).to(chances) < chances
        thinned = [rescaled(r, m, p, rescale) for r, m, p in zip(rows, mask, chances)]
        update[name] = consensus(_flat(torch.stack(thinned)), TiesRule()).reshape(stacked.shape[1:])
    return add_update(base, experts, update, scale)
