"""Tiny models of published architectures with experts and calibration batches, drawn from a seed.

Weights are random, drawn so that every part of the architecture matters, and experts differ from
the base in every parameter. Properties that hold for any weights need no trained model.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import MergeError
from . import small_models
from .architectures import ARCHITECTURES, PAD, VOCABULARY, Architecture

TASKS = ("first", "second")
BATCHES = ((5, 7), (3, 5))  # sequences and tokens of the calibration batches of a task
PADDING = 3  # tokens
MATRICES_THAT_ARE_NO_WEIGHTS = ("A_log",)  # they keep the library's values, and noise
MASKED = (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask"))


@dataclass(frozen=True)
class Problem:
    """A base, one expert per task, and batches of calibration inputs per task."""

    base: nn.Module
    experts: dict[str, dict[str, Tensor]]
    calibration: dict[str, list[dict[str, Tensor]]]


# --------------------------------------------------------------------------------- models


def _library():
    """The module ``transformers``, which is imported where it is needed.

    Raises: MergeError where it is not installed.
    """
    if find_spec("transformers") is None:
        raise MergeError(
            "transformers, whose architectures are merged here, is not installed; "
            "run `pip install --require-hashes -r requirements-hub.lock`"
        )
    import transformers

    return transformers


@contextmanager
def quiet():
    """Without the remarks of libraries about tiny configurations and prototypes of their own."""
    logging = _library().logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype")
            yield
    finally:
        logging.set_verbosity(before)


def build(architecture: Architecture) -> nn.Module:
    """The model of a registry entry in evaluation mode, with the weights its library draws."""
    if architecture.model in vars(small_models):
        model = getattr(small_models, architecture.model)()
    else:
        model = _published(architecture)
    return model.to(torch.float64 if architecture.double else torch.float32).eval()


def _published(architecture: Architecture) -> nn.Module:
    transformers = _library()
    kind = getattr(transformers, architecture.model)
    if kind is transformers.EncoderDecoderModel:
        towers = [transformers.BertConfig(**architecture.config) for _ in range(2)]
        return kind(kind.config_class.from_encoder_decoder_configs(*towers))
    return kind(kind.config_class(**architecture.config), **architecture.options)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Draw weights so that every part matters: matrices of gain one; noise on the rest."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        fixed = name.endswith(MATRICES_THAT_ARE_NO_WEIGHTS)
        if parameter.dim() > 1 and not fixed:
            fan_in = parameter.numel() / parameter.shape[0]
            parameter.copy_(noise / fan_in**0.5)
        else:
            parameter.add_(0.1 * noise)


@torch.no_grad()
def expert_of(base: nn.Module) -> dict[str, Tensor]:
    """State dict of the base with noise of 30 % in every parameter; tied weights stay tied."""
    expert = copy.deepcopy(base)
    for parameter in expert.parameters():
        parameter.add_(0.3 * parameter.abs().mean() * torch.randn_like(parameter))
    return expert.state_dict()


# --------------------------------------------------------------------------------- inputs


def _tokens(count: int, length: int) -> Tensor:
    """Random tokens (count, length), none of which pads, begins or ends a text."""
    return torch.randint(3, VOCABULARY, (count, length))


def _text(model: nn.Module, count: int, length: int) -> dict[str, Tensor]:
    ids = _tokens(count, length)
    return with_positions(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _pairs(model, count, length):
    ids, answers = _tokens(count, length), _tokens(count, length - 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": answers,
        "decoder_attention_mask": torch.ones_like(answers),
    }


def _pictures(model, count, length):
    return {"pixel_values": torch.randn(count, 3, 16, 16)}


def _towers(model, count, length):
    return {**_text(model, count, length), **_pictures(model, count, length)}


def _speech(model, count, length):
    answers = _tokens(count, length)
    return {
        "input_features": torch.randn(count, 4, 16),
        "decoder_input_ids": answers,
        "decoder_attention_mask": torch.ones_like(answers),
    }


def _sound(model, count, length):
    return {"input_values": torch.randn(count, 120)}


INPUTS: dict[str, Callable] = {
    "text": _text,
    "pairs": _pairs,
    "pictures": _pictures,
    "towers": _towers,
    "speech": _speech,
    "sound": _sound,
}


def with_positions(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch (B, S) with the position of every token that is no padding, (B, S), if the model
    takes positions."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return batch
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**batch, "position_ids": positions}


def padded(model: nn.Module, batch: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """A batch (B, S) with three more tokens under a zero mask, (B, S + 3), on the ``right`` or on
    the ``left``."""
    amounts = (0, PADDING) if side == "right" else (PADDING, 0)
    longer = dict(batch)
    for ids, mask in MASKED:
        if ids in batch:
            longer[ids] = F.pad(batch[ids], amounts, value=PAD)
            longer[mask] = F.pad(batch[mask], amounts)
    return with_positions(model, longer) if "position_ids" in batch else longer


def problem(name: str, seed: int = 0, device: str = "cpu") -> Problem:
    """The model of that name with experts and calibration batches, all drawn from the seed.

    Raises: MergeError for a name that is not in the registry.
    """
    if name not in ARCHITECTURES:
        raise MergeError(f"architecture: expected one of {sorted(ARCHITECTURES)}, found {name!r}")
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = build(architecture)
        randomise(base)
        experts = {task: expert_of(base) for task in TASKS}
        make, dtype = INPUTS[architecture.inputs], next(base.parameters()).dtype
        calibration = {}
        for task in TASKS:
            batches = [make(base, *size) for size in BATCHES]
            calibration[task] = [_placed(batch, dtype, device) for batch in batches]
    return Problem(base.to(device), experts, calibration)


def _placed(batch: dict[str, Tensor], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """A batch on the device, its inputs in the precision of the model."""
    moved = {name: value.to(device) for name, value in batch.items()}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in moved.items()}
