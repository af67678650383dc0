# ruff: noqa: F811 (fixtures come by import)
"""Adapters as experts: what they are folded to, held to the formulas of LoRA and DoRA, and what is
refused of them. tests/oracles_adapters.py holds the same to peft itself."""

import copy
import hashlib
import json
import shutil

import pytest
import torch

from qpmerge_lite.checkpoints import tensors
from qpmerge_lite.checkpoints.compatibility import check

from checkpoint_families import (  # isort: skip
    SIZE,
    assert_same,
    contents,
    families,  # noqa: F401
    run,
    safetensors,
    state_of,
    transformers,
)

import qpmerge_lite as q

WRAPPER = "base_model.model."
QUERY = "layers.0.self_attn.q_proj"
R, ALPHA = 2, 3


def llama(tied=False, dtype=torch.float32):
    sizes = {**SIZE, "num_key_value_heads": 1, "max_position_embeddings": 16}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=tied, attention_bias=True)
    return transformers.LlamaForCausalLM(config).to(dtype)


def gpt2():
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, bos_token_id=0, eos_token_id=0, **sizes)
    )


def resnet():
    sizes = {"embedding_size": 4, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    return transformers.ResNetModel(transformers.ResNetConfig(**sizes))


MODELS = {
    "llama": llama,
    "half": lambda: llama(dtype=torch.bfloat16),
    "tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "gpt2 without head": lambda: gpt2().transformer,
    "resnet": resnet,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of bases by name."""
    root = tmp_path_factory.mktemp("adapted")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(root / name)
    return root


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def write_adapter(folder, state, prefix=WRAPPER, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "bias": "none"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    named = {prefix + name: value.contiguous() for name, value in state.items()}
    safetensors.save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def factors(layer, outputs, inputs, rank=R, kernel=()):
    """LoRA of a layer."""
    down = noise(rank, inputs, *kernel)
    up = noise(outputs, rank, *(1 for _ in kernel), seed=1)
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


def product(state, layer):
    down, up = (state[f"{layer}.lora_{side}.weight"].double() for side in "AB")
    return torch.einsum("mr,rn...->mn...", up.flatten(1), down)


LAYER = f"model.{QUERY}"
LORA = factors(LAYER, 8, 8)
UPDATE = product(LORA, LAYER)
WEIGHT, BIAS = f"{LAYER}.weight", f"{LAYER}.bias"
WORDS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONV, CONVOLUTION = "encoder.stages.0.layers.0.layer.0.convolution", factors(
    "encoder.stages.0.layers.0.layer.0.convolution", 8, 4, kernel=(3, 3)
)  # fmt: skip
TABLE = {
    "model.embed_tokens.lora_embedding_A": noise(R, 40),
    "model.embed_tokens.lora_embedding_B": noise(8, R),
}
ROWS = {"model.embed_tokens.token_adapter.trainable_tokens_delta": noise(2, 8)}
ATTENTION, SQUARE = "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"
CONV1D = {**factors(ATTENTION, 24, 8), **factors(SQUARE, 8, 8)}
SHIFT = {f"{LAYER}.lora_B.bias": noise(8)}
LENGTHS = {f"{LAYER}.lora_magnitude_vector": noise(8).abs()}
KNOWN = {f"{LAYER}.base_layer.bias": noise(8), "model.layers.0.self_attn.o_proj.bias": noise(8)}


def of_length(matrix, lengths):
    """Rows of these lengths."""
    return lengths.double()[:, None] * matrix / matrix.norm(dim=1, keepdim=True)


def replaced_rows(table):
    table = table.clone()
    table[[7, 0]] = next(iter(ROWS.values())).double()
    return table


# base, the adapter's tensors, its settings, and tensor of the base -> what it becomes
FOLDS = {
    "LoRA": ("llama", LORA, {}, {WEIGHT: lambda w: w + 1.5 * UPDATE}),
    "half precision": ("half", LORA, {}, {WEIGHT: lambda w: w + 1.5 * UPDATE}),
    "an adapter in half precision": (
        "llama",
        {name: value.half() for name, value in LORA.items()},
        {},
        {WEIGHT: lambda w: w + 1.5 * product({k: v.half() for k, v in LORA.items()}, LAYER)},
    ),
    "rank-stabilised": (
        "llama", LORA, {"use_rslora": True}, {WEIGHT: lambda w: w + 3 / 2**0.5 * UPDATE}
    ),
    "patterns": (
        "llama",
        LORA,
        {
            "r": 5,
            "rank_pattern": {"v_proj": 7, r"layers\.\d\..*": R},
            "alpha_pattern": {"q_proj": 8},
        },
        {WEIGHT: lambda w: w + 4 * UPDATE},
    ),
    "pattern of another layer": (
        "llama", LORA, {"alpha_pattern": {"proj": 8, "self_attn": 9}},
        {WEIGHT: lambda w: w + 1.5 * UPDATE},
    ),
    "DoRA": (
        "llama",
        LORA | LENGTHS,
        {"use_dora": True},
        {WEIGHT: lambda w: of_length(w + 1.5 * UPDATE, noise(8).abs())},
    ),
    "biases in their own right": (
        "llama",
        LORA | KNOWN,
        {"bias": "all"},
        {
            WEIGHT: lambda w: w + 1.5 * UPDATE,
            BIAS: lambda _: noise(8).double(),
            "model.layers.0.self_attn.o_proj.bias": lambda _: noise(8).double(),
        },
    ),
    "LoRA's bias": (
        "llama",
        LORA | SHIFT,
        {"lora_bias": True},
        {WEIGHT: lambda w: w + 1.5 * UPDATE, BIAS: lambda b: b + 1.5 * noise(8).double()},
    ),
    "whole layers": (
        "half",
        LORA | {HEAD: noise(40, 8)},
        {"modules_to_save": ["lm_head"]},
        {WEIGHT: lambda w: w + 1.5 * UPDATE, HEAD: lambda _: noise(40, 8).double()},
    ),
    "a table": (
        "llama", TABLE, {},
        {WORDS: lambda w: w + 1.5 * (noise(8, R).double() @ noise(R, 40).double()).T},
    ),
    "DoRA of a table": (
        "llama",
        TABLE | {"model.embed_tokens.lora_magnitude_vector": noise(8).abs()},
        {"use_dora": True},
        {
            WORDS: lambda w: of_length(
                w.T + 1.5 * noise(8, R).double() @ noise(R, 40).double(), noise(8).abs()
            ).T
        },
    ),
    "rows": ("llama", ROWS, {"trainable_token_indices": [7, 0]}, {WORDS: replaced_rows}),
    "rows of a tied table": (
        "tied", ROWS, {"trainable_token_indices": {"embed_tokens": [7, 0]}}, {WORDS: replaced_rows}
    ),
    "Conv1D": (
        "gpt2",
        CONV1D,
        {"fan_in_fan_out": True},
        {
            f"{ATTENTION}.weight": lambda w: w + 1.5 * product(CONV1D, ATTENTION).T,
            f"{SQUARE}.weight": lambda w: w + 1.5 * product(CONV1D, SQUARE).T,
        },
    ),
    "Conv1D that is square alone": (
        "gpt2",
        factors(SQUARE, 8, 8),
        {"fan_in_fan_out": True},
        {f"{SQUARE}.weight": lambda w: w + 1.5 * product(CONV1D, SQUARE).T},
    ),
    "DoRA of Conv1D": (
        "gpt2",
        factors(ATTENTION, 24, 8) | {f"{ATTENTION}.lora_magnitude_vector": noise(24).abs()},
        {"use_dora": True},
        {
            f"{ATTENTION}.weight": lambda w: of_length(
                w.T + 1.5 * product(CONV1D, ATTENTION), noise(24).abs()
            ).T
        },
    ),
    "a convolution": (
        "resnet", CONVOLUTION, {},
        {f"{CONV}.weight": lambda w: w + 1.5 * product(CONVOLUTION, CONV)},
    ),
    "a model with a head, where the base has none": (
        "gpt2 without head",
        CONV1D,
        {},
        {
            "h.0.attn.c_attn.weight": lambda w: w + 1.5 * product(CONV1D, ATTENTION).T,
            "h.0.attn.c_proj.weight": lambda w: w + 1.5 * product(CONV1D, SQUARE).T,
        },
    ),
    "the model inside": (
        "llama", factors(QUERY, 8, 8), {}, {WEIGHT: lambda w: w + 1.5 * UPDATE}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDS)
def test_one_adapter_alone_gives_its_model(bases, name, tmp_path, capsys):
    kind, state, settings, changes = FOLDS[name]
    adapter = write_adapter(tmp_path / "adapter", state, **settings)
    before = state_of(bases / kind)
    for method in ("soup", "task_arithmetic"):
        out = tmp_path / method
        scale = ["--option", "scale=1.0"] if method == "task_arithmetic" else []
        words = ["merge", bases / kind, adapter, "--out", out, "--method", method, *scale]
        done = run(capsys, *words)
        assert (done[0], done[2]) == (0, "")
        found = state_of(out)
        assert found.keys() == before.keys()
        for tensor, value in found.items():
            if tensor not in changes:
                assert torch.equal(value, before[tensor]), tensor
                continue
            wanted = changes[tensor](before[tensor].double())
            assert not torch.equal(value, before[tensor])
            exact = 4 * torch.finfo(value.dtype).eps
            assert value.dtype == before[tensor].dtype
            torch.testing.assert_close(
                value.double(), wanted, rtol=exact, atol=exact * float(wanted.abs().max())
            )


def test_names_without_the_wrapper_s_are_understood(bases, tmp_path, capsys):
    outs = []
    for number, prefix in enumerate((WRAPPER, "")):
        adapter = write_adapter(tmp_path / str(number) / "adapter", LORA, prefix=prefix)
        outs.append(tmp_path / f"out {number}")
        assert run(capsys, "merge", bases / "llama", adapter, "--out", outs[-1])[0] == 0
    assert_same(outs[0], state_of(outs[1]))


def test_biases_that_peft_files_three_times_are_read_once(bases, tmp_path, capsys):
    """With bias="all" and a layer of modules_to_save."""
    head = "transformer.h.0.attn.c_proj"
    state = {f"{head}.weight": noise(8, 8), f"{head}.bias": noise(8)}
    state |= {f"{head}.original_module.bias": noise(8, seed=1)}
    state |= {f"{head}.modules_to_save.bias": noise(8)}
    adapter = write_adapter(tmp_path / "a", state, bias="all", modules_to_save=["c_proj"])
    assert run(capsys, "merge", bases / "gpt2", adapter, "--out", tmp_path / "out")[0] == 0
    found = state_of(tmp_path / "out")
    assert torch.equal(found[f"{head}.weight"], noise(8, 8))
    assert torch.equal(found[f"{head}.bias"], noise(8))


def test_norms_may_have_older_names_in_the_files(families, tmp_path, capsys):
    """As those of BERT and ESM at the Hub have, which transformers renames when it reads them, so
    that peft knows the new ones."""
    base, name = tmp_path / "base", "encoder.layer.0.output.LayerNorm"
    shutil.copytree(families["bert"].root / "base", base)
    old = {"weight": "gamma", "bias": "beta"}
    renamed = {}
    for key, value in state_of(base).items():
        layer, _, entry = key.rpartition(".")
        renamed[f"{layer}.{old[entry]}" if layer.endswith("LayerNorm") else key] = value
    safetensors.save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    state = {f"{name}.bias": noise(8), f"{name}.weight": noise(8, seed=1)}
    adapter = write_adapter(tmp_path / "a", state, bias="all")
    assert run(capsys, "merge", base, adapter, "--out", tmp_path / "out")[0] == 0
    changed = {f"{name}.beta": state[f"{name}.bias"], f"{name}.gamma": state[f"{name}.weight"]}
    assert_same(tmp_path / "out", renamed | changed)


BERT_LAYER = "encoder.layer.0.attention.self.{}"


def bert_adapters(root):
    """Adapters of the queries and values of the family's BERT, and their updates."""
    folders, updates = {}, {}
    for seed, name in enumerate(("first", "second")):
        state = {}
        for which in ("query", "value"):
            layer = BERT_LAYER.format(which)
            state[f"{layer}.lora_A.weight"] = noise(R, 8, seed=3 * seed)
            state[f"{layer}.lora_B.weight"] = 0.1 * noise(8, R, seed=3 * seed + 1)
        folders[name] = write_adapter(root / name, state)
        updates[name] = {}
        for which in ("query", "value"):
            layer = BERT_LAYER.format(which)
            change = state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
            updates[name][f"{layer}.weight"] = ALPHA / R * change
    return folders, updates


@pytest.mark.parametrize("method", ["ties", "dare", "wudi", "tsv_merge", "regmean"])
def test_methods_see_the_models_that_adapters_make(families, method, tmp_path, capsys):
    family = families["bert"]
    folders, updates = bert_adapters(tmp_path)
    states = {}
    for name, changes in updates.items():
        states[name] = copy.copy(family.model.state_dict())
        for tensor, change in changes.items():
            states[name][tensor] = states[name][tensor] + change
    calibrated = [family.calibration()] if method == "regmean" else []
    options = {"steps": 3} if method == "wudi" else {}
    expected = getattr(q, method)(family.model, states, *calibrated, **options)
    words = [f"--option={name}={value}" for name, value in options.items()]
    done = run(
        capsys, "merge", family.base, *folders.values(), "--out", tmp_path / "out",
        "--method", method, *words, *(family.given if calibrated else []),
    )  # fmt: skip
    assert (done[0], done[2]) == (0, "")
    for tensor, value in state_of(tmp_path / "out").items():
        torch.testing.assert_close(value, expected.state_dict[tensor], rtol=1e-5, atol=1e-6)


def test_an_adapter_and_a_whole_model_are_merged_together(families, tmp_path, capsys):
    family = families["llama"]
    layer = "model.layers.0.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "adapter", factors(layer, 8, 8))
    words = [family.base, adapter, family.root / "first", "--out", tmp_path / "out"]
    assert run(capsys, "merge", *words)[0] == 0
    states = {"adapter": dict(family.model.state_dict()), "first": family.states["first"]}
    update = product(factors(layer, 8, 8), layer)
    states["adapter"][f"{layer}.weight"] = (
        states["adapter"][f"{layer}.weight"] + 1.5 * update
    ).float()
    assert_same(tmp_path / "out", q.soup(family.model, states).state_dict)


def test_the_manifest_holds_the_adapter_s_own_files(bases, tmp_path, capsys):
    adapter, out = write_adapter(tmp_path / "adapter", LORA), tmp_path / "out"
    before = contents(adapter)
    run(capsys, "merge", bases / "llama", f"mine={adapter}", "--out", out)
    base, source = json.loads((out / "merge.json").read_text())["inputs"]
    assert source == {
        "name": "mine",
        "folder": "adapter",
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in before.items()},
    }
    assert source["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert contents(adapter) == before and "model.safetensors" in base["files"]


def test_a_tokenizer_beside_the_adapter_is_its_own(families, tmp_path, capsys):
    family = families["bert"]
    folders, _ = bert_adapters(tmp_path)
    for path in family.base.glob("tokenizer*"):
        shutil.copy(path, folders["first"])
    words = ["merge", family.base, *folders.values(), "--out", tmp_path / "out", *family.given]
    assert run(capsys, *words, "--method", "regmean")[0] == 0
    first = json.loads((tmp_path / "out" / "merge.json").read_text())["inputs"][1]
    assert "tokenizer.json" in first["files"]


REFUSED = {
    "IA3": ({"peft_type": "IA3"}, {}, ["peft_type: expected 'LORA', found 'IA3'"]),
    "no kind": ({"peft_type": None}, {}, ["peft_type: expected 'LORA', found None"]),
    "parameters": ({"target_parameters": ["experts.w1"]}, {}, ["target_parameters: expected"]),
    "excluded layers": ({"exclude_modules": ["v_proj"]}, {}, ["exclude_modules: expected no such"]),
    "copied layers": ({"layer_replication": [[0, 1]]}, {}, ["layer_replication: expected no such"]),
    "only after some tokens": ({"alora_invocation_tokens": [3]}, {}, ["alora_invocation_tokens"]),
    "quantised": ({"use_qalora": True}, {}, ["use_qalora: expected no such field"]),
    "a field of tomorrow": ({"use_novelty": 0.5}, {}, ["use_novelty", "found 0.5"]),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_4"}, {},
        ["init_lora_weights: expected a start that leaves the base as it is, found 'pissa"],
    ),
    "LoftQ": ({"init_lora_weights": "loftq"}, {}, ["init_lora_weights", "'loftq'"]),
    "no rank": ({"r": 0}, {}, ["config.json, r: expected a whole number from 1 on, found 0"]),
    "no alpha": ({"lora_alpha": "3"}, {}, ["lora_alpha: expected a finite number, found '3'"]),
    "endless alpha": ({"lora_alpha": float("inf")}, {}, ["lora_alpha: expected a finite number"]),
    "an alpha beyond all numbers": ({"lora_alpha": 10**400}, {}, ["lora_alpha: expected a finite"]),
    "a rank beyond all sizes": ({"r": 10**400}, {}, ["r: expected a whole number from 1 on"]),
    "no pattern": ({"rank_pattern": {"(": 3}}, {}, ["rank_pattern: expected patterns of names"]),
    "other biases": ({"bias": "some"}, {}, ["bias: expected 'none', 'all' or 'lora_only'"]),
    "a row twice": ({"trainable_token_indices": [1, 1]}, {}, ["trainable_token_indices"]),
    "another rank": (
        {"r": 4}, {}, ["q_proj.lora_A.weight': expected shape (4, 8)", "found shape (2, 8)"],
    ),
    "another size": (
        {}, factors(LAYER, 12, 8), ["expected factors of an update of shape (8, 8)", "(12, 8)"],
    ),
    "a layer that is not there": (
        {}, LORA | factors("model.layers.7.mlp.down_proj", 8, 12),
        ["layers.7.mlp.down_proj.weight', which it has not", "7.mlp.down_proj.lora_A.weight"],
    ),
    "tensors of another kind": (
        {}, LORA | {f"{LAYER}.hada_w1_a": noise(2)}, ["q_proj.hada_w1_a', which it has not"],
    ),
    "half of a factor pair": (
        {}, {f"{LAYER}.lora_A.weight": noise(2, 8)},
        ["lora_A.weight': expected both factors for 'model.layers.0.self_attn.q_proj.weight'"],
    ),
    "magnitudes without DoRA": (
        {}, LORA | LENGTHS, ["expected a magnitude vector", "only there, found one"],
    ),
    "DoRA without magnitudes": ({"use_dora": True}, LORA, ["a magnitude vector", "found none"]),
    "magnitudes of another layer": (
        {"use_dora": True}, LORA | {f"{LAYER}.lora_magnitude_vector": noise(9)},
        ["expected 8 magnitudes, found shape (9,)"],
    ),
    "a bias that the layer lacks": (
        {"lora_bias": True},
        factors("lm_head", 40, 8) | {"lm_head.lora_B.bias": noise(40)},
        ["'lm_head.bias', which it has not: 'base_model.model.lm_head.lora_B.bias'"],
    ),
    "a head of another size": (
        {}, {"lm_head.weight": noise(41, 8)}, ["expected shape (40, 8) for 'lm_head.weight'"],
    ),
    "rows that nobody counted": (
        {"trainable_token_indices": [1]}, ROWS, ["expected shape (1, 8)", "found shape (2, 8)"],
    ),
    "rows beyond the table": (
        {"trainable_token_indices": [1, 40]}, ROWS, ["expected rows below 40, found 40"],
    ),
    "no numbers": (
        {}, {"lm_head.weight": torch.zeros(40, 8, dtype=torch.int64)},
        ["expected numbers, as of 'lm_head.weight' (F32), found I64"],
    ),
    "factors that are no numbers": (
        {}, {name: value.to(torch.int64) for name, value in LORA.items()}, ["(F32), found I64"],
    ),
    "factors without axes": (
        {}, {name: torch.tensor(1.0) for name in LORA}, ["expected shape (2,)", "(0, 2)"],
    ),
    "a factor of no layer": (
        {}, {"lora_A.weight": noise(2, 8)}, ["which it has not: 'base_model.model.lora_A.weight'"],
    ),
    "nothing": ({}, {}, ["adapter_model.safetensors: expected tensors, found none"]),
    "one thing twice": (
        {"use_dora": True},
        LORA | LENGTHS | {f"{LAYER}.lora_magnitude_vector.weight": noise(8)},
        ["expected one magnitude for 'model.layers.0.self_attn.q_proj.weight'"],
    ),
}  # fmt: skip


def refusal(bases, folder, capsys, tmp_path, monkeypatch, kind="llama"):
    """What merge and check say, which has to be the same, without a weight having been read."""
    before = contents(folder) if folder.is_dir() else {}
    monkeypatch.setattr(tensors, "read_tensor", None)
    status, out, _ = run(capsys, "check", bases / kind, folder)
    refused, _, err = run(capsys, "merge", bases / kind, folder, "--out", tmp_path / "out")
    assert status == 1 and refused == 1 and "ERROR" in out and not (tmp_path / "out").exists()
    assert not before or contents(folder) == before
    for line in out.splitlines():
        if line.startswith("ERROR"):
            assert line.removeprefix("ERROR ") in err
    return err


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded_is_refused_by_name(bases, name, tmp_path, capsys, monkeypatch):
    settings, state, expected = REFUSED[name]
    state = state or (LORA if settings else {})
    adapter = write_adapter(tmp_path / "second", state, **settings)
    told = refusal(bases, adapter, capsys, tmp_path, monkeypatch)
    assert all(part in told for part in expected), told
    assert str(adapter) in told and ("merge_and_unload()" in told or "base" in told)


def without_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut_short(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def unreadable(folder):
    (folder / "adapter_config.json").write_text("{")


DAMAGES = {
    "no weights": (without_weights, ["adapter_model.safetensors: expected the weights"]),
    "pickled": (pickled, ["pickled one (adapter_model.bin), which can run any code"]),
    "cut short": (cut_short, ["adapter_model.safetensors", "cut short or damaged"]),
    "no configuration": (unreadable, ["adapter_config.json: expected JSON in UTF-8"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_adapter_that_is_damaged_is_refused(bases, name, tmp_path, capsys, monkeypatch):
    damage, expected = DAMAGES[name]
    adapter = write_adapter(tmp_path / "second", LORA)
    damage(adapter)
    told = refusal(bases, adapter, capsys, tmp_path, monkeypatch)
    assert all(part in told for part in expected), told


def test_an_adapter_is_no_base(bases, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", LORA)
    (adapter / "config.json").write_text("{}")
    status, _, err = run(capsys, "merge", adapter, bases / "llama", "--out", tmp_path / "out")
    assert status == 1 and "an adapter alone; name its base first" in err


def test_a_square_layer_among_both_kinds_is_refused(bases, tmp_path, capsys, monkeypatch):
    """peft's flag then says what its last layer was."""
    state = factors(ATTENTION, 24, 8) | factors(SQUARE, 8, 8) | factors("transformer.wpe", 16, 8)
    told = refusal(
        bases, write_adapter(tmp_path / "a", state), capsys, tmp_path, monkeypatch, "gpt2"
    )
    assert "layer 'transformer.h.0.attn.c_proj': expected layers that all have" in told


def test_embeddings_that_peft_would_untie_are_refused(bases, tmp_path, capsys, monkeypatch):
    adapter = write_adapter(tmp_path / "a", {WORDS: noise(40, 8)}, modules_to_save=["embed_tokens"])
    told = refusal(bases, adapter, capsys, tmp_path, monkeypatch, "tied")
    assert "for 'model.embed_tokens.weight': expected embeddings" in told and "unties" in told


def test_what_may_not_be_meant_is_said(bases, tmp_path, capsys):
    adapter = write_adapter(
        tmp_path / "adapter", TABLE,
        base_model_name_or_path="elsewhere/other", target_modules=["embed_tokens", "q_proj"],
    )  # fmt: skip
    status, out, _ = run(capsys, "check", bases / "tied", adapter, "--json")
    told = {(f["level"], f["where"].rpartition("/")[2]) for f in json.loads(out)["findings"]}
    assert status == 0 and told == {
        ("WARNING", "adapter_model.safetensors, for 'model.embed_tokens.weight'"),
        ("WARNING", "adapter_config.json, target_modules"),
        ("INFO", "adapter_config.json, base_model_name_or_path"),
    }
    named = write_adapter(tmp_path / "named", LORA, base_model_name_or_path="hub/llama")
    assert check(bases / "llama", {"named": named}).findings == []


def test_odd_places_and_files_are_read_and_left_alone(bases, tmp_path, capsys):
    settings = {"modules_to_save": "", "base_model_name_or_path": 5, "revision": None}
    adapter = write_adapter(tmp_path / "añ ₂=b" / "ünï adapter", LORA, **settings)
    for path in adapter.iterdir():
        path.chmod(0o400)
    adapter.chmod(0o500)
    before = contents(adapter)
    (tmp_path / "link").symlink_to(adapter)
    outs = tmp_path / "a", tmp_path / "b"
    for place, out in zip((adapter, tmp_path / "link"), outs):
        assert run(capsys, "merge", bases / "llama", place, "--out", out)[0] == 0
    adapter.chmod(0o700)
    assert_same(outs[0], state_of(outs[1]))
    assert contents(adapter) == before


@pytest.mark.parametrize("method", ["soup", "ties"])
def test_factors_that_are_not_finite_are_refused(bases, method, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", {k: v * float("nan") for k, v in LORA.items()})
    words = ["merge", bases / "llama", adapter, "--out", tmp_path / "out", "--method", method]
    status, _, err = run(capsys, *words)
    assert status == 1 and "NaN or infinite" in err
    assert f"read from {adapter / 'adapter_model.safetensors'}" in err
    assert not (tmp_path / "out").exists()
