"""Batches made of a few sequences of a calibration batch, whose recordings tell what is whose; and
kinds of batches."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..calibration import MASKS, Batch
from ..forwards import is_encoder_decoder

IDS = ("input_ids", "decoder_input_ids")


def kind_of(batch: Batch) -> frozenset[tuple]:
    """Batches with the same arguments, of as many axes, the same dtypes and equal flags, are
    alike."""
    kinds = set[tuple]()
    for key, value in batch.arguments.items():
        if isinstance(value, Tensor):
            kinds.add((key, value.dim(), value.dtype))
        elif value is not None:
            kinds.add((key, type(value), value))
    return frozenset(kinds)


def numbers(batch: Batch) -> int:
    """How many numbers a batch holds in its tensors."""
    return sum(z.numel() for z in batch.arguments.values() if isinstance(z, Tensor))


def unlike_sequences(batch: Batch) -> list[int]:
    """Three sequences of a batch, of different lengths where it can be seen; the only one twice."""
    if batch.size == 1:
        return [0, 0]
    order = list(range(batch.size))
    for mask in batch.masks.values():
        order = (mask != 0).flatten(1).sum(1).argsort(descending=True, stable=True).tolist()
        break
    return [order[0], order[-1], order[batch.size // 2]]


def with_even_tokens(batch: Batch) -> Batch | None:
    """The batch with every token holding what the first of its sequence does; None where it has no
    tokens."""
    arguments = {}
    for key in batch.one_per_input:
        value = batch.arguments[key]
        if key in IDS:
            arguments[key] = value[..., :1].expand_as(value).contiguous()
        elif value.is_floating_point() and value.dim() > 2:
            arguments[key] = value[:, :1].expand_as(value).contiguous()
    return replace(batch, arguments=batch.arguments | arguments) if arguments else None


def without_a_token(model, batch: Batch, mask: str) -> Batch | None:
    """The batch with one token gone, of the decoder's or of all other arguments; None where it has
    one only.

    It is the last one, or the first where the last is padding in every sequence, whose loss might
    not show.
    """
    of_decoder = mask == MASKS[1]
    mine = {}
    for key, value in batch.arguments.items():
        decoders = key.startswith("decoder_") or (key == "labels" and is_encoder_decoder(model))
        if isinstance(value, Tensor) and decoders == of_decoder:
            mine[key] = value
    named = [k for k in (mask, "decoder_input_ids", "decoder_inputs_embeds", "labels") if k in mine]
    if not named or mine[named[0]].dim() < 2:
        return None
    axis = 1 if named[0] == "decoder_inputs_embeds" else mine[named[0]].dim() - 1
    length, arguments = mine[named[0]].shape[axis], dict(batch.arguments)
    if length < 2:
        return None
    counted = batch.masks.get(mask)
    start = 0 if counted is None or bool((counted[:, -1] != 0).any()) else 1
    for key, value in mine.items():
        tokens = value.dim() > axis and value.shape[axis] == length
        if tokens and (not value.is_floating_point() or value.dim() <= axis + 2):
            arguments[key] = value.narrow(axis, start, length - 1)
        elif value.dim() == 1 and len(value) == length != batch.size:
            arguments[key] = value.narrow(0, start, length - 1)
    return replace(batch, arguments=arguments)
