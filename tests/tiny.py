"""Tiny random models of ``transformers``, in float64, that several tests share."""

import pytest
import torch

T = pytest.importorskip("transformers")

SIZE = {
    "vocab_size": 40, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
PLACED = {**SIZE, "max_position_embeddings": 16}
HEADS = {**SIZE, "num_key_value_heads": 1, "head_dim": 4}
PAIR = {
    "vocab_size": 40, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12, "max_position_embeddings": 16, "pad_token_id": 1,
}  # fmt: skip
TOWER = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
PICTURES = {**TOWER, "image_size": 8, "patch_size": 4}
SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2],
    "window_size": 4,
}  # fmt: skip
WHISPER = {
    **PAIR, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16,
    "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
SOUND = {
    **SIZE, "hidden_size": 16, "conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [8, 3],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
WINDOWS = {**HEADS, "num_hidden_layers": 4, "sliding_window": 4}


def model(kind, config, double=True, **options):
    """A random model of a class of ``transformers``, matrices with gain one."""
    made = getattr(T, kind)
    made = made(made.config_class(**config), **options)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    return made.to(torch.float64 if double else torch.float32).eval()


def opt():
    return model("OPTModel", {**PLACED, "ffn_dim": 12, "word_embed_proj_dim": 8})


def bert_with_decoder():
    made = T.EncoderDecoderModel
    towers = [T.BertConfig(**PLACED) for _ in range(2)]
    return made(made.config_class.from_encoder_decoder_configs(*towers)).double().eval()


def vit_with_decoder():
    made = T.VisionEncoderDecoderModel
    towers = T.ViTConfig(**PICTURES), T.BertConfig(**PLACED)
    return made(made.config_class.from_encoder_decoder_configs(*towers)).double().eval()
