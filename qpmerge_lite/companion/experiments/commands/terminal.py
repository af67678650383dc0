"""Commands in processes of their own, shown as a terminal shows them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import wrap

from ....checkpoints.findings import size
from ....errors import MergeError

WIDTH = 84  # letters of a line of the page
PROGRAMS = {"qpmerge": [sys.executable, "-m", "qpmerge_lite"], "python": [sys.executable]}
VERBS = "qpmerge_lite.checkpoints.arguments"  # what runs: named, so that chapters hang on it
INDENT = "\n  "  # before what goes on a sentence, in what commands say
REFUSED = 1  # exit status of a command that said why it does nothing


def run(place: Path, command: str, *, refused: bool = False) -> str:
    """Run a command in a folder, print it with what it says, and return what it says.

    Args:
        command: as in a shell, of ``qpmerge`` or ``python``; any white space parts its words.
        refused: whether the command is to be refused.
    Raises: MergeError where a command fails that is not to be refused, or the other way round.
    """
    program, *words = shlex.split(command)
    line = [*PROGRAMS[program], *words]
    done = subprocess.run(line, cwd=place, capture_output=True, text=True, encoding="utf-8")
    if done.returncode != (REFUSED if refused else 0):
        expected = "a refusal" if refused else "success"
        raise MergeError(
            f"{shown(command)}\nexpected {expected}, found exit status {done.returncode}: "
            f"{done.stderr}"
        )
    said = done.stdout + (done.stderr if refused else "")
    print(f"\n{shown(command)}\n{folded(said)}")
    return said


def shown(command: str) -> str:
    """A command behind a prompt, in lines that fit, each but the last one with a backslash; an
    option stays with its value."""
    lines = ["$"]
    for part in re.split(r"\s+(?=--)", command):
        words = " ".join(part.split())
        if lines != ["$"] and len(lines[-1]) + len(words) > WIDTH - 3:
            lines.append("   ")
        lines[-1] += f" {words}"
    return " \\\n".join(lines)


def folded(said: str) -> str:
    """What a command says, with the lines folded that are too long for the page; sentences that it
    folded for a wider terminal are folded anew."""
    lines = []
    for line in said.replace(INDENT, " ").splitlines():
        parts = wrap(line, WIDTH, subsequent_indent=INDENT[1:], break_on_hyphens=False)
        lines += parts if len(line) > WIDTH else [line]
    return "\n".join(lines)


def files(place: Path, pattern: str) -> str:
    """Names and sizes of the files in a folder that fit a pattern, a line each."""
    paths = sorted(path for path in place.glob(pattern) if path.is_file())
    lines = [f"{path.relative_to(place)}  {size(path.stat().st_size)}" for path in paths]
    return "\n".join(lines)
