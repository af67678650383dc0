"""Heads of classifiers run on what a backbone returns, without backbones of their own: predictions
of merges and experts are compared by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..architectures import class_of, configuration_of, quietly
from ..folders import Checkpoint
from ..tensors import read_tensors
from .tasks import class_named, labels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PER_INPUT = ("ForSequenceClassification", "ForImageClassification")
PER_TOKEN = ("ForTokenClassification",)
NOT_CLASSES = ("regression", "multi_label_classification")  # whose logits are no softmax
NO_TOKEN = -1  # in the place of padding, where a model has no token for that
ARGUMENTS = "arguments"  # attribute of an output: what the backbone was given


class Given(nn.Module):
    """In the place of a backbone: returns what it was given, with the pooler that is the head's.

    Args:
        pooler: from hidden states (B, S, d) to features (B, d), or None.
    """

    def __init__(self, pooler: nn.Module | None):
        super().__init__()
        self.pooler = pooler
        self.output: Any = None

    def forward(self, *_, **__):
        """The output that is set, as transformers has it."""
        if self.pooler is None:
            return self.output
        features = self.pooler(self.output.last_hidden_state)
        return type(self.output)(**{**self.output, "pooler_output": features})


def can_predict(head: Checkpoint) -> bool:
    """Whether a head predicts one of several classes, of an input or of every token."""
    kind = class_named(head.config)
    is_classifier = any(task in kind for task in (*PER_INPUT, *PER_TOKEN))
    several = len(labels_of(head)) > 1
    return is_classifier and several and head.config.get("problem_type") not in NOT_CLASSES


def functions_of(
    heads: Mapping[str, Checkpoint], body: nn.Module
) -> dict[str, Callable[..., Tensor]] | None:
    """Expert's name -> function from what a backbone returns to logits (N, classes), N inputs or
    tokens; None where some head does not predict classes.

    Args:
        body: the backbone, run within :func:`noting_arguments`.
    """
    if not all(map(can_predict, heads.values())):
        return None
    dtype = next(body.parameters()).dtype
    return {name: _function_of(head, dtype) for name, head in heads.items()}


def _function_of(head: Checkpoint, dtype: torch.dtype) -> Callable[..., Tensor]:
    model, given = _alone(head, dtype)
    reads = signature(model.forward).parameters
    is_per_token = any(task in class_named(head.config) for task in PER_TOKEN)
    config = model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = NO_TOKEN

    def logits(output) -> Tensor:
        arguments = dict(getattr(output, ARGUMENTS))
        given.output = output
        if "input_ids" in arguments:  # in which some models look for the last token of a text
            padding = arguments["attention_mask"] == 0
            ids = arguments["input_ids"].masked_fill(padding, config.pad_token_id)
            arguments["input_ids"] = ids
        known = {name: value for name, value in arguments.items() if name in reads}
        made = model(**known).logits
        return made[arguments["attention_mask"] != 0] if is_per_token else made

    return logits


def _alone(head: Checkpoint, dtype: torch.dtype) -> tuple[PreTrainedModel, Given]:
    """A classifier without its backbone, and what is in the place of that."""
    with quietly(), torch.device("meta"):
        model = class_of(head)(configuration_of(head))
    prefix = model.base_model_prefix
    own = read_tensors(head, head.entries)
    is_own = any(name.startswith(f"{prefix}.pooler.") for name in own)
    given = Given(getattr(model, prefix).pooler if is_own else None)
    setattr(model, prefix, given)
    own = {name: value.to(dtype) for name, value in own.items()}
    model.load_state_dict(own, assign=True)
    return model.eval(), given


@contextmanager
def noting_arguments(body: nn.Module):
    """Meanwhile, what a backbone returns says what it was given."""

    def note(_module, _positional, named, output):
        setattr(output, ARGUMENTS, named)

    handle = body.register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
