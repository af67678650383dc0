# ruff: noqa: F811 (fixtures come by import)
"""Files from the Hub through its own client, over HTTP on this machine: what comes, what does not
and why, and how it is pinned."""

import json
import os
import subprocess
import sys

import pytest
import toysets
import yaml
from hub import Hub
from test_sources import hub, place, same  # noqa: F401

from qpmerge_lite.companion import cli, data
from qpmerge_lite.companion.data import manifests
from qpmerge_lite.companion.data.hub import lock
from qpmerge_lite.companion.data.manifests import Absent, ManifestError, load_manifest

FILES = {"config.json": b'{"model_type": "toy"}', "model.safetensors": bytes(range(256)) * 400}


def family(place, *sources, **change):
    """A manifest family.yaml of checkpoints."""
    content = {
        "schema": 1,
        "kind": "checkpoint",
        "name": "family",
        "tier": "paper",
        "description": "toys",
        "sources": list(sources),
    }
    (place / "family.yaml").write_text(
        "# toys\n" + toysets.dump({**content, "elsewhere": [], **change})
    )
    return load_manifest("family")


def source(commit="main", verified=True, files=FILES, name="base", repo="ours/model"):
    """A source of one checkpoint, with the hashes of these files or, unverified, only with their
    names."""
    entries = [
        toysets.entry(path, content) if verified else {"path": path}
        for path, content in files.items()
    ]
    common = {"checkpoint": name, "licence": "MIT", "citation": "ours", "verified": verified}
    return {"id": name, "kind": "hub", **common, "repo": repo, "revision": commit, "files": entries}


def refusal(name="family"):
    with pytest.raises(ManifestError) as caught:
        data.fetch(name)
    return str(caught.value).partition("\n  ")[2]


def test_files_come_once_and_then_from_the_cache(place, hub):
    commit = hub.add("ours/model", FILES)
    family(place, source(commit))
    found = data.fetch("family")
    assert {path: where.read_bytes() for path, where in found.items()} == FILES
    assert (
        data.checkpoint("family")
        == found["config.json"].parent
        == found["model.safetensors"].parent
    )
    asked = len(hub.requests)
    assert data.fetch("family/base") == found and len(hub.requests) == asked
    assert data.here(load_manifest("family")) == {"base": load_manifest("family").sources[0].files}


def test_what_is_not_there_is_named_with_its_page(place, hub):
    family(place, source("0" * 40))
    page = f"{hub.url}/ours/model"
    assert refusal() == (
        f"base: ours/model/config.json at {'0' * 40}: no such repository at {page}, or a private "
        "one; correct the manifest, or set HF_TOKEN"
    )
    hub.add("ours/model", FILES)
    assert refusal() == (
        f"base: ours/model/config.json at {'0' * 40}: no such file or revision at {page}; "
        "correct the manifest"
    )
    commit = hub.add("ours/model", {"config.json": FILES["config.json"]})
    family(place, source(commit))
    assert refusal() == (
        f"base: ours/model/model.safetensors at {commit}: no such file or revision at {page}; "
        "correct the manifest"
    )


def test_a_gated_repository_says_where_to_accept_its_terms_and_opens_with_a_token(
    place, hub, monkeypatch
):
    commit = hub.add("ours/model", FILES)
    hub.gated["ours/model"] = "hf_open"
    family(place, source(commit))
    assert refusal() == (
        f"base: ours/model/config.json at {commit}: gated; accept its terms at "
        f"{hub.url}/ours/model and set HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_open")
    assert set(data.fetch("family")) == set(FILES)


def test_an_interrupted_download_resumes_where_it_stopped(place, hub):
    """The client hands bytes on in pieces of 10 MiB; what it had of the first pieces is not asked
    for again."""
    files = {"config.json": b"{}", "model.safetensors": bytes(24 * 2**20)}
    family(place, source(hub.add("ours/model", files), files=files))
    hub.cut["model.safetensors"] = 1
    assert data.fetch("family")["model.safetensors"].read_bytes() == files["model.safetensors"]
    assert [
        span for method, path, span in hub.requests if method == "GET" and "safetensors" in path
    ] == [None, f"bytes={10 * 2**20}-"]


def test_a_body_that_ends_early_is_no_file_and_finished_files_are_kept(place, hub):
    family(place, source(hub.add("ours/model", FILES)))
    hub.short.add("model.safetensors")
    assert (
        "OSError: Consistency check failed: file should be of size 102400 but has size 51200"
        in refusal()
    )
    assert [
        path.name
        for path in (place / "cache").rglob("*")
        if path.suffix in (".safetensors", ".incomplete")
    ] == []
    hub.short.clear()
    hub.requests.clear()
    data.fetch("family")
    assert not any("config.json" in path for _, path, _ in hub.requests)


def test_a_wrong_byte_is_refused_and_the_file_removed(place, hub):
    family(place, source(hub.add("ours/model", FILES)))
    hub.wrong["model.safetensors"] = FILES["model.safetensors"][:-1] + b"x"
    said = refusal()
    assert (
        said.startswith("family: base: model.safetensors: expected sha256 ")
        and "what came is removed; fetch it again" in said
    )
    assert [
        path
        for path in (place / "cache").rglob("*")
        if path.is_file() and path.stat().st_size == 102400
    ] == []
    hub.wrong.clear()
    assert data.fetch("family")["model.safetensors"].read_bytes() == FILES["model.safetensors"]


def test_what_nothing_is_held_to_is_refused_until_it_is_locked(place, hub):
    hub.add("ours/model", FILES)
    family(place, source(verified=False))
    assert refusal() == "base: ours/model is not pinned; run: qpmerge data lock family"
    assert hub.requests == []


def test_lock_pins_commits_and_hashes_and_leaves_the_rest_as_it_is(place, hub):
    other = {
        "config.json": b"{}",
        "a-1.safetensors": b"one",
        "a-2.safetensors": b"two",
        "run.py": b"print()",
    }
    commits = {"base": hub.add("ours/model", FILES), "expert": hub.add("ours/expert", other)}
    before = family(
        place,
        source(verified=False),
        source(
            verified=False,
            name="expert",
            repo="ours/expert",
            files={"config.json": b"", "a-*.safetensors": b""},
        ),
    )
    text = before.path.read_text()
    assert lock("family") == commits
    files = {path: content for path, content in other.items() if path != "run.py"}
    expected = toysets.dump(
        {
            "sources": [
                source(commits["base"]),
                source(commits["expert"], name="expert", repo="ours/expert", files=files),
            ]
        }
    )
    assert (
        before.path.read_text()
        == text.partition("sources:\n")[0] + expected + text[text.index("elsewhere") :]
    )
    assert sorted(os.listdir(place)) == ["cache", "family.yaml", "mirror"]
    assert lock("family") == {} and set(data.fetch("family/expert")) == {
        "config.json",
        "a-1.safetensors",
        "a-2.safetensors",
    }


def test_lock_changes_nothing_unless_everything_came(place, hub):
    hub.add("ours/model", {"config.json": b"{}"})
    before = family(place, source(verified=False)).path.read_text()
    with pytest.raises(
        ManifestError,
        match=(
            r"family: base: expected model.safetensors in ours/model at \w{40}, found "
            r"config.json"
        ),
    ):
        lock("family")
    family(place, source(verified=False, repo="ours/none"))
    with pytest.raises(Absent, match="base: ours/none at main: no such repository at"):
        lock("family")
    assert (place / "family.yaml").read_text() == before.replace("ours/model", "ours/none")


def test_lock_pins_a_data_set_only_if_its_rows_are_the_manifests(place, hub):
    rows = toysets.texts()
    hub.add("ours/toy", {"all.parquet": toysets.on_the_hub(rows[1:])}, kind="dataset")
    toysets.write(place, rows, toysets.hub_source({"path": "all.parquet"}))
    before = (place / "toy.yaml").read_text()
    with pytest.raises(ManifestError, match="hub: .*: expected .* rows of the index, found"):
        lock("toy")
    assert (place / "toy.yaml").read_text() == before
    commit = hub.add("ours/toy", {"all.parquet": toysets.on_the_hub(rows)}, kind="dataset")
    assert lock("toy") == {"hub": commit} and same(data.rows("toy"), rows)
    assert load_manifest("toy").source("hub").verified


def test_lock_writes_nothing_into_a_manifest_of_another_layout(place, hub):
    hub.add("ours/model", FILES)
    path = family(place, source(verified=False)).path
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text())))
    before = path.read_text()
    with pytest.raises(
        ManifestError,
        match="family: base: expected the layout of the other manifests, found another",
    ):
        lock("family")
    assert path.read_text() == before


def test_a_pinned_set_without_digests_is_read_as_filed_with_validation_held_out(
    place, hub, monkeypatch
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "tables"))
    rows = toysets.texts()
    files = {
        f"{s}-0.parquet": toysets.on_the_hub([row for row in rows if row[2] == s], others=0)
        for s in ("train", "test")
    }
    hub.add("ours/toy", files, kind="dataset")
    files = [{"path": f"{s}-*.parquet", "split": s} for s in ("train", "test")]
    toysets.write(place, rows, toysets.hub_source(*files), counted=False)
    assert refusal("toy").startswith("hub: ours/toy is not pinned; run: qpmerge data lock toy")
    lock("toy")
    with pytest.raises(
        ManifestError,
        match=r"hub: expected the labels \['no', .*, found \['maybe', 'yes', 'no', 'other'\]",
    ):
        data.rows("toy")
    text = (place / "toy.yaml").read_text()
    (place / "toy.yaml").write_text(
        text.replace("labels:\n- 'no'\n- 'yes'\n- maybe", "labels: [maybe, 'yes', 'no', other]")
    )
    found = data.rows("toy")
    assert {split: part.column_names for split, part in found.items()} == dict.fromkeys(
        manifests.SPLITS, ["text", "label"]
    )
    assert [len(part) for part in found.values()] == [55, 6, 13]
    whole = datasets.Dataset.from_parquet(str(data.fetch("toy")["train-0.parquet"]))["content"][:]
    assert sorted(found["train"]["text"][:] + found["validation"]["text"][:]) == sorted(whole)
    assert found["train"].features["label"].names == ["MAYBE", "yes", "no", "other"]


def test_the_command_honours_the_endpoint_and_works_on_without_a_network(place, hub):
    """In processes of their own, as the client reads its variables when it is imported."""
    commit = hub.add("ours/model", FILES)
    family(place, source(commit), source(verified=False, name="expert", repo="ours/expert"))
    code = (
        "import sys; from qpmerge_lite.companion import cli; "
        "from qpmerge_lite.companion.data import manifests; "
        "manifests.FOLDER = manifests.Path(sys.argv[1]); sys.exit(cli.main(sys.argv[2:]))"
    )

    def qpmerge(*words, **variables):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(place / "home"), **variables}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, place, *words],
            env=environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    status, out, _ = qpmerge("data", "fetch", "family/base", "--json")
    found, asked = json.loads(out)["family/base"], len(hub.requests)
    assert status == 0 and set(found) == set(FILES) and asked > 0
    assert all((place / "home") in manifests.Path(path).parents for path in found.values())
    assert qpmerge("data", "verify", "family", HF_HUB_OFFLINE="1") == (
        0,
        "family: 2 files verified\n",
        "",
    )
    status, out, err = qpmerge("data", "fetch", "paper", HF_HUB_OFFLINE="1")
    assert status == 1 and out.startswith("family/base: 2 files in ") and len(hub.requests) == asked
    assert err.startswith(
        "qpmerge: family/expert: no source serves\n  expert: ours/expert is not pinned; run: "
        "qpmerge data lock family"
    )


def test_the_command_locks_and_says_what_it_pinned(place, hub, capsys):
    commit = hub.add("ours/model", FILES)
    family(place, source(verified=False))
    assert (
        cli.main(["data", "lock", "paper"]) == 0
        and capsys.readouterr().out == f"family: base at {commit}\n"
    )
    assert (
        cli.main(["data", "lock", "family"]) == 0
        and capsys.readouterr().out == "family: nothing to lock\n"
    )
    assert cli.main(["data", "fetch", "family", "--quiet"]) == 0 and capsys.readouterr().out == ""


def test_without_a_connection_the_cure_is_named(place, monkeypatch):
    family(place, source("0" * 40))
    with Hub() as gone:
        url = gone.url
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal().endswith(
        f"not in the cache, and {url} was not reached; check the network, HF_HUB_OFFLINE and "
        f"HF_ENDPOINT"
    )


def test_the_other_client_finds_its_way_too(place, hub):
    """``datasets`` reads a repository by itself, so that the server of these tests is held to both
    clients."""
    hub.add(
        "ours/toy",
        {"data/train-0.parquet": toysets.on_the_hub(toysets.texts()), "README.md": b"a toy\n"},
        kind="dataset",
    )
    code = "import datasets; print(datasets.load_dataset('ours/toy')['train'].num_rows)"
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(place / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "76", done.stderr


@pytest.mark.parametrize(
    "name", [name for name in manifests.names() if not name.startswith("smoke")]
)
def test_shipped_manifests_can_be_locked_where_they_are_not(name):
    """Every source that nobody has verified is laid out as ``lock`` rewrites it, and comes through
    it unchanged but for its pins."""
    from dataclasses import replace

    from qpmerge_lite.companion.data.hub import _rewritten

    manifest = load_manifest(name)
    text = manifest.path.read_text()
    for source in manifest.sources:
        if source.kind == "hub":
            files = tuple(
                replace(file, path=file.path.replace("*", "0"), bytes=1, sha256="a" * 64)
                for file in source.files
            )
            pinned = replace(
                source, verified=True, files=files, extra={**source.extra, "revision": "b" * 40}
            )
            text = _rewritten(text, pinned)
            assert manifests.parse(manifest.path, text).source(source.id) == pinned
    kept = [
        line for line in manifest.path.read_text().splitlines() if line.startswith(("#", "  #"))
    ]
    assert all(line in text.splitlines() for line in kept)
