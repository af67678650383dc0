"""Where things are: the checkout, its records, the cache of what was trained and merged, a mirror
of data sets."""

import os
from pathlib import Path

from ..errors import MergeError

HOME = Path(__file__).parents[2]  # the checkout that this package lies in
MANIFESTS = HOME / "data_manifests"


def repository() -> Path:
    """Root of the checkout to work on: the nearest folder upwards from the working directory with
    this project's pyproject.toml.

    Raises: MergeError outside of one.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        project = folder / "pyproject.toml"
        if project.is_file() and 'name = "qpmerge-lite"' in project.read_text(encoding="utf-8"):
            return folder
    raise MergeError(
        "no qpmerge-lite checkout above the working directory; run this inside the repository"
    )


def records_folder(root=None) -> Path:
    """Folder of records: ``$QPMERGE_RECORDS``, else ``book/_records`` of a checkout, by default
    that of :func:`repository`."""
    named = os.environ.get("QPMERGE_RECORDS")
    return Path(named) if named else Path(root or repository()) / "book" / "_records"


def cache_folder() -> Path:
    """Folder of trained experts and of merges: ``$QPMERGE_CACHE``, else ``.cache/qpmerge`` of the
    checkout of this package."""
    return Path(os.environ.get("QPMERGE_CACHE") or HOME / ".cache" / "qpmerge")


def mirror_folder() -> Path | None:
    """Folder that mirrors data sets: ``$QPMERGE_MIRROR``, or ``../shared/data`` beside the checkout
    where it exists; else None."""
    named, beside = os.environ.get("QPMERGE_MIRROR"), HOME.parent / "shared" / "data"
    if named:
        return Path(named)
    return beside if beside.is_dir() else None
