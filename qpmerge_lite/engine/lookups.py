"""Tables that are called several times in a forward, by one module or by several with the same
weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .layouts import Layout, find_layout
from .lockstep import LeftOut
from .recording import Call, Recordings
from .views import Table, View

Lookup = tuple[
    str, Layout
]  # an argument of the model whose tokens a table looks up, and how they lie


def families(views: Mapping[str, View], state) -> dict[str, list[str]]:
    """Table -> the tables that hold its weights, itself among them."""
    by_weights: dict[int, list[str]] = {}
    for name, v in views.items():
        if isinstance(v, Table):
            by_weights.setdefault(state[v.parameters[0]].data_ptr(), []).append(name)
    return {name: family for family in by_weights.values() for name in family}


def calls_of(family: list[str], calls: list[Call]) -> list[Call]:
    """Calls of the tables of a family, in order."""
    return [call for call in calls if call.point[0] == "layer" and call.point[1] in family]


def later_lookups(
    table: Table, family: list[str], recorded: Recordings, padded: bool
) -> list[Lookup]:
    """What is looked up behind the first call, which is where forwards wait: tokens that are known
    before.

    Raises: LeftOut where they are not; MergeError where they cannot be matched to a mask.
    """
    ran = {
        name: calls_of(family, calls)
        for name, calls in recorded.named().items()
        if calls is not None
    }
    if len({len(calls) for calls in ran.values()}) > 1:
        raise LeftOut(
            table.name, "how often it is called in a forward depends on what the batch holds"
        )
    lookups = []
    for place in range(1, len(ran["some"])):
        arguments = frozenset.intersection(*(calls[place].arguments for calls in ran.values()))
        if not arguments:
            raise LeftOut(
                table.name,
                "called more than once in a forward, on tokens that no argument of the model holds",
            )

        shorter = {mask: _rows(table, ran, mask, place) for mask in recorded.shorter}
        rows, fewer = (_rows(table, ran, name, place) for name in ("some", "fewer"))
        if rows is None:
            raise LeftOut(table.name, "called without a tensor")
        layout = find_layout(
            table.name, rows, fewer, shorter, recorded.batch, padded=padded, table=True
        )
        lookups.append((min(arguments), layout))
    return lookups


def _rows(table: Table, ran: Mapping[str, list[Call]], recording: str, place: int) -> Tensor | None:
    """Rows (…, 1) of one of the calls of a recording, None where it has none."""
    read = ran[recording][place].read if recording in ran else None
    return None if read is None else table.rows(read)
