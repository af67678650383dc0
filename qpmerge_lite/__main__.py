"""The command ``qpmerge``."""

import sys
from importlib.util import find_spec

from . import __version__

MODULE = f"""qpmerge-lite {__version__}, the module. To be used from Python:

    from qpmerge_lite import qp
    merge = qp(base, experts, calibration)
    model = merge.model(base)

    help(qpmerge_lite)    what else it exports
    help(qp)              what a merge takes and gives back
"""
REPOSITORY = "the commands for the book and its data come with the repository, not with the module"
THERE = "in a clone of it, `make book` makes an environment that has them, as .venv/bin/qpmerge"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its verbs for the book and its data are those of the repository."""
    if find_spec("qpmerge_lite.companion") is not None:
        from .companion.cli import main as run

        return run(arguments)
    arguments = sys.argv[1:] if arguments is None else arguments
    if not set(arguments) - {"-h", "--help"}:
        print(f"{MODULE}\n{REPOSITORY[0].upper()}{REPOSITORY[1:]}.")
        return 0
    print(f"qpmerge: {REPOSITORY}; {THERE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
