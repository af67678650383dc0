"""``qpmerge completion``: a script that completes verbs, options, methods, folders and files.

It is made of the ``argparse`` parser by shtab, once: to complete a word, a shell then asks neither
Python nor this package.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..arguments import add_verb
from ..calibration.records import require
from ..manuals import COMPLETION, COMPLETION_MORE
from ..methods import METHODS

SHELLS = ("bash", "zsh")
FOLDERS = ("base", "merged", "model")  # arguments that are folders
FILES = ("config", "out", "report")  # or folders
NAMED = ("experts", "expert", "calibration", "moments")  # files behind NAME= or delta:, too
# functions of the script: what fits a word, and, for zsh, files behind signs that end words of bash
AMONG, BEHIND = "_qpmerge_methods", "_qpmerge_named_files"
BEHIND_SIGNS = f"{BEHIND}() {{\n  compset -P '*='\n  compset -P 'delta:'\n  _files\n}}"


def add_completion(top: argparse.ArgumentParser, groups) -> None:
    """Add the verb to the subcommands of a parser.

    Args:
        top: the parser whose script it prints. groups: its subcommands.
    """

    def print_script(arguments) -> int:
        print(script(top, arguments.shell))
        return 0

    about = "print a script that completes this command in a shell"
    verb = add_verb(groups, "completion", print_script, about, COMPLETION, COMPLETION_MORE)
    verb.add_argument("shell", choices=SHELLS, help="the shell that is to complete")


def script(top: argparse.ArgumentParser, shell: str) -> str:
    """The script of a parser for a shell, one of ``SHELLS``.

    Raises: Refused where shtab is not installed.
    """
    otherwise = "do without: completion changes nothing else"
    require("shtab", "which writes such scripts", otherwise, extra="completion")
    import shtab

    for action in _actions(top):
        if action.dest == "method":
            action.complete = _among(METHODS)  # type: ignore[attr-defined]
        elif action.dest in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in NAMED:
            named = {"zsh": BEHIND, "preamble": {"zsh": BEHIND_SIGNS}}
            action.complete = shtab.FILE | named  # type: ignore[attr-defined]
    written = shtab.complete(top, shell)
    # where an argument may be there several times, shtab has zsh complete the first of them alone
    return written.replace('"(*):', '"*:') if shell == "zsh" else written


def _among(words) -> dict:
    """How shtab is told to complete one of these words: for bash by a function, as their being
    choices of the parser would have it refuse others in words of its own."""
    listed = " ".join(words)
    function = f'{AMONG}() {{\n  compgen -W "{listed}" -- "$1"\n}}'
    return {"bash": AMONG, "zsh": f"({listed})", "preamble": {"bash": function}}


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)
