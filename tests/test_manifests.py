"""Manifests: what breaks the schema is refused by name, and so is a byte that differs."""

import copy
import hashlib
from importlib import metadata

import pytest
import yaml
from safetensors import safe_open

from qpmerge_lite import manifests
from qpmerge_lite.manifests import ManifestError, load_manifest, verify

SOUND = {
    "schema": 1,
    "name": "toy",
    "description": "a toy",
    "sources": [
        {
            "id": "weights",
            "kind": "file",
            "licence": "MIT",
            "citation": "ours",
            "made": {"command": "make weights"},
            "files": [{"path": "a.bin", "bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}],
        },
        {
            "id": "library",
            "kind": "package",
            "package": "numpy",
            "versions": ">=1",
            "licence": "BSD",
            "citation": "numpy",
            "files": [{"path": "b.bin", "bytes": 3, "sha256": "0" * 64}],
        },
    ],
    "splits": {"train": "", "validation": "", "test": ""},
    "leakage": [],
}
HELP = "; see data_manifests/README.md"
BREAKS = {
    "toy.yaml: expected a mapping, found None": lambda m: m.clear(),
    "toy.yaml: schema: expected 1, found 2": lambda m: m.update(schema=2),
    "toy.yaml.schema: expected an integer, found True": lambda m: m.update(schema=True),
    "toy.yaml: name: expected 'toy', as the file is called, found other": lambda m: m.update(name="other"),
    "toy.yaml.description: expected text, found ": lambda m: m.update(description=""),
    "toy.yaml: sources: expected at least one source, found none": lambda m: m.update(sources=[]),
    "toy.yaml: splits: expected an entry 'test', found ['train', 'validation']": lambda m: m["splits"].pop("test"),
    "toy.yaml: sources: expected ids that differ, found ['library', 'library']": lambda m: m["sources"][0].update(id="library"),
    "toy.yaml: sources[0].kind: expected one of package, file, found hub": lambda m: m["sources"][0].update(kind="hub"),
    "toy.yaml: sources[1]: expected a field 'versions', found ['citation', 'files', 'id', 'kind', 'licence', 'package']": lambda m: m[
        "sources"
    ][1].pop("versions"),
    "toy.yaml: sources[1]: expected only the fields id, kind, licence, citation, files, package, versions, found ['colour']": lambda m: m[
        "sources"
    ][1].update(colour="red"),
    "toy.yaml: sources[0].files: expected at least one file, found none": lambda m: m["sources"][0].update(files=[]),
    "toy.yaml: sources[0].files[0].path: expected a path inside its source, found ../a.bin": lambda m: m["sources"][0]["files"][0].update(
        path="../a.bin"
    ),
    "toy.yaml: sources[0].files[0].sha256: expected 64 lower-case hexadecimal digits, found abc": lambda m: m["sources"][0]["files"][
        0
    ].update(sha256="abc"),
    "toy.yaml: sources[0].files[0].bytes: expected a positive number, found 0": lambda m: m["sources"][0]["files"][0].update(bytes=0),
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "ROOT", tmp_path)
    (tmp_path / "a.bin").write_bytes(b"abc")

    def _write(change=lambda content: None, sources=slice(None)):
        content = copy.deepcopy(SOUND)
        content["sources"] = content["sources"][sources]
        change(content)
        (tmp_path / "toy.yaml").write_text(yaml.safe_dump(content or None))
        return tmp_path / "toy.yaml"

    return _write


@pytest.mark.parametrize("message", BREAKS)
def test_a_broken_manifest_is_refused_by_field(write, message):
    with pytest.raises(ManifestError) as caught:
        load_manifest(write(BREAKS[message]))
    assert str(caught.value) == message + HELP


def test_a_sound_manifest_is_read(write):
    manifest = load_manifest(write())
    assert [source.id for source in manifest.sources] == ["weights", "library"]
    assert manifest.source("library").extra == {"package": "numpy", "versions": ">=1"}
    with pytest.raises(ManifestError, match="expected a source 'x'"):
        manifest.source("x")


def test_an_unknown_manifest_and_broken_yaml_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="nowhere.yaml: no such manifest; known: .*smoke-vision"):
        load_manifest("nowhere")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ManifestError, match="bad.yaml: expected YAML"):
        load_manifest(tmp_path / "bad.yaml")


def test_sound_files_are_located(write, tmp_path):
    assert verify(load_manifest(write(sources=slice(1)))) == [tmp_path / "a.bin"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"abd", "expected sha256 ba7816bf.*, found a52d159f.*"),
        (b"abcd", "expected 3 bytes, found 4"),
        (None, "expected a file of 3 bytes, found none"),
    ],
)
def test_a_wrong_byte_is_refused_with_its_cure(write, tmp_path, content, expected):
    manifest = load_manifest(write(sources=slice(1)))
    (tmp_path / "a.bin").unlink()
    if content is not None:
        (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ManifestError, match=f"toy: weights: a.bin: {expected}; restore the file.*: make weights"):
        verify(manifest)


def test_a_package_that_lacks_or_changes_the_file_is_named(write, tmp_path):
    manifest = load_manifest(write(sources=slice(1, 2)))
    version = metadata.version("numpy")
    with pytest.raises(ManifestError, match=f"library: b.bin: expected a file .* found in numpy {version}; install"):
        verify(manifest)


@pytest.mark.parametrize(
    ("package", "versions", "message"),
    [
        ("no-such-package", ">=1", "library: package no-such-package is not installed; run: pip install"),
        ("numpy", "<1", r"library: expected numpy<1, found numpy \S+; run: pip install 'numpy<1'"),
        ("numpy", "about two", r"versions: expected a version range such as '>=3.10,<4', found 'about two'"),
    ],
)
def test_a_package_that_is_missing_or_of_another_version_is_refused(write, package, versions, message):
    path = write(lambda m: m["sources"][0].update(package=package, versions=versions), slice(1, 2))
    with pytest.raises(ManifestError, match=message):
        verify(load_manifest(path))


@pytest.mark.parametrize("name", manifests.names())
def test_shipped_manifests_hold_on_this_machine(name):
    paths = verify(load_manifest(name))
    assert all(path.is_file() for path in paths) and len(paths) == len(set(paths))


@pytest.mark.parametrize("name", manifests.names())
def test_shipped_weights_say_how_they_were_made(name):
    for source in load_manifest(name).sources:
        for file in source.files if file_is_weights(source) else ():
            with safe_open(manifests.locate(source, file), "pt") as weights:
                header = weights.metadata()
            assert {**header, "command": source.extra["made"]["command"]} == source.extra["made"]
            assert file.bytes <= 2 * 1024**2


def file_is_weights(source):
    return source.kind == "file" and source.files[0].path.endswith(".safetensors")
