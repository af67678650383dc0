"""The Hugging Face Hub through its own client: files into the client's cache, why one does not
come, and pins."""

import os
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from ...checkpoints.hub import endpoint, trouble
from . import readers
from .manifests import Absent, File, ManifestError, Source, check, load_manifest, parse, sha256


def download(manifest, source: Source, file: File, network=True, revision=None) -> Path:
    """One file of a repository, by way of the client's cache, which does not keep it if a byte
    differs.

    Raises: Absent saying why the Hub does not give it and what to do; ManifestError when it is not
        what the manifest says.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    kind, revision = _type(manifest), revision or source.extra["revision"]
    try:
        where = hf_hub_download(
            source.extra["repo"],
            file.path,
            repo_type=kind,
            revision=revision,
            endpoint=endpoint(),
            local_files_only=not network,
        )
    except (OSError, HTTPError) as error:
        raise Absent(
            f"{source.id}: {source.extra['repo']}/{file.path} at {revision}: "
            f"{reason(source, kind, error)}"
        ) from error
    try:
        return check(manifest, source, file, Path(where))
    except ManifestError:
        Path(where).resolve().unlink(missing_ok=True)
        Path(where).unlink(missing_ok=True)
        raise


def _type(manifest):
    return "dataset" if manifest.kind == "dataset" else "model"


def reason(source: Source, kind: str, error: Exception) -> str:
    """Why the Hub does not serve, and what to do."""
    page = f"{endpoint()}/{'datasets/' if kind == 'dataset' else ''}{source.extra['repo']}"
    return "; ".join(trouble(error, page, "correct the manifest"))


def lock(name: str) -> dict[str, str]:
    """Pin the sources of a manifest that nobody has verified: commit, bytes and SHA-256 of their
    files as the Hub has them now.

    The manifest is replaced when all are known, and only if its rows, where it has digests of them,
    come out the same; comments outside the lists of files stay.

    Returns: id of each source that was pinned -> its commit.
    Raises: Absent or ManifestError saying what the Hub does not give, or gives otherwise; the
        manifest is then as it was.
    """
    manifest = load_manifest(name)
    text, commits = manifest.path.read_text(encoding="utf-8"), {}
    for source in manifest.sources:
        if source.kind == "hub" and not source.verified:
            pinned, files = _pin(manifest, source)
            if readers.counted(manifest):
                readers.read(manifest, pinned, files)
            text, commits[source.id] = _rewritten(text, pinned), pinned.extra["revision"]
            if pinned not in parse(manifest.path, text).sources:
                raise ManifestError(
                    f"{name}: {source.id}: expected the layout of the other manifests, "
                    "found another; lay it out as they are"
                )
    if not commits:
        return commits
    partial = manifest.path.with_name(f".{manifest.path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, manifest.path)
    return commits


def _pin(manifest, source):
    """The source as the Hub has it now, verified, and where its files are."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    repo, revision = source.extra["repo"], source.extra["revision"]
    try:
        info = HfApi(endpoint()).repo_info(repo, repo_type=_type(manifest), revision=revision)
    except (OSError, HTTPError) as error:
        raise Absent(
            f"{source.id}: {repo} at {revision}: {reason(source, _type(manifest), error)}"
        ) from error
    files, places, there = [], {}, sorted(entry.rfilename for entry in info.siblings)
    for file in source.files:
        paths = [path for path in there if fnmatchcase(path, file.path)]
        if not paths:
            raise ManifestError(
                f"{manifest.name}: {source.id}: expected {file.path} in {repo} at {info.sha}, "
                f"found {', '.join(there)}"
            )
        for path in paths:
            wanted = replace(file, path=path)
            place = download(manifest, source, wanted, revision=info.sha)
            places[path] = place
            files.append(File(path, place.stat().st_size, sha256(place), file.split))
    extra = {**source.extra, "revision": info.sha}
    return replace(source, files=tuple(files), verified=True, extra=extra), places


def _rewritten(text: str, source: Source) -> str:
    """The manifest's text with this source's revision, verification and files."""
    start = text.find(f"\n  - id: {source.id}\n") + 1
    end = re.compile(r"^(  - |\S|  #)|\Z", re.M).search(text, start + 1).start()
    block, rest = text[start:end], text[end:]
    block = re.sub(
        r"^    revision: .*$", f"    revision: {source.extra['revision']}", block, flags=re.M
    )
    block = re.sub(r"^    verified: .*$", "    verified: true", block, flags=re.M)
    lines = ["    files:"]
    for file in source.files:
        lines.append(f"      - path: {file.path}")
        if file.split:
            lines.append(f"        split: {file.split}")
        lines += [f"        bytes: {file.bytes}", f"        sha256: {file.sha256}"]
    files = "\n".join([*lines, ""])
    block = re.sub(r"^    files:\n(      .*\n)*", files, block, flags=re.M)
    return text[:start] + block + rest
