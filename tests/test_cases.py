"""Inputs that calibrated methods once got wrong: arguments of blocks, padding, pairs of stacks."""

import pytest
import torch
from cases import (
    ELEMENTS,
    apart,
    assert_batches_do_not_matter,
    assert_copies_come_back,
    assert_every_parameter_is_solved_or_listed,
    assert_same_merge,
    assert_stationary,
    beginnings,
    both,
    distance,
    longer,
    masked,
    plain_energy,
    single,
    tokens,
    tuned,
    under,
)
from tiny import (
    HEADS,
    PAIR,
    PLACED,
    SIZE,
    SWIN,
    WHISPER,
    WINDOWS,
    bert_with_decoder,
    model,
    opt,
    vit_with_decoder,
)
from torch import nn

import qpmerge_lite as q

# ------------------------------------------------- blocks of one stack with arguments of their own


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Gemma2Model", WINDOWS),
        (
            "Gemma3TextModel",
            {**WINDOWS, "layer_types": ["sliding_attention", "full_attention"] * 2},
        ),
        ("MistralModel", WINDOWS),
        (
            "ModernBertModel",
            {
                **PLACED,
                "local_attention": 4,
                "num_hidden_layers": 4,
                "pad_token_id": 1,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "cls_token_id": 0,
                "sep_token_id": 2,
            },
        ),
    ],
)
def test_windows_of_attention_follow_every_batch(kind, config):
    base = model(kind, config)
    experts = tuned(base)
    short, long = {"input_ids": tokens(4, 3)}, {"input_ids": tokens(4, 14)}
    merges = [q.qp(base, experts, both(*o), **ELEMENTS) for o in ((short, long), (long, short))]
    assert distance(*(merge.state_dict for merge in merges)) < 1e-9
    soup = q.soup(base, experts).state_dict
    for batches in (both(short, long), both(long, short)):
        found = q.audit(base, soup, experts, batches)["output"]
        assert found == pytest.approx(plain_energy(base, soup, experts, batches), abs=1e-9)


def test_a_massive_channel_hides_no_wrong_argument_of_a_block():
    config = {
        **HEADS,
        "sliding_window": 3,
        "query_pre_attn_scalar": 4,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    base = model("Gemma3TextModel", config)
    with torch.no_grad():
        base.embed_tokens.weight[:, 0], base.norm.weight[0] = 10.0, 300.0
    assert_stationary(base, apart(lambda n, s: {"input_ids": tokens(n, s)}, (8, 7), (5, 12)))


@pytest.mark.parametrize(
    "kind", ["LlamaModel", "GPT2Model", "BertModel", "Lfm2Model", "MambaModel"]
)
def test_layers_are_solved_on_what_they_read_in_the_merged_model(kind):
    more = {
        "GPT2Model": {"n_positions": 16},
        "Lfm2Model": {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
        "MambaModel": {"state_size": 4, "conv_kernel": 3},
    }
    sizes = {"GPT2Model": {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 40}}
    base = model(kind, sizes.get(kind, SIZE) | more.get(kind, {}))
    if kind == "GPT2Model":  # its layers are no nn.Linear: a head stands for them
        base.ln_f = nn.Sequential(base.ln_f, nn.Linear(8, 8)).double()
    assert_stationary(base, apart(lambda n, s: {"input_ids": tokens(n, s)}, (6, 7), (4, 5)))


@pytest.mark.parametrize(
    ("kind", "config", "double"),
    [
        (
            "JambaModel",
            {
                **SIZE,
                "num_key_value_heads": 1,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "num_experts": 2,
                "mamba_d_state": 4,
                "mamba_d_conv": 3,
                "mamba_dt_rank": 4,
            },
            False,
        ),
        (
            "Lfm2Model",
            {**SIZE, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
            True,
        ),
        (
            "BambaModel",
            {
                **SIZE,
                "num_key_value_heads": 1,
                "attn_layer_indices": [1],
                "mamba_n_heads": 4,
                "mamba_d_head": 4,
                "mamba_d_state": 4,
                "mamba_n_groups": 1,
                "mamba_d_conv": 3,
                "mamba_chunk_size": 4,
            },
            True,
        ),
    ],
)
def test_hybrids_whose_blocks_take_different_masks(kind, config, double):
    base, ids, mask = model(kind, config, double), tokens(6), beginnings(6)
    tolerance = 1e-9 if double else 1e-4
    one, two = (both(masked(base, ids, mask, pad)) for pad in (1, 2))
    assert_same_merge(base, one, two, tolerance)
    assert_copies_come_back(base, one, tolerance)


# ----------------------------------------------------------------------------- padding and layouts


def padded_models():
    """Name -> model and whether padding on the left leaves its own output as it is."""
    return {
        "opt": (opt(), True),
        "llama": (model("LlamaModel", HEADS), True),
        "qwen3": (model("Qwen3Model", HEADS), True),
        "hunyuan": (model("HunYuanDenseV1Model", HEADS), True),
        "bert": (model("BertModel", PLACED, add_pooling_layer=False), True),
        "mpnet": (model("MPNetModel", PLACED, add_pooling_layer=False), True),
        "xlnet": (
            model(
                "XLNetModel",
                {"vocab_size": 40, "d_model": 8, "d_inner": 12, "n_layer": 2, "n_head": 2},
            ),
            True,
        ),
        "mamba": (model("MambaModel", {**SIZE, "state_size": 4, "conv_kernel": 3}), True),
        "roformer": (model("RoFormerModel", {**PLACED, "embedding_size": 8}), False),
    }


@pytest.mark.parametrize(
    "name", ["opt", "llama", "qwen3", "hunyuan", "bert", "mpnet", "xlnet", "mamba", "roformer"]
)
@pytest.mark.parametrize("count", [1, 6, 7])  # 7: as many sequences as tokens
def test_padding_is_never_counted(name, count):
    base, left = padded_models()[name]
    ids, mask = tokens(count), beginnings(count)
    batches = [masked(base, ids, mask, pad) for pad in (1, 2)]
    merge = assert_same_merge(base, both(batches[0]), both(batches[1]))
    assert_every_parameter_is_solved_or_listed(base, merge)
    for side in ("right", *(["left"] if left else [])):
        more = longer(base, batches[0], side)
        assert_same_merge(base, both(batches[0]), both(more), 1e-5)  # rotary tables are float32


@pytest.mark.parametrize("name", ["opt", "qwen3", "mpnet", "xlnet"])
def test_sequences_come_one_by_one_or_many_at_a_time(name):
    base, _ = padded_models()[name]
    batches = [masked(base, tokens(n, s), beginnings(n, s)) for n, s in ((6, 7), (5, 5))]
    assert_batches_do_not_matter(base, both(*batches), 1e-8)
    assert_copies_come_back(base, both(*batches))


@pytest.mark.parametrize("name", ["qwen3", "hunyuan"])
def test_norms_over_heads_are_solved_with_a_mask_as_without(name):
    base, ids = padded_models()[name][0], tokens(6)
    experts = tuned(base)
    calibration = both({"input_ids": ids}), both({"input_ids": ids, "attention_mask": ids * 0 + 1})
    without, ones = (q.qp(base, experts, batches, **ELEMENTS) for batches in calibration)
    assert distance(without.state_dict, ones.state_dict) < 1e-9
    assert len(without.table) == len(ones.table) == 24
    assert any(row["layer"].endswith(("q_norm", "query_layernorm")) for row in ones.table)


def test_layers_that_read_tokens_laid_flat_are_solved():
    base = opt()
    merge = q.qp(
        base,
        tuned(base),
        both({"input_ids": tokens(8), "attention_mask": beginnings(8)}),
        **ELEMENTS,
    )
    layers = {row["layer"] for row in merge.table}
    assert {f"decoder.layers.{i}.fc{j}" for i in (0, 1) for j in (1, 2)} <= layers


@pytest.mark.parametrize("kind", ["SwinModel", "Swinv2Model"])
def test_windows_of_pictures_belong_to_their_picture(kind):
    base = model(kind, SWIN, add_pooling_layer=False)
    pictures = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    merge = assert_batches_do_not_matter(base, both({"pixel_values": pictures}), 1e-8)
    assert any(
        row["layer"].endswith("attention.self.query") or "q_proj" in row["layer"]
        for row in merge.table
    )
    experts = tuned(base)
    one, two = (
        q.qp(base, experts, both(*batches)).state_dict  # cross-fitted: folds are of pictures
        for batches in ([{"pixel_values": pictures}], single([{"pixel_values": pictures}]))
    )
    assert distance(one, two) < 1e-8


# -------------------------------------------------------------------------- encoders with decoders


@pytest.mark.parametrize("length", [7, 5])
def test_a_decoder_of_bert_has_its_own_mask(length):
    base, ids, answers, mask = (
        bert_with_decoder(),
        tokens(6),
        tokens(6, length),
        beginnings(6, length),
    )
    texts = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_attention_mask": mask,
    }
    one, two = (both(texts | {"decoder_input_ids": under(answers, mask, pad)}) for pad in (1, 2))
    merge = assert_same_merge(base, one, two)
    assert_every_parameter_is_solved_or_listed(base, merge)
    reads = beginnings(6)
    one, two = (
        both(
            texts
            | {
                "input_ids": under(ids, reads, pad),
                "attention_mask": reads,
                "decoder_input_ids": answers,
            }
        )
        for pad in (1, 2)
    )
    assert_same_merge(base, one, two)


def test_a_decoder_behind_pictures_has_its_mask():
    base, answers, mask = vit_with_decoder(), tokens(6), beginnings(6)
    texts = {
        "pixel_values": torch.randn(6, 3, 8, 8, dtype=torch.float64),
        "decoder_attention_mask": mask,
    }
    one, two = (both(texts | {"decoder_input_ids": under(answers, mask, pad)}) for pad in (1, 2))
    assert_same_merge(base, one, two)


@pytest.mark.parametrize(("encoders", "decoders"), [(8, 1), (1, 8), (2, 2)])
@pytest.mark.parametrize("kind", ["WhisperModel", "M2M100Model", "T5Model", "BartModel"])
def test_the_mask_of_a_small_decoder_is_read(kind, encoders, decoders):
    depths = {"encoder_layers": encoders, "decoder_layers": decoders}
    t5 = {
        "vocab_size": 40,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": encoders,
        "num_heads": 2,
        "num_decoder_layers": decoders,
        "relative_attention_num_buckets": 4,
    }
    configs = {"WhisperModel": WHISPER | depths, "T5Model": t5}
    base, answers, mask = (
        model(kind, configs.get(kind, PAIR | depths)),
        tokens(6, 5),
        beginnings(6, 5),
    )
    if kind == "WhisperModel":
        reads = {"input_features": torch.randn(6, 4, 16, dtype=torch.float64)}
    else:
        reads = {"input_ids": tokens(6), "attention_mask": torch.ones(6, 7, dtype=torch.long)}
    texts = reads | {"decoder_attention_mask": mask}
    one, two = (both(texts | {"decoder_input_ids": under(answers, mask, pad)}) for pad in (1, 2))
    assert_same_merge(base, one, two)


@pytest.mark.parametrize(
    "kind", ["MarianModel", "PegasusModel", "BartModel", "MBartModel", "BlenderbotModel"]
)
def test_tables_of_positions_that_take_no_ids_are_no_obstacle(kind):
    base = model(kind, PAIR)
    batch = {"input_ids": tokens(6), "decoder_input_ids": tokens(6, 5)}
    assert_copies_come_back(base, both(batch))
    assert_batches_do_not_matter(base, both(batch), 1e-8)


def test_token_ids_beyond_the_table_of_positions_are_no_obstacle():
    base = model("WhisperModel", WHISPER)  # forty tokens, sixteen positions
    batch = {
        "input_features": torch.randn(6, 4, 16, dtype=torch.float64),
        "decoder_input_ids": tokens(6, 5),
    }
    assert_copies_come_back(base, both(batch))
