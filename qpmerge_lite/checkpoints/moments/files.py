"""Files of moments: what one model's layers read of its own data, added up, in safetensors.

A file has, for every group of layers that read one tensor, three entries named after the first of
them:

    NAME.gram     (F, g, n (n + 1) / 2)   ``Σ x xᵀ`` by fold, rows of the lower triangle end to end
    NAME.count    (F,) int64              how many x each fold has
    NAME.ids      (g,) int64              of a table of tokens only: which ones occur

with x as the engine has it: a one is appended where a layer has a bias, a norm has a gram of each
of its g channels, a table counts tokens. What the file is of stands in the metadata of its header,
as JSON under ``qpmerge_moments``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from ..findings import Refused, shortened
from ..fingerprints import of_config, of_weights
from ..folders import Change, Checkpoint
from ..headers import Header, read_header
from ..heads.telling import Backbone

KEY, FORMAT, SUFFIX = "qpmerge_moments", 1, ".safetensors"
KINDS = ("Dense", "Transposed", "Convolution", "Norm", "Table")  # of layers, as the engine has them
PRECISIONS = ("F32", "F64")
MEASURE_AGAIN = "measure the moments again, with qpmerge moments"
OTHER_MODEL = "give the moments of this expert, or measure them: qpmerge moments FOLDER"


@dataclass(frozen=True)
class Layer:
    """One layer of a file.

    Attributes:
        name: path of its module.
        kind: one of ``KINDS``.
        parameters: name in the model's state dict -> its names in the files of the checkpoint,
            several where these have a tied tensor several times; the weight first.
        bias: whether a one was appended to what it reads.
        sums: the layer that its entries are named after.
        subtracts_mean, offset: of a norm, as ``engine.norms.Norm`` has them.
    """

    name: str
    kind: str
    parameters: dict[str, list[str]]
    bias: bool
    sums: str
    subtracts_mean: bool = True
    offset: float = 0.0

    @property
    def names(self) -> list[str]:
        """Names of all its parameters in the files of the checkpoint."""
        return [name for names in self.parameters.values() for name in names]


@dataclass(frozen=True)
class MomentsFile:
    """A file of moments as far as its header says.

    Attributes:
        path: where it is.
        header: of the file.
        about: what its metadata say: ``model``, ``calibration``, ``folds``, ``versions`` and so on.
        layers: name -> layer, in the order of a forward.
        averaged: other entries of the model -> why no layer has them.
    """

    path: Path
    header: Header
    about: dict
    layers: dict[str, Layer]
    averaged: dict[str, str]

    @property
    def folds(self) -> int:
        """How many folds of texts there are."""
        return self.about["folds"]

    @property
    def model(self) -> dict[str, str]:
        """Digests of the model that was run: ``weights`` and ``config``."""
        return {name: self.about["model"][name] for name in ("weights", "config")}


def read_moments(path: Path) -> MomentsFile:
    """The header of a file of moments, held against itself; no sum is read.

    Raises: Refused for a file that is none, is damaged, or of another format.
    """
    header = read_header(path)
    about = _about(path, header.metadata)
    layers, averaged = about.pop("layers"), about.pop("averaged")
    file = MomentsFile(path, header, about, _layers(path, layers), averaged)
    for layer in file.layers.values():
        _check_entries(file, layer)
    return file


def _about(path: Path, metadata: Mapping) -> dict:
    """The metadata of a file, of whose fields those that are used have the right types."""
    if KEY not in metadata:
        cure = "give a file that qpmerge moments has written"
        raise Refused(path, "moments", "a safetensors file of something else", cure)
    try:
        about = json.loads(metadata[KEY])
        form = about["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, f"what does not parse ({error!r})") from error
    if form != FORMAT:
        cure = f"read it with the version that wrote it, or {MEASURE_AGAIN}"
        raise Refused(f"{path}, format", str(FORMAT), f"{form!r:.40}", cure)
    fields = {"folds": int, "layers": list, "averaged": dict, "model": dict, "calibration": dict}
    for name, kind in fields.items():
        if type(about.get(name)) is not kind:
            raise _damaged(path, f"{about.get(name)!r:.40} as {name!r}")
    for name in ("weights", "config"):
        if not isinstance(about["model"].get(name), str):
            raise _damaged(path, f"no digest of the model's {name}")
    if about["folds"] < 1:
        raise _damaged(path, f"{about['folds']} folds")
    return about


def _damaged(path: Path, found: str) -> Refused:
    """The refusal of metadata that this package has not written so."""
    return Refused(f"{path}, metadata", f"those of format {FORMAT}", found, MEASURE_AGAIN)


def _layers(path: Path, described: list) -> dict[str, Layer]:
    """The layers that metadata speak of, by name."""
    layers = {}
    for given in described:
        try:
            layer = Layer(**given)
        except TypeError as error:
            raise _damaged(path, f"a layer {given!r:.60}") from error
        if layer.kind not in KINDS or not _is_named(layer):
            raise _damaged(path, f"a layer {given!r:.60}")
        layers[layer.name] = layer
    if not layers:
        raise _damaged(path, "no layer")
    return layers


def _is_named(layer: Layer) -> bool:
    """Whether names of a layer and of its parameters are names."""
    wanted = [f"{layer.name}.weight".lstrip(".")]
    wanted += [f"{layer.name}.bias".lstrip(".")] if layer.bias else []
    if not isinstance(layer.parameters, dict) or [*layer.parameters] != wanted:
        return False
    if not all(isinstance(names, list) and names for names in layer.parameters.values()):
        return False
    words = [layer.name, layer.sums, *layer.names]
    return all(isinstance(word, str) for word in words)


def names_of_sums(layer: Layer) -> list[str]:
    """Names of the entries that a layer's sums are in."""
    parts = ["gram", "count", "ids"] if layer.kind == "Table" else ["gram", "count"]
    return [f"{layer.sums}.{part}" for part in parts]


def _check_entries(file: MomentsFile, layer: Layer) -> None:
    """Refused unless a layer's sums are there, in dtypes and shapes that go together."""
    entries = file.header.entries
    for name in names_of_sums(layer):
        if name not in entries:
            found = f"no entry {name!r}"
            raise Refused(f"{file.path}, layer {layer.name!r}", "its sums", found, MEASURE_AGAIN)
    gram, count, *ids = (entries[name] for name in names_of_sums(layer))
    g = gram.shape[1] if len(gram.shape) == 3 else 0
    wanted = {
        gram: (PRECISIONS, (file.folds, g, *gram.shape[2:])),
        count: (("I64",), (file.folds,)),
    }
    for entry in ids:
        wanted[entry] = (("I64",), (g,))
    for entry, (dtypes, shape) in wanted.items():
        if entry.dtype not in dtypes or entry.shape != shape or not g:
            where = f"{file.path}, tensor {entry.name!r}"
            expected = f"{' or '.join(dtypes)} of shape {shape}"
            raise Refused(where, expected, f"{entry.dtype} of shape {entry.shape}", MEASURE_AGAIN)


def inputs_of(layer: Layer, shape: tuple[int, ...]) -> int:
    """How many numbers n a layer reads at a time, for a weight of this shape."""
    if layer.kind in ("Norm", "Table"):
        return 1 + layer.bias
    rows = shape[:1] if layer.kind == "Transposed" else shape[1:]
    return prod(rows) + layer.bias


def copies_of(layer: Layer, shape: tuple[int, ...]) -> int | None:
    """How many grams g a layer has, for a weight of this shape; None where data decide it."""
    if layer.kind == "Table":
        return None
    return shape[0] if layer.kind == "Norm" else 1


def check_fits(file: MomentsFile, base: Checkpoint) -> None:
    """Refused unless a file's layers are layers of the base, of its widths, and together with what
    the file says to average are all of the base's tensors of numbers."""
    entries, covered = base.entries, {*file.averaged}
    for layer in file.layers.values():
        where = f"{file.path}, layer {layer.name!r}"
        covered |= {*layer.names}
        for name in layer.names:
            if name not in entries:
                found = f"{name!r}, which the base has not"
                raise Refused(where, "tensors of the base", found, OTHER_MODEL)
        shape = entries[layer.names[0]].shape
        n, g = inputs_of(layer, shape), copies_of(layer, shape)
        held = file.header.entries[f"{layer.sums}.gram"].shape
        wanted = (file.folds, held[1] if g is None else g, n * (n + 1) // 2)
        if held != wanted:
            expected = f"sums over inputs of width {n}, of shape {wanted}"
            raise Refused(where, expected, f"shape {held}", OTHER_MODEL)
    missing = [name for name, e in entries.items() if e.is_number and name not in covered]
    if missing:
        expected = "every tensor of the base, as one of a layer or as one to be averaged"
        raise Refused(file.path, expected, f"nothing of {shortened(missing)}", OTHER_MODEL)


def check_measured(file: MomentsFile, expert: Checkpoint, found: Mapping[str, str]) -> None:
    """Refused unless a file is of an expert.

    Args:
        found: digests of the expert's ``weights`` and ``config``.
    """
    for name, digest in found.items():
        if file.model[name] != digest:
            where = f"{file.path}, {name} of the model"
            expected = f"those of {expert.folder} (SHA-256 {digest})"
            raise Refused(where, expected, f"others ({file.model[name]:.64})", OTHER_MODEL)


def as_in_base(file: MomentsFile, expert: Checkpoint, base: Checkpoint) -> MomentsFile:
    """A file of an expert's moments as it is, or where heads are kept, with the base's names of
    tensors and layers and without those of the head.

    Args:
        expert: under the base's names, with the tensors that are merged alone.
        base: with these alone too; a backbone where heads are kept.
    """
    if not isinstance(base, Backbone):
        return file
    names = {entry.name: name for name, entry in expert.entries.items()}
    start = _start_of_backbone(names, base.prefix)
    layers = {}
    for layer in file.layers.values():
        parameters = {}
        for parameter, of_files in layer.parameters.items():
            merged = [names[name] for name in of_files if name in names]
            if merged:
                parameters[parameter.removeprefix(start)] = merged
        if len(parameters) == len(layer.parameters):
            own = replace(layer, name=layer.name.removeprefix(start), parameters=parameters)
            layers[own.name] = own
    averaged = {names[name]: reason for name, reason in file.averaged.items() if name in names}
    return replace(file, layers=layers, averaged=averaged)


def _start_of_backbone(names: Mapping[str, str], prefix: str) -> str:
    """What an expert's names of its backbone begin with.

    Args:
        names: of the expert's tensors -> the base's, which begin with a ``prefix``.
    """
    for own, of_base in names.items():
        rest = of_base.removeprefix(prefix)
        if own.endswith(rest):
            return own.removesuffix(rest)
    return ""


def read_all(
    given: Mapping[str, Sequence[Path]],
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    heads: Mapping[str, Checkpoint],
) -> dict[str, list[MomentsFile]]:
    """The files of moments of every expert, held against the checkpoints: expert's name -> files.

    Args:
        base, experts: where heads are kept, their backbones alone.
        heads: expert's name -> its head, where heads are kept.
    Raises: Refused for a file that is damaged, of other weights, or does not fit the base; for an
        expert that is no whole model.
    """
    files = {}
    for expert in experts:
        if isinstance(expert, Change):
            expected, cure = "a whole model beside --moments", expert.make_whole
            raise Refused(expert.place, expected, expert.kind, cure)
        read = [read_moments(path) for path in given[expert.name]]
        files[expert.name] = [as_in_base(file, expert, base) for file in read]
        texts = {file.about["calibration"].get("sha256") for file in files[expert.name]}
        if len(texts) < len(files[expert.name]):
            cure = "leave one of them out"
            found = "some of the same ones, which would count twice"
            raise Refused(f"--moments {expert.name}", "files of different texts", found, cure)
        for file in files[expert.name]:
            check_fits(file, base)
    for expert in experts:
        parts = [expert, heads[expert.name]] if expert.name in heads else [expert]
        digests = {"weights": of_weights(*parts), "config": of_config(expert)}
        for file in files[expert.name]:
            check_measured(file, expert, digests)
    return files
