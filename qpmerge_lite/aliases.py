r"""Entries of a state dict that share memory: tied ones are one tensor, others see it in another
shape or order, as a transpose does."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn


def tied(base: nn.Module) -> dict[str, list[str]]:
    """Name of every state-dict entry -> names of all that are the same tensor, itself included."""
    groups: dict[Hashable, list[str]] = {}
    state = base.state_dict()
    for name, value in state.items():
        place: Hashable = name
        if _has_memory(value):
            place = value.device, value.data_ptr(), value.shape, value.stride()
        groups.setdefault(place, []).append(name)
    names_by_entry = {name: names for names in groups.values() for name in names}
    return {name: names_by_entry[name] for name in state}


def sharing(base: nn.Module) -> list[list[str]]:
    """Names of state-dict entries whose memory overlaps, tied or not, in the order of the state
    dict: one list for every such memory."""
    state = base.state_dict()
    spans = []
    for place, value in enumerate(state.values()):
        if _has_memory(value):
            kind, start = (str(value.device), str(value.dtype)), value.data_ptr()
            spans.append((kind, start, start + _extent(value) * value.element_size(), place))
    groups: list[list[int]] = []
    kind_before, end = None, 0
    for kind, start, stop, place in sorted(spans):
        if kind == kind_before and start < end:
            groups[-1].append(place)
            end = max(end, stop)
        else:
            groups.append([place])
            kind_before, end = kind, stop
    names = list(state)
    overlapping = (sorted(group) for group in groups if len(group) > 1)
    return [list(map(names.__getitem__, group)) for group in overlapping]


def as_loaded(base: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values that the base would hold: memory that several entries see in different ways has
    those of the first of them.

    Args:
        state: every entry of the base's state dict, name -> (…).
    """
    loaded, reference = dict(state), base.state_dict()
    for names in sharing(base):
        views = {name: reference[name] for name in names}
        if len({(v.data_ptr(), v.shape, v.stride()) for v in views.values()}) == 1:
            continue  # tied
        start = min(v.data_ptr() for v in views.values())
        places = {name: _places(v, start) for name, v in views.items()}
        memory = _widened(state[names[0]]).new_zeros(1 + max(int(p.max()) for p in places.values()))
        for name in reversed(names):
            memory[places[name]] = _widened(state[name])
        loaded |= {name: memory[p].to(state[name]) for name, p in places.items()}
    return loaded


def _has_memory(value: Tensor) -> bool:
    return value.numel() > 0 and value.device.type != "meta"


def _extent(value: Tensor) -> int:
    """Elements from the first to behind the last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))


def _places(value: Tensor, start: int) -> Tensor:
    """Where in memory every element is, counted in elements from the address ``start``; of the
    value's shape."""
    inside = torch.arange(_extent(value), device=value.device).as_strided(
        value.shape, value.stride()
    )
    return inside + (value.data_ptr() - start) // value.element_size()


def _widened(value: Tensor) -> Tensor:
    return value.detach().double() if value.is_floating_point() else value.detach()
