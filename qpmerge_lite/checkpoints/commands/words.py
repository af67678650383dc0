"""Words of a command line as models, sources and values."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..deltas.reading import behind
from ..findings import Refused
from ..hub import reference_of
from ..methods import assignment


def named_folders(words: Sequence[str], kind: str = "expert") -> dict[str, Path]:
    """Experts, or other models, of the command line: name -> folder, in their order.

    Args:
        words: folders or references, which give their own name, or ``NAME=FOLDER``.
        kind: what they are, for messages.
    Raises: Refused for a name that is there twice.
    """
    experts: dict[str, Path] = {}
    for word in words:
        name, equals, place = word.partition("=")
        is_bare = behind(word) is not None or "/" in name or Path(word).exists()
        if is_bare or not (equals and name and place):
            name, place = _own_name(word), word
        if name in experts:
            expected = f"{kind}s with names of their own"
            cure = "give names, such as first=FOLDER second=FOLDER"
            raise Refused(f"{kind} {name!r}", expected, "two of that name", cure)
        experts[name] = Path(place)
    return experts


def _own_name(word: str) -> str:
    """What an expert is called that was not given a name."""
    differences = behind(word)
    reference = reference_of(differences or word)
    if reference:
        return reference.name
    return Path(word).resolve().name if differences is None else differences.resolve().stem


def columns(words: Sequence[str]) -> dict[str, list[str]]:
    """Name -> fields, of ``--column NAME=FIELD`` or ``NAME=FIELD,FIELD``."""
    fields = pairs(words, "--column", "french=sentence")
    return {name: given.split(",") for name, given in fields.items()}


def talks(arguments) -> bool:
    """Whether a verb tells in words what it has done."""
    return not (arguments.quiet or arguments.json)


def shows_progress(arguments) -> bool:
    """Whether a verb that talks does so to a terminal."""
    return talks(arguments) and sys.stderr.isatty()


def pairs(words: Sequence[str], option: str, example: str) -> dict[str, str]:
    """``NAME=VALUE`` of an option that may be there several times."""
    pairs: dict[str, str] = {}
    for word in words:
        name, value = assignment(word, option, example)
        if name in pairs:
            raise Refused(option, f"{name!r} once", "it twice", "leave one of them out")
        pairs[name] = value
    return pairs
