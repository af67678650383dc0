# ruff: noqa: F811 (fixtures come by import)
"""Task vectors as experts: `delta:FILE` stands for base + difference, `qpmerge delta` writes such
files, and what does not fit the base is refused by name before a weight is read."""

import hashlib
import json
import shutil

import pytest
import torch
from checkpoint_families import (
    EXPERTS,
    assert_same,
    contents,
    families,  # noqa: F401
    hub,  # noqa: F401
    run,
    safetensors,
    state_of,
)
from test_checkpoints_adapters import ALPHA, bases, factors, product, write_adapter  # noqa: F401

from qpmerge_lite.checkpoints import tensors
from qpmerge_lite.checkpoints.commands.words import named_folders
from qpmerge_lite.checkpoints.deltas.adding import added, subtracted
from qpmerge_lite.checkpoints.deltas.reading import behind
from qpmerge_lite.checkpoints.headers import read_header

LAYER = "encoder.layer.0.output.dense.weight"


def written(capsys, base, expert, out, *words):
    """What ``qpmerge delta`` says of a file, as JSON."""
    status, told, err = run(capsys, "delta", base, expert, "--out", out, "--json", *words)
    assert (status, err) == (0, "")
    return json.loads(told)


def save(path, state):
    safetensors.save_file(state, path, metadata={"format": "pt"})
    return f"delta:{path}"


@pytest.mark.parametrize("method", ["soup", "ties", "dare", "regmean"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_differences_merge_as_their_experts_do(families, kind, method, tmp_path, capsys):
    family = families[kind]
    places = []
    for name in EXPERTS:
        path = tmp_path / f"{name}.safetensors"
        told = written(capsys, family.base, family.root / name, path, "--dtype", "float64")
        assert told["inexact"] == {} and told["unchanged"] == 0
        places.append(f"{name}=delta:{path}")
    given = family.given if method == "regmean" else []
    outs = tmp_path / "of differences", tmp_path / "of experts"
    for out, experts in zip(outs, (places, family.folders[1:])):
        words = ["merge", family.base, *experts, "--out", out, "--method", method, *given]
        assert run(capsys, *words)[0] == 0
    assert_same(outs[0], state_of(outs[1]))


def test_an_expert_comes_back_from_half_precision_and_float32(families, tmp_path, capsys):
    family, path = families["llama"], tmp_path / "first.safetensors"
    told = written(capsys, family.base, family.root / "first", path)
    assert told["inexact"] == {}
    assert {value.dtype for value in safetensors.load_file(path).values()} == {torch.float32}
    out = tmp_path / "out"
    assert run(capsys, "merge", family.base, f"delta:{path}", "--out", out)[0] == 0
    assert_same(out, state_of(family.root / "first"))


def of_any_size(dtype, seed, powers):
    """Numbers within as many powers of two, of both signs, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    count = 20_000
    mantissas = 1 + torch.rand(count, generator=generator, dtype=torch.float64)
    exponents = torch.randint(powers, (count,), generator=generator)
    signs = torch.randint(-1, 2, (count,), generator=generator)
    return (signs * mantissas * 2.0**exponents / 2.0 ** (powers // 2)).to(dtype)


@pytest.mark.parametrize(("dtype", "powers", "kept"), [
    (torch.bfloat16, 15, torch.float32),
    (torch.float16, 12, torch.float32),
    (torch.float32, 28, torch.float64),
], ids=str)  # fmt: skip
def test_differences_are_exact_as_far_as_is_said(dtype, powers, kept):
    origin, value = (of_any_size(dtype, seed, powers + 1) for seed in (0, 1))
    ratios = torch.where(value == 0, origin, origin / value).abs()
    difference = subtracted(value, origin)
    assert torch.equal(difference.to(kept).double(), difference)
    assert torch.equal(added(origin, difference.to(kept)), value) and ratios.max() > 2 ** (
        powers - 1
    )


def test_differences_beyond_that_or_of_float32_are_rounded():
    """One power of two further, and where numbers have become much smaller."""
    for dtype, power in ((torch.bfloat16, 17), (torch.float16, 14)):
        origin = torch.tensor([2.0**power / 4], dtype=dtype)
        value = -torch.tensor([1 + torch.finfo(dtype).eps], dtype=dtype) / 4
        difference = subtracted(value, origin)
        assert not torch.equal(difference.float().double(), difference)
    origin, value = torch.tensor([1.0]), torch.tensor([0.1])
    difference = subtracted(value, origin)
    assert not torch.equal(added(origin, difference.float()), value)
    assert torch.equal(added(origin, difference), value)


def test_numbers_that_do_not_come_back_are_counted(families, tmp_path, capsys):
    """Of float32 in float32: some that have become much smaller."""
    family, path, expert = families["bert"], tmp_path / "d.safetensors", tmp_path / "expert"
    shutil.copytree(family.base, expert)
    origin = state_of(family.base)
    value = origin | {LAYER: origin[LAYER] / 1000, "pooler.dense.weight": torch.ones(8, 8)}
    safetensors.save_file(value, expert / "model.safetensors", metadata={"format": "pt"})
    told = written(capsys, family.base, expert, path)
    difference = safetensors.load_file(path)
    found = {}
    for name, tensor in difference.items():
        count = int(((origin[name].double() + tensor.double()).float() != value[name]).sum())
        found |= {name: count} if count else {}
    assert told["inexact"] == found != {}
    assert told["inexact"].keys() >= {LAYER}
    _, out, _ = run(capsys, "delta", family.base, expert, "--out", tmp_path / "b.safetensors")
    assert f"but for {sum(found.values())} numbers in {len(found)} tensors" in out


def test_a_file_is_what_it_says(families, tmp_path, capsys):
    """Names of the base, float differences as subtracted, only of what was changed."""
    family, expert = families["bert"], tmp_path / "expert"
    shutil.copytree(family.base, expert)
    state = state_of(expert)
    changed = state | {LAYER: state[LAYER] + 1}
    safetensors.save_file(changed, expert / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "d.safetensors"
    told = written(capsys, family.base, expert, out, "--dtype", "float64")
    assert (told["differences"], told["unchanged"]) == (1, len(state) - 1)
    (found,) = safetensors.load_file(out).items()
    assert found[0] == LAYER and found[1].dtype == torch.float64
    assert torch.equal(found[1], changed[LAYER].double() - state[LAYER].double())
    about = read_header(out).metadata
    digest = hashlib.sha256((expert / "model.safetensors").read_bytes()).hexdigest()
    assert about["base"] == "base" and json.loads(about["expert_weights"]) == {
        "model.safetensors": digest
    }
    assert str(tmp_path) not in json.dumps(about)
    written(capsys, family.base, expert, tmp_path / "again.safetensors", "--dtype", "float64")
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
    none = tmp_path / "none.safetensors"
    assert written(capsys, family.base, family.base, none)["differences"] == 0
    assert safetensors.load_file(none) == {}
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] == ".") == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_files_round_differences(families, dtype, tmp_path, capsys):
    family, out = families["bert"], tmp_path / "d.safetensors"
    assert written(capsys, family.base, family.root / "first", out, "--dtype", dtype)["inexact"]
    origin, value = family.model.state_dict(), family.states["first"]
    for name, tensor in safetensors.load_file(out).items():
        wanted = (value[name].double() - origin[name].double()).to(getattr(torch, dtype))
        assert torch.equal(tensor, wanted)


def test_an_adapter_becomes_a_difference(families, tmp_path, capsys):
    family, layer = families["bert"], "encoder.layer.0.attention.self.query"
    adapter, out = write_adapter(tmp_path / "a", factors(layer, 8, 8)), tmp_path / "d.safetensors"
    written(capsys, family.base, adapter, out)
    (found,) = safetensors.load_file(out).items()
    update = ALPHA / 2 * product(factors(layer, 8, 8), layer)
    assert found[0] == f"{layer}.weight"
    torch.testing.assert_close(found[1], update.float(), rtol=1e-5, atol=1e-6)


def test_counters_are_whole_numbers(bases, tmp_path, capsys):
    state = state_of(bases / "resnet")
    name = next(name for name in state if name.endswith("num_batches_tracked"))
    shutil.copytree(bases / "resnet", tmp_path / "expert")
    changed = state | {name: state[name] + 2**60 + 1}
    safetensors.save_file(changed, tmp_path / "expert" / "model.safetensors", {"format": "pt"})
    out = tmp_path / "d.safetensors"
    written(capsys, bases / "resnet", tmp_path / "expert", out)
    assert safetensors.load_file(out)[name].tolist() == 2**60 + 1
    words = ["merge", bases / "resnet", f"delta:{out}", "--out", tmp_path / "out"]
    assert run(capsys, *words)[0] == 0
    assert_same(tmp_path / "out", changed)


def test_files_that_others_wrote_are_read(families, tmp_path, capsys):
    """One file, a folder with one, and shards with their index; what is missing is the base's."""
    family = families["bert"]
    difference = {LAYER: torch.full((8, 12), 0.5), "pooler.dense.bias": torch.ones(8)}
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    for folder in (single, sharded):
        folder.mkdir()
    save(single / "model.safetensors", difference)
    places = {}
    for number, (name, value) in enumerate(difference.items()):
        places[name] = f"model-{number}.safetensors"
        save(sharded / places[name], {name: value})
    index = json.dumps({"weight_map": places})
    (sharded / "model.safetensors.index.json").write_text(index)
    words = [save(tmp_path / "mine.safetensors", difference), f"delta:{single}", f"delta:{sharded}"]
    state = family.model.state_dict()
    expected = {name: value + difference.get(name, 0) for name, value in state.items()}
    for number, word in enumerate(words):
        out = tmp_path / str(number)
        assert run(capsys, "merge", family.base, word, "--out", out)[0] == 0
        assert_same(out, expected)
        told = json.loads((out / "merge.json").read_text())["inputs"][1]
        assert told["name"] == ("mine", "single", "sharded")[number]
        folder = (tmp_path, single, sharded)[number]
        for file, digest in told["files"].items():
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
    assert "config.json" not in told["files"] and len(told["files"]) == 3


def test_check_costs_and_diagnose_know_differences(families, tmp_path, capsys):
    family = families["bert"]
    words = []
    for name in EXPERTS:
        path = tmp_path / f"{name}.safetensors"
        written(capsys, family.base, family.root / name, path, "--dtype", "float64")
        words.append(f"{name}=delta:{path}")
    status, out, _ = run(capsys, "check", family.base, *words, "--json")
    told = json.loads(out)
    assert status == 0 and told["findings"] == [] and told["estimates"]["soup"]["memory"] > 0
    found = []
    for experts in (words, family.folders[1:]):
        done = run(capsys, "diagnose", family.root / "first", family.base, *experts, *family.given,
                   "--json")  # fmt: skip
        assert done[0] == 0
        found.append(json.loads(done[1]))
    for part in ("experts", "layers", "untouched"):
        assert found[0][part] == found[1][part]


def test_the_tokenizer_beside_a_single_file_is_not_taken_for_its_own(families, tmp_path, capsys):
    family = families["bert"]
    path = family.root / "second" / "difference.safetensors"
    written(capsys, family.base, family.root / "second", path)
    try:
        words = ["merge", family.base, f"second=delta:{path}", "--out", tmp_path / "out"]
        given = ["--calibration", f"second={family.files['second']}", "--method", "regmean"]
        assert run(capsys, *words, *given)[0] == 0
    finally:
        path.unlink()
    told = json.loads((tmp_path / "out" / "merge.json").read_text())["inputs"][1]
    assert [*told["files"]] == ["difference.safetensors"]


def test_another_base_s_name_is_told(families, tmp_path, capsys):
    family = families["bert"]
    written(capsys, family.base, family.root / "first", tmp_path / "d.safetensors")
    shutil.copytree(family.base, tmp_path / "newer")
    words = ["check", tmp_path / "newer", f"delta:{tmp_path / 'd.safetensors'}", "--json"]
    (finding,) = json.loads(run(capsys, *words)[1])["findings"]
    assert finding["level"] == "INFO" and finding["expected"] == "'newer'"
    assert finding["found"] == "'base'"


REFUSED = {
    "unknown": ({"nonesuch": torch.ones(1)}, ["tensors of the base alone, found 'nonesuch'"]),
    "another shape": (
        {LAYER: torch.ones(8, 13), "pooler.dense.bias": torch.ones(8)},
        [f"tensor '{LAYER}': expected shape (8, 12), found shape (8, 13)"],
    ),
    "shapes alike": (
        {name: torch.ones(9) for name in ("pooler.dense.bias", "embeddings.LayerNorm.bias")},
        ["found shape (9,), as in 1 more tensors"],
    ),
    "no numbers": (
        {LAYER: torch.ones(8, 12, dtype=torch.bool)},
        ["expected numbers to add to those of the base (F32), found BOOL"],
    ),
    "whole numbers": ({LAYER: torch.ones(8, 12, dtype=torch.int64)}, ["found I64"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(families, name, tmp_path, capsys, monkeypatch):
    family, (state, expected) = families["bert"], REFUSED[name]
    word = save(tmp_path / "d.safetensors", state)
    monkeypatch.setattr(tensors, "read_tensor", None)  # no weight is read
    words = [[verb, family.base, word] for verb in ("check", "merge")]
    refused = run(capsys, *words[1], "--out", tmp_path / "out")
    status, out, _ = run(capsys, *words[0])
    assert refused[0] == status == 1 and not (tmp_path / "out").exists()
    for part in (*expected, str(tmp_path / "d.safetensors"), "qpmerge delta"):
        assert part in refused[2] and part in out


def a_whole_model(folder, family):
    return f"delta:{family.base}", "leave delta: out, or name the file of the differences"


def pickled(folder, family):
    (folder / "a.bin").write_bytes(b"\x80\x02pickle")
    return f"delta:{folder / 'a.bin'}", "a pickled file, which can run any code"


def cut_short(folder, family):
    word = save(folder / "a.safetensors", {LAYER: torch.ones(8, 12)})
    (folder / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-1])
    return word, "cut short or damaged"


def absent(folder, family):
    return f"delta:{folder / 'nonesuch'}", "nonesuch: expected a file that can be read"


def unnamed(folder, family):
    return "delta:", "expected delta:FILE"


@pytest.mark.parametrize("damage", [a_whole_model, pickled, cut_short, absent, unnamed])
def test_what_is_no_difference_is_refused(families, damage, tmp_path, capsys):
    word, expected = damage(tmp_path, families["bert"])
    words = ["merge", families["bert"].base, word, "--out", tmp_path / "out"]
    status, _, err = run(capsys, *words)
    assert status == 1 and expected in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["soup", "regmean"])
def test_a_difference_that_is_not_finite_is_refused(families, method, tmp_path, capsys):
    family = families["bert"]
    spoilt = torch.zeros(8, 12)
    spoilt[1, 2] = float("nan")
    word = save(tmp_path / "d.safetensors", {LAYER: spoilt})
    given = ["--calibration", f"d={family.files['first']}"] if method == "regmean" else []
    words = ["merge", family.base, word, "--out", tmp_path / "out", "--method", method, *given]
    status, _, err = run(capsys, *words)
    assert status == 1 and LAYER in err and "1 of 96 values are NaN" in err
    assert f"read from {tmp_path / 'd.safetensors'}" in err
    assert not (tmp_path / "out").exists()


def test_differences_stand_for_no_model(families, tmp_path, capsys):
    family = families["bert"]
    word = save(tmp_path / "d.safetensors", {LAYER: torch.ones(8, 12)})
    told = [run(capsys, "moments", word, "--calibration", family.files["first"], "--out",
                tmp_path / "m.safetensors"),
            run(capsys, "merge", family.base, word, "--moments", "d=none", "--out",
                tmp_path / "out")]  # fmt: skip
    for status, _, err in told:
        assert status == 1 and "found a task vector; make a whole model of it" in err
    assert run(capsys, "merge", word, family.base, "--out", tmp_path / "out")[0] == 1


WRITING = {
    "not finite": (float("inf"), "float32", [f"'{LAYER}'", "NaN or infinite"]),
    "beyond the dtype": (1e5, "float16", [f"difference of tensor '{LAYER}'", "float16"]),
}


@pytest.mark.parametrize("name", WRITING)
def test_what_cannot_be_written_leaves_nothing(families, name, tmp_path, capsys):
    family, (value, dtype, expected) = families["bert"], WRITING[name]
    shutil.copytree(family.root / "first", tmp_path / "expert")
    path = tmp_path / "expert" / "model.safetensors"
    changed = state_of(path.parent) | {LAYER: torch.full((8, 12), value)}
    safetensors.save_file(changed, path, metadata={"format": "pt"})
    before = contents(tmp_path)
    words = ["delta", family.base, tmp_path / "expert", "--out", tmp_path / "d.safetensors"]
    status, _, err = run(capsys, *words, "--dtype", dtype)
    assert status == 1 and all(part in err for part in expected)
    assert contents(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["expert"]


def test_experts_of_another_architecture_have_no_difference(families, tmp_path, capsys):
    words = ["delta", families["bert"].base, families["llama"].base]
    status, _, err = run(capsys, *words, "--out", tmp_path / "d.safetensors")
    assert status == 1 and "architectures: expected" in err and list(tmp_path.iterdir()) == []


def test_outputs_of_delta_are_new_files(families, tmp_path, capsys):
    family = families["bert"]
    (tmp_path / "d.safetensors").write_text("mine")
    for out, expected in (("d.safetensors", "a new file"), ("d.bin", "ends in .safetensors")):
        words = ["delta", family.base, family.root / "first", "--out", tmp_path / out]
        status, _, err = run(capsys, *words)
        assert status == 1 and expected in err
    assert (tmp_path / "d.safetensors").read_text() == "mine"


def test_words_are_told_apart():
    assert behind("delta:a/b.safetensors").as_posix() == "a/b.safetensors"
    assert behind("a/delta:b") is None and behind("hf:a/b") is None
    named = named_folders(["delta:x/fr.safetensors", "de=delta:y", "delta:hf:ours/it@v=1"])
    assert {name: str(place) for name, place in named.items()} == {
        "fr": "delta:x/fr.safetensors", "de": "delta:y", "it": "delta:hf:ours/it@v=1"
    }  # fmt: skip


def test_a_merge_is_not_written_into_a_difference_s_folder(families, tmp_path, capsys):
    (tmp_path / "d").mkdir()
    save(tmp_path / "d" / "model.safetensors", {LAYER: torch.ones(8, 12)})
    words = ["merge", families["bert"].base, f"delta:{tmp_path / 'd'}"]
    status, _, err = run(capsys, *words, "--out", tmp_path / "d" / "out")
    assert status == 1 and "which is an input" in err


def test_differences_come_from_the_hub(families, hub, tmp_path, capsys):
    family = families["bert"]
    (tmp_path / "d").mkdir()
    out = tmp_path / "d" / "model.safetensors"
    written(capsys, family.base, family.root / "first", out, "--dtype", "float64")
    commit = hub.add("ours/fr", contents(out.parent) | {"README.md": b"# French"})
    words = [family.base, "delta:hf:ours/fr"]
    status, told, _ = run(capsys, "check", *words, "--json")
    assert status == 0 and json.loads(told)["downloads"] == out.stat().st_size
    assert run(capsys, "merge", *words, "--out", tmp_path / "out")[0] == 0
    assert_same(tmp_path / "out", family.states["first"])
    source = json.loads((tmp_path / "out" / "merge.json").read_text())["inputs"][1]
    assert (source["name"], source["revision"]) == ("fr", commit)
