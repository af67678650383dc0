r"""State dicts in, one state dict out: what every method does with the weights of base and experts.

Parameters are merged by a method. Floating buffers, such as running means and variances, are
always averaged. Entries that are no numbers to average (codes, counters, masks) are the experts'.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .aliases import as_loaded, tied
from .errors import is_finite
from .experts import State, agreed, check_experts, equal, is_number, stored, wide
from .options import number

PIECE = 1 << 15  # numbers averaged at a time: in the caches, and not worth a second thread
AVERAGED_BUFFER = "a buffer, which no method changes: the mean of the experts'"


@dataclass
class Merge:
    """A merged model and how it came about.

    Attributes:
        state_dict: every entry of the base's state dict, in its shape, dtype and device.
        table: one row per merged layer, where the method has something to say about layers.
        averaged: name of every floating entry that was plainly averaged -> the reason.
    """

    state_dict: dict[str, Tensor]
    table: list[dict] = field(default_factory=list)
    averaged: dict[str, str] = field(default_factory=dict)

    def model(self, base: nn.Module) -> nn.Module:
        """A copy of ``base`` with the merged weights."""
        merged = copy.deepcopy(base)
        merged.load_state_dict(self.state_dict)
        return merged


def buffers_of(base: nn.Module) -> set[str]:
    """Names of the floating and complex buffers in the base's state dict."""
    buffers = {name for name, _ in base.named_buffers(remove_duplicate=False)}
    state = base.state_dict()
    return {name for name, value in state.items() if name in buffers and is_number(value)}


def parameters_of(base: nn.Module) -> set[str]:
    """Names of the floating and complex entries of the base's state dict that are no buffers.

    A parameter with several names (tied weights) is there under each of them.
    """
    numbers = {name for name, value in base.state_dict().items() if is_number(value)}
    return numbers - buffers_of(base)


def average(
    base: nn.Module, experts: Mapping[str, State], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Weighted mean of the experts, in float64, returned in the base's dtypes.

    Parameters are weighted; floating buffers are averaged evenly; of what is no number to average,
    the value that all experts have, of counters the largest.
    Values that all experts share come back bit for bit if the weights sum to one.

    Args:
        experts: as :func:`check_experts` returns them.
        weights: one per expert, 1/K each by default.
    Raises: NonFinite for a mean that the base's dtype cannot hold.
    """
    even = [1 / len(experts)] * len(experts)
    weights = even if weights is None else weights
    parameters = parameters_of(base)
    merged = {}
    for name, like in base.state_dict().items():
        values = [state[name] for state in experts.values()]
        merged[name] = _mean(name, values, weights if name in parameters else even, like)
    return as_loaded(base, merged)


def _mean(name: str, values: list[Tensor], weights: Sequence[float], like: Tensor) -> Tensor:
    """Weighted mean of an entry; what is no number is taken from the experts."""
    first = values[0]
    if not is_number(like):
        return agreed(name, values).to(like, copy=True)
    affine = abs(sum(weights) - 1) <= 1e-9
    alike = affine and all(equal(first, other) for other in values[1:])
    if alike and not is_finite(first):  # checked: as in the base
        return first.to(like, copy=True)
    mean = torch.empty_like(first, dtype=like.dtype, device=like.device)
    tensors = [mean, *values]
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = [tensor.view(-1) for tensor in tensors]
    for piece, *parts in zip(*(tensor.split(PIECE) for tensor in tensors)):
        piece.copy_(stored(f"parameter {name!r}", _mean_of_piece(parts, weights, affine), like))
    return mean


def _mean_of_piece(values: list[Tensor], weights: Sequence[float], affine: bool) -> Tensor:
    """Weighted mean (…) of some numbers of an entry, in double precision; ``affine`` weights sum to
    one."""
    mean = torch.zeros_like(wide(values[0]))
    for weight, value in zip(weights, values):
        mean += weight * wide(value)
    return torch.where(_shared(values), wide(values[0]), mean) if affine else mean


def _shared(values: list[Tensor]) -> Tensor:
    """Where all tensors have one value: boolean, of their shape."""
    first = values[0]
    shared = torch.ones_like(first, dtype=torch.bool)
    for other in values[1:]:
        alike = other.dtype == first.dtype and first.itemsize > 1
        shared &= other == first if alike else wide(other) == wide(first)
    return shared


def task_vectors(base: nn.Module, experts: Mapping[str, State]) -> dict[str, Tensor]:
    """Updates ``τ_k = θ_k - θ_0`` of every parameter by experts, which are checked: name -> (K, …),
    float64 or complex128.

    Raises: what :func:`check_experts` raises.
    """
    return differences(base, check_experts(base, experts))


class Computed(Mapping[str, Tensor]):
    """Tensors by name that are computed whenever they are asked for, and not kept.

    Args:
        names: in the order of the mapping. compute: from a name to its tensor (…).
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]):
        self._names, self._compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def differences(base: nn.Module, experts: Mapping[str, State]) -> dict[str, Tensor]:
    r"""Updates ``τ_k = θ_k - θ_0`` of every parameter: name -> (K, …), float64 or complex128.

    A parameter without axes has (K,), a tied one is there under each of its names, and buffers
    have no updates.

    Args:
        experts: as :func:`check_experts` returns them.
    """
    return dict(differences_one_by_one(base, experts))


def differences_one_by_one(base: nn.Module, experts: Mapping[str, State]) -> Computed:
    """The same as :func:`differences`, of which one is in memory at a time."""
    parameters, state = parameters_of(base), base.state_dict()

    def difference(name: str) -> Tensor:
        stacked = torch.stack([wide(expert[name]) for expert in experts.values()])
        if is_finite(state[name]):
            return stacked - wide(state[name])
        # checked: all experts have the base's values, so that nothing changes
        return torch.zeros_like(stacked)

    return Computed([name for name in state if name in parameters], difference)


def add_update(
    base: nn.Module,
    experts: Mapping[str, State],
    update: Mapping[str, Tensor],
    scale: float = 1.0,
) -> Merge:
    """The base plus ``scale`` times an update of its parameters.

    Buffers are the experts' mean, counters and codes the experts'. Tied parameters get the
    update of the first of their names that has one, so that they stay tied; so do parameters that
    share memory otherwise, as a matrix and its transpose. Parameters without an update stay the
    base's.

    Args:
        experts: as :func:`check_experts` returns them.
        update: parameter name -> tensor (…) of its shape, float64 or complex128. Each is asked for
            once.
    Raises: MergeError for a scale that is no number; NonFinite for weights that are not finite, or
        that the base's dtype cannot hold.
    """
    scale = number("scale", scale)
    parameters, ties = parameters_of(base), tied(base)
    even = [1 / len(experts)] * len(experts)
    merged, averaged = {}, {}
    updated: dict[str, str] = {}  # name of an update -> the parameter that it was added to
    for name, origin in base.state_dict().items():
        source = next((n for n in ties[name] if n in update), None)
        if name not in parameters:
            values = [state[name] for state in experts.values()]
            merged[name] = _mean(name, values, even, origin)
            if is_number(origin):
                averaged[name] = AVERAGED_BUFFER
        elif source is None or not is_finite(origin):
            merged[name] = origin.clone()
        elif source in updated:  # of a parameter with several names
            merged[name] = merged[updated[source]].clone()
        else:
            value = wide(origin) + scale * update[source]
            merged[name] = stored(f"parameter {name!r}", value, origin)
            updated[source] = name
    return Merge(as_loaded(base, merged), averaged=averaged)
