"""Configurations of base and expert, field by field."""

from __future__ import annotations

from collections.abc import Sequence

from ..findings import ERROR, WARNING, Finding
from ..folders import CONFIG, Checkpoint

# fields of config.json that decide what the weights mean, though their shapes may not show it
STRUCTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "position_embedding_type",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)
# fields that say nothing about the forward of a model that is only run
BOOKKEEPING = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
    "tie_word_embeddings",
    "use_cache",
    "id2label",
    "label2id",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "gradient_checkpointing",
)
ARCHITECTURE = ("architectures", "model_type")  # fields that name one
ONE_ARCHITECTURE = "merge fine-tunings of one base, and name that base first"


def other_architecture(
    base: Checkpoint, expert: Checkpoint, fields: Sequence[str]
) -> list[Finding]:
    """An error for each of the fields that name an architecture and differ."""
    findings = []
    for name in fields:
        wanted, found = base.config.get(name), expert.config.get(name)
        if wanted != found:
            where = f"{expert.folder / CONFIG}, {name}"
            findings.append(Finding(ERROR, where, f"{wanted}", f"{found}", ONE_ARCHITECTURE))
    return findings


def other_fields(base: Checkpoint, expert: Checkpoint) -> list[Finding]:
    """Fields of config.json, also those of parts such as ``text_config``, that differ.

    A field that one of the two lacks says nothing: versions of transformers write other ones.
    """
    findings = []
    wanted, found = _flat(base.config), _flat(expert.config)
    for name in sorted(wanted.keys() & found.keys()):
        last = name.rpartition(".")[2]
        if wanted[name] == found[name] or last in BOOKKEEPING:
            continue
        decides = last in STRUCTURE or name.partition(".")[0] in STRUCTURE
        level = ERROR if decides else WARNING
        cure = ONE_ARCHITECTURE if decides else "the merge keeps the base's; see that it is meant"
        where = f"{expert.folder / CONFIG}, {name}"
        values = repr(wanted[name]), repr(found[name])
        findings.append(Finding(level, where, *values, cure))
    tied = [model.config.get("tie_word_embeddings") for model in (base, expert)]
    if None not in tied and tied[0] != tied[1]:
        where = f"{expert.folder / CONFIG}, tie_word_embeddings"
        cure = "the merge is tied as the base is; see that the expert was trained so"
        findings.append(Finding(WARNING, where, repr(tied[0]), repr(tied[1]), cure))
    return findings


def _flat(config: dict) -> dict[str, object]:
    """Fields of a configuration, those of its parts as ``part.field``."""
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, dict) and name not in BOOKKEEPING:
            flat |= {f"{name}.{inner}": v for inner, v in value.items()}
        else:
            flat[name] = value
    return flat
