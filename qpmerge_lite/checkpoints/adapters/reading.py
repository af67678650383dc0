"""Adapters of peft: which tensor of the base each of their own tensors changes, and how.

Only configurations and headers are read here; ``folding`` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..findings import ERROR, Finding, Refused
from ..folders import ADAPTER, INDEX, SINGLE, Change, Checkpoint, other_name, read_json
from ..headers import SAVE_AGAIN, Entry, Header, read_header
from .settings import FOLD, indices_of, scale_of, settings_errors

WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
WRAPPER = "base_model.model."  # what peft puts before the names of the model
BASE_LAYER = ".base_layer."  # what it puts into the names of the tensors that it keeps of a layer
# with bias="all" peft also files a replaced layer's bias as it was, and once more as it is
BEFORE, AGAIN = ".original_module.", ".modules_to_save."
ENDINGS = {  # end of a tensor's name in the file -> what it is, and the tensor that it changes
    ".lora_A.weight": ("down", ".weight"),
    ".lora_B.weight": ("up", ".weight"),
    ".lora_embedding_A": ("table_down", ".weight"),
    ".lora_embedding_B": ("table_up", ".weight"),
    ".lora_magnitude_vector": ("magnitude", ".weight"),
    ".lora_magnitude_vector.weight": ("magnitude", ".weight"),
    ".lora_B.bias": ("shift", ".bias"),
    ".token_adapter.trainable_tokens_delta": ("rows", ".weight"),
}
REPLACEMENT = "replacement"
WHOLE = "make a whole model of it, qpmerge merge BASE ADAPTER --out FOLDER, and name that folder"


@dataclass
class Fold:
    """How an adapter changes one tensor of the base.

    Attributes:
        module: the layer's name as peft has it.
        parts: what is in the file for it -> its name there. ``replacement`` takes the tensor's
            place; ``down`` (r, n) and ``up`` (m, r) are factors of an update, those of an embedding
            ``table_down`` and ``table_up``; ``magnitude`` has m numbers, the norms of DoRA;
            ``shift`` (m,) is added to a bias; ``rows`` take the place of some rows.
        scale: what updates and shifts are multiplied by.
        is_transposed: whether the tensor is (n, m), as of embeddings and of GPT-2's Conv1D, instead
            of (m, n).
        indices: of the rows that are replaced.
    """

    module: str
    parts: dict[str, str] = field(default_factory=dict)
    scale: float = 1.0
    is_transposed: bool = False
    indices: list[int] = field(default_factory=list)


@dataclass
class Adapter(Change):
    """An adapter and the base that it is folded into.

    Attributes:
        settings: what adapter_config.json says.
        folds: tensor of the base -> how it is changed; others are the base's own.
    """

    settings: dict = field(default_factory=dict)
    folds: dict[str, Fold] = field(default_factory=dict)

    config_file = ADAPTER
    is_sharded = False
    kind, make_whole = "an adapter", WHOLE

    @property
    def files_of_tensors(self) -> dict[str, str]:
        """Tensor that the adapter changes -> the adapter's file."""
        return dict.fromkeys(self.folds, WEIGHTS)

    @property
    def header(self) -> Header:
        """That of the adapter's own file of weights."""
        return self.headers[WEIGHTS]

    @property
    def tensors(self) -> dict[str, Entry]:
        """The adapter's own tensors."""
        return self.header.entries


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter and no whole model."""
    whole = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    return (folder / ADAPTER).is_file() and not whole


def read_adapter(name: str, folder: Path, base: Checkpoint) -> tuple[Adapter, list[Finding]]:
    """An adapter of a base, and an error for each thing that is wrong with it by itself."""
    adapter = Adapter(name, folder, base=base)
    try:
        adapter.settings = read_json(folder / ADAPTER)
        if not (folder / WEIGHTS).is_file():
            _refuse_missing(folder)
        adapter.headers[WEIGHTS] = read_header(folder / WEIGHTS)
    except Refused as refusal:
        return adapter, [refusal.finding]
    return adapter, settings_errors(folder / ADAPTER, adapter.settings)


def _refuse_missing(folder: Path) -> None:
    if (folder / PICKLED_WEIGHTS).is_file():
        found = f"a pickled one ({PICKLED_WEIGHTS}), which can run any code when read"
        raise Refused(folder, f"weights in {WEIGHTS}", found, SAVE_AGAIN)
    cure = "pass the folder that peft's save_pretrained wrote"
    raise Refused(folder / WEIGHTS, "the weights of the adapter", "none", cure)


def gathered(adapter: Adapter) -> tuple[dict[str, Fold], list[Finding]]:
    """Tensor -> its fold, by the names that the adapter's model has; and errors."""
    folds: dict[str, Fold] = {}
    findings = []
    for key in adapter.tensors:
        if BEFORE in key or AGAIN in key and key.replace(AGAIN, ".") in adapter.tensors:
            continue
        name, part = target_of(key.removeprefix(WRAPPER))
        fold = folds.setdefault(name, Fold(name.rpartition(".")[0]))
        if part in fold.parts:
            where = f"{adapter.folder / WEIGHTS}, tensor {key!r}"
            found = f"{fold.parts[part]!r} too"
            findings.append(Finding(ERROR, where, f"one {part} for {name!r}", found, FOLD))
        fold.parts[part] = key
    for fold in folds.values():
        fold.scale = scale_of(adapter.settings, fold.module)
        fold.indices = indices_of(adapter.settings, fold.module)
    return folds, findings


def target_of(key: str) -> tuple[str, str]:
    """The tensor that one of the file's changes, and what the one of the file is to it."""
    for ending, (part, changed) in ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending) + changed, part
    return key.replace(BASE_LAYER, ".").replace(AGAIN, "."), REPLACEMENT


def renamed(folds: dict[str, Fold], entries: Mapping[str, Entry]) -> dict[str, Fold]:
    """The folds by the base's names.

    The adapter may have been trained with one more level of names than the base's files have, as
    with a head around the model, or with one less. That way is taken by which most names fit.
    """
    ways = [{name: name for name in folds}]
    for prefix in _first_parts(folds):
        ways.append({name: name.removeprefix(prefix) for name in folds})
    for prefix in _first_parts(entries):
        ways.append({name: prefix + name for name in folds})
    best = max(ways, key=lambda way: _count_of_known(way, entries))
    if len({*best.values()}) < len(folds):  # two names became one
        best = ways[0]
    return {_stored(best[name], entries): fold for name, fold in folds.items()}


def _stored(name: str, entries: Mapping[str, Entry]) -> str:
    """What the base's files call a tensor: its older name where they have that."""
    other = other_name(name)
    if other is None or name in entries or other not in entries:
        return name
    return other


def _first_parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] + "." for name in names))


def _count_of_known(way: Mapping[str, str], entries: Mapping[str, Entry]) -> int:
    return sum(name in entries for name in way.values())
