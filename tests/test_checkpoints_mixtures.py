"""Mixtures of experts, whose tensors transformers fuses when it reads them and splits when it
writes them: calibrated merges, moments and diagnoses of their folders are those of the models."""

import copy
import json
import socket

import pytest
import torch
from checkpoint_families import (
    EXPERTS,
    SIZE,
    Family,
    contents,
    run,
    safetensors,
    state_of,
    transformers,
)
from test_checkpoints_adapters import factors, write_adapter

import qpmerge_lite as q
from qpmerge_lite.checkpoints import calibrated
from qpmerge_lite.checkpoints.compatibility import check
from qpmerge_lite.checkpoints.conversion import layout as layouts

# rows of matrices are multiples of 16 bytes, which grouped products ask for
PLACED = {**SIZE, "intermediate_size": 16, "num_key_value_heads": 1, "max_position_embeddings": 16}
ROUTED = {"num_experts_per_tok": 2, "num_experts": 4}
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 0, "num_key_value_heads": 2,
}  # fmt: skip
MIXTURES = {
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**ROUTED, "moe_intermediate_size": 8, "head_dim": 4}),
    "OLMoE": ("OlmoeForCausalLM", ROUTED),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", {**LATENT, "moe_intermediate_size": 8}),
    "gpt-oss": (
        "GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4},
    ),
}  # fmt: skip
FUSED = [name for name in MIXTURES if name != "gpt-oss"]  # whose files have them as the model


def mixture(name, dtype=torch.float32):
    kind, options = MIXTURES[name]
    made = getattr(transformers, kind)
    config = made.config_class(**PLACED | options, pad_token_id=0)
    return made(config).to(dtype)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Folders of a base and two experts, by name."""
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("mixtures")
    return {name: Family(root / name, lambda name=name: mixture(name)) for name in MIXTURES}


def saved(family, state, folder):
    """Tensors of the files that ``save_pretrained`` makes of a state of the model."""
    model = copy.deepcopy(family.model)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    return state_of(folder)


def assert_close(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=name)


METHODS = {"regmean": {}, "qp": {"basis": "rows", "folds": 2}, "auto": {}}


@pytest.mark.parametrize("name", MIXTURES)
def test_files_have_experts_one_by_one_where_the_model_has_them_fused(mixtures, name):
    family = mixtures[name]
    model, layout = calibrated.build(check(family.base, {}).base)
    assert model.state_dict().keys() == family.model.state_dict().keys()
    assert bool(layout.converted) == (name in FUSED)
    files = state_of(family.base)
    assert {file for names in layout.in_files.values() for file in names} >= files.keys()
    back = layout.stored(model.state_dict())
    for file, value in files.items():
        assert torch.equal(back[file], value), file
    assert len(files) > len(model.state_dict()) or name not in FUSED


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "qp") for name in MIXTURES), ("Mixtral", "auto"), ("OLMoE", "regmean")],
)
def test_copies_of_one_expert_come_back(mixtures, name, method, tmp_path, capsys):
    family, expert = mixtures[name], mixtures[name].root / "first"
    words = ["merge", family.base, f"first={expert}", f"second={expert}", "--method", method]
    options = [word for k, v in METHODS[method].items() for word in ("--option", f"{k}={v}")]
    done = run(capsys, *words, *options, *family.given, "--out", tmp_path / "out")
    assert (done[0], done[2]) == (0, "")
    assert contents(tmp_path / "out").keys() >= contents(family.base).keys()
    assert_close(state_of(tmp_path / "out"), state_of(expert), 1e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_calibrated_merges_are_what_the_function_gives(mixtures, name, tmp_path, capsys):
    family, out = mixtures[name], tmp_path / "out"
    words = ["merge", *family.folders, *family.given, "--method", "regmean", "--out", out]
    assert run(capsys, *words)[0] == 0
    expected = q.regmean(family.model, family.states, family.calibration())
    found = state_of(out)
    assert_close(found, saved(family, expected.state_dict, tmp_path / "expected"), 1e-12)
    told = json.loads((out / "merge.json").read_text(encoding="utf-8"))
    averaged = {file for files in told["averaged"].values() for file in files}
    assert len(told["table"]) == len(expected.table) and averaged < found.keys()
    fused = [model for model in expected.averaged if ".experts." in model]
    assert fused and averaged >= {file for file in found if ".experts." in file}
    loaded = type(family.model).from_pretrained(out).state_dict()
    for model, value in expected.state_dict.items():
        torch.testing.assert_close(loaded[model], value, rtol=0, atol=1e-12)


def test_half_precision_and_shards_are_merged_too(tmp_path, capsys):
    made = Family(tmp_path / "m", lambda: mixture("Mixtral", torch.bfloat16), max_shard_size="2KB")
    out = tmp_path / "out"
    words = ["merge", *made.folders, *made.given, "--method", "regmean", "--out", out]
    assert run(capsys, *words)[0] == 0
    assert len(list(out.glob("*.safetensors"))) > 2
    expected = q.regmean(made.model, made.states, made.calibration())
    assert_close(state_of(out), saved(made, expected.state_dict, tmp_path / "expected"), 0)


def test_adapters_are_folded_before_experts_are_fused(mixtures, tmp_path, capsys):
    family, layer = mixtures["Mixtral"], "model.layers.0.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "first", factors(layer, 8, 8))
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(capsys, "merge", family.base, adapter, "--out", whole)[0] == 0
    for place, made in ((adapter, out), (whole, tmp_path / "of whole")):
        words = ["merge", family.base, f"first={place}", f"second={family.root / 'second'}"]
        done = run(capsys, *words, *family.given, "--method", "regmean", "--out", made)
        assert (done[0], done[2]) == (0, "")
    assert_close(state_of(out), state_of(tmp_path / "of whole"), 1e-6)


def test_moments_of_a_mixture_stand_in_for_its_data(mixtures, tmp_path, capsys):
    family, given = mixtures["Qwen3-MoE"], []
    for name in EXPERTS:
        file = tmp_path / f"{name}.safetensors"
        words = ["moments", family.root / name, "--calibration", family.files[name], "--out", file]
        assert run(capsys, *words, "--folds", 1)[0] == 0
        given += ["--moments", f"{name}={file}"]
    outs = tmp_path / "of moments", tmp_path / "of data"
    for out, data in zip(outs, (given, family.given)):
        words = ["merge", *family.folders, *data, "--method", "regmean", "--out", out]
        done = run(capsys, *words)
        assert (done[0], done[2]) == (0, "")
    assert_close(state_of(outs[0]), state_of(outs[1]), 1e-5)
    told = [json.loads((out / "merge.json").read_text())["averaged"] for out in outs]
    by_reason = [{reason: {*files} for reason, files in of.items()} for of in told]
    assert by_reason[0] == by_reason[1]


def test_a_merge_of_mixtures_is_diagnosed(mixtures, tmp_path, capsys):
    """The first expert in place of a merge."""
    family = mixtures["Mixtral"]
    words = ["diagnose", family.root / "first", *family.folders, *family.given, "--json"]
    status, out, _ = run(capsys, *words)
    told = json.loads(out)
    assert status == 0 and told["untouched"] == []
    assert told["experts"]["first"]["captured"]["value"] == pytest.approx(1)
    left_out = {name for names in told["left_out"].values() for name in names}
    files = state_of(family.base)
    assert left_out >= {name for name in files if ".experts." in name} and left_out < files.keys()


def test_what_a_merge_left_as_it_was_is_told_by_the_names_of_files(mixtures, tmp_path, capsys):
    family, merged = mixtures["Mixtral"], tmp_path / "merged"
    assert run(capsys, "merge", *family.folders, "--out", merged)[0] == 0
    state, base = state_of(merged), state_of(family.base)
    one, *_ = [name for name in state if ".experts." in name]
    safetensors.save_file(state | {one: base[one]}, merged / "model.safetensors", {"format": "pt"})
    words = ["diagnose", merged, *family.folders, *family.given, "--json"]
    assert json.loads(run(capsys, *words)[1])["untouched"] == [one]


def test_a_damaged_expert_is_named_by_its_file(mixtures, tmp_path, capsys):
    family = mixtures["OLMoE"]
    state = state_of(family.root / "second")
    name = [name for name in state if ".experts." in name][3]
    (tmp_path / "second").mkdir()
    state[name][0, 0] = float("nan")
    safetensors.save_file(state, tmp_path / "second" / "model.safetensors", {"format": "pt"})
    (tmp_path / "second" / "config.json").write_bytes((family.base / "config.json").read_bytes())
    words = ["merge", family.base, family.root / "first", tmp_path / "second", *family.given]
    status, _, err = run(capsys, *words, "--method", "regmean", "--out", tmp_path / "out")
    assert status == 1 and not (tmp_path / "out").exists()
    assert f"{tmp_path / 'second' / 'model.safetensors'}, tensor '{name}'" in err
    assert "1 of" in err and "NaN" in err


def test_no_network_is_asked_and_random_numbers_are_left_alone(
    mixtures, tmp_path, capsys, monkeypatch
):
    def refused(*_):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refused)
    family, state = mixtures["Mixtral"], torch.get_rng_state()
    words = ["merge", *family.folders, *family.given, "--method", "regmean"]
    assert run(capsys, *words, "--out", tmp_path / "out")[0] == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_where_tensors_are_is_worked_out_once(tmp_path, capsys, mixtures, monkeypatch):
    made = []
    begin = layouts.Layout.__init__
    monkeypatch.setattr(
        layouts.Layout, "__init__", lambda *given: (made.append(1), begin(*given))[1]
    )
    family = mixtures["OLMoE"]
    words = ["merge", *family.folders, *family.given, "--method", "regmean"]
    assert run(capsys, *words, "--out", tmp_path / "out")[0] == 0 and made == [1]
