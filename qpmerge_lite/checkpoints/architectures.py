"""What transformers knows of a checkpoint's model: its class, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING

import torch

from .calibration.records import IMAGE, TARGET, TEXT, require
from .findings import Refused
from .folders import CONFIG, Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# no network, and no code but that of transformers itself
HERE_ALONE = {"local_files_only": True, "trust_remote_code": False}
# what transformers raises for a folder that it cannot make a model or a tokenizer of
TROUBLES = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)


def require_transformers() -> None:
    """Refused where transformers is not installed."""
    require("transformers", "which has the models", "choose a method that needs none, such as soup")


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers from writing to the terminal what is refused here anyway."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def loaded(maker, expert: Checkpoint, base: Checkpoint, files: Sequence[str], kind: str, **options):
    """What an expert's folder has of a kind, or the base's where the expert's has none.

    Args:
        maker: class of transformers that reads it, such as AutoTokenizer; ``options`` are its own.
        files: patterns of names that show that a folder has one.
        kind: what it is, such as ``a tokenizer``.
    Raises: Refused where there is none, or one that transformers cannot load without remote code.
    """
    holder = expert if expert.matching(files) else base
    if not holder.matching(files):
        cure = f"save one there, with {kind.split()[1]}.save_pretrained(folder)"
        expected = f"{kind} in the expert's folder or in the base's"
        raise Refused(expert.folder, expected, "none", cure)
    try:
        with quietly():
            return maker.from_pretrained(holder.folder, **options, **HERE_ALONE)
    except TROUBLES as error:
        cure = "save it again with this version of transformers"
        raise Refused(holder.folder, f"{kind} that transformers load", f"{error}", cure) from error


def class_of(base: Checkpoint):
    """The class of transformers that config.json names first, or AutoModel where it names none."""
    import transformers

    named = base.config.get("architectures") or []
    if not named:
        return transformers.AutoModel
    found = getattr(transformers, str(named[0]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        where = f"{base.folder / CONFIG}, architectures"
        cure = "choose a method that builds no model, such as soup, or another version"
        raise Refused(where, "a model of transformers", repr(named[0]), cure)
    return found


def configuration_of(checkpoint: Checkpoint):
    """The configuration of a checkpoint's model as transformers has it: of its config.json, or of
    what is known of the model of an adapter, whose folder has none."""
    from transformers import AutoConfig

    if checkpoint.config_file == CONFIG:
        return AutoConfig.from_pretrained(checkpoint.folder, **HERE_ALONE)
    return AutoConfig.for_model(**checkpoint.config)


def empty_model(base: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint without its numbers, on the meta device: no memory is taken for it.

    Raises: Refused where transformers is not installed or does not have the class.
    """
    require_transformers()
    from transformers import AutoModel

    made = class_of(base)
    try:
        with quietly(), torch.device("meta"):
            config = configuration_of(base)
            model = made.from_config(config) if made is AutoModel else made(config)
            model.tie_weights()
    except TROUBLES as error:
        where, cure = str(base.folder), "see that config.json belongs to these weights"
        raise Refused(where, "a model that transformers can make", f"{error}", cure) from error
    return model


def names_in_model(base: Checkpoint) -> dict[str, str]:
    """Name of every parameter and buffer that the model keeps -> the first name of the same tensor,
    in the order of the model's state dict.

    Files have a tied tensor once, the model under each of its names.

    Raises: what :func:`empty_model` raises.
    """
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(value), name)
        for name, value in empty_model(base).state_dict(keep_vars=True).items()
    }


def fields_of(model: PreTrainedModel, where: str) -> tuple[str, ...]:
    """Names of what a model reads of a calibration row: ``text``, ``text`` and ``target`` where it
    answers one text with another, or ``image``.

    Args:
        where: its folder, for messages.
    Raises: Refused for models that read anything else.
    """
    reads = signature(model.forward).parameters
    decodes = "decoder_input_ids" in reads
    kind, expected = type(model).__name__, "a model that reads texts, or one that reads pictures"
    cure = "merge by a method that looks at weights only, or call the method from Python"
    if {"input_ids", "pixel_values"} <= reads.keys() and not model.can_generate():
        cure += ", or save its parts as models of their own and merge these"
        raise Refused(where, expected, f"{kind}, which reads both at once", cure)
    if model.main_input_name == "pixel_values" and not decodes:
        return (IMAGE,)
    if model.main_input_name != "input_ids":
        found = f"{kind}, which reads {model.main_input_name}"
        raise Refused(where, expected, found, cure)
    if decodes and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        expected = "a model that reads a text, or answers one text with another"
        raise Refused(where, expected, f"{kind}, an encoder with a decoder and no words", cure)
    return (TEXT, TARGET) if decodes else (TEXT,)
