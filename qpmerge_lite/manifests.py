"""Data manifests: what a suite reads, from where, under which licence, and which bytes are expected.

The schema is described in ``data_manifests/README.md``. Nothing here downloads anything.
"""

import hashlib
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from .errors import MergeError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "data_manifests"
SCHEMA = 1
TEXT, WHOLE, LIST, MAP = str, int, list, dict
MANIFEST_FIELDS = {
    "schema": WHOLE, "name": TEXT, "description": TEXT, "sources": LIST, "splits": MAP, "leakage": LIST,
}  # fmt: skip
SOURCE_FIELDS = {"id": TEXT, "kind": TEXT, "licence": TEXT, "citation": TEXT, "files": LIST}
KIND_FIELDS = {"package": {"package": TEXT, "versions": TEXT}, "file": {"made": MAP}}
FILE_FIELDS = {"path": TEXT, "bytes": WHOLE, "sha256": TEXT}


class ManifestError(MergeError):
    """A manifest that breaks the schema, or a source that is not what its manifest says."""


@dataclass(frozen=True)
class File:
    """One file: path inside its source, size and SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Files of one origin. ``extra`` holds what only its kind has: package and versions, or how it was made."""

    id: str
    kind: str
    licence: str
    citation: str
    files: tuple[File, ...]
    extra: dict


@dataclass(frozen=True)
class Manifest:
    """A validated manifest; ``splits`` and ``leakage`` say how data are divided and what is kept out."""

    path: Path
    name: str
    description: str
    sources: tuple[Source, ...]
    splits: dict
    leakage: tuple[str, ...]

    def source(self, name: str) -> Source:
        """The source with this id."""
        for source in self.sources:
            if source.id == name:
                return source
        raise ManifestError(f"{self.path.name}: expected a source {name!r}, found {[s.id for s in self.sources]}")


def names() -> list[str]:
    """Names of the manifests of the repository."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_manifest(name: str | Path) -> Manifest:
    """Read and validate a manifest, by its name or by a path ending in ``.yaml``.

    Raises: ManifestError naming the file, the field, what was expected and what was found.
    """
    import yaml

    path = Path(name) if str(name).endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ManifestError(f"{path.name}: no such manifest; known: {', '.join(names()) or 'none beside the package'}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ManifestError(f"{path.name}: expected YAML, found {error}") from error
    return _manifest(path, content)


def _manifest(path: Path, content) -> Manifest:
    where = path.name
    _fields(where, content, MANIFEST_FIELDS)
    _expect(content["schema"] == SCHEMA, f"{where}: schema", str(SCHEMA), content["schema"])
    _expect(content["name"] == path.stem, f"{where}: name", f"{path.stem!r}, as the file is called", content["name"])
    _expect(content["sources"], f"{where}: sources", "at least one source", "none")
    sources = tuple(_source(f"{where}: sources[{i}]", item) for i, item in enumerate(content["sources"]))
    ids = [source.id for source in sources]
    _expect(len(set(ids)) == len(ids), f"{where}: sources", "ids that differ", ids)
    for split in ("train", "validation", "test"):
        _expect(split in content["splits"], f"{where}: splits", f"an entry {split!r}", sorted(content["splits"]))
    return Manifest(path, content["name"], content["description"], sources, content["splits"], tuple(content["leakage"]))


def _source(where: str, content) -> Source:
    _expect(isinstance(content, dict), where, "a mapping", content)
    kind = content.get("kind")
    _expect(kind in KIND_FIELDS, f"{where}.kind", f"one of {', '.join(KIND_FIELDS)}", kind)
    _fields(where, content, {**SOURCE_FIELDS, **KIND_FIELDS[kind]})
    _expect(content["files"], f"{where}.files", "at least one file", "none")
    if kind == "package":
        _specifiers(f"{where}.versions", content["versions"])
    files = tuple(_file(f"{where}.files[{i}]", item) for i, item in enumerate(content["files"]))
    common = {name: content[name] for name in ("id", "kind", "licence", "citation")}
    return Source(**common, files=files, extra={name: content[name] for name in KIND_FIELDS[kind]})


def _file(where: str, content) -> File:
    _fields(where, content, FILE_FIELDS)
    path = PurePosixPath(content["path"])
    inside = not path.is_absolute() and ".." not in path.parts
    _expect(inside, f"{where}.path", "a path inside its source", content["path"])
    digits = re.fullmatch("[0-9a-f]{64}", content["sha256"])
    _expect(digits, f"{where}.sha256", "64 lower-case hexadecimal digits", content["sha256"])
    _expect(content["bytes"] > 0, f"{where}.bytes", "a positive number", content["bytes"])
    return File(**content)


def _fields(where: str, content, fields: dict) -> None:
    """Exactly these fields, each of its type, no text empty."""
    _expect(isinstance(content, dict), where, "a mapping", content)
    for name, kind in fields.items():
        _expect(name in content, where, f"a field {name!r}", sorted(map(str, content)))
        value = content[name]
        right = isinstance(value, kind) and not isinstance(value, bool) and value != ""
        _expect(right, f"{where}.{name}", {str: "text", int: "an integer", list: "a list", dict: "a mapping"}[kind], value)
    odd = [name for name in content if name not in fields]
    _expect(not odd, where, f"only the fields {', '.join(fields)}", odd)


def _expect(condition, where: str, expected: str, found) -> None:
    if not condition:
        shown = found if isinstance(found, str) else repr(found)
        raise ManifestError(f"{where}: expected {expected}, found {shown}; see data_manifests/README.md")


def _specifiers(where: str, text: str):
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ManifestError(f"{where}: expected a version range such as '>=3.10,<4', found {text!r}") from error


def locate(source: Source, file: File) -> Path:
    """Where a file of a source is on this machine.

    Raises: ManifestError when its package is not installed, or in a version outside the range.
    """
    if source.kind == "file":
        return ROOT / file.path
    name, versions = source.extra["package"], source.extra["versions"]
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise ManifestError(f"{source.id}: package {name} is not installed; run: pip install '{name}{versions}'") from error
    if not _specifiers(source.id, versions).contains(distribution.version, prereleases=True):
        raise ManifestError(
            f"{source.id}: expected {name}{versions}, found {name} {distribution.version}; run: pip install '{name}{versions}'"
        )
    return Path(str(distribution.locate_file(file.path)))


def verify(manifest: Manifest) -> list[Path]:
    """Check every file of a manifest against its size and SHA-256, and return where they are.

    Raises: ManifestError naming the file, what was expected and found, and what to do.
    """
    return [_check(manifest, source, file) for source in manifest.sources for file in source.files]


def _check(manifest: Manifest, source: Source, file: File) -> Path:
    path, where = locate(source, file), f"{manifest.name}: {source.id}: {file.path}"
    if source.kind == "package":
        version = metadata.version(source.extra["package"])
        cure = f"found in {source.extra['package']} {version}; install a version in which the file is unchanged"
    else:
        cure = "restore the file from the repository, or make it again: " + str(source.extra["made"].get("command"))
    if not path.is_file():
        raise ManifestError(f"{where}: expected a file of {file.bytes} bytes, found none; {cure}")
    content = path.read_bytes()
    if len(content) != file.bytes:
        raise ManifestError(f"{where}: expected {file.bytes} bytes, found {len(content)}; {cure}")
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise ManifestError(f"{where}: expected sha256 {file.sha256}, found {found}; {cure}")
    return path
