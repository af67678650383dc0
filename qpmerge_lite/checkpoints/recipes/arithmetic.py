"""Merges of recipes, tensor by tensor, in mergekit's own arithmetic.

mergekit 0.1.5 subtracts, trims and sums in the dtype of the tensors, where this package's functions
compute in float64. In bfloat16 many entries of an update are equally large, and which of them a
trim keeps follows from the rounding; hence the same operations in the same dtypes here, so that a
recipe gives the weights that it gives there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from ...datafree import on_arc
from ...errors import MergeError
from ...experts import agreed, stored, wide
from ...merge import PIECE, Merge
from ...options import seeded
from ...sparse import TiesRule, consensus, rescaled
from ..folders import Checkpoint
from ..tensors import TYPES, read_tensors
from ..weights_only import located
from .plans import Plan
from .reading import Recipe
from .settings import TOGETHER, Rule

SMALLEST_DIVISOR = 1e-8  # of a sum of weights, below which it divides nothing
SMALLEST_LENGTH = 1e-6  # of Model Stock: products of lengths, and divisors that are not used


def recipe_merges(
    recipe: Recipe,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    plans: Mapping[str, Plan],
    seed: int,
    wanted: Collection[str],
) -> Iterator[Merge]:
    """One merge for every wanted tensor of the base, in the order in which mergekit draws random
    numbers: by name, and by model within a tensor.

    Args:
        plans: of every tensor.
        wanted: names of tensors, of all where random numbers are drawn; they may become fewer
            meanwhile.
        seed: of the random numbers, mergekit's ``--random-seed``.
    Raises: MergeError for weights that are not finite, or that the dtype cannot hold.
    """
    generator = seeded(seed)
    others = iter(experts)
    in_order = []
    for number, _ in enumerate(recipe.sources):
        in_order.append(base if number == recipe.base else next(others))
    sizes = {name: prod(entry.shape) for name, entry in base.entries.items()}
    begun: deque[tuple[str, Future[Tensor]]] = deque()
    threads = torch.get_num_threads()
    workers = recipe.rule.at_once(1, threads)

    def begin(name: str) -> Future[Tensor]:
        values = [read_tensors(checkpoint, [name])[name] for checkpoint in in_order]
        return pool.submit(_tensor, recipe, name, values, plans[name], generator)

    def end(name: str, merging: Future[Tensor]) -> Merge:
        try:
            return Merge({name: merging.result()})
        except MergeError as error:
            raise located(error, [base, *experts], [name]) from error

    with ThreadPoolExecutor(workers, "merge", torch.set_num_threads, [threads // workers]) as pool:
        for name in sorted(wanted):
            while begun and sizes[name] + sum(sizes[other] for other, _ in begun) > TOGETHER:
                yield end(*begun.popleft())
            begun.append((name, begin(name)))
        while begun:
            yield end(*begun.popleft())


def _tensor(
    recipe: Recipe, name: str, values: list[Tensor], plan: Plan, generator: torch.Generator
) -> Tensor:
    """One merged tensor (…) of the models' tensors, in their order; the list is emptied."""
    if not values[0].is_floating_point():
        return agreed(name, values)
    dtype = values[0].dtype if recipe.dtype is None else TYPES[recipe.dtype]
    values = [value.to(dtype) for value in values]
    if recipe.method == "linear":
        merged = linear(values, plan.own["weight"], bool(plan.common["normalize"]))
    elif len(values) == 1:
        merged = values[0]
    else:
        base, experts = values.pop(recipe.base), values
        merged = _on_base(recipe, base, experts, plan, generator)
    like = merged if recipe.out_dtype is None else torch.empty((), dtype=TYPES[recipe.out_dtype])
    return stored(f"tensor {name!r}", merged, like)


def _on_base(
    recipe: Recipe, base: Tensor, experts: list[Tensor], plan: Plan, generator: torch.Generator
) -> Tensor:
    """One merged tensor by a method that knows a base."""
    if recipe.method == "slerp":
        return on_arc(wide(base), wide(experts[0]), plan.common["t"]).to(base.dtype)
    if recipe.method == "model_stock":
        return model_stock(base, experts, bool(plan.common["filter_wise"]))
    return sparse(base, experts, recipe.rule, plan, generator)


def linear(values: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """``Σ_k w_k θ_k``, over ``Σ_k w_k`` if normalised; summed in float32 at least.

    Args:
        values: K tensors (…) of one dtype, in which the result is too.
    """
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    factors = torch.tensor(weights, dtype=dtype)
    divisor = factors.sum() if normalize else None
    merged = torch.empty_like(values[0], memory_format=torch.contiguous_format)
    flat = [tensor.reshape(-1).split(PIECE) for tensor in (merged, *values)]
    for piece, *parts in zip(*flat):
        total = torch.zeros(piece.shape, dtype=dtype)
        for part, factor in zip(parts, factors):
            total.addcmul_(part, factor)
        piece.copy_(total if divisor is None else total.div_(divisor))
    return merged


def model_stock(base: Tensor, experts: Sequence[Tensor], filter_wise: bool) -> Tensor:
    """``t · mean θ_k + (1 - t) θ_0`` with ``t = K cos φ / (1 + (K - 1) cos φ)``.

    cos φ is the mean cosine between updates, of the whole tensor or of its last axis if
    ``filter_wise``; the base stays where the divisor vanishes.

    Args:
        base: (…), in whose dtype all is computed.
        experts: K ≥ 2 tensors (…).
    """
    shape = base.shape if filter_wise else (base.numel(),)
    updates = [(expert - base).reshape(shape) for expert in experts]
    lengths = [torch.linalg.vector_norm(update, dim=-1) for update in updates]
    cosines = []
    for a, b in combinations(range(len(updates)), 2):
        product = (updates[a] * updates[b]).sum(dim=-1)
        divisor = (lengths[a] * lengths[b]).clamp(min=SMALLEST_LENGTH)
        cosines.append((product / divisor).clamp(-1, 1))
    cosine = torch.stack(cosines).mean(0).unsqueeze(-1)
    divisor = 1 + (len(experts) - 1) * cosine
    vanishes = divisor.abs() < SMALLEST_LENGTH
    ratio = len(experts) * cosine / torch.where(vanishes, 1.0, divisor)
    ratio = torch.where(vanishes, 0.0, ratio)
    mean = sum(experts[1:], experts[0]).reshape(shape) / len(experts)
    return (ratio * mean + (1 - ratio) * base.reshape(shape)).reshape(base.shape)


def sparse(
    base: Tensor, experts: list[Tensor], rule: Rule, plan: Plan, generator: torch.Generator
) -> Tensor:
    """``θ_0 + λ Σ_k w_k τ_k`` of thinned updates τ_k, over the sum of weights if normalised; both
    sums over the updates that have the elected sign, where the method elects one.

    Args:
        base: (…), in whose dtype all is computed.
        experts: K tensors (…); the list is emptied, as updates take their places.
        plan: of the tensor.
    """
    weights = torch.tensor(plan.own["weight"], dtype=base.dtype)
    updates: list[Tensor] = []
    while experts:
        updates.append(experts.pop(0) - base)  # not in place: a digest may still need the bytes
        updates.append(thinned(updates.pop(), rule, plan, len(updates), generator))
    if rule.elects:
        divisor = "weights" if plan.common["normalize"] else "nothing"
        how = TiesRule(weighted_votes=True, divisor=divisor)
        total = _elected(updates, how, weights)
    else:
        total = torch.stack(updates).mul_(weights.reshape(-1, *[1] * base.dim())).sum(0)
        parts = weights.sum()
        if plan.common["normalize"] and abs(float(parts)) >= SMALLEST_DIVISOR:
            total /= parts
    if plan.common["lambda"] != 1:
        total *= plan.common["lambda"]
    return base + total


def _elected(updates: Sequence[Tensor], how: TiesRule, weights: Tensor) -> Tensor:
    """:func:`consensus` of K updates (…) with weights (K,), piece by piece.

    In which order torch adds up numbers depends on where they stand among those that a processor
    takes together; so pieces begin at multiples of ``PIECE``, and none is shorter.
    """
    total = torch.empty_like(updates[0], memory_format=torch.contiguous_format)
    merged, *flat = (tensor.view(-1) for tensor in (total, *updates))
    starts = range(0, max(len(merged) - PIECE, 1), PIECE)
    for start, stop in zip(starts, [*starts[1:], len(merged)]):
        pieces = torch.stack([vector[start:stop] for vector in flat])
        merged[start:stop] = consensus(pieces, how, weights)
    return total


def thinned(update: Tensor, rule: Rule, plan: Plan, k: int, generator: torch.Generator) -> Tensor:
    """An update (…) of the k-th expert without the entries that a method drops, if it drops any."""
    if rule.thinning is None:
        return update
    density = plan.own["density"][k]
    if density == 1 or update.numel() == 0:
        return update
    if rule.thinning == "magnitude":
        mask = _largest(update, density)
    elif rule.thinning == "outliers":
        mask = _middling(update, density, plan.own["gamma"][k])
    elif rule.thinning == "random":
        chances = torch.full_like(update, density, dtype=_drawn_in(update))
        mask = torch.bernoulli(chances, generator=generator)
    elif density == 0:
        return torch.zeros_like(update)
    else:
        chances = _by_rank(update, density, plan.own["epsilon"][k])
        mask = torch.bernoulli(chances, generator=generator)
    rescale = "l1" if plan.common["rescale"] else "keep"
    return rescaled(update.to(mask.dtype), mask, 1.0, rescale).to(update.dtype)


def _drawn_in(update: Tensor) -> torch.dtype:
    """The dtype of probabilities: float32, or bfloat16 for updates in it."""
    return torch.bfloat16 if update.dtype == torch.bfloat16 else torch.float32


def _by_magnitude(update: Tensor, descending: bool) -> Tensor:
    """Places (d,) in a flattened update (…) by the magnitudes there, in single precision.

    Equally large ones come in no order but that of torch's sort, on which mergekit's masks hang
    too; so the whole tensor is sorted, its magnitudes where they are.
    """
    sizes = update.abs().reshape(-1).float()
    places = torch.empty(len(sizes), dtype=torch.int64)
    torch.sort(sizes, descending=descending, out=(sizes, places))
    return places


def _mask(update: Tensor, kept: Tensor) -> Tensor:
    """Ones at the places ``kept`` of the flattened update, in its shape and dtype."""
    mask = torch.zeros(update.numel(), dtype=update.dtype)
    mask[kept] = 1
    return mask.reshape(update.shape)


def _largest(update: Tensor, density: float) -> Tensor:
    """A mask of the ⌊density·d⌋ largest entries, of one at least if there is any density."""
    count = max(1, int(density * update.numel())) if density else 0
    return _mask(update, _by_magnitude(update, descending=True)[:count])


def _middling(update: Tensor, density: float, outliers: float) -> Tensor:
    """A mask without the ⌊outliers·d⌋ largest entries, or fewer, and without the smallest, so that
    ⌊density·d⌋ are left."""
    size = update.numel()
    count = int(density * size)
    first = max(0, size - count - int(outliers * size))
    return _mask(update, _by_magnitude(update, descending=False)[first : first + count])


def _by_rank(update: Tensor, density: float, spread: float) -> Tensor:
    """Probabilities of being kept, which rise with the rank along the second axis from ``density -
    spread`` to ``density + spread``."""
    rows = update if update.dim() > 1 else update.reshape(1, -1)
    ranks = rows.abs().argsort(dim=1).argsort(dim=1).to(_drawn_in(update)) + 1
    first, last = ranks.amin(1, keepdim=True), ranks.amax(1, keepdim=True)
    share = ((ranks - first) / (last - first).clamp(min=1)).clamp(0, 1)
    return ((density - spread) + share * 2 * spread).reshape(update.shape)
