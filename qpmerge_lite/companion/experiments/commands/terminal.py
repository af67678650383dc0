"""Commands in processes of their own, shown as a terminal shows them.

Those of ``qpmerge`` are forked from one that has imported torch and transformers, which would take
longer than most commands.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from runpy import run_module
from textwrap import wrap
from typing import NamedTuple

from ....checkpoints.findings import size
from ....errors import MergeError

WIDTH = 84  # letters of a line of the page
QPMERGE, PACKAGE = "qpmerge", __name__.partition(".")[0]
PROGRAMS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
}
IMPORTED = [
    __name__,
    f"{PACKAGE}.companion.cli",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
]
VERBS = "qpmerge_lite.checkpoints.arguments"  # what runs: named, so that chapters hang on it
INDENT = "\n  "  # before what goes on a sentence, in what commands say
REFUSED = 1  # exit status of a command that said why it does nothing


def run(place: Path, command: str, *, refused: bool = False) -> str:
    """Run a command in a folder, print it with what it says, and return what it says.

    Args:
        command: as in a shell, of ``qpmerge``, ``python`` or ``torchrun``; any white space parts
            its words.
        refused: whether the command is to be refused.
    Raises: MergeError where a command fails that is not to be refused, or the other way round.
    """
    program, *words = shlex.split(command)
    done = _forked(place, words) if program == QPMERGE else _started(place, program, words)
    if done.status != (REFUSED if refused else 0):
        expected = "a refusal" if refused else "success"
        raise MergeError(
            f"{shown(command)}\nexpected {expected}, found exit status {done.status}: "
            f"{done.complaints}"
        )
    said = done.output + (done.complaints if refused else "")
    print(f"\n{shown(command)}\n{folded(said)}")
    return said


class _Done(NamedTuple):
    """What a command has left: its exit status, what it printed, and what it complained of."""

    status: int | None
    output: str
    complaints: str


def _started(place: Path, program: str, words: list[str]) -> _Done:
    """A program in a process that imports everything anew."""
    line = [*PROGRAMS[program], *words]
    done = subprocess.run(line, cwd=place, capture_output=True, text=True, encoding="utf-8")
    return _Done(done.returncode, done.stdout, done.stderr)


def _forked(place: Path, words: list[str]) -> _Done:
    """A command of ``qpmerge`` in a process that is forked for it."""
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder) / "output", Path(folder) / "complaints"
        process = _server().Process(target=_carry_out, args=(place, words, *streams))
        process.start()
        process.join()
        said = [path.read_text(encoding="utf-8") for path in streams]
        return _Done(process.exitcode, *said)


@cache
def _server() -> ForkServerContext:
    """What forks processes that have imported ``IMPORTED``; it is started by the first of them."""
    server = get_context("forkserver")
    server.set_forkserver_preload(IMPORTED)
    return server


def _carry_out(place: Path, words: list[str], output: Path, complaints: Path) -> None:
    """Run a command of ``qpmerge`` in a folder; both streams go to files."""
    os.chdir(place)
    sys.argv = [QPMERGE, *words]
    with (
        output.open("w", encoding="utf-8") as printed,
        complaints.open("w", encoding="utf-8") as complained,
        redirect_stdout(printed),
        redirect_stderr(complained),
    ):
        run_module(PACKAGE, run_name="__main__")


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
