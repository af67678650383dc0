"""The same rows out of every source, in the same order; what differs is refused by name."""

import hashlib
import io
import sys
from functools import cache

import numpy as np
import pytest
import toysets
from hub import Hub

from qpmerge_lite.companion import data, paths
from qpmerge_lite.companion.data import manifests, readers
from qpmerge_lite.companion.data.manifests import ManifestError, load_manifest

STANDARD = [name for name in manifests.names("standard") if load_manifest(name).kind == "dataset"]
needs_the_mirror = pytest.mark.skipif(
    paths.mirror_folder() is None, reason="no mirror here: QPMERGE_MIRROR is not set"
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of manifests, a mirror, and the Hub's client with an empty cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(manifests, "FOLDER", tmp_path)
    monkeypatch.setenv("QPMERGE_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mirror").mkdir()
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def same(found, rows):
    """Whether a ``DatasetDict`` has exactly the rows that the README's definition gives, in its
    order."""
    column = "text" if isinstance(rows[0][0], str) else "image"
    for split, part in toysets.divided(rows).items():
        table = found[split].with_format("numpy")
        contents = [" ".join(row[1].split()) if column == "text" else row[1] for row in part]
        np.testing.assert_array_equal(table[column][:], np.array(contents))
        np.testing.assert_array_equal(table["label"][:], [row[2] for row in part])
        assert found[split].features["label"].names == toysets.LABELS
    return True


@pytest.mark.parametrize("rows", [toysets.texts(), toysets.images()], ids=["texts", "images"])
def test_rows_of_the_mirror_are_as_the_readme_defines_them(place, rows):
    path, content = toysets.mirrored(rows)
    (place / "mirror" / path).write_bytes(content)
    toysets.write(place, rows, toysets.mirror_source(path, content))
    found = data.rows("toy")
    assert same(found, rows) and {split: len(part) for split, part in found.items()} == (
        {"train": 50, "validation": 5, "test": 12}
        if path == "toy.parquet"
        else {"train": 36, "validation": 4, "test": 10}
    )
    if path == "toy.npz":
        assert found["train"].features["image"].dtype == "uint8"


@pytest.mark.parametrize("rows", [toysets.texts(), toysets.images()], ids=["texts", "images"])
def test_the_hub_gives_the_same_rows_from_among_others(place, hub, rows):
    hub.add("ours/toy", {"all.parquet": toysets.on_the_hub(rows)}, kind="dataset")
    gone = {"files": [toysets.entry("gone.npz", b"not here")]}
    mirrored = toysets.mirror_source("gone", b"not here") | gone
    toysets.write(place, rows, mirrored, toysets.hub_source({"path": "all.parquet"}))
    assert same(data.rows("toy"), rows)


def test_lines_of_json_with_labels_in_words_give_the_same_rows(place, hub):
    rows, escape = toysets.texts(), lambda text: text.replace('"', '\\"')
    lines = [
        f'{{"content": "{escape(text)}", "answer": "{toysets.LABELS[label]}"}}\n'
        for text, label, _ in reversed(rows)
    ]
    hub.add("ours/toy", {"all.jsonl": "".join(lines).encode()}, kind="dataset")
    toysets.write(place, rows, toysets.hub_source({"path": "all.jsonl"}))
    assert same(data.rows("toy"), rows)


def test_files_that_hold_one_split_each_need_no_index_and_hold_nothing_else(place, hub):
    rows, parts = toysets.texts(), ("train", "test")
    split = lambda **more: {
        f"{s}.parquet": toysets.on_the_hub([row for row in rows if row[2] == s], **more)
        for s in parts
    }
    toysets.write(
        place, rows, toysets.hub_source(*({"path": f"{s}.parquet", "split": s} for s in parts))
    )
    hub.add("ours/toy", split(others=0), kind="dataset")
    assert same(data.rows("toy"), rows)
    hub.add("ours/toy", split(others=1), kind="dataset")
    with pytest.raises(
        ManifestError,
        match=r"hub: test: expected 12 rows of sha256 \w+, found 13 of \w+; these are other rows",
    ):
        data.rows("toy")


def test_a_split_that_no_file_holds_is_named(place, hub):
    rows = toysets.texts()
    hub.add("ours/toy", {"train.parquet": toysets.on_the_hub(rows, others=0)}, kind="dataset")
    toysets.write(place, rows, toysets.hub_source({"path": "train.parquet", "split": "train"}))
    with pytest.raises(
        ManifestError, match="toy: expected rows of test, found only train; correct the manifest"
    ):
        data.rows("toy")


def test_rows_that_differ_are_refused_and_the_next_source_serves(place, hub):
    rows = toysets.texts()
    path, content = toysets.mirrored([("Other", 0, "train"), *rows[1:]])
    (place / "mirror" / path).write_bytes(content)
    hub.add("ours/toy", {"all.parquet": toysets.on_the_hub(rows)}, kind="dataset")
    toysets.write(
        place,
        rows,
        toysets.mirror_source(path, content),
        toysets.hub_source({"path": "all.parquet"}),
    )
    with pytest.warns(
        UserWarning,
        match=r"toy: mirror: train: expected 50 rows of .* other rows, .* \(hub served instead\)",
    ):
        assert same(data.rows("toy"), rows)


def test_rows_that_the_hub_lacks_are_missed_and_every_source_is_named(place, hub):
    rows = toysets.texts()
    hub.add("ours/toy", {"all.parquet": toysets.on_the_hub(rows[2:])}, kind="dataset")
    toysets.write(
        place,
        rows,
        toysets.mirror_source("toy.parquet", b"x"),
        toysets.hub_source({"path": "all.parquet"}),
    )
    with pytest.raises(ManifestError) as caught:
        data.rows("toy")
    first, mirror, missed, elsewhere = str(caught.value).split("\n  ")
    assert first == "toy: no source serves" and elsewhere == "the attic has other rows"
    assert mirror.startswith(
        "toy: mirror: toy.parquet: expected a file of 1 bytes, found none; copy the file to the "
        "mirror"
    )
    assert "expected 50 rows of the index, found 4" in missed and missed.endswith(
        "these are other rows, so use another source"
    )


def test_no_mirror_at_all_is_said(place, monkeypatch):
    monkeypatch.delenv("QPMERGE_MIRROR")
    monkeypatch.setattr(paths, "HOME", place / "nowhere")
    toysets.write(place, toysets.texts(), toysets.mirror_source("toy.parquet", b"x"))
    with pytest.raises(
        ManifestError,
        match="mirror: no mirror here; set QPMERGE_MIRROR to a folder that holds toy.parquet",
    ):
        data.fetch("toy")


def test_pickled_arrays_are_not_read(place):
    stream = io.BytesIO()
    np.savez(
        stream,
        x_train=np.array([{}], object),
        y_train=np.zeros(1, int),
        class_names=np.array(toysets.LABELS),
    )
    (place / "mirror" / "toy.npz").write_bytes(stream.getvalue())
    toysets.write(place, toysets.images(), toysets.mirror_source("toy.npz", stream.getvalue()))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.rows("toy")


def test_labels_of_the_mirror_have_to_be_the_manifests(place):
    path, content = toysets.mirrored(toysets.images())
    (place / "mirror" / path).write_bytes(content)
    toysets.write(
        place, toysets.images(), toysets.mirror_source(path, content), labels=["a", "b", "c"]
    )
    with pytest.raises(
        ManifestError,
        match=r"expected the labels \['a', 'b', 'c'\], found \['no', 'yes', 'maybe'\]",
    ):
        data.rows("toy")


def test_a_checkpoint_comes_from_an_installed_package(place, monkeypatch):
    site, files = place / "site", {"config.json": b"{}", "model.safetensors": b"weights"}
    (site / "weights_to_go" / "model").mkdir(parents=True)
    (site / "weights_to_go-1.0.dist-info").mkdir()
    (site / "weights_to_go-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: weights-to-go\nVersion: 1.0\n"
    )
    for path, content in files.items():
        (site / "weights_to_go" / "model" / path).write_bytes(content)
    common = {"checkpoint": "base", "verified": True, "licence": "MIT", "citation": "ours"}
    package = {
        "id": "package",
        "kind": "package",
        **common,
        "package": "weights-to-go",
        "versions": "==1.0",
    }
    package["files"] = [
        toysets.entry(f"weights_to_go/model/{path}", content) for path, content in files.items()
    ]
    family = {
        "schema": 1,
        "kind": "checkpoint",
        "name": "family",
        "tier": "paper",
        "description": "toys",
        "sources": [package],
    }
    (place / "family.yaml").write_text(toysets.dump({**family, "elsewhere": []}))
    with pytest.raises(
        ManifestError,
        match="weights-to-go is not installed; run: pip install --no-deps 'weights-to-go==1.0'",
    ):
        data.checkpoint("family")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    assert (
        data.checkpoint("family")
        == data.checkpoint("family/base")
        == site / "weights_to_go" / "model"
    )
    with pytest.raises(
        ManifestError, match="family/expert: no such checkpoint; known: family/base"
    ):
        data.fetch("family/expert")
    (site / "weights_to_go" / "model" / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(
        ManifestError,
        match="model.safetensors: expected sha256 .* found in weights-to-go 1.0; install a version",
    ):
        data.checkpoint("family")
    with pytest.raises(ManifestError, match="family: expected a data set, found a checkpoint"):
        data.rows("family")


@cache
def whole_set(name):
    """Splits of a set of the standard tier, as the mirror gives them."""
    return data.rows(name)


@needs_the_mirror
@pytest.mark.parametrize("name", STANDARD)
def test_sets_of_the_standard_tier_come_from_the_mirror_and_in_the_layout_of_the_hub_alike(
    name, place, monkeypatch
):
    """The repository's own files are not at hand, so its layout is filled with the mirror's rows,
    shuffled among others."""
    monkeypatch.undo()
    manifest = load_manifest(name)
    whole = whole_set(name)
    labels, column = (
        manifest.extra["labels"],
        "text" if "text" in manifest.extra["columns"] else "image",
    )
    assert (
        list(whole) == list(manifests.SPLITS) and whole["train"].features["label"].names == labels
    )
    found = {
        split: [toysets.digest(c, label) for c, label in pairs(part, column)]
        for split, part in whole.items()
    }
    for split, digests in found.items():
        assert digests == sorted(digests) and len(digests) == manifest.splits[split]["rows"]
        assert hashlib.sha256(b"".join(digests)).hexdigest() == manifest.splits[split]["sha256"]
    remote = [source for source in manifest.sources if source.kind == "hub"]
    index = manifests.FOLDER / "index" / f"{name}.bin"
    assert index.exists() == bool(remote)
    if remote:
        assert index.read_bytes() == b"".join(
            digest[: readers.KEY] for digests in found.values() for digest in digests
        )
        rows = [row for part in whole.values() for row in pairs(part, column)]
        again = from_the_hub(manifest, remote[0], rows, column, place, monkeypatch)
        for split, part in again.items():
            assert [toysets.digest(*pair) for pair in pairs(part, column)] == found[
                split
            ] and part.features == whole[split].features


def pairs(part, column):
    table = part.with_format("numpy")[:]
    contents = table[column].tolist() if column == "text" else table[column].astype(np.uint8)
    return list(zip(contents, table["label"].tolist(), strict=True))


def from_the_hub(manifest, source, rows, column, place, monkeypatch):
    import datasets
    import huggingface_hub.constants

    ours = {ours: theirs for theirs, ours in source.extra["labels"].items()}
    names = [ours.get(name, name) for name in reversed(manifest.extra["labels"])]
    columns = {name: source.extra["columns"].get(name, name) for name in (column, "label")}
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    rows.append(("no. such text" if column == "text" else np.zeros_like(rows[0][0]), 0))
    files = {}
    for i, file in enumerate(source.files):
        part = rows[i :: len(source.files)]
        words = [names[-1 - label] for _, label in part]
        table = {columns[column]: [row[0] for row in part], columns["label"]: words}
        if file.path.endswith(".jsonl"):
            if "{" in columns[column]:
                halves = [row[0].partition(". ") for row in part]
                table = {
                    "title": [half[0] for half in halves],
                    "description": [half[2] for half in halves],
                    "label": list(map(int, words)),
                }
            stream = io.BytesIO()
            datasets.Dataset.from_dict(table).to_json(stream)
            files[file.path] = stream.getvalue()
        else:
            content = datasets.Value("string") if column == "text" else datasets.Image()
            files[file.path] = toysets.parquet(
                table,
                datasets.Features(
                    {columns[column]: content, columns["label"]: datasets.ClassLabel(names=names)}
                ),
            )
    with Hub() as hub:
        hub.add(source.extra["repo"], files, kind="dataset", revision=source.extra["revision"])
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "cache"))
        return readers.read(manifest, source, data.files_of(manifest, source))


@needs_the_mirror
def test_no_row_of_one_set_is_held_out_in_another():
    """Images byte for byte; texts but for case, blanks and punctuation, where three short ones are
    known and said in the manifests."""
    seen, shared = {}, set()
    for name in STANDARD:
        for split, part in whole_set(name).items():
            for content, _ in pairs(part, "text" if "text" in part.column_names else "image"):
                seen.setdefault(readers._bare(content), set()).add((name, split))
    for content, places in seen.items():
        if len({name for name, _ in places}) > 1 and {split for _, split in places} != {"train"}:
            shared.add(content)
        assert len(places) == len({name for name, _ in places}), f"{content}: {places}"
    assert shared == {"no", "absolutelynot", "goodevening"}
