"""Labels of rows as numbers of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..calibration.sources import Row
from ..findings import Refused, shortened

SHOWN = 8  # names of labels in a message


def classes_of(rows: Sequence[Row], numbers: Mapping[str, int], task: str) -> list[int]:
    """The class of every row.

    Args:
        rows: each with its ``label``, which is a label's name or the number of its class.
        numbers: name of a label -> number of its class, by the model's configuration.
        task: for messages.
    Raises: Refused naming the row whose label is neither.
    """
    return [_class_of(row, numbers, task) for row in rows]


def _class_of(row: Row, numbers: Mapping[str, int], task: str) -> int:
    label, known = row.label, {*numbers.values()}
    if isinstance(label, str) and label in numbers:
        return numbers[label]
    if isinstance(label, str) and label.isdecimal():  # as the name of a folder
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool) and label in known:
        return label
    names = shortened(numbers, SHOWN)
    expected = f"a number below {len(known)}, or one of the labels {names}"
    cure = f"correct it, or say which field has the labels: --label {task}=FIELD"
    raise Refused(row.where, expected, repr(row.label), cure)
