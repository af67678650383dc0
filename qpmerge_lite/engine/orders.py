"""The order in which forwards come to layers, and to the borders of blocks."""

from __future__ import annotations

from torch import nn

Point = tuple[str, str]  # "layer", "enter" or "leave", and the path of a module


def insert(sequence: list[Point], points: list[Point]) -> None:
    """Add points to a sequence, in place, each behind the one that comes before it."""
    place = 0
    for point in points:
        if point not in sequence:
            sequence.insert(place, point)
        place = sequence.index(point) + 1


def place_the_rest(sequence: list[Point], model: nn.Module, layers, blocks) -> None:
    """Add layers and borders of blocks that were not called to a sequence, in place, behind what
    comes before them in the model."""
    points, opened = list[Point](), list[str]()
    for name, _ in model.named_modules():
        while opened and not name.startswith(f"{opened[-1]}."):
            points.append(("leave", opened.pop()))
        if name in blocks and ("enter", name) not in sequence:
            points.append(("enter", name))
            opened.append(name)
        if name in layers:
            points.append(("layer", name))
    points += [("leave", name) for name in reversed(opened)]
    insert(sequence, points)


def predecessors(orders: list[list[Point]]) -> dict[Point, set[Point]]:
    """For every point, those that come before it in some of the orders, or before one of these;
    itself where orders disagree."""
    earlier: dict[Point, set[Point]] = {point: set() for order in orders for point in order}
    for order in orders:
        for place, point in enumerate(order):
            earlier[point].update(order[:place])
    for between in earlier:
        for before in earlier.values():
            if between in before:
                before |= earlier[between]
    return earlier


def sort(sequence: list[Point], earlier: dict[Point, set[Point]]) -> None:
    """Put each point of a sequence, in place, behind its predecessors, where orders agree; points
    without an entry stay in their places."""
    ordered = [point for point in sequence if point in earlier]
    ranked = iter(sorted(ordered, key=lambda point: len(earlier[point])))
    sequence[:] = [next(ranked) if point in earlier else point for point in sequence]
