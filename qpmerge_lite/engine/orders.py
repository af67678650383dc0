"""The order in which forwards come to layers, and to the borders of blocks."""

from __future__ import annotations

from torch import nn

Point = tuple[str, str]  # "layer", "enter" or "leave", and the path of a module


def insert(sequence: list[Point], points: list[Point]) -> None:
    """Add points to a sequence, each behind the one that comes before it."""
    place = 0
    for point in points:
        if point not in sequence:
            sequence.insert(place, point)
        place = sequence.index(point) + 1


def place_the_rest(sequence: list[Point], model: nn.Module, layers, blocks) -> None:
    """Put layers and borders of blocks that were not called behind what comes before them in the
    model."""
    place, opened = 0, []

    def put(point):
        nonlocal place
        if point not in sequence:
            sequence.insert(place, point)
        place = sequence.index(point) + 1

    for name, _ in model.named_modules():
        while opened and not name.startswith(f"{opened[-1]}."):
            put(("leave", opened.pop()))
        if name in blocks and ("enter", name) not in sequence:
            put(("enter", name))
            opened.append(name)
        if name in layers:
            put(("layer", name))
    for name in reversed(opened):
        put(("leave", name))


def predecessors(orders: list[list[Point]]) -> dict[Point, set[Point]]:
    """For every point, those that come before it in some of the orders, or before one of these;
    itself where orders disagree."""
    found: dict[Point, set[Point]] = {point: set() for order in orders for point in order}
    for order in orders:
        for place, point in enumerate(order):
            found[point].update(order[:place])
    for between in found:
        for earlier in found.values():
            if between in earlier:
                earlier |= found[between]
    return found


def sort(sequence: list[Point], earlier: dict[Point, set[Point]]) -> None:
    """Put each point behind its predecessors, where orders agree; points without an entry stay in
    their places."""
    ranked = iter(
        sorted(
            (point for point in sequence if point in earlier), key=lambda point: len(earlier[point])
        )
    )
    sequence[:] = [next(ranked) if point in earlier else point for point in sequence]
