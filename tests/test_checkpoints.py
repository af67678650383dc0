# ruff: noqa: F402, F811 (fixtures come by import)
"""`qpmerge merge` and `qpmerge check`: a merged folder is what the Python function gives, loads in
a process that does not know this package, and is all there or not at all."""

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_families import (
    DENSE,
    EXPERTS,
    KILLED,
    ROOT,
    SIZE,
    Family,
    assert_same,
    change,
    contents,
    cut,
    families,
    family,
    reshape,
    run,
    safetensors,
    state_of,
    texts,
    tokenizer,
    transformers,
    tuned,
)

import qpmerge_lite as q
from qpmerge_lite.checkpoints import (
    calibrated,
    methods,
    tensors,
    weights_only,
)
from qpmerge_lite.checkpoints.calibration import records, tokens
from qpmerge_lite.checkpoints.calibration.sources import Row
from qpmerge_lite.checkpoints.commands.words import named_folders
from qpmerge_lite.checkpoints.compatibility import check
from qpmerge_lite.checkpoints.headers import read_header
from qpmerge_lite.checkpoints.merging import merge_folders
from qpmerge_lite.checkpoints.methods import CALIBRATED, WEIGHTS_ONLY, literal
from qpmerge_lite.checkpoints.orders import Order
from qpmerge_lite.companion import cli

__all__ = ["families", "family"]  # fixtures
OPTIONS = {
    "ties": [{}, {"semantics": "mergekit", "density": 0.3}],
    "wudi": [{"steps": 3, "rate": 0.01}],
    "dc_merge": [{"density": 0.1}],
    "soup": [{}, {"weights": [0.7, 0.3]}],
}
CASES = [(name, options) for name in WEIGHTS_ONLY for options in OPTIONS.get(name, [{}])]


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_weights_alone_give_what_the_function_gives(
    families, kind, method, options, tmp_path, capsys
):
    family = families[kind]
    words = [word for k, v in options.items() for word in ("--option", f"{k}={v}")]
    done = run(
        capsys, "merge", *family.folders, "--out", tmp_path / "out", "--method", method, *words
    )
    assert (done[0], done[2]) == (0, "")
    expected = getattr(q, method)(family.model, family.states, **options)
    assert_same(tmp_path / "out", expected.state_dict)


QUICK = {"qp": {"basis": "rows", "folds": 2}, "sketched": {"rank": 8}}


@pytest.mark.parametrize("method", CALIBRATED)
def test_calibration_files_give_what_the_function_gives(families, method, tmp_path, capsys):
    family, options = families["bert"], QUICK.get(method, {})
    words = [word for k, v in options.items() for word in ("--option", f"{k}={v}")]
    out = tmp_path / "out"
    done = run(capsys, "merge", *family.folders, "--out", out, *family.given,
               "--method", method, *words, "--json")  # fmt: skip
    assert (done[0], done[2]) == (0, "")
    expected = getattr(q, method)(family.model, family.states, family.calibration(), **options)
    found = state_of(out)
    assert found.keys() == expected.state_dict.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected.state_dict[name], rtol=0, atol=1e-12)
    told = json.loads(done[1])
    assert len(told["table"]) == len(expected.table)
    assert {n for names in told["averaged"].values() for n in names} == expected.averaged.keys()


def test_a_decoder_in_shards_and_half_precision_is_merged_too(families, tmp_path, capsys):
    family, out = families["llama"], tmp_path / "out"
    status, told, _ = run(
        capsys, "merge", *family.folders, "--out", out, *family.given,
        "--method", "regmean", "--batch-size", 4,
    )  # fmt: skip
    assert status == 0 and "method: regmean (it was asked for)" in told
    expected = q.regmean(family.model, family.states, family.calibration(4))
    assert_same(out, expected.state_dict)


def test_the_default_without_calibration_is_soup(families, tmp_path, capsys):
    family = families["bert"]
    _, told, _ = run(capsys, "merge", *family.folders, "--out", tmp_path / "a")
    assert "method: soup (the default where no expert has calibration)" in told
    assert run(capsys, "merge", *family.folders, "--out", tmp_path / "c", "--quiet") == (0, "", "")


LOADED = """
import sys, torch, transformers
transformers.utils.logging.disable_progress_bar()
for kind, folder in zip(("BertModel", "LlamaForCausalLM"), sys.argv[1:]):
    model, told = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    print(sorted(name for name, found in told.items() if found), model.dtype)
    head = model.get_output_embeddings()
    print(head is None or head.weight is model.get_input_embeddings().weight)
    with torch.no_grad():
        print(bool(torch.isfinite(model(torch.tensor([[3, 4, 5]]))[0]).all()))
tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
print(tokenizer("w1 w2")["input_ids"])
print("qpmerge_lite" in sys.modules)
"""


def test_the_result_loads_where_this_package_is_not_known(families, tmp_path, capsys):
    places = []
    for kind, family in families.items():
        places.append(str(tmp_path / kind))
        assert run(capsys, "merge", *family.folders, "--out", places[-1])[0] == 0
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *places], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[] torch.float32", "True", "True",
        "[] torch.bfloat16", "True", "True",
        "[3, 4]", "False",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_folder_is_the_base_s_but_for_the_numbers(families, kind, tmp_path, capsys):
    family, out = families[kind], tmp_path / "out"
    assert run(capsys, "merge", *family.folders, "--out", out, "--method", "ties")[0] == 0
    before, after = contents(family.base), contents(out)
    assert after.keys() == before.keys() | {"merge.json", "README.md"}
    for name, content in before.items():
        if not name.endswith(".safetensors"):
            assert after[name] == content
        else:
            (length,) = struct.unpack("<Q", content[:8])
            assert after[name][: 8 + length] == content[: 8 + length]
            assert len(after[name]) == len(content) and after[name] != content


@pytest.mark.parametrize("words", [
    ["--method", "dare", "--option", "seed=3"],
    ["--method", "qp", "--option", "basis=rows"],
], ids=str)  # fmt: skip
def test_a_second_run_writes_the_same_bytes(families, words, tmp_path, capsys):
    family = families["bert"]
    given = family.given if "qp" in words else []
    for name in ("a", "b"):
        done = run(capsys, "merge", *family.folders, "--out", tmp_path / name, *words, *given)
        assert done[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    written = (tmp_path / "a" / "merge.json").read_text() + (tmp_path / "a/README.md").read_text()
    assert str(family.root.parent) not in written


def test_the_manifest_has_what_it_takes_to_make_the_merge_again(families, tmp_path, capsys):
    family, out = families["llama"], tmp_path / "out"
    run(capsys, "merge", *family.folders, "--out", out, "--method", "ties",
        "--option", "density=0.4", "--option", "semantics=peft")  # fmt: skip
    told = json.loads((out / "merge.json").read_text(encoding="utf-8"))
    assert told["method"] == "ties" and told["options"] == {"density": 0.4, "semantics": "peft"}
    assert [source["name"] for source in told["inputs"]] == ["base", *EXPERTS]
    for source, folder in zip(told["inputs"], family.folders):
        weights = {path.name for path in Path(folder).glob("*.safetensors")}
        assert len(weights) > 1 and weights <= source["files"].keys()
    assert told["versions"]["qpmerge_lite"] == q.__version__
    assert "`ties`" in (out / "README.md").read_text(encoding="utf-8")


def test_statistics_of_norms_are_averaged_whatever_the_method():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    experts = {name: tuned(base, seed).state_dict() for seed, name in enumerate(EXPERTS)}
    for seed, state in enumerate(experts.values()):
        state["1.running_var"] = torch.rand(3) + seed
    entries = tensors.Entries(base.state_dict())
    for method, options in ((q.task_arithmetic, {}), (q.ties, {}), (q.soup, {"weights": [2, -1]})):
        expected = method(base, experts, **options).state_dict
        found = method(entries, experts, **options).state_dict
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_tied_weights_that_are_both_in_the_files_stay_tied(family, tmp_path, capsys):
    """As files of other writers have them; what is drawn at random is drawn once for both."""
    names = ("embeddings.word_embeddings.weight", "lm_head.weight")
    for folder in family.folders:
        path = Path(folder, "model.safetensors")
        state = safetensors.load_file(path)
        state[names[1]] = state[names[0]].clone()
        safetensors.save_file(state, path, metadata={"format": "pt"})
        change(Path(folder), tie_word_embeddings=True)
    out = tmp_path / "out"
    assert run(capsys, "merge", *family.folders, "--out", out, "--method", "dare")[0] == 0
    found = state_of(out)
    assert torch.equal(found[names[0]], found[names[1]])


def test_a_killed_merge_leaves_no_output(families, tmp_path, capsys):
    family, out = families["llama"], tmp_path / "out"
    before = contents(family.root)
    words = ["merge", *family.folders, "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists() and contents(family.root) == before
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    assert run(capsys, *words)[0] == 0


def test_a_full_disk_is_an_error_that_leaves_nothing(families, tmp_path, capsys, monkeypatch):
    def full(shards, name, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors.Shards, "write", full)
    status, _, err = run(capsys, "merge", *families["bert"].folders, "--out", tmp_path / "out")
    assert status == 1 and "--out" in err and "No space left on device" in err
    assert list(tmp_path.iterdir()) == []


def pickle_disguised(folder):
    torch.save({"a": torch.zeros(2)}, folder / "model.safetensors")


def pickles_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')


def index_without_its_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def index_to_elsewhere(folder):
    (folder / "model.safetensors").unlink()
    places = {"weight_map": {"a": "../first/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


def index_of_other_tensors(folder):
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    places = {"weight_map": {"nonesuch": "x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


EMBEDDING = "embeddings.word_embeddings.weight"
NO_JSON = struct.pack("<Q", 4) + b"\xff{}]"
DAMAGES = {
    "shard cut short": (
        lambda folder: cut(folder / "model.safetensors", 3000),
        ["model.safetensors", "a file of", "cut short or damaged"],
    ),
    "header cut short": (
        lambda folder: cut(folder / "model.safetensors", 100),
        ["model.safetensors: expected a whole safetensors header", "announces"],
    ),
    "header that is no JSON": (
        lambda folder: (folder / "model.safetensors").write_bytes(NO_JSON),
        ["model.safetensors: expected a safetensors header in JSON"],
    ),
    "empty file of weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        ["model.safetensors: expected a whole safetensors header, found a file of 0 bytes"],
    ),
    "pickle under another name": (
        pickle_disguised,
        ["model.safetensors: expected safetensors, found a pickled file", "save_pretrained"],
    ),
    "pickles only": (pickles_only, ["pytorch_model.bin", "weights in safetensors"]),
    "adapter without its weights": (
        adapter_only,
        ["adapter_model.safetensors: expected the weights"],
    ),
    "missing shard": (
        index_without_its_shard,
        ["weight_map: expected a file 'model-00002-of-00002.safetensors'", "fetch the missing"],
    ),
    "index to another folder": (
        index_to_elsewhere,
        ["weight_map: expected files in its own folder, found '../first/model.safetensors'"],
    ),
    "index of other tensors": (
        index_of_other_tensors,
        ["tensor 'nonesuch': expected the tensor in x.safetensors, found it nowhere"],
    ),
    "remote code": (
        lambda folder: change(
            folder, auto_map={"AutoModel": "model.Own"}, architectures=["NoSuchModel"]
        ),
        ["config.json, auto_map", "needs code from its folder"],
    ),
    "quantised": (
        lambda folder: change(folder, quantization_config={"quant_method": "gptq"}),
        ["config.json, quantization_config", "quantised ones (gptq)", "dequantised"],
    ),
    "other vocabulary": (
        lambda folder: (
            change(folder, vocab_size=41),
            reshape(folder, EMBEDDING, lambda value: torch.zeros(41, 8)),
        ),
        ["config.json, vocab_size: expected 40, found 41", "shape (40, 8), found shape (41, 8)"],
    ),
    "other number of heads": (
        lambda folder: change(folder, num_attention_heads=4),
        ["num_attention_heads: expected 2, found 4"],
    ),
    "other architecture": (
        lambda folder: change(folder, architectures=["BertForMaskedLM"]),
        ["architectures: expected ['BertModel'], found ['BertForMaskedLM']"],
    ),
    "other kind of dtype": (
        lambda folder: reshape(folder, DENSE, lambda value: value.to(torch.int64)),
        [f"tensor {DENSE!r}: expected dtype F32, found dtype I64"],
    ),
    "no configuration": (
        lambda folder: (folder / "config.json").unlink(),
        ["config.json: expected a file, found none"],
    ),
    "configuration that does not parse": (
        lambda folder: (folder / "config.json").write_text("{"),
        ["config.json: expected JSON in UTF-8"],
    ),
    "no folder": (shutil.rmtree, ["second: expected a folder with a model, found nothing"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_headers_show_is_refused_before_a_weight_is_read(
    family, name, tmp_path, capsys, monkeypatch
):
    damage, expected = DAMAGES[name]
    damage(family.root / "second")
    before = contents(family.root)
    monkeypatch.setattr(tensors, "read_tensor", None)
    status, out, _ = run(capsys, "check", *family.folders)
    assert status == 1 and "ERROR" in out
    refused, _, err = run(capsys, "merge", *family.folders, "--out", tmp_path / "out")
    assert refused == 1
    for part in expected:
        assert part in out and part in err, (out, err)
    assert "second" in err and not (tmp_path / "out").exists()
    assert contents(family.root) == before and [p.name for p in tmp_path.iterdir()] == ["bert"]


WEIGHTS = {
    "NaN": lambda value: value.fill_(torch.nan),
    "infinite": lambda value: value.fill_(torch.inf),
}


@pytest.mark.parametrize("who", ["base", "second"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "regmean"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_finite_are_refused_with_their_file(
    family, name, who, method, tmp_path, capsys
):
    reshape(family.root / who, DENSE, WEIGHTS[name])
    given = family.given if method == "regmean" else []
    words = ["merge", *family.folders, "--out", tmp_path / "out", "--method", method, *given]
    status, _, err = run(capsys, *words)
    assert status == 1 and DENSE in err and "NaN or infinite" in err
    assert f"read from {family.root / who / 'model.safetensors'}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


FILES = {
    "empty": ("", ["first.jsonl: expected at least one text, found none"]),
    "mis-encoded": ('{"text": "Grüße"}'.encode("latin-1"), ["expected text in UTF-8", "position"]),
    "mis-columned": (
        '{"text": "w1 w2"}\n{"sentence": "w1", "label": 0}',
        ["first.jsonl, line 2: expected a field 'text', found only 'sentence', 'label'; rename"],
    ),
    "no JSON": ("w1 w2\n", ["first.jsonl, line 1: expected an object of JSON"]),
    "no object": ("[1, 2]", ["line 1: expected an object of JSON, found a list"]),
    "no words": ('{"text": 5}', ["line 1: expected words in the field 'text', found 5"]),
    "one input for auto": ('{"text": "w1 w2"}', ["'first'", "at least two calibration inputs"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_calibration_file_that_is_none_is_refused(family, name, tmp_path, capsys):
    content, expected = FILES[name]
    write(family.files["first"], content)
    words = ["merge", *family.folders, "--out", tmp_path / "out", *family.given]
    status, _, err = run(capsys, *words)
    assert status == 1 and all(part in err for part in expected), err
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


USAGE = {
    "a task without calibration": (
        ["--calibration", "first=FILES/first.jsonl"],
        ["--calibration: expected a file for every expert", "none for 'second'", "second=FILE"],
    ),
    "calibration of nobody": (
        ["--calibration", "third=FILES/first.jsonl"],
        ["--calibration: expected one of the experts (first, second), found 'third'"],
    ),
    "calibration for weights alone": (
        ["--method", "soup", "--calibration", "first=FILES/first.jsonl"],
        ["soup looks at weights only", "leave it out"],
    ),
    "calibration that is not there": (
        ["--calibration", "first=FILES/no.txt", "--calibration", "second=FILES/second.jsonl"],
        ["no.txt: expected a calibration file that can be read"],
    ),
    "a table": (
        ["--calibration", "first=FILES/no.csv", "--calibration", "second=FILES/second.jsonl"],
        ["no.csv: expected JSON lines, Parquet or plain text, found a .csv file"],
    ),
    "calibration without a name": (
        ["--calibration", "FILES"],
        ["--calibration: expected NAME=VALUE, such as french=french.jsonl"],
    ),
    "unknown method": (["--method", "mean"], ["--method: expected one of qp, ", "'mean'"]),
    "unknown option": (
        ["--method", "ties", "--option", "desnity=0.1"],
        ["--option: expected an option of ties (density, scale, weights, semantics)", "'desnity'"],
    ),
    "option out of range": (
        ["--method", "ties", "--option", "density=7"],
        ["density: expected a fraction in (0, 1], found 7"],
    ),
    "option twice": (
        ["--option", "weights=[1,0]", "--option", "weights=[0,1]"],
        ["--option: expected 'weights' once"],
    ),
    "no length": (["--max-length", "0"], ["--max-length: expected a whole number from 1 on"]),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_refused_before_anything_is_read(
    families, name, tmp_path, capsys, monkeypatch
):
    words, expected = USAGE[name]
    family = families["bert"]
    monkeypatch.setattr(tensors, "read_tensor", None)
    words = [word.replace("FILES", str(family.root)) for word in words]
    status, _, err = run(capsys, "merge", *family.folders, "--out", tmp_path / "out", *words)
    assert status == 1 and all(part in err for part in expected), err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_is_not_touched(families, tmp_path, capsys):
    family, full = families["bert"], tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    before = contents(family.root)
    places = {
        full: "expected a new or an empty folder, found one with files in it",
        tmp_path / "file": "expected a new folder, found a file or a link",
        tmp_path / "no" / "out": "make that folder first",
        family.base / "merged": "expected a folder of its own",
    }
    for place, expected in places.items():
        status, _, err = run(capsys, "merge", *family.folders, "--out", place)
        assert status == 1 and f"--out {place}" in err and expected in err
    assert contents(tmp_path) == {"full/mine": b"kept", "file": b"kept"}
    assert contents(family.root) == before
    (tmp_path / "empty").mkdir()
    assert run(capsys, "merge", *family.folders, "--out", tmp_path / "empty")[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_refused(families, tmp_path, capsys):
    tmp_path.chmod(0o500)
    status, _, err = run(capsys, "merge", *families["bert"].folders, "--out", tmp_path / "out")
    tmp_path.chmod(0o700)
    assert status == 1 and "a place that can be written" in err


def test_a_check_says_what_is_to_be_known(family, capsys):
    second = family.root / "second"
    reshape(second, DENSE, lambda value: value.half())
    change(second, layer_norm_eps=1e-6, _name_or_path="elsewhere", unheard_of=1)
    change(second, "tokenizer_config.json", model_max_length=7)
    (second / "pytorch_model.bin").write_bytes(b"never opened")
    status, out, _ = run(capsys, "check", *family.folders, "--json")
    report = json.loads(out)
    told = {(f["level"], Path(f["where"].partition(",")[0]).name) for f in report["findings"]}
    assert status == 0 and told == {
        ("WARNING", "model.safetensors"),
        ("WARNING", "config.json"),
        ("WARNING", "tokenizer_config.json"),
        ("INFO", "pytorch_model.bin"),
        ("INFO", "chat_template.jinja"),
    }
    sizes = [Path(folder, "model.safetensors").stat().st_size for folder in family.folders]
    assert report["bytes"] == sum(sizes) and report["tensors"] == len(state_of(family.base))
    assert run(capsys, "check", *family.folders, "--quiet") == (0, "", "")
    status, out, _ = run(capsys, "check", *family.folders)
    assert status == 0 and "0 errors, 3 warnings" in out
    assert (
        "found dtype F16; nothing is to be done: it is merged in float64 and stored in F32" in out
    )


def test_native_models_with_code_of_their_own_are_merged_without_it(family, tmp_path, capsys):
    for folder in family.folders:
        change(Path(folder), auto_map={"AutoModel": "evil.Model"})
        Path(folder, "evil.py").write_text("raise SystemExit('run')")
    words = ["merge", *family.folders, "--out", tmp_path / "out", *family.given]
    assert run(capsys, *words, "--method", "regmean")[0] == 0
    assert not (tmp_path / "out" / "evil.py").exists()


def test_other_ties_are_a_warning(families, tmp_path, capsys):
    shutil.copytree(families["llama"].root, tmp_path / "llama")
    change(tmp_path / "llama" / "second", tie_word_embeddings=False)
    folders = [tmp_path / "llama" / name for name in ("base", *EXPERTS)]
    status, out, _ = run(capsys, "check", *folders)
    assert status == 0 and "WARNING" in out
    assert "tie_word_embeddings: expected True, found False; the merge is tied as the base" in out


def test_random_methods_ask_for_the_names_of_tied_weights(families, tmp_path, capsys, monkeypatch):
    words = ["merge", *families["llama"].folders, "--out", tmp_path / "out"]
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    status, _, err = run(capsys, *words, "--method", "della")
    assert status == 1 and "expected transformers" in err and "such as soup" in err
    assert list(tmp_path.iterdir()) == []
    assert run(capsys, *words)[0] == 0


def test_an_encoder_with_a_decoder_is_merged_by_weights_alone(tmp_path, capsys):
    torch.manual_seed(0)
    size = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    family = Family(
        tmp_path / "t5",
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=40, decoder_start_token_id=0, **size)
        ),
    )
    words = ["merge", *family.folders, "--out"]
    for method in ("dare", "ties"):
        assert run(capsys, *words, tmp_path / method, "--method", method)[0] == 0
        expected = getattr(q, method)(family.model, family.states)
        assert_same(tmp_path / method, expected.state_dict)
    status, _, err = run(capsys, *words, tmp_path / "out", *family.given)
    assert status == 1 and "first.jsonl, line 1: expected a field 'target'" in err


def test_no_network_is_asked_and_random_numbers_are_left_alone(
    families, tmp_path, capsys, monkeypatch
):
    def refused(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    state = torch.get_rng_state()
    words = ["merge", *families["bert"].folders, *families["bert"].given]
    for method in ("regmean", "qp"):
        assert run(capsys, *words, "--out", tmp_path / method, "--method", method)[0] == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_that_goes_while_it_is_read_is_named(family, tmp_path, capsys, monkeypatch):
    read = tensors.read_tensors

    def gone(checkpoint, names):
        if checkpoint.name == "second":
            cut(checkpoint.folder / "model.safetensors", 4000)
        return read(checkpoint, names)

    monkeypatch.setattr(weights_only, "read_tensors", gone)
    status, _, err = run(capsys, "merge", *family.folders, "--out", tmp_path / "out")
    assert status == 1 and "second/model.safetensors, tensor" in err and "damaged" in err
    assert not (tmp_path / "out").exists()


def test_progress_is_shown_on_request(families, tmp_path, capsys):
    family = families["bert"]
    experts = {name: family.root / name for name in EXPERTS}
    merge_folders(Order(family.base, experts, tmp_path / "out"), progress=True)
    assert "soup: 100%" in capsys.readouterr().err


def test_experts_are_named_by_their_folders_or_by_hand(tmp_path, capsys):
    (tmp_path / "a=b").mkdir()
    named = named_folders([f"x={tmp_path}", str(tmp_path / "a=b"), str(tmp_path / "c")])
    assert named == {"x": tmp_path, "a=b": tmp_path / "a=b", "c": tmp_path / "c"}
    with pytest.raises(q.errors.MergeError, match="two of that name"):
        named_folders([str(tmp_path / "c"), f"c={tmp_path}"])


def test_texts_are_cut_to_what_is_asked_and_what_the_model_has_positions_for(families):
    family = families["bert"]
    report = check(family.base, {name: family.root / name for name in EXPERTS})
    model, _ = calibrated.build(report.base)
    assert tokens.positions(model) == 16
    long, short = (Row(f"row {text}", (text,)) for text in ("w1 " * 30, "w2"))
    rows, cut = tokens.token_rows([long, short], tokenizer(), 16)
    assert [len(row["input_ids"]) for row in rows] == [16, 1] and cut == 1
    first, second = tokens.batches([{"input_ids": ids} for ids in ([4, 5], [6], [7])], 2, 9)
    assert first["input_ids"].tolist() == [[4, 5], [6, 9]]
    assert first["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert second["input_ids"].tolist() == [[7]]
    roberta = transformers.RobertaConfig(max_position_embeddings=16, pad_token_id=1, **SIZE)
    assert tokens.positions(transformers.RobertaModel(roberta)) == 14
    with pytest.raises(q.errors.MergeError, match="token ids below 40"):
        tokens.check_tokens([long, short], [{"input_ids": [3]}, {"input_ids": [40]}], model)


def test_tensors_are_read_and_written_as_the_library_of_the_format_does(tmp_path):
    state = {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "complex": torch.randn(2, dtype=torch.complex64),
        "eight": torch.randn(3).to(torch.float8_e4m3fn),
        "brain": torch.randn(2, 2).bfloat16(),
        "counts": torch.arange(3),
    }
    safetensors.save_file(state, tmp_path / "a", metadata={"format": "pt"})
    header = read_header(tmp_path / "a")
    assert header.metadata == {"format": "pt"} and header.entries.keys() == state.keys()
    (tmp_path / "new").mkdir()
    shards = tensors.Shards(tmp_path / "new", {"a": header})
    for name, value in state.items():
        read = tensors.read_tensor(header, name)
        assert read.dtype == value.dtype and read.shape == value.shape
        assert read.numpy(force=True).tobytes() == value.numpy().tobytes() if name in (
            "scalar", "empty", "flags", "complex", "counts"
        ) else torch.equal(read.float(), value.float())  # fmt: skip
        shards.write(name, value)
    shards.finish()
    assert (tmp_path / "new" / "a").read_bytes() == (tmp_path / "a").read_bytes()


def test_every_method_of_the_command_is_a_function_of_the_package():
    for name in (*WEIGHTS_ONLY, *CALIBRATED):
        assert callable(methods.function_of(name)) and not {"heads", "experts"} & set(
            methods.options_of(name)
        )
    assert "ridge" in methods.options_of("qp") and "folds" in methods.options_of("qp")
    assert [literal(text) for text in ("1", "[1, 2]", "rows")] == [1, [1, 2], "rows"]


def test_whatever_is_called_as_a_method_is_one_of_the_command_or_takes_what_it_cannot_say():
    called = {
        name
        for name in filter(lambda name: inspect.isfunction(getattr(q, name)), q.__all__)
        if list(inspect.signature(getattr(q, name)).parameters)[:3]
        == ["base", "experts", "calibration"]
    }
    functions = {"greedy_soup", "fisher", "adamerging"}  # take functions: a score, or heads
    passes = {"merge_sequentially", "merge_together", "layer_moments"}
    assert called - functions - passes == {*WEIGHTS_ONLY, *CALIBRATED}


@pytest.mark.parametrize("older", ["base", "first"])
def test_norms_may_have_older_names(families, older, tmp_path, capsys):
    """As in files of BERT: transformers reads LayerNorm.gamma as LayerNorm.weight."""
    family, names = families["bert"], ("base", *EXPERTS)
    for name in names:
        shutil.copytree(family.root / name, tmp_path / name)
    path = tmp_path / older / "model.safetensors"
    state = {}
    for name, value in safetensors.load_file(path).items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        state[name.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    safetensors.save_file(state, path, {"format": "pt"})
    folders = [tmp_path / name for name in names]
    status, told, _ = run(capsys, "check", *folders)
    assert status == 0 and "expected the base's names of norms" in told
    for words in (["--method", "soup"], ["--method", "regmean", *family.given]):
        out, same = tmp_path / words[1], tmp_path / f"{words[1]}-same"
        assert run(capsys, "merge", *folders, "--out", out, *words)[0] == 0
        assert run(capsys, "merge", *family.folders, "--out", same, *words)[0] == 0
        written = {entry for entry in safetensors.load_file(out / "model.safetensors")}
        assert any("gamma" in name for name in written) == (older == "base")
        merged = transformers.BertModel.from_pretrained(out).state_dict()
        assert all(torch.equal(merged[name], value) for name, value in state_of(same).items())


def launched(program, *words):
    """Exit status of what torchrun starts, on a free port."""
    assert program == "torchrun"
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    return subprocess.run(command, env=os.environ | more, timeout=120).returncode


def write_classifiers(base, root):
    """Experts with heads of their own, and labelled texts of one of them."""
    from test_checkpoints_heads import LABELS, expert_of

    for seed, (name, labels) in enumerate(LABELS.items()):
        kind = "BertForSequenceClassification"
        expert_of(base, kind, name, seed).save_pretrained(root / "tuned" / name)
        rows = [{"text": text, "topic": labels[0]} for text in texts(seed)]
        lines = "\n".join(json.dumps(row) for row in rows)
        (root / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def test_the_commands_of_the_readme_run(families, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family = families["bert"]
    for name, copied in zip(("base", *EXPERTS), ("base", "tuned/french", "tuned/german")):
        shutil.copytree(family.root / name, tmp_path / copied)
    shutil.copy(family.files["first"], "french.jsonl")
    shutil.copy(family.files["second"], "german.jsonl")
    Path("german.txt").write_text("\n".join(texts(6)), encoding="utf-8")
    (tmp_path / "unseen").mkdir()
    shutil.copy(family.files["second"], Path("unseen", "french.jsonl"))
    Path("unseen", "german.txt").write_text("\n".join(texts(7)), encoding="utf-8")
    write_classifiers(family.model, tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("### From the command line")[2].partition("\n## ")[0]
    blocks = re.findall("```sh\n(.*?)```", section, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    ran = []
    for program, *words in (shlex.split(line, comments=True) for line in lines):
        if program == "qpmerge":
            ran.append(run(capsys, *words))
        else:
            assert launched(program, *words) == 0
    assert [(status, err) for status, _, err in ran] == [(0, "")] * 11
    torch.testing.assert_close(
        state_of(tmp_path / "halves"),
        q.featcal(family.model, family.states, family.calibration()).state_dict,
        rtol=0,
        atol=1e-5,
    )
    assert "method: auto (the default where every expert has calibration)" in ran[2][1]
    told = json.loads(Path("chosen", "merge.json").read_text(encoding="utf-8"))
    assert f"chosen: {told['choice']['chosen']}\n" in ran[2][1]
    torch.testing.assert_close(
        state_of(tmp_path / "chosen"),
        q.auto(family.model, family.states, family.calibration()).state_dict,
        rtol=0,
        atol=1e-12,
    )
    assert "base and differences give the expert back" in " ".join(said for _, said, _ in ran)
    (recipe,) = re.findall("```py\n(.*?)```", section, re.DOTALL)
    told = "\nimport sys; print(model.config.id2label[4], 'qpmerge_lite' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", recipe + told], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "war False\n"), done.stderr
    with pytest.raises(SystemExit, match="0"):
        cli.main(["merge", "--help"])
    assert "exit status:" in capsys.readouterr().out
