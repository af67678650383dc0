"""Heads in the folder of a merge: ``heads/NAME/`` beside the merged backbone.

Each has the expert's config.json, its tokenizer or processor where that is not the base's, and the
head's tensors alone, in a file that nothing takes for a whole model.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ...errors import NonFinite, is_finite
from ..compatibility import Report
from ..digests import sha256
from ..folders import CONFIG, PROCESSOR, TOKENIZER, Checkpoint
from ..output import write_json
from ..tensors import read_tensors
from .adapted import AdapterHead
from .card import FOLDER, WEIGHTS
from .tasks import class_named, labels_of

READERS = (*TOKENIZER, *PROCESSOR)


def write_heads(report: Report, merged: Path) -> dict[str, dict]:
    """Write every expert's own head into the folder of a merge.

    Args:
        report: on checkpoints that fit; ``merged``: the folder, which has no heads yet.
    Returns: expert's name -> its file and that file's SHA-256, class, labels and tensors.
    Raises: NonFinite for tensors that are not finite.
    """
    from safetensors.torch import save_file

    told = {}
    for name, head in report.heads.items():
        folder = merged / FOLDER / name
        folder.mkdir(parents=True)
        tensors = read_tensors(head, head.entries)
        for key, value in tensors.items():
            if not is_finite(value):
                where = f"{head.folder}, tensor {key!r}"
                raise NonFinite(where, value, "the checkpoint is damaged")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        if isinstance(head, AdapterHead):
            write_json(folder / CONFIG, head.config)
        else:
            shutil.copyfile(head.folder / CONFIG, folder / CONFIG)
        for file in _own_readers(report.base, head):
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(head.folder / file, folder / file)
        told[name] = {
            "file": f"{FOLDER}/{name}/{WEIGHTS}",
            "sha256": sha256(folder / WEIGHTS),
            "class": class_named(head.config),
            "labels": labels_of(head),
            "tensors": list(tensors),
            "replaced": _replaced(report.base, head),
        }
    return told


def _own_readers(base: Checkpoint, head: Checkpoint) -> list[str]:
    """An expert's files of its tokenizer and processor: all of them where one is not the base's."""
    own, of_base = head.matching(READERS), base.matching(READERS)
    for name in own:
        if name not in of_base or sha256(head.folder / name) != sha256(base.folder / name):
            return own
    return []


def _replaced(base: Checkpoint, head: Checkpoint) -> list[str]:
    """Tensors of a head that the base has too, in another shape."""
    entries = base.entries
    same = {name: entry for name, entry in head.entries.items() if name in entries}
    return [name for name, entry in same.items() if entry.shape != entries[name].shape]
