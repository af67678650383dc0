"""Inputs that calibrated methods once got wrong, or refused badly: unusual layers and batches."""

import copy

import pytest
import torch
from cases import (
    ELEMENTS,
    TASKS,
    assert_copies_come_back,
    assert_every_parameter_is_solved_or_listed,
    assert_same_merge,
    beginnings,
    both,
    distance,
    masked,
    tokens,
    tuned,
    under,
)
from tiny import HEADS, PICTURES, PLACED, SIZE, SOUND, model
from torch import nn

import qpmerge_lite as q
from qpmerge_lite.errors import MergeError

# ----------------------------------------------------------------- layers that read something else


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("MPNetModel", {}),
        ("DebertaModel", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        (
            "DebertaV2Model",
            {
                "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"],
                "position_buckets": 4,
                "norm_rel_ebd": "layer_norm",
                "share_att_key": True,
            },
        ),
        (
            "DeepseekV3Model",
            {
                "q_lora_rank": 8,
                "kv_lora_rank": 8,
                "qk_nope_head_dim": 4,
                "qk_rope_head_dim": 4,
                "v_head_dim": 4,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 8,
                "first_k_dense_replace": 2,
                "n_group": 1,
                "topk_group": 1,
            },
        ),
    ],
)
@pytest.mark.parametrize("count", [6, 7, 8])  # DeBERTa's relative positions number 8
def test_tables_and_norms_of_relative_positions(kind, more, count):
    base, ids, mask = model(kind, PLACED | more), tokens(count), beginnings(count)
    one, two = (
        both({"input_ids": under(ids, mask, pad), "attention_mask": mask}) for pad in (1, 2)
    )
    merge = assert_same_merge(base, one, two)
    assert_every_parameter_is_solved_or_listed(base, merge)
    assert_copies_come_back(base, one)


def test_a_bias_of_pairs_of_tokens_is_averaged_for_a_reason():
    base = model("MPNetModel", PLACED, add_pooling_layer=False)
    merge = q.qp(base, tuned(base), both({"input_ids": tokens(6)}), **ELEMENTS)
    assert list(merge.averaged) == ["encoder.relative_attention_bias.weight"]


def test_a_tower_without_a_mask_is_not_masked():
    config = {
        "text_config": {**PLACED, "eos_token_id": 2},
        "vision_config": PICTURES,
        "projection_dim": 8,
    }
    base, ids, mask = model("CLIPModel", config), tokens(6), beginnings(6, least=3)
    pictures = {"pixel_values": torch.randn(6, 3, 8, 8, dtype=torch.float64)}
    one, two = (both(masked(base, ids, mask, pad) | pictures) for pad in (1, 2))
    merge = assert_same_merge(base, one, two)
    layers = {row["layer"] for row in merge.table}
    assert any(name.startswith("vision_model") for name in layers)
    assert any(name.startswith("text_model") for name in layers)
    without = {"input_ids": ids, **pictures}
    assert_same_merge(
        base, both(without), both(without | {"attention_mask": torch.ones_like(ids)}), 1e-8
    )


def masks_of_something_else():
    """Name -> model, batch, and the mask whose entries are no rows of the hidden state."""
    sound = torch.randn(6, 120, dtype=torch.float64)
    heard = (torch.arange(120) < torch.randint(60, 120, (6, 1))).long()
    funnel = {
        "vocab_size": 40,
        "block_sizes": [1, 1],
        "d_model": 8,
        "n_head": 2,
        "d_head": 4,
        "d_inner": 12,
    }
    texts = {"input_ids": tokens(6), "attention_mask": beginnings(6)}
    return {
        "wav2vec2": (
            model("Wav2Vec2Model", SOUND),
            {"input_values": sound, "attention_mask": heard},
        ),
        "longformer": (
            model("LongformerModel", {**PLACED, "attention_window": 4, "pad_token_id": 1}),
            texts,
        ),
        "funnel": (model("FunnelModel", funnel), texts),
    }


@pytest.mark.parametrize("name", ["wav2vec2", "longformer", "funnel"])
def test_a_mask_that_rows_cannot_be_matched_to_is_an_error_that_says_so(name):
    base, batch = masks_of_something_else()[name]
    with pytest.raises(MergeError, match="attention_mask"):
        q.qp(base, tuned(base), both(batch), **ELEMENTS)


@pytest.mark.parametrize("name", ["wav2vec2", "longformer", "funnel"])
def test_the_same_models_are_merged_where_nothing_is_padded(name):
    base, batch = masks_of_something_else()[name]
    full = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    merge = assert_copies_come_back(base, both(full))
    assert merge.table


# ------------------------------------------------------------------- what batches and outputs hold


def test_labels_in_a_batch_change_nothing():
    base, ids = model("LlamaForCausalLM", SIZE), tokens(6)
    experts = tuned(base)
    with_labels, without = both({"input_ids": ids, "labels": ids}), both({"input_ids": ids})
    merges = [
        q.qp(base, experts, batches, **ELEMENTS).state_dict for batches in (with_labels, without)
    ]
    assert distance(*merges) < 1e-12
    energies = [
        q.audit(base, merges[0], experts, batches)["output"] for batches in (with_labels, without)
    ]
    assert energies[0] == pytest.approx(energies[1], abs=1e-12)


def test_flags_of_a_library_pass_through():
    base, ids = model("BertModel", PLACED), tokens(6)
    flags = {"return_dict": True, "output_hidden_states": True, "token_type_ids": None}
    assert_same_merge(base, both({"input_ids": ids}), both({"input_ids": ids, **flags}))
    assert_same_merge(
        base, both({"input_ids": ids}), both({"input_ids": ids, "return_dict": False})
    )


def test_positions_given_once_for_all_sequences():
    base, ids = model("BertModel", PLACED), tokens(6)
    places = torch.arange(7)[None]
    once = {"position_ids": places, "input_ids": ids}  # the first entry is not one per sequence
    assert_same_merge(
        base, both(once), both({"input_ids": ids, "position_ids": places.expand(6, 7)})
    )


def test_experts_may_have_another_precision_than_the_base():
    base, batches = model("LlamaModel", HEADS, double=False), both({"input_ids": tokens(6)})
    half = {t: {k: v.bfloat16() for k, v in state.items()} for t, state in tuned(base).items()}
    single_precision = {t: {k: v.float() for k, v in state.items()} for t, state in half.items()}
    for method in (q.qp, q.regmean, q.featcal):
        one, two = (
            method(base, experts, batches).state_dict for experts in (half, single_precision)
        )
        assert distance(one, two) == 0
        assert {value.dtype for value in one.values()} == {torch.float32}
    soup = q.soup(base, half).state_dict
    assert q.audit(base, soup, half, batches) == q.audit(base, soup, single_precision, batches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["LlamaModel", "BertModel", "ViTModel"])
def test_half_precision_is_stored_as_it_came(kind, dtype):
    base = model(kind, PICTURES if kind == "ViTModel" else PLACED).to(dtype)
    batch = {"input_ids": tokens(6)}
    if kind == "ViTModel":
        batch = {"pixel_values": torch.randn(6, 3, 8, 8, dtype=dtype)}
    merge = assert_copies_come_back(base, both(batch), 1e-3)
    assert {value.dtype for value in merge.state_dict.values()} == {dtype}


# ---------------------------------------------------------------------- shared blocks and adapters


def test_blocks_that_are_used_again_are_solved_on_all_uses_or_listed():
    base = model("AlbertModel", {**PLACED, "embedding_size": 6}, add_pooling_layer=False)
    ids, mask = tokens(6), beginnings(6)
    one, two = (both(masked(base, ids, mask, pad)) for pad in (1, 2))
    assert_copies_come_back(base, one)
    assert_same_merge(base, one, two)


def test_routed_experts_of_a_library():
    config = {
        "vocab_size": 40,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": 2,
        "num_heads": 2,
        "relative_attention_num_buckets": 4,
        "num_experts": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 64,
    }
    base = model("SwitchTransformersModel", config)
    batch = {"input_ids": tokens(6), "decoder_input_ids": tokens(6, 5)}
    assert_copies_come_back(base, both(batch), 1e-6)  # routers are float32


class Linear(nn.Module):
    """A layer with an adapter, wrapped as libraries do under the name of the class."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, layer.out_features, bias=False)})

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_factors_of_adapters_are_refused_with_the_advice_to_fold_them():
    base = model("LlamaModel", HEADS)
    for block in base.layers:
        block.self_attn.q_proj = Linear(block.self_attn.q_proj).double()
    with pytest.raises(MergeError, match="(?i)fold|merge_and_unload"):
        q.qp(base, tuned(base), both({"input_ids": tokens(6)}))


def test_adapters_that_were_folded_are_merged():
    peft = pytest.importorskip("peft")
    base, folded = model("LlamaModel", HEADS), {}
    for task in TASKS:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        folded[task] = (
            peft.get_peft_model(copy.deepcopy(base), config).merge_and_unload().state_dict()
        )
    merge = q.qp(base, folded, both({"input_ids": tokens(6)}), **ELEMENTS)
    assert_every_parameter_is_solved_or_listed(base, merge)
