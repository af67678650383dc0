"""The sequential merge on real architectures: tiny `transformers` models with random weights, in
float64."""

import copy

import pytest
import torch
from toys import TASKS

import qpmerge_lite as q

transformers = pytest.importorskip("transformers")
compatibility = pytest.importorskip(
    "qpmerge_lite.companion.experiments.compatibility", reason="the suites extra is not installed"
)

SIZE = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURES = {**SIZE, "image_size": 8, "patch_size": 4}
T5 = {
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 4,
    "vocab_size": 19,
}
GPT2 = {
    "vocab_size": 19,
    "n_positions": 12,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
# model, and what remains averaged in it: parameters that are added as they are, biases of pairs of
# tokens, and tied heads
ARCHITECTURES = {
    "bert": (
        lambda: transformers.BertModel(
            transformers.BertConfig(vocab_size=19, max_position_embeddings=12, **SIZE)
        ),
        [],
    ),
    "vit": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**PICTURES)),
        ["embeddings.cls_token", "embeddings.position_embeddings"],
    ),
    "clip": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**PICTURES)),
        ["embeddings.class_embedding"],
    ),
    "gpt2": (lambda: transformers.GPT2Model(transformers.GPT2Config(**GPT2)), []),
    "gpt2 with its head": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        ["lm_head.weight", "transformer.wte.weight"],
    ),
    "t5": (
        lambda: transformers.T5Model(transformers.T5Config(**T5)),
        [BIAS.format("decoder"), BIAS.format("encoder")],
    ),
    "flan t5 with its head": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(feed_forward_proj="gated-gelu", **T5)
        ),
        sorted(
            [
                BIAS.format("decoder"),
                BIAS.format("encoder"),
                "lm_head.weight",
                "shared.weight",
                "decoder.embed_tokens.weight",
                "encoder.embed_tokens.weight",
            ]
        ),
    ),
    "llama": (
        lambda: transformers.LlamaModel(
            transformers.LlamaConfig(vocab_size=19, num_key_value_heads=1, **SIZE)
        ),
        [],
    ),
}


def inputs(name, count):
    """Keyword arguments of a model: pictures, or padded texts, for T5 with padded beginnings of
    answers of the same length."""
    if name in ("vit", "clip"):
        return {"pixel_values": torch.randn(count, 3, 8, 8, dtype=torch.float64)}
    mask = lambda: (torch.arange(7) < torch.randint(3, 8, (count, 1))).long()
    ids = lambda: torch.randint(1, 17, (count, 7))
    batch = {"input_ids": ids(), "attention_mask": mask()}
    return batch | (
        {"decoder_input_ids": ids(), "decoder_attention_mask": mask()} if "t5" in name else {}
    )


def problem(name, dtype=torch.float64):
    """Base, experts whose tied weights stay tied, and calibration of two batches a task."""
    torch.manual_seed(0)
    base = ARCHITECTURES[name][0]().to(dtype)
    experts = {}
    for task in TASKS:
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for p in expert.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        experts[task] = expert.state_dict()
    calibration = {t: [inputs(name, n) for n in (9, 5)] for t in TASKS}
    cast = lambda v: v.to(dtype) if v.is_floating_point() else v
    return (
        base,
        experts,
        {
            t: [{k: cast(v) for k, v in b.items()} for b in batches]
            for t, batches in calibration.items()
        },
    )


def assert_same(one, other, tolerance=1e-6):
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_copies_of_one_expert_give_it_back_and_what_is_averaged_is_listed(name):
    base, experts, calibration = problem(name)
    merge = q.qp(
        base, dict.fromkeys(TASKS, experts["a"]), calibration, basis="rows", ridge=0.0, prior=0.0
    )
    assert sorted(merge.averaged) == ARCHITECTURES[name][1]
    assert all(merge.averaged.values())
    assert_same(merge.state_dict, experts["a"])
    assert all(row["captured"] == pytest.approx(1) for row in merge.table)
    audited = q.audit(base, merge.state_dict, {"a": experts["a"]}, calibration)
    assert audited["output"] == pytest.approx(1, abs=1e-6) and audited["layers"].keys() == {
        row["layer"] for row in merge.table
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_order_batches_and_padding_do_not_matter(name):
    base, experts, calibration = problem(name)
    merge = q.qp(base, experts, calibration, basis="rotated_rows")
    other = {
        t: [
            {k: v[i : i + 1] for k, v in b.items()}
            for b in batches
            for i in range(len(next(iter(b.values()))))
        ]
        for t, batches in calibration.items()
    }
    for batch in (b for batches in other.values() for b in batches):
        for ids, mask in (
            ("input_ids", "attention_mask"),
            ("decoder_input_ids", "decoder_attention_mask"),
        ):
            if ids in batch:
                batch[ids] = torch.where(
                    batch[mask] == 1, batch[ids], 18
                )  # a token that occurs nowhere else
    again = q.qp(base, {t: experts[t] for t in reversed(TASKS)}, other, basis="rotated_rows")
    assert [r["layer"] for r in again.table] == [r["layer"] for r in merge.table]
    assert_same(again.state_dict, merge.state_dict, 1e-5)


@pytest.mark.parametrize("name", ["gpt2 with its head", "t5", "flan t5 with its head"])
def test_tied_weights_stay_tied(name):
    base, experts, calibration = problem(name)
    merge, places = q.qp(base, experts, calibration), {}
    for key, value in base.state_dict().items():
        places.setdefault(value.data_ptr(), []).append(key)
    tied = [keys for keys in places.values() if len(keys) > 1]
    assert tied
    for first, *others in tied:
        assert all(
            torch.equal(merge.state_dict[first], merge.state_dict[other]) for other in others
        )
        assert not torch.equal(merge.state_dict[first], base.state_dict()[first])
    assert_same(merge.model(base).state_dict(), merge.state_dict, 0.0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_precision_is_merged_in_double_and_stored_as_it_came(name):
    base, experts, calibration = problem(name, torch.bfloat16)
    merge = q.qp(
        base, dict.fromkeys(TASKS, experts["a"]), calibration, basis="rows", ridge=0.0, prior=0.0
    )
    assert {v.dtype for v in merge.state_dict.values()} == {torch.bfloat16}
    assert sorted(merge.averaged) == ARCHITECTURES[name][1]
    assert all(merge.averaged.values())
    assert_same(merge.state_dict, experts["a"], 2e-2)


def test_tokens_that_do_not_occur_are_averaged_and_the_others_weighted_by_how_often_they_do():
    base, experts, calibration = problem("bert")
    merge = q.qp(base, experts, calibration, basis="elements", ridge=0.0, targets="propagated")
    key, n = "embeddings.word_embeddings.weight", torch.zeros(len(TASKS), 19, dtype=torch.float64)
    for t, task in enumerate(TASKS):
        for batch in calibration[task]:
            n[t] += batch["input_ids"][batch["attention_mask"] == 1].bincount(minlength=19)
    share = torch.where(n.sum(0) > 0, n / n.sum(1, keepdim=True), 1.0)
    expected = sum(
        (share[t] / share.sum(0))[:, None] * experts[task][key] for t, task in enumerate(TASKS)
    )
    assert 0 < (n.sum(0) == 0).sum() < 19
    torch.testing.assert_close(merge.state_dict[key], expected)


@pytest.mark.parametrize("gain", [1.0, 60.0])
def test_a_norm_that_stores_how_far_its_gain_is_from_one_is_solved_as_the_same_norm(gain):
    class PlusOneRMSNorm(torch.nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) + x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    base, experts, calibration = problem("llama")
    base.norm.weight.data.fill_(gain)
    for state in experts.values():
        state["norm.weight"].add_(gain - 1)
    merge = q.qp(base, experts, calibration, basis="rows")
    base.norm = PlusOneRMSNorm(8, eps=1e-6).double()
    base.norm.weight.data.fill_(gain - 1)
    for state in experts.values():
        state["norm.weight"].sub_(1)
    other = q.qp(base, experts, calibration, basis="rows")
    assert "norm" in {row["layer"] for row in other.table}
    torch.testing.assert_close(other.state_dict["norm.weight"] + 1, merge.state_dict["norm.weight"])


def test_norms_are_solved_whatever_their_classes_are_called():
    config = transformers.SwitchTransformersConfig(
        **T5, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0
    )
    ARCHITECTURES["switch t5"] = (lambda: transformers.SwitchTransformersModel(config), None)
    base, experts, calibration = problem("switch t5")
    assert not [name for name in q.qp(base, experts, calibration).averaged if "norm" in name]


# one or two of every group, and those that once went wrong
FAST = (
    "BERT",
    "DeBERTa-v2",
    "ALBERT",
    "XLNet",
    "OPT",
    "Qwen3",
    "Gemma 2",
    "T5",
    "BART",
    "bert2bert",
    "GPT-2, tied head",
    "BERT, classes",
    "ViT",
    "Swin",
    "ConvNeXt",
    "CLIP",
    "Whisper",
    "Wav2Vec2",
    "Mixtral",
    "Qwen2-MoE",
    "Jamba",
    "LFM2",
    "nn.TransformerEncoder",
    "Sequence first",
    "Experts in a list",
    "Residual network",
    "U-Net",
)
# padding is refused where a model keeps no row per token, and where padded rows turn into NaN in
# the model itself
REFUSED = {"Longformer": ("right", "left"), "Funnel": ()}
LEAST_SOLVED = {
    "encoders": 0.4,
    "decoders": 0.7,
    "encoder-decoders": 0.85,
    "heads": 0.75,
    "vision": 0.6,
    "audio": 0.8,
    "mixtures of experts": 0.2,
    "state space and hybrids": 0.5,
    "plain PyTorch": 0.4,
}


def assert_row(row):
    """Every property of one architecture, with its bound."""
    assert row["refused"] == "", row
    tolerance = {"float64": 1e-8, "float32": 1e-4}[row["dtype"]]
    assert row["copies"] <= tolerance, row
    assert row["batches"] <= tolerance, row
    for side in compatibility.SIDES:
        if side in REFUSED.get(row["architecture"], ()):
            assert "attention_mask" in row[f"{side}_refused"], row
        elif row[f"{side}_model"] is not None and row[f"{side}_model"] <= tolerance:
            assert row[f"{side}_refused"] == "" and row[side] <= tolerance, row
    assert row["solved"] + row["averaged"] == pytest.approx(1) and row["untouched"] == 0, row
    assert row["solved"] >= LEAST_SOLVED[row["group"]], row
    assert row["solved"] == 1 or row["reason"], row


@pytest.mark.parametrize("name", FAST)
def test_copies_batches_padding_and_shares(name):
    assert_row(compatibility.check(name))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", compatibility.ARCHITECTURES)
def test_copies_batches_padding_and_shares_of_every_architecture(name, seed):
    assert_row(compatibility.check(name, seed))


def test_the_registry_is_as_wide_as_the_book_says():
    groups = {entry.group for entry in compatibility.ARCHITECTURES.values()}
    assert len(compatibility.ARCHITECTURES) >= 45 and groups == set(LEAST_SOLVED)
    assert set(FAST) <= set(compatibility.ARCHITECTURES)


def test_what_an_architecture_is_called_that_is_not_there():
    with pytest.raises(
        q.errors.MergeError, match="architecture: expected one of .*BERT.*, found 'Bert'"
    ):
        compatibility.check("Bert")


def test_a_change_of_the_merge_is_told_from_one_of_the_model():
    row = {"refused": "", "dtype": "float64", "right": 1.0, "right_model": 1.0, "right_refused": ""}
    assert compatibility.verdict(row, "right") == compatibility.THE_MODELS_OWN
    assert compatibility.verdict(row | {"right_model": 0.0}, "right") == compatibility.FAILS
    assert (
        compatibility.verdict(row | {"right_model": 0.0, "right": 0.0}, "right")
        == compatibility.HOLDS
    )
    assert (
        compatibility.verdict(row | {"right_model": None, "right": None}, "right")
        == compatibility.WITHOUT
    )
    assert (
        compatibility.verdict(row | {"right_model": 0.0, "right_refused": "no"}, "right")
        == compatibility.REFUSED
    )
    assert compatibility.verdict(row | {"refused": "no"}, "right") == compatibility.REFUSED
