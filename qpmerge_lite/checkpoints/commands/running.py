"""A command line, from its words to its exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ...errors import MergeError
from ..processes.joining import Party, launch_of, silent_unless_first
from ..stops import Terminated, status_of, told_to_stop
from .merging import run_merge

UNREAD = 128 + 13  # the exit status of a process that SIGPIPE ends


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse a command line, by default that of the process, and run the ``command`` that it sets.

    Of several processes that a launcher has started, all run a merge, and the first alone runs
    everything else; it alone prints, and all end alike.

    Returns: the exit status: 0 done, 1 refused or failed, 130 or 143 stopped, 141 where nobody
        reads on what is printed; ``argparse`` leaves with 2 at wrong usage.
    """
    launch = launch_of(os.environ)
    with silent_unless_first(launch):
        parsed = parser.parse_args(arguments)
        parsed.party = Party(launch)
        return _status(parsed)


def _status(parsed) -> int:
    """Run the command of a command line; its exit status."""
    party = parsed.party
    try:
        with told_to_stop():
            party.join()
            has_work = party.number == 0 or parsed.command is run_merge
            status = party.ended(parsed.command(parsed) if has_work else 0)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # as of ``qpmerge … | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left of it
        return UNREAD
    except MergeError as error:
        party.tell(_with_notes(f"qpmerge: {error}", error))
        return 1
    except KeyboardInterrupt as stop:
        if party.count > 1 and isinstance(stop, Terminated):
            stop.add_note("launchers such as torchrun end all processes where one is lost")
        if party.number == 0 or isinstance(stop, Terminated):  # Ctrl-C comes to all
            party.tell(_with_notes("qpmerge: stopped", stop))
        return status_of(stop)
    finally:
        party.leave()  # the others see it, and should be told why before


def _with_notes(words: str, error: BaseException) -> str:
    """What is said of an error, with what was kept."""
    return "; ".join([words, *getattr(error, "__notes__", [])])
