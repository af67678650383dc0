"""Calibration of a merge from its sources: what the model reads, as batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...engine.layers import view
from ..architectures import empty_model, fields_of, loaded
from ..compatibility import Report
from ..findings import WARNING, Finding, Refused
from ..folders import PROCESSOR, Checkpoint
from .pictures import opened
from .records import IMAGE, TARGET, TEXT
from .sources import Row, Source, notes, read_source, shared
from .tokens import batches, checked_rows, longest, tokenizer_of, with_decoder


@dataclass
class Feed:
    """Calibration of every expert.

    Attributes:
        sources: expert -> what was read.
        limits: ``max_length`` of texts and ``batch_size``, as they were asked for.
        batches: expert -> batches, tensors of pictures in float32.
        notes: what is good to know, a sentence each.
        warnings: what may be a mistake.
    """

    sources: dict[str, Source]
    limits: dict[str, int]
    batches: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def as_json(self) -> dict[str, dict]:
        """What a manifest says of every expert's inputs."""
        return {name: source.as_json() | self.limits for name, source in self.sources.items()}


def feed(
    report: Report,
    places: Mapping[str, str | Path],
    fields: Mapping[str, Sequence[str]],
    *,
    samples: int,
    max_length: int,
    batch_size: int,
) -> Feed:
    """The calibration of every expert, read by its own tokenizer or processor, or by the base's
    where it has none. No weight is read.

    Args:
        places: expert -> source, see ``sources.read_source``.
        fields: expert -> names of what is read of its rows, where these are not the usual ones.
        samples: inputs of an expert at the most.
        max_length: tokens of a text at the most; never more than the model has positions for.
        batch_size: inputs of a forward.
    Raises: Refused for a model that reads something else, and for what cannot be read.
    """
    model = empty_model(report.base)
    usual = fields_of(model, str(report.base.folder))
    if report.heads and TARGET in usual:
        where, found = str(report.base.folder), "one that answers a text with another"
        cure = "merge by a method that looks at weights only"
        expected = "a base that reads texts or pictures alone, as experts have heads of their own"
        raise Refused(where, expected, found, cure)
    pictures = usual == (IMAGE,)
    sources = {}
    for name, place in places.items():
        asked = fields.get(name, usual)
        check_fields(name, asked, usual)
        sources[name] = read_source(name, place, asked, samples, pictures)
    limits = {"max_length": max_length, "batch_size": batch_size}
    made = Feed(sources, limits, notes=notes(sources), warnings=shared(sources))
    for expert in report.experts:
        rows = sources[expert.name].rows
        if pictures:
            processor = processor_of(expert, report.base)
            made.batches[expert.name] = pixels(rows, processor, model, batch_size)
            made.warnings += _other_processor(expert, processor, report.base)
        else:
            tokenizer = tokenizer_of(expert, report.base)
            limit = longest(model, tokenizer, max_length)
            tokens, cut = checked_rows(rows, tokenizer, model, limit, TARGET in usual)
            own = batches(tokens, batch_size, tokenizer.pad_token_id)
            if TARGET in usual:
                own = [with_decoder(model, batch) for batch in own]
            made.batches[expert.name] = own
            made.notes += _of_tokens(expert.name, own, cut, limit, model)
    return made


def feed_of(order, report: Report) -> Feed:
    """The calibration that an order, or a question, names for all experts; what may be a mistake in
    it is added to the report."""
    inputs = feed(
        report,
        order.calibration,
        order.columns,
        samples=order.samples,
        max_length=order.max_length,
        batch_size=order.batch_size,
    )
    report.findings += inputs.warnings
    return inputs


def check_fields(expert: str, fields: Sequence[str], usual: Sequence[str]) -> None:
    """Refused for a number of fields that the model does not read."""
    counts = {1, 2} if tuple(usual) == (TEXT,) else {len(usual)}
    if len(fields) not in counts:
        example = f"{expert}={','.join(usual)}"
        expected = " or ".join(str(count) for count in sorted(counts)) + f" fields, as in {example}"
        found = f"{len(fields)} ({', '.join(fields)})"
        raise Refused("--column", expected, found, "name what the model reads")


def _of_tokens(
    expert: str, own: Sequence[Mapping[str, Tensor]], cut: int, limit: int, model: nn.Module
) -> list[str]:
    """What is to be known of an expert's tokens: texts that were cut, and too few for a layer."""
    told = []
    if cut:
        told.append(f"{expert}: {cut} texts were cut to {limit} tokens")
    count = sum(int(batch["attention_mask"].sum()) for batch in own)
    width = widest(model)
    if count < width:
        told.append(
            f"{expert}: {count} tokens are fewer than the {width} inputs of the widest layer; what "
            "they leave open is decided by prior and ridge, so give more if there are more"
        )
    return told


def widest(model: nn.Module) -> int:
    """Inputs of the widest dense layer."""
    state, found = model.state_dict(), 0
    for name, module in model.named_modules():
        layer = view(name, module, "weights")
        if layer is not None:
            found = max(found, layer.matrix(state).shape[-1])
    return found


def processor_of(expert: Checkpoint, base: Checkpoint):
    """The expert's processor of pictures, or the base's where the expert's folder has none. It
    works with Pillow, whatever else is installed.

    Raises: Refused where there is none, or one that transformers cannot load without remote code.
    """
    from transformers import AutoImageProcessor

    return loaded(
        AutoImageProcessor, expert, base, PROCESSOR, "a processor of pictures", backend="pil"
    )


def _other_processor(expert: Checkpoint, processor, base: Checkpoint) -> list[Finding]:
    """A warning where an expert's pictures are prepared otherwise than those of the merge."""
    if not (expert.matching(PROCESSOR) and base.matching(PROCESSOR)):
        return []
    own, other = processor.to_dict(), processor_of(base, base).to_dict()
    differ = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if not differ:
        return []
    cure = "the merge gets the base's; see that both prepare pictures alike"
    where, found = str(expert.folder), f"another {', '.join(differ)}"
    return [Finding(WARNING, where, "the base's processor of pictures", found, cure)]


def pixels(rows: Sequence[Row], processor, model: nn.Module, size: int) -> list[dict[str, Tensor]]:
    """Batches of ``pixel_values`` (B, 3, H, W), float32: each picture by itself through the
    processor, in their order.

    Raises: Refused for a picture that does not open, and where the processor does not make pictures
        of one size and of the model's channels of them.
    """
    made: list[Tensor] = []
    for row in rows:
        picture = opened(row.where, row.content)  # type: ignore[arg-type]
        (values,) = processor(images=picture, return_tensors="pt")["pixel_values"]
        channels = getattr(model.config, "num_channels", 3)
        if values.dim() != 3 or len(values) != channels:
            cure = "call the method from Python, with batches of your own"
            expected = f"a model and a processor of pictures ({channels}, height, width)"
            raise Refused(row.where, expected, f"{tuple(values.shape)}", cure)
        if made and values.shape != made[0].shape:
            cure = "give pictures of one size, or a processor that makes them so"
            sizes = f"{tuple(made[0].shape)} as of the first", f"{tuple(values.shape)}"
            raise Refused(row.where, *sizes, cure)
        made.append(values.float())
    parts = [made[start : start + size] for start in range(0, len(made), size)]
    return [{"pixel_values": torch.stack(part)} for part in parts]
