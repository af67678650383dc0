"""Digests of what a checkpoint is, whatever files it lies in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .comparison.fields import BOOKKEEPING
from .digests import sha256
from .folders import TOKENIZER, Checkpoint
from .headers import Entry, pieces


def of_weights(*parts: Checkpoint) -> str:
    """SHA-256 of all tensors of a checkpoint in the order of their names in its files: name, dtype,
    shape, bytes. How they are split into files does not count, nor what these say of themselves.

    Args:
        parts: the checkpoint, or its backbone and its head.

    Raises: Refused where a file cannot be read.
    """
    digest = hashlib.sha256()
    places: dict[str, tuple[Path, Entry]] = {}
    for header in [header for part in parts for header in part.headers.values()]:
        places |= {entry.name: (header.path, entry) for entry in header.entries.values()}
    for name in sorted(places):  # those that the files have
        path, entry = places[name]
        digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
        for piece in pieces(path, entry):
            digest.update(piece)
    return digest.hexdigest()


def of_config(checkpoint: Checkpoint) -> str:
    """SHA-256 of the fields of config.json that have to do with a forward, in the order of their
    names."""
    fields = {k: v for k, v in checkpoint.config.items() if k not in BOOKKEEPING}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def of_tokenizer(checkpoint: Checkpoint) -> str:
    """SHA-256 of the names and bytes of the tokenizer's files, in the order of their names."""
    files = {name: sha256(checkpoint.folder / name) for name in checkpoint.matching(TOKENIZER)}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
