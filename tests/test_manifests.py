"""Manifests: what breaks the schema is refused by name, and so is a byte that differs."""

import copy
import hashlib
import json
from importlib import metadata
from pathlib import Path

import jsonschema
import pytest
import yaml
from safetensors import safe_open

from qpmerge_lite.companion.data import manifests
from qpmerge_lite.companion.data.manifests import ManifestError, load_manifest, verify

SOUND = {
    "schema": 1,
    "kind": "suite",
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
BROKEN = sorted((Path(__file__).parent / "broken_manifests").glob("*.yaml"))
BEYOND_THE_SCHEMA = {
    "name-other",
    "sources-same-id",
    "versions-in-words",
    "rows-of-unknown-split",
    "rows-counted-in-part",
    "pair-with-digests",
}


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_a_broken_manifest_is_refused_by_field(path):
    """The first line of each file of ``broken_manifests`` is the message that the rest of it is
    refused with."""
    with pytest.raises(ManifestError) as caught:
        load_manifest(path)
    assert path.read_text().partition("\n")[0] == f"# {caught.value}"


def test_the_schema_alone_refuses_what_other_validators_can_see():
    schema = jsonschema.Draft202012Validator(json.loads(manifests.SCHEMA.read_text()))
    schema.check_schema(schema.schema)
    assert {
        path.stem for path in BROKEN if schema.is_valid(yaml.safe_load(path.read_text()))
    } == BEYOND_THE_SCHEMA
    for path in manifests.FOLDER.glob("*.yaml"):
        schema.validate(yaml.safe_load(path.read_text()))


def test_every_field_of_the_schema_is_described():
    said = (manifests.FOLDER / "README.md").read_text()
    fields = {
        name
        for part in walk(json.loads(manifests.SCHEMA.read_text()))
        for name in part.get("properties", ())
    }
    assert {name for name in fields if f"`{name}`" not in said} == set()


def walk(schema):
    if isinstance(schema, dict):
        yield schema
    for value in (
        schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    ):
        yield from walk(value)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "HOME", tmp_path)
    (tmp_path / "a.bin").write_bytes(b"abc")

    def _write(change=lambda content: None, sources=slice(None)):
        content = copy.deepcopy(SOUND)
        content["sources"] = content["sources"][sources]
        change(content)
        (tmp_path / "toy.yaml").write_text(yaml.safe_dump(content or None))
        return tmp_path / "toy.yaml"

    return _write


def test_a_sound_manifest_is_read(write):
    manifest = load_manifest(write())
    assert [source.id for source in manifest.sources] == ["weights", "library"]
    assert manifest.source("library").extra == {"package": "numpy", "versions": ">=1"}
    with pytest.raises(ManifestError, match="expected a source 'x'"):
        manifest.source("x")


def test_an_unknown_manifest_and_broken_yaml_are_refused(tmp_path):
    with pytest.raises(
        ManifestError, match="nowhere.yaml: no such manifest; known: .*smoke-vision"
    ):
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
    with pytest.raises(
        ManifestError, match=f"toy: weights: a.bin: {expected}; restore the file.*: make weights"
    ):
        verify(manifest)


def test_a_package_that_lacks_or_changes_the_file_is_named(write, tmp_path):
    manifest = load_manifest(write(sources=slice(1, 2)))
    version = metadata.version("numpy")
    with pytest.raises(
        ManifestError, match=f"library: b.bin: expected a file .* found in numpy {version}; install"
    ):
        verify(manifest)


@pytest.mark.parametrize(
    ("package", "versions", "message"),
    [
        (
            "no-such-package",
            ">=1",
            "library: package no-such-package is not installed; run: pip install",
        ),
        ("numpy", "<1", r"library: expected numpy<1, found numpy \S+; run: pip install 'numpy<1'"),
        (
            "numpy",
            "about two",
            r"versions: expected a version range such as '>=3.10,<4', found 'about two'",
        ),
    ],
)
def test_a_package_that_is_missing_or_of_another_version_is_refused(
    write, package, versions, message
):
    path = write(lambda m: m["sources"][0].update(package=package, versions=versions), slice(1, 2))
    with pytest.raises(ManifestError, match=message):
        verify(load_manifest(path))


@pytest.mark.parametrize("name", manifests.names("smoke"))
def test_manifests_of_the_embedded_suites_hold_on_this_machine(name):
    paths = verify(load_manifest(name))
    assert all(path.is_file() for path in paths) and len(paths) == len(set(paths))


@pytest.mark.parametrize("name", manifests.names("smoke"))
def test_shipped_weights_say_how_they_were_made(name):
    for source in load_manifest(name).sources:
        for file in source.files if file_is_weights(source) else ():
            with safe_open(manifests.locate(source, file), "pt") as weights:
                header = weights.metadata()
            assert {**header, "command": source.extra["made"]["command"]} == source.extra["made"]
            assert file.bytes <= 2 * 1024**2


def file_is_weights(source):
    return source.kind == "file" and source.files[0].path.endswith(".safetensors")
