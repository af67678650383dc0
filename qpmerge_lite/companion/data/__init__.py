"""Data sets and checkpoints from the first source that serves: the mirror, an installed package,
the Hugging Face Hub.

Whichever serves, the rows are the same (``readers``). Nothing is unpickled and no code comes with
the data.
"""

import warnings
from pathlib import Path

from .manifests import Absent, ManifestError, Source, check, load_manifest, locate


def fetch(name: str) -> dict[str, Path]:
    """Files of a data set, or of one checkpoint of a family (``family/checkpoint``; ``base`` where
    none is named).

    Returns: path inside the source -> where the file is here, every one held to its size and hash.
    Raises: ManifestError naming every source that was tried, why it does not serve, and what to do.
    """
    manifest, sources = _find(name)
    return _first(name, manifest, sources, lambda source: files_of(manifest, source))


def checkpoint(name: str) -> Path:
    """Folder of the verified files of a checkpoint, for ``from_pretrained(folder)`` of
    transformers.

    Raises: ManifestError naming every source that was tried, why it does not serve, and what to do.
    """
    for path, file in fetch(name).items():
        if Path(path).name == "config.json":
            return file.parent
    raise ManifestError(
        f"{name}: expected a checkpoint with a config.json, found none; see "
        f"data_manifests/README.md"
    )


def rows(name: str):
    """A data set as ``datasets.DatasetDict`` with splits train, validation and test.

    Columns: ``text`` (and ``pair``), or ``image``; and ``label``, a ``ClassLabel`` with the
    manifest's names. Where the manifest has digests of the rows, images are uint8 of shape (H, W)
    or (H, W, 3) and rows are in the order of their digests; elsewhere images are as their files
    hold them, and rows as the files order them.

    Raises: ManifestError naming every source that was tried, why it does not serve, and what to do.
    """
    from . import readers  # which brings NumPy: listing the manifests has no need of it

    manifest, sources = _find(name)
    if manifest.kind != "dataset":
        raise ManifestError(f"{name}: expected a data set, found a {manifest.kind}; use checkpoint")
    return _first(
        name,
        manifest,
        sources,
        lambda source: readers.read(manifest, source, files_of(manifest, source)),
    )


def members(manifest) -> list[str]:
    """Names under which ``fetch`` serves what a manifest lists."""
    if manifest.kind != "checkpoint":
        return [manifest.name]
    checkpoints = dict.fromkeys(source.checkpoint for source in manifest.sources)
    return [f"{manifest.name}/{name}" for name in checkpoints]


def here(manifest) -> dict[str, tuple]:
    """Source id -> its files, of every source that is on this machine, verified without a network.

    Raises: ManifestError when a byte differs.
    """
    files = {}
    for source in manifest.sources:
        try:
            files_of(manifest, source, network=False)
        except Absent:
            continue
        files[source.id] = source.files
    return files


def _find(name):
    family, _, member = name.partition("/")
    manifest = load_manifest(family)
    if manifest.kind == "suite":
        raise ManifestError(
            f"{name}: a suite reads its sources where they are; run: qpmerge data verify {name}"
        )
    if manifest.kind == "dataset":
        return manifest, manifest.sources
    sources = [source for source in manifest.sources if source.checkpoint == (member or "base")]
    if not sources:
        raise ManifestError(f"{name}: no such checkpoint; known: {', '.join(members(manifest))}")
    return manifest, sources


def _first(name, manifest, sources, use):
    """What ``use`` makes of the first source it can; a source that is there but wrong is warned of
    even then."""
    failures = []
    for source in sources:
        try:
            result = use(source)
        except ManifestError as error:
            failures.append(error)
            continue
        for failure in failures:
            if not isinstance(failure, Absent):
                warnings.warn(f"{failure} ({source.id} served instead)", stacklevel=3)
        return result
    lines = [f"{name}: no source serves", *map(str, failures), *manifest.extra.get("elsewhere", ())]
    raise ManifestError("\n  ".join(lines))


def files_of(manifest, source: Source, network=True) -> dict[str, Path]:
    """Every file of a source, verified."""
    from . import hub, readers

    files = {}
    for file in source.files:
        if source.kind != "hub":
            files[file.path] = check(manifest, source, file, locate(source, file))
        elif "*" in file.path or not (file.sha256 or readers.counted(manifest)):
            raise Absent(
                f"{source.id}: {source.extra['repo']} is not pinned; "
                f"run: qpmerge data lock {manifest.name}"
            )
        else:
            files[file.path] = hub.download(manifest, source, file, network)
    return files
