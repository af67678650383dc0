"""Heads that adapters of peft keep: whole layers that are trained beside the factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..adapters.reading import (
    BEFORE,
    REPLACEMENT,
    WEIGHTS,
    WRAPPER,
    Adapter,
    gathered,
    renamed,
    target_of,
)
from ..calibration.records import require
from ..findings import Refused, shortened
from ..folders import ADAPTER, Checkpoint
from .tasks import class_named, has_task

# task_type of an adapter -> the end of the name of its model's class
ENDS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
CALLED = {"classifier", "pre_classifier", "classification_head", "score"}
LAST = ("out_proj", "score", "classifier")  # layers that put out a number for every label
SAY = "make a whole model of it with peft's merge_and_unload(), save that, and name its folder"


class AdapterHead(Checkpoint):
    """The head in an adapter's file; its configuration is made of the base's."""

    is_sharded = False
    config_file = ADAPTER


def head_of(adapter: Adapter) -> AdapterHead | None:
    """The head that an adapter keeps, None where its task has none.

    Labels are numbered, as an adapter does not name them.

    Raises: Refused where the number of labels cannot be told, or transformers has no class for it.
    """
    own = _own_layers(adapter)
    kind = _class_of(adapter) if own else None
    if kind is None:
        return None
    entries = {name: adapter.tensors[key] for key, name in own.items()}
    last = [name for name in entries if _layer(name) in LAST and name.endswith(".weight")]
    if not last or not entries[last[0]].shape:
        where, layers = str(adapter.folder / WEIGHTS), shortened(entries)
        expected = f"a head with a layer called {' or '.join(LAST)}, which shows how many labels"
        raise Refused(where, expected, layers, SAY)
    labels = {str(n): f"LABEL_{n}" for n in range(entries[last[0]].shape[0])}
    config = adapter.base.config | {
        "architectures": [kind],
        "id2label": labels,
        "label2id": {label: int(number) for number, label in labels.items()},
    }
    headers = {WEIGHTS: replace(adapter.header, entries=entries)}
    return AdapterHead(adapter.name, adapter.folder, config, headers)


def _layer(name: str) -> str:
    """What the layer of a tensor is called, without its number among several."""
    parts = [part for part in name.split(".")[:-1] if not part.isdecimal()]
    return parts[-1] if parts else ""


def _own_layers(adapter: Adapter) -> dict[str, str]:
    """Key of the adapter's file -> name in its model, of tensors of layers that are trained whole
    and are a head's: the base has them not, or they are called so."""
    saved = adapter.settings.get("modules_to_save")
    modules = [str(name) for name in saved] if isinstance(saved, list) else []
    folds, _ = gathered(adapter)
    in_base = {id(fold): name for name, fold in renamed(folds, adapter.entries).items()}
    own = {}
    for name, fold in folds.items():
        is_whole = any(f".{module}." in f".{name}" for module in modules)
        is_new = in_base.get(id(fold)) not in adapter.entries
        is_head = is_new or not CALLED.isdisjoint(name.split("."))
        if is_whole and is_head and {*fold.parts} == {REPLACEMENT}:
            own[fold.parts[REPLACEMENT]] = name
    return own


def _class_of(adapter: Adapter) -> str | None:
    """The class of transformers that the adapter's model is of; None for no task."""
    base, task = adapter.base, adapter.settings.get("task_type")
    end = ENDS.get(str(task))
    if end is None and task is not None:
        return None
    if has_task(base) and (end is None or end in class_named(base.config)):
        return class_named(base.config)
    require("transformers", "which knows classes of models with heads", SAY)
    from transformers.models.auto import modeling_auto as known

    tables: Mapping[str | None, Mapping] = {
        "SEQ_CLS": known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": known.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        None: known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    kind = tables[task].get(base.config.get("model_type"))
    return kind[0] if isinstance(kind, tuple) else kind


def names_of_changes(adapter: Adapter, head: AdapterHead) -> list[str]:
    """Tensors that an adapter changes besides its head, as its model calls them."""
    names = [target_of(key.removeprefix(WRAPPER))[0] for key in adapter.tensors]
    return [name for name in dict.fromkeys(names) if _plain(name) not in head.entries]


def without_head(adapter: Adapter, head: AdapterHead, backbone: Checkpoint) -> Adapter:
    """The adapter of a backbone, which has no changes of a head."""
    entries = {}
    for key, entry in adapter.tensors.items():
        if _plain(target_of(key.removeprefix(WRAPPER))[0]) not in head.entries:
            entries[key] = entry
    headers = {WEIGHTS: replace(adapter.header, entries=entries)}
    body = replace(adapter, headers=headers, base=backbone, folds={})
    head.digests = body.digests
    return body


def _plain(name: str) -> str:
    """A name without what peft puts into those of layers as they were before."""
    return name.replace(BEFORE, ".")
