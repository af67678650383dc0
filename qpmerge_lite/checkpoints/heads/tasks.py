"""What a configuration says of a checkpoint's task: its class, and its labels."""

from __future__ import annotations

from collections.abc import Mapping

from ..findings import Refused
from ..folders import CONFIG, Checkpoint

# what names of classes say of heads that belong to a task; a language model's is none of them
TASKS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
    "ForMultipleChoice",
    "ForQuestionAnswering",
)


def has_task(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of a class for a task, by its configuration."""
    return any(task in class_named(checkpoint.config) for task in TASKS)


def class_named(config: Mapping) -> str:
    """The class of transformers that a configuration names first; empty where it names none, or
    what is no name."""
    named = config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    return first if first.isidentifier() else ""


def labels_of(checkpoint: Checkpoint) -> dict[int, str]:
    """Number of a class -> its label, as a configuration has them or transformers by default.

    Raises: Refused where the configuration has something else there.
    """
    named = checkpoint.config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    is_mapping = isinstance(named, dict) and all(map(str.isdecimal, named))
    if not is_mapping or {*map(int, named)} != {*range(len(named))}:
        where, cure = f"{checkpoint.folder / CONFIG}, id2label", "write it so"
        raise Refused(where, "numbers from 0 on and their labels", f"{named!r:.80}", cure)
    return {int(number): str(label) for number, label in named.items()}


def numbers_of_labels(checkpoint: Checkpoint) -> dict[str, int]:
    """Label -> number of its class, by ``id2label`` and ``label2id``.

    Raises: Refused as :func:`labels_of`.
    """
    labels, given = labels_of(checkpoint), checkpoint.config.get("label2id")
    numbers = {label: number for number, label in labels.items()}
    if isinstance(given, dict):
        numbers |= {str(label): number for label, number in given.items() if number in labels}
    return numbers
