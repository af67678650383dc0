"""The encoders of the embedded language suite in the public format: folders for transformers.

transformers has the architecture under the name of ESM: normalisation before attention and
perceptron and once more at the end, positions from a table, no class token. Weights only get other
names, and the table of positions a first row for padding.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import language

DENSE = ("query", "key", "value", "dense")  # what an adapter adds to, by the last part of a name
PARTS = {
    "norm1": "attention.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "norm2": "LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
}  # part of a block -> the same in a layer of ESM
OTHERS = {"embed.weight": "embeddings.word_embeddings.weight"} | {
    f"norm.{entry}": f"encoder.emb_layer_norm_after.{entry}" for entry in ("weight", "bias")
}
POSITIONS = "embeddings.position_embeddings.weight"


def blocks_as(
    state: Mapping[str, Tensor], start: str, parts: Mapping[str, str]
) -> dict[str, Tensor]:
    """Weights of a suite's blocks under the names of transformers' layers.

    Args:
        start: what these names begin with, before the number.
        parts: part of a block -> the same in a layer.
    """
    named = {}
    for name in state:
        if name.startswith("blocks."):
            _, number, part = name.split(".", 2)
            part, _, entry = part.rpartition(".")
            named[f"{start}.{number}.{parts[part]}.{entry}"] = state[name]
    return named


def esm_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the suite's encoder under the names of transformers' ``EsmModel``.

    Args:
        state: state dict of :func:`language.build`.
    """
    named = {new: state[old] for old, new in OTHERS.items()}
    table = state["position"][0]  # (LENGTH, d)
    named[POSITIONS] = torch.cat([torch.zeros_like(table[:1]), table])
    named |= blocks_as(state, "encoder.layer", PARTS)
    return {name: value.detach().contiguous() for name, value in named.items()}


def suite_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`esm_state`: weights of an ``EsmModel`` for :func:`language.build`."""
    blocks = {new: old for old, new in PARTS.items()}
    named = {old: state[new] for old, new in OTHERS.items()}
    named["position"] = state[POSITIONS][1:].unsqueeze(0)
    for name in state:
        if name.startswith("encoder.layer."):
            number, part = name.removeprefix("encoder.layer.").split(".", 1)
            part, _, entry = part.rpartition(".")
            named[f"blocks.{number}.{blocks[part]}.{entry}"] = state[name]
    return named


def config():
    """Configuration of the suite's encoder as transformers has it."""
    from transformers import EsmConfig

    encoder = language.build()
    block = encoder.blocks[0]
    return EsmConfig(
        vocab_size=encoder.embed.num_embeddings,
        mask_token_id=language.MASK,
        pad_token_id=language.PAD,
        hidden_size=encoder.embed.embedding_dim,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=block.attention.heads,
        intermediate_size=block.up.out_features,
        max_position_embeddings=language.LENGTH + 1,
        position_embedding_type="absolute",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=encoder.norm.eps,
        token_dropout=False,
    )


def tokenizer():
    """A tokenizer of transformers that gives the identifiers of :func:`language.encode`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[PAD]": language.PAD, "[MASK]": language.MASK, **language.alphabet()}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="[MASK]"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="[PAD]",
        mask_token="[MASK]",
        unk_token="[MASK]",
        model_max_length=language.LENGTH,
    )


def save(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write a checkpoint of the suite's encoder: configuration, weights and tokenizer."""
    from transformers import EsmModel

    model = EsmModel(config())
    for unused in (model.contact_head, model.pooler):  # the suite's encoder has neither
        for parameter in unused.parameters():
            torch.nn.init.zeros_(parameter)
    model.load_state_dict(model.state_dict() | esm_state(state))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def read(folder: Path) -> dict[str, Tensor]:
    """Weights of such a checkpoint for :func:`language.build`: the inverse of :func:`save`."""
    from transformers import EsmModel

    return suite_state(EsmModel.from_pretrained(folder).state_dict())


def save_adapter(
    folder: Path, base: Mapping[str, Tensor], expert: Mapping[str, Tensor], rank: int
) -> None:
    """Write an expert as a LoRA adapter of PEFT: the best update of a rank for every dense layer,
    and all biases; gains and tables stay the base's.

    Args:
        base, expert: state dicts of :func:`language.build`.
        rank: of every update.
    """
    origin, tuned = esm_state(base), esm_state(expert)
    entries, layers = {}, []
    for name, value in tuned.items():
        layer, _, entry = name.rpartition(".")
        if entry == "weight" and layer.rpartition(".")[2] in DENSE:
            left, values, right = torch.linalg.svd(value - origin[name], full_matrices=False)
            roots = values[:rank].sqrt()
            entries[f"{layer}.lora_A.weight"] = roots[:, None] * right[:rank]
            entries[f"{layer}.lora_B.weight"] = left[:, :rank] * roots
            layers.append(layer)
        elif entry == "bias":
            entries[name] = value
    folder.mkdir(parents=True)
    prefixed = {f"base_model.model.{name}": v.contiguous() for name, v in entries.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", {"format": "pt"})
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "all"}
    said |= {"target_modules": layers, "task_type": "FEATURE_EXTRACTION"}
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
