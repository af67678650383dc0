# ruff: noqa: F811 (fixtures come by import)
"""Checkpoints of the Hub, through its own client and over HTTP on this machine: what is asked for,
what is written down, and what is refused."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from checkpoint_families import (
    Family,
    bert,
    change,
    contents,
    hub,  # noqa: F401
    llama,
    run,
    safetensors,
    state_of,
    torch,
)
from test_checkpoints_adapters import factors, product, write_adapter

import qpmerge_lite as q
from qpmerge_lite.checkpoints import headers, outlines
from qpmerge_lite.checkpoints import hub as client
from qpmerge_lite.checkpoints.calibration import records
from qpmerge_lite.checkpoints.commands.words import named_folders
from qpmerge_lite.checkpoints.findings import size

transformers = pytest.importorskip("transformers")
LAYER = "encoder.layer.0.attention.self.query"
HUB_WORDS = ["hf:ours/base", "hf:ours/first", "hf:ours/second"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    transformers.utils.logging.disable_progress_bar()
    made = Family(tmp_path_factory.mktemp("hub") / "bert", bert)
    write_adapter(made.root / "adapter", factors(LAYER, 8, 8))
    return made


@pytest.fixture
def commits(family, hub):
    """Repository -> its commit; each has files beside the model that nobody should fetch."""
    made = {}
    for name in ("base", "first", "second", "adapter"):
        files = contents(family.root / name)
        files |= {"pytorch_model.bin": b"pickle", "modeling.py": b"run()", "README.md": b"# Ours"}
        files |= {"onnx/model.safetensors": b"another", "model.fp16.safetensors": b"another"}
        made[name] = hub.add(f"ours/{name}", files)
    return made


def asked(hub, method="GET"):
    """Paths that bytes of files were asked for of."""
    whole = [path for verb, path, _ in hub.requests if verb == method]
    return {path.rpartition("/")[2] for path in whole if "/resolve/" in path or "/large/" in path}


def test_a_merge_of_the_hub_s_is_that_of_the_folders(family, hub, commits, tmp_path, capsys):
    out = tmp_path / "out"
    done = run(capsys, "merge", *HUB_WORDS, "--out", out, "--method", "ties", "--quiet")
    assert done == (0, "", "")
    run(capsys, "merge", *family.folders, "--out", tmp_path / "local", "--method", "ties")
    local, fetched = contents(tmp_path / "local"), contents(out)
    assert local.keys() == fetched.keys()
    for name in local.keys() - {"merge.json", "README.md"}:
        assert local[name] == fetched[name], name
    inputs, beside = (json.loads(c["merge.json"])["inputs"] for c in (fetched, local))
    for source, other, name in zip(inputs, beside, ("base", "first", "second")):
        assert source["folder"] == f"ours/{name}" and source["revision"] == commits[name]
        assert source["name"] == name and source["files"] == other["files"]
    assert asked(hub) <= contents(family.base).keys() and "model.safetensors" in asked(hub)


def test_what_was_fetched_is_not_fetched_again(hub, commits, tmp_path, capsys):
    run(capsys, "merge", *HUB_WORDS, "--out", tmp_path / "a")
    hub.requests.clear()
    assert run(capsys, "merge", *HUB_WORDS, "--out", tmp_path / "b")[0] == 0
    assert asked(hub) == set()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_revision_is_the_one_that_was_asked_for(family, hub, commits, tmp_path, capsys):
    other = hub.add("ours/first", contents(family.root / "second"))
    assert other != commits["first"]
    for number, revision in enumerate(("main", commits["first"], "of a branch")):
        if number == 2:
            hub.repositories["models", "ours/first"]["v1"] = hub.repositories[
                "models", "ours/first"
            ][commits["first"]]
            revision = "v1"
        out = tmp_path / str(number)
        words = [family.base, f"mine=hf:ours/first@{revision}", "--out", out]
        assert run(capsys, "merge", *words)[0] == 0
        source = json.loads((out / "merge.json").read_text())["inputs"][1]
        assert source["name"] == "mine"
        assert source["revision"] == (other if revision == "main" else commits["first"])
        expert = family.states["second" if revision == "main" else "first"]
        assert torch.equal(state_of(out)["pooler.dense.weight"], expert["pooler.dense.weight"])


def test_an_adapter_comes_from_the_hub(family, hub, commits, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, "merge", family.base, "hf:ours/adapter", "--out", out, "--quiet")[0] == 0
    name = f"{LAYER}.weight"
    update = 1.5 * product(factors(LAYER, 8, 8), LAYER).float()
    torch.testing.assert_close(state_of(out)[name], family.model.state_dict()[name] + update)
    source = json.loads((out / "merge.json").read_text())["inputs"][1]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= source["files"].keys()
    assert source["revision"] == commits["adapter"]


def test_shards_are_those_of_the_index(hub, tmp_path, capsys):
    family = Family(tmp_path / "llama", llama, max_shard_size="1KB")
    for name in ("base", "first"):
        files = contents(family.root / name) | {"consolidated.safetensors": b"all once more"}
        hub.add(f"ours/{name}", files)
    words = ["hf:ours/base", "hf:ours/first"]
    status, out, _ = run(capsys, "check", *words, "--json")
    assert status == 0 and json.loads(out)["tensors"] == len(state_of(family.base))
    assert run(capsys, "merge", *words, "--out", tmp_path / "out")[0] == 0
    assert "consolidated.safetensors" not in asked(hub)
    expected = q.soup(family.model, {"first": family.states["first"]}).state_dict
    assert all(
        torch.equal(value, expected[name]) for name, value in state_of(tmp_path / "out").items()
    )


def test_a_check_fetches_headers_alone_and_says_what_a_merge_downloads(
    family, hub, commits, tmp_path, capsys, monkeypatch
):
    sizes = [Path(folder, "model.safetensors").stat().st_size for folder in family.folders]
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(outlines, "FIRST", 64)  # so that no header fits into the first answer
    status, out, err = run(capsys, "check", *HUB_WORDS, "--json")
    report = json.loads(out)
    assert (status, err) == (0, "") and report["downloads"] == report["bytes"] == sum(sizes)
    header = len(headers.read_header(family.base / "model.safetensors").raw)
    spans = {span for verb, path, span in hub.requests if "/large/" in path and verb == "GET"}
    assert spans == {"bytes=0-63", f"bytes=0-{header - 1}"}
    for finding in report["findings"]:
        assert finding["where"].startswith(("hf:ours/first@", "hf:ours/second@"))

    told = run(capsys, "check", *HUB_WORDS)[1]
    assert f"and downloads {size(sum(sizes))} of them first" in told
    run(capsys, "merge", family.base, "hf:ours/first", "--out", tmp_path / "out")
    report = json.loads(run(capsys, "check", *HUB_WORDS, "--json")[1])
    assert report["downloads"] == sizes[0] + sizes[2]
    assert list((tmp_path / "temporary").iterdir()) == []
    assert "downloads" not in run(capsys, "check", *family.folders)[1]


def test_a_check_finds_at_the_hub_what_it_finds_here(family, hub, commits, tmp_path, capsys):
    shutil.copytree(family.root / "second", tmp_path / "second")
    path = tmp_path / "second" / "model.safetensors"
    state = safetensors.load_file(path) | {"pooler.dense.weight": torch.zeros(8, 9)}
    safetensors.save_file(state, path, metadata={"format": "pt"})
    commit = hub.add("ours/second", contents(tmp_path / "second"))
    here = run(capsys, "check", family.base, tmp_path / "second")
    there = run(capsys, "check", family.base, "hf:ours/second")
    assert here[0] == there[0] == 1 and "found shape (8, 9)" in there[1]
    expected = here[1].replace(str(tmp_path / "second"), f"hf:ours/second@{commit}")
    assert there[1].splitlines()[:-1] == expected.splitlines()[:-1]
    refused = run(capsys, "merge", family.base, "hf:ours/second", "--out", tmp_path / "out")
    assert refused[0] == 1 and "found shape (8, 9)" in refused[2]
    assert f"hf:ours/second@{commit}/model.safetensors" in refused[2]
    spans = {span for verb, path, span in hub.requests if "/large/" in path and verb == "GET"}
    assert None not in spans  # whole files


def test_headers_are_looked_at_before_a_model_is_run(family, hub, commits, tmp_path, capsys):
    shutil.copytree(family.root / "second", tmp_path / "second")
    path = tmp_path / "second" / "model.safetensors"
    state = safetensors.load_file(path) | {"pooler.dense.weight": torch.zeros(8, 9)}
    safetensors.save_file(state, path, metadata={"format": "pt"})
    hub.add("ours/second", contents(tmp_path / "second"))
    texts = family.files["first"]
    words = ["diagnose", "hf:ours/first", "hf:ours/base", "hf:ours/second", "--calibration"]
    status, _, err = run(capsys, *words, f"second={texts}")
    assert status == 1 and "found shape (8, 9)" in err
    change(tmp_path / "second", quantization_config={"quant_method": "awq"})
    hub.add("ours/second", contents(tmp_path / "second"))
    words = [
        "moments",
        "hf:ours/second",
        "--calibration",
        texts,
        "--out",
        tmp_path / "m.safetensors",
    ]
    status, _, err = run(capsys, *words)
    assert status == 1 and "codes of quantised ones (awq)" in err
    spans = {span for verb, path, span in hub.requests if "/large/" in path and verb == "GET"}
    assert spans and None not in spans  # whole files


def gated(hub):
    hub.gated["ours/second"] = "hf_open"


def absent(hub):
    del hub.repositories["models", "ours/second"]


def pickled(hub):
    hub.add("ours/second", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})


def elsewhere(hub):
    index = {"weight_map": {"a": "../../model.safetensors"}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    hub.add("ours/second", files)


def damaged(hub):
    hub.add("ours/second", {"config.json": b"{}", "model.safetensors": b"\xff" * 40})


def nothing(hub):
    pass


REFUSED = {
    "gated": ("hf:ours/second", gated, ["hf:ours/second: expected files of the Hub, found gated",
              "accept its terms at URL/ours/second and set HF_TOKEN"]),
    "absent": ("hf:ours/second", absent, ["no such repository at URL/ours/second, or a private",
               "set HF_TOKEN"]),
    "no revision": ("hf:ours/second@v9", nothing,
                    ["hf:ours/second@v9: expected files", "no such file or revision at URL"]),
    "pickles alone": ("hf:ours/second", pickled,
                      ["expected model.safetensors, model.safetensors.index.json or an adapter's",
                       "pickled weights are never fetched"]),
    "index to elsewhere": ("hf:ours/second", elsewhere,
                           ["weight_map: expected files in its own folder"]),
    "no weights in it": ("hf:ours/second", damaged,
                         ["model.safetensors: expected a whole safetensors header"]),
    "no name": ("x=hf:", nothing, ["hf:: expected hf:owner/name or hf:owner/name@revision"]),
    "no reference": ("hf:ours/second@", nothing, ["expected hf:owner/name"]),
    "a path": ("x=hf:../second", nothing, ["expected hf:owner/name"]),
    "a name that none may have": ("hf:ours/a--b", nothing, ["HFValidationError", "correct owner"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_does_not_give_is_refused(family, hub, commits, name, tmp_path, capsys):
    word, change, expected = REFUSED[name]
    change(hub)
    refused, _, err = run(capsys, "merge", family.base, word, "--out", tmp_path / "out")
    status, out, told = run(capsys, "check", family.base, word)
    assert refused == status == 1 and not (tmp_path / "out").exists()
    for part in expected:
        assert part.replace("URL", hub.url) in err, err
        assert part.replace("URL", hub.url) in out + told, out + told


def test_a_token_opens_what_is_gated(family, hub, commits, tmp_path, capsys, monkeypatch):
    gated(hub)
    monkeypatch.setenv("HF_TOKEN", "hf_open")
    assert run(capsys, "check", family.base, "hf:ours/second")[0] == 0
    assert run(capsys, "merge", family.base, "hf:ours/second", "--out", tmp_path / "out")[0] == 0
    assert "hf_open" not in (tmp_path / "out" / "merge.json").read_text()


def test_wrong_usage_asks_for_nothing(hub, commits, tmp_path, capsys):
    words = ["merge", *HUB_WORDS, "--out", tmp_path / "out", "--method", "mean"]
    assert run(capsys, *words)[0] == 1 and hub.requests == []


def test_without_the_client_the_cure_is_named(family, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    words = [family.base, "hf:ours/first"]
    for told in (
        run(capsys, "check", *words),
        run(capsys, "merge", *words, "--out", tmp_path / "o"),
    ):
        assert told[0] == 1 and "expected huggingface_hub" in told[2]
        assert "pip install 'qpmerge-lite[hub]'" in told[2]
    assert run(capsys, "merge", *family.folders, "--out", tmp_path / "out")[0] == 0


def test_a_lost_connection_leaves_nothing(family, hub, commits, tmp_path, capsys):
    hub.short.add("model.safetensors")
    status, _, err = run(capsys, "merge", family.base, "hf:ours/first", "--out", tmp_path / "out")
    assert status == 1 and "hf:ours/first" in err and "should be of size" in err
    assert not (tmp_path / "out").exists()


def test_a_merge_works_on_without_a_network(family, hub, commits, tmp_path, capsys, monkeypatch):
    words = ["merge", family.base, "hf:ours/first", "--out"]
    assert run(capsys, *words, tmp_path / "a", "--quiet") == (0, "", "")
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(capsys, *words, tmp_path / "b", "--quiet") == (0, "", "")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for command in (["merge", "--out", tmp_path / "none"], ["check"]):
        status, _, err = run(capsys, *command, family.base, "hf:ours/second")
        assert status == 1 and "not in the cache, and" in err and "HF_HUB_OFFLINE" in err
    assert run(capsys, "check", family.base, "hf:ours/first")[0] == 0
    assert hub.requests == []


def test_words_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:x").mkdir()
    assert client.reference_of("./hf:x") is None and client.reference_of(tmp_path / "hf:x") is None
    named = named_folders(["hf:a/b", "c=hf:a/b@v=1", "hf:gpt2@refs/pr/1"])
    assert named == {
        "b": Path("hf:a/b"),
        "c": Path("hf:a/b@v=1"),
        "gpt2": Path("hf:gpt2@refs/pr/1"),
    }
    assert client.reference_of(named["gpt2"]) == client.Reference("gpt2", "refs/pr/1")
