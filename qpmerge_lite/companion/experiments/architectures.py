"""Published architectures as tiny models: the registry behind the compatibility table.

Everything is small (width 8, two blocks, forty tokens), so that a merge takes little time. The
numbers of a configuration do not matter; that every part of the architecture is there does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

VOCABULARY, PAD = 40, 1  # no text holds the token that pads

SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": PAD,
}  # fmt: skip
SHARED_KEYS = {**SIZE, "num_key_value_heads": 1}
HEADS = {**SHARED_KEYS, "head_dim": 4}
WINDOWS = {**HEADS, "sliding_window": 4}
GPT = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
T5 = {
    "vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 4,
}  # fmt: skip
GATED = {**T5, "feed_forward_proj": "gated-gelu"}
PAIRS = {
    "vocab_size": VOCABULARY, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12, "max_position_embeddings": 16, "pad_token_id": PAD,
}  # fmt: skip
PICTURES = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2],
    "window_size": 4,
}  # fmt: skip
FOUR_STAGES = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
RESIDUAL = {
    "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic",
}  # fmt: skip
STAGES = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 8],
    "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 2], "mlp_ratios": [2, 2],
}  # fmt: skip
SOUND = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [8, 3],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
WHISPER = {
    **PAIRS, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16,
    "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
DISENTANGLED = {**SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
SHARED_BUCKETS = {
    **DISENTANGLED, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True,
}  # fmt: skip
MARKS = {"bos_token_id": 0, "eos_token_id": 2}
MARKED = {**SIZE, **MARKS, "cls_token_id": 0, "sep_token_id": 2}
XLNET = {"vocab_size": VOCABULARY, "d_model": 8, "d_inner": 12, "n_layer": 2, "n_head": 2}
FUNNEL = {
    "vocab_size": VOCABULARY, "block_sizes": [1, 1], "d_model": 8, "n_head": 2, "d_head": 4,
    "d_inner": 12,
}  # fmt: skip
LATENT = {
    **SIZE, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
ROUTED = {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERT = {
    **SHARED_KEYS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}  # fmt: skip
ONE_OF_EACH = ["sliding_attention", "full_attention"]
MAMBA = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 2,
    "conv_kernel": 3,
}  # fmt: skip
GRANITE = {
    **SHARED_KEYS, "layer_types": ["mamba", "attention"], "num_local_experts": 2,
    "num_experts_per_tok": 1, "shared_intermediate_size": 8, "mamba_n_heads": 4,
    "mamba_d_head": 4, "mamba_d_state": 4, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_d_conv": 3, "mamba_chunk_size": 4,
}  # fmt: skip
JAMBA = {
    **SHARED_KEYS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_d_conv": 3,
    "mamba_dt_rank": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One row of the compatibility table.

    Attributes:
        group: what it stands beside in the table.
        model: name of a class of ``transformers``, or of ``plain``.
        inputs: what its batches hold, the name of a function in ``compatibility.INPUTS``.
        config: of a class of ``transformers``, as keywords.
        options: other keywords of the class.
        double: whether it runs in float64; float32 otherwise.
    """

    group: str
    model: str
    inputs: str = "text"
    config: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    double: bool = True


def _encoder(model: str, config: dict, pooler: bool = False, **more) -> Architecture:
    options = {"add_pooling_layer": False} if pooler else {}
    return Architecture("encoders", model, config={**config, **more}, options=options)


def _decoder(model: str, config: dict, **more) -> Architecture:
    return Architecture("decoders", model, config={**config, **more})


def _head(model: str, config: dict, inputs: str = "text", **more) -> Architecture:
    return Architecture("heads", model, inputs, config={**config, **more})


def _pair(model: str, config: dict, **more) -> Architecture:
    return Architecture("encoder-decoders", model, "pairs", {**config, **more})


def _vision(model: str, config: dict, pooler: bool = False, **more) -> Architecture:
    options = {"add_pooling_layer": False} if pooler else {}
    return Architecture("vision", model, "pictures", {**config, **more}, options)


def _towers(model: str, **more) -> Architecture:
    config = {"text_config": {**SIZE, **more}, "vision_config": PICTURES}
    return Architecture("vision", model, "towers", config)


def _mixture(model: str, config: dict, **more) -> Architecture:
    return Architecture("mixtures of experts", model, config={**config, **more}, double=False)


def _hybrid(model: str, config: dict, double: bool = True, **more) -> Architecture:
    return Architecture("state space and hybrids", model, "text", {**config, **more}, {}, double)


def _plain(model: str, inputs: str) -> Architecture:
    return Architecture("plain PyTorch", model, inputs)


ARCHITECTURES: dict[str, Architecture] = {
    "BERT": _encoder("BertModel", SIZE, pooler=True),
    "RoBERTa": _encoder("RobertaModel", SIZE, pooler=True),
    "MPNet": _encoder("MPNetModel", SIZE, pooler=True),
    "DeBERTa": _encoder("DebertaModel", DISENTANGLED),
    "DeBERTa-v2": _encoder("DebertaV2Model", SHARED_BUCKETS),
    "ELECTRA": _encoder("ElectraModel", SIZE, embedding_size=6),
    "ALBERT": _encoder("AlbertModel", SIZE, pooler=True, embedding_size=6),
    "ModernBERT": _encoder("ModernBertModel", MARKED, local_attention=4),
    "DistilBERT": _encoder("DistilBertModel", SIZE, hidden_dim=12),
    "XLNet": _encoder("XLNetModel", XLNET),
    "NomicBERT": _encoder("NomicBertModel", SIZE, pooler=True),
    "RoFormer": _encoder("RoFormerModel", SIZE, embedding_size=6),
    "Longformer": _encoder("LongformerModel", SIZE, pooler=True, attention_window=4),
    "Funnel": _encoder("FunnelModel", FUNNEL),
    "T5 encoder": _encoder("T5EncoderModel", T5),
    "GPT-2": _decoder("GPT2Model", GPT),
    "GPT-NeoX": _decoder("GPTNeoXModel", SIZE),
    "OPT": _decoder("OPTModel", SIZE, ffn_dim=12, word_embed_proj_dim=8),
    "Llama": _decoder("LlamaModel", SHARED_KEYS),
    "Mistral": _decoder("MistralModel", WINDOWS),
    "Qwen2": _decoder("Qwen2Model", SHARED_KEYS),
    "Qwen3": _decoder("Qwen3Model", HEADS),
    "Gemma": _decoder("GemmaModel", HEADS),
    "Gemma 2": _decoder("Gemma2Model", WINDOWS),
    "Gemma 3": _decoder("Gemma3TextModel", WINDOWS, layer_types=ONE_OF_EACH),
    "Phi-3": _decoder("Phi3Model", SHARED_KEYS, **MARKS),
    "Bloom": _decoder("BloomModel", SIZE),
    "Falcon": _decoder("FalconModel", SIZE),
    "HunYuan": _decoder("HunYuanDenseV1Model", HEADS),
    "T5": _pair("T5Model", T5),
    "BART": _pair("BartModel", PAIRS),
    "Marian": _pair("MarianModel", PAIRS),
    "Pegasus": _pair("PegasusModel", PAIRS),
    "M2M100": _pair("M2M100Model", PAIRS),
    "bert2bert": _pair("EncoderDecoderModel", SIZE),
    "Llama, untied head": _head("LlamaForCausalLM", SHARED_KEYS),
    "GPT-2, tied head": _head("GPT2LMHeadModel", GPT),
    "Flan-T5, tied head": _head("T5ForConditionalGeneration", GATED, "pairs"),
    "BERT, tied head": _head("BertForMaskedLM", SIZE),
    "BERT, classes": _head("BertForSequenceClassification", SIZE),
    "Llama, classes": _head("LlamaForSequenceClassification", SHARED_KEYS),
    "ViT": _vision("ViTModel", PICTURES, pooler=True),
    "DINOv2": _vision("Dinov2Model", PICTURES, mlp_ratio=2),
    "BEiT": _vision("BeitModel", PICTURES, pooler=True),
    "Swin": _vision("SwinModel", SWIN, pooler=True),
    "ConvNeXt": _vision("ConvNextModel", FOUR_STAGES, patch_size=2),
    "ResNet": _vision("ResNetModel", RESIDUAL),
    "SegFormer": _vision("SegformerModel", STAGES),
    "CLIP": _towers("CLIPModel", eos_token_id=2),
    "SigLIP": _towers("SiglipModel"),
    "Whisper": Architecture("audio", "WhisperModel", "speech", WHISPER),
    "Wav2Vec2": Architecture("audio", "Wav2Vec2Model", "sound", SOUND),
    "HuBERT": Architecture("audio", "HubertModel", "sound", SOUND),
    "Mixtral": _mixture("MixtralModel", ROUTED),
    "Qwen2-MoE": _mixture("Qwen2MoeModel", SHARED_EXPERT),
    "gpt-oss": _mixture("GptOssModel", ROUTED, sliding_window=4, layer_types=ONE_OF_EACH),
    "DeepSeek-V3": _mixture("DeepseekV3Model", LATENT),
    "Mamba": _hybrid("MambaModel", MAMBA),
    "Jamba": _hybrid("JambaModel", JAMBA, double=False),
    "Granite 4": _hybrid("GraniteMoeHybridModel", GRANITE, double=False),
    "LFM2": _hybrid("Lfm2Model", SHARED_KEYS, layer_types=["conv", "full_attention"]),
    "RWKV": _hybrid("RwkvModel", SIZE, attention_hidden_size=8, context_length=16),
    "nn.TransformerEncoder": _plain("Encoder", "text"),
    "nn.Transformer": _plain("Pair", "pairs"),
    "Sequence first": _plain("SequenceFirst", "text"),
    "Experts in a list": _plain("Experts", "text"),
    "Residual network": _plain("Residual", "pictures"),
    "U-Net": _plain("UNet", "pictures"),
    "MLP-Mixer": _plain("Mixer", "pictures"),
}  # fmt: skip
