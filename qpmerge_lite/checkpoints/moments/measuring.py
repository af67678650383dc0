"""``qpmerge moments``: one model is run on its own data, and a file of moments written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...aliases import tied
from ...engine.gather import Inputs, Reads
from ...engine.norms import Norm
from ...engine.recipes import Making, Recipe
from ...engine.sums import RTOL
from ...engine.views import Table, View
from ...sequential import Pass, PassOptions
from .. import fingerprints
from ..adapters.reading import WHOLE, is_adapter
from ..calibrated import build, cast
from ..calibration.feeds import Feed, feed
from ..calibration.sources import SAMPLES
from ..compatibility import Report, check, refuse_errors
from ..conversion.layout import Layout
from ..deltas.reading import WHOLE as WHOLE_OF_DELTA
from ..deltas.reading import behind
from ..findings import Refused
from ..folders import Checkpoint
from ..headers import Entry, pieces
from ..heads.running import NO_TOKEN
from ..orders import check_sizes, fetched
from ..output import check_new_file, new_file, versions
from .files import (
    FORMAT,
    KEY,
    SUFFIX,
    Layer,
    check_fits,
    names_of_sums,
    read_moments,
)
from .grams import packed

MODEL = "model"  # what messages call the one that is run
CONVERTED = "the files have it fused with others or split, which moments are not measured for"
NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}


@dataclass
class Measurement:
    """What is to be measured.

    Attributes:
        model: folder of the model that is run, or its reference at the Hub.
        calibration: file, folder, or address at the Hub of its inputs, see ``sources``.
        out: file to be made.
        fields: to read of every row, where they are not called as is usual.
        folds: of inputs, for a ridge to be chosen by.
        samples: inputs at the most.
        max_length: tokens of a text at the most.
        batch_size: inputs of a forward.
    """

    model: Path
    calibration: str | Path
    out: Path
    fields: Sequence[str] = field(default_factory=list)
    folds: int = 4
    samples: int = SAMPLES
    max_length: int = 128
    batch_size: int = 8


def measure(order: Measurement, *, progress: bool = False) -> dict:
    """Run a model on its own data and write what its layers read, added up.

    Products are taken in the precision of the activations, float32 at least, and that is the
    precision that their sums, which are of float64, are stored in; of each only the lower triangle:
    ``2 n² F`` bytes in float32 for F folds of a layer that reads n numbers, as much as its square
    weights in one fold and half precision. A merge in as many folds is then that of the data
    themselves, but for rounding of 6e-8 where texts are many. Where folds are added up for RegMean,
    float32 products of other rows add up otherwise: less than 1e-5 of the merge's distance from the
    base at its default, 2e-4 where α = 1 inverts grams as they are. Of a model in float64 it is
    1e-10. (Tests hold it to these.) Of a model with a head, layers of the head are measured too: a
    merge that keeps heads takes those of the backbone alone. One group of layers is in memory at a
    time; on the disk, everything is there twice until the file is whole.

    Returns: what the file says of itself, and how many layers it has.
    Raises: Refused for what can be seen before the model is run; MergeError, NonFinite while it
        is. Nothing is left of the output then.
    """
    check_new_file(order.out, SUFFIX)
    check_sizes(order, "folds", "samples", "max_length", "batch_size")
    checkpoint = _whole_model(order.model, progress)
    inputs = feed(
        Report(checkpoint, [replace(checkpoint, name=MODEL)]),
        {MODEL: order.calibration},
        {MODEL: order.fields} if order.fields else {},
        samples=order.samples,
        max_length=order.max_length,
        batch_size=order.batch_size,
    )
    count = len(inputs.sources[MODEL].rows)
    if count < order.folds:
        cure = f"add inputs, or choose --folds {count}"
        expected = f"at least {order.folds} inputs, one for every fold"
        raise Refused(order.calibration, expected, f"{count}", cure)
    model, layout = build(checkpoint)
    config = model.config.get_text_config()
    # without a token for padding, some classifiers read one text at a time only
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = NO_TOKEN
    batches = cast(inputs.batches[MODEL], model.dtype)
    with new_file(order.out, "whole") as made:
        with (made / "sums").open("xb") as file:
            sums = _Sums(file, _names_in_files(checkpoint, model, layout))
            covered = record(model, batches, sums.add, folds=order.folds, progress=progress)
        about = _about(order, checkpoint, inputs)
        layers, converted = _as_stored([sums.layers[name] for name in covered.layers], layout)
        averaged = layout.by_file(covered.averaged | converted)
        told = {"layers": [asdict(layer) for layer in layers], "averaged": averaged}
        entries = sums.entries_of(layers)
        _write(made / "whole", made / "sums", entries, about | told)
        check_fits(read_moments(made / "whole"), checkpoint)
    return about | {"layers": len(layers), "averaged": len(averaged)}


def _whole_model(place: Path, progress: bool) -> Checkpoint:
    """The checkpoint of a folder or reference; refused for a change of a model, and for one with
    errors."""
    if behind(place) is not None:
        raise Refused(place, "a whole model", "a task vector", WHOLE_OF_DELTA)
    folder, _ = fetched(place, {}, progress=progress)
    if is_adapter(folder):
        raise Refused(folder, "a whole model", "an adapter", WHOLE)
    report = check(folder, {})
    refuse_errors(report)
    return report.base


def _as_stored(layers: Sequence[Layer], layout: Layout) -> tuple[list[Layer], dict[str, str]]:
    """The layers whose parameters the files have as the model does; and parameters of the others ->
    why they are averaged."""
    as_stored: list[Layer] = []
    converted: dict[str, str] = {}
    for layer in layers:
        if any(name in layout.converted for name in layer.parameters):
            converted |= dict.fromkeys(layer.parameters, CONVERTED)
        else:
            as_stored.append(layer)
    return as_stored, converted


def _names_in_files(
    checkpoint: Checkpoint, model: nn.Module, layout: Layout
) -> dict[str, list[str]]:
    """Entry of the model's state dict -> its names in the files, which have most tied ones once."""
    entries, names = checkpoint.entries, {}
    for name, same in tied(model).items():
        stored = [file for other in same for file in layout.names(other)]
        names[name] = [file for file in stored if file in entries]
    return names


class Covered(NamedTuple):
    """What a recording has.

    Attributes:
        layers: names of the layers whose inputs were added up, in forward order.
        averaged: every other floating entry of the state dict -> why it is none of theirs.
    """

    layers: list[str]
    averaged: dict[str, str]


class _Recording(Pass):
    """A pass that solves nothing, and tells what layers read.

    Attributes:
        tell: called with the sums of layers that read alike.
    """

    doing = "measuring"
    tell: Callable[[Inputs], None]

    def _solve(self, views: list[View], reads: Reads, making: Making, shared: dict | None) -> None:
        inputs = self.gatherer.inputs(views, reads, making)
        self.tell(inputs)
        for view in inputs.views:
            making.table.append({"layer": view.name})
            for parameter in view.parameters:
                making.solved.update(self.tied[parameter])


def record(
    model: nn.Module,
    batches: Sequence[Mapping],
    tell: Callable[[Inputs], None],
    *,
    folds: int = 4,
    progress: bool = False,
) -> Covered:
    """Add up what every layer of a model reads, in one run of it alone over its calibration
    batches.

    Args:
        batches: keyword arguments of ``model.forward``.
        tell: called with what layers that read alike read, T = 1. Where the pass is made again, as
            when a layer turns out to read what no sequence owns, layers are told again: the last
            sums of those in ``layers`` count.
        folds: number of folds of sequences, each of which has to have one.
    Returns: which layers there are, and why the other entries belong to none.
    Raises: MergeError, NonFinite, EmptyCalibration as :func:`merge_sequentially` does.
    """
    recipe = Recipe(None, "expert", folds=folds, full_energy=False)
    states, calibration = {"model": model.state_dict()}, {"model": batches}
    recording = _Recording(model, states, calibration, {"inputs": recipe}, PassOptions())
    recording.tell = tell
    merge = recording.run(progress)["inputs"]
    return Covered([row["layer"] for row in merge.table], merge.averaged)


class _Sums:
    """Sums as they come, written to a file one behind the other.

    Args:
        file: opened for writing, empty.
        names: parameter of the model -> its names in the files of the checkpoint.
    Attributes:
        layers: name -> layer. places: name of an entry -> where it is; the last one of a name.
    """

    def __init__(self, file, names: dict[str, list[str]]):
        self._file, self._names = file, names
        self.layers: dict[str, Layer] = {}
        self.places: dict[str, Entry] = {}

    def add(self, inputs: Inputs) -> None:
        """Write the sums of layers that read alike."""
        first = inputs.views[0]
        layers = [self._layer(view, first.name) for view in inputs.views]
        self.layers |= {layer.name: layer for layer in layers}
        gram, count, *ids = names_of_sums(layers[0])
        precision = torch.float64 if inputs.rtol <= RTOL[torch.float64] else torch.float32
        self._write(gram, packed(inputs.C[0]).to(precision))
        self._write(count, inputs.counts[0].long())
        if isinstance(first, Table) and first.ids is not None:
            self._write(ids[0], first.ids)

    def _layer(self, view: View, sums: str) -> Layer:
        """A view in words."""
        parameters = {name: self._names[name] for name in view.parameters}
        named = Layer(view.name, type(view).__name__, parameters, view.bias, sums)
        if isinstance(view, Norm):
            more = {"subtracts_mean": view.subtracts_mean, "offset": view.offset}
            return Layer(**asdict(named) | more)
        return named

    def _write(self, name: str, value: Tensor) -> None:
        start = self._file.tell()
        self._file.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        stop = self._file.tell()
        self.places[name] = Entry(name, NAMES[value.dtype], tuple(value.shape), start, stop)

    def entries_of(self, layers: list[Layer]) -> dict[str, Entry]:
        """Where the entries of these layers are."""
        names = [name for layer in layers for name in names_of_sums(layer)]
        return {name: self.places[name] for name in dict.fromkeys(names)}


def _write(path: Path, tensors: Path, entries: dict[str, Entry], about: dict) -> None:
    """Write a safetensors file.

    Args:
        tensors: file that has the bytes of its entries.
        about: its metadata.
    """
    header: dict = {"__metadata__": {"format": "pt", KEY: json.dumps(about)}}
    end = 0
    for name, place in entries.items():
        start, end = end, end + place.stop - place.start
        described = {"dtype": place.dtype, "shape": place.shape, "data_offsets": [start, end]}
        header[name] = described
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # tensors begin at a multiple of eight
    with path.open("xb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        for place in entries.values():
            out.writelines(pieces(tensors, place))


def _about(order: Measurement, checkpoint: Checkpoint, inputs: Feed) -> dict:
    """What a file of moments says of itself, without a path or a date: the same order has the same
    file."""
    return {
        "format": FORMAT,
        "model": {
            "folder": checkpoint.folder.resolve().name,
            "architectures": checkpoint.config.get("architectures"),
            "weights": fingerprints.of_weights(checkpoint),
            "config": fingerprints.of_config(checkpoint),
        },
        "tokenizer": fingerprints.of_tokenizer(checkpoint),
        "calibration": inputs.as_json()[MODEL],
        "folds": order.folds,
        "versions": versions(with_transformers=True),
    }
