"""The command ``qpmerge``."""

import argparse
import sys
from importlib.util import find_spec

from . import __version__
from .checkpoints.arguments import add_verbs
from .checkpoints.commands.running import run_command
from .checkpoints.completion.scripts import add_completion

MODULE = f"""qpmerge-lite {__version__}, the module. It merges checkpoints, or from Python:

    from qpmerge_lite import qp
    merge = qp(base, experts, calibration)
    model = merge.model(base)

    help(qpmerge_lite)    what else it exports
    help(qp)              what a merge takes and gives back
"""
REPOSITORY = "the commands for the book and its data come with the repository, not with the module"
THERE = "in a clone of it, `make book` makes an environment that has them, as .venv/bin/qpmerge"
OF_THE_REPOSITORY = ("book", "data")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its verbs for the book and its data are those of the repository. Returns the
    exit status: 0 done, 1 refused, 2 wrong usage."""
    if find_spec("qpmerge_lite.companion") is not None:
        from .companion.cli import main as run

        return run(arguments)
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in OF_THE_REPOSITORY:
        print(f"qpmerge: {REPOSITORY}; {THERE}", file=sys.stderr)
        return 2
    if not arguments:
        parser().print_help()
        return 0
    return run_command(parser(), arguments)


def parser() -> argparse.ArgumentParser:
    """The command line of the module alone."""
    top = argparse.ArgumentParser(
        prog="qpmerge",
        description=MODULE,
        epilog=f"{REPOSITORY[0].upper()}{REPOSITORY[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = top.add_subparsers(required=True)
    add_verbs(groups)
    add_completion(top, groups)
    return top


if __name__ == "__main__":
    sys.exit(main())
