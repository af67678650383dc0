"""The command ``qpmerge``."""

import sys
from importlib.util import find_spec


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its verbs for the book and its data are those of the repository."""
    if find_spec("qpmerge_lite.companion") is None:
        print(
            "qpmerge: the commands for the book and its data come with the repository, not with the module; run it there",
            file=sys.stderr,
        )
        return 2
    from .companion.cli import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
