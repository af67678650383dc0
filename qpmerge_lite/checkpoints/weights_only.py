"""Merges of checkpoints that need weights alone: no class of a model, and no more tensors in memory
than the method has to see together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import MergeError
from ..merge import Merge
from .architectures import names_in_model
from .folders import Checkpoint
from .heads.telling import Backbone
from .methods import ONE_STREAM, function_of, groups_of
from .tensors import Entries, read_tensors


def rehearse(method: str, experts: Sequence[str], options: Mapping[str, object]) -> None:
    """Merge a model of four zeros, so that options are refused before weights are read.

    Raises: what the method raises.
    """
    entries = {"weight": torch.zeros(2, 2)}
    states = {name: {"weight": torch.zeros(2, 2)} for name in experts}
    function_of(method)(Entries(entries), states, **options)


def merged_groups(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    method: str,
    options: Mapping[str, object],
    wanted: Collection[str],
) -> Iterator[Merge]:
    """One merge for every group of tensors that has a wanted one.

    Args:
        wanted: names of tensors; they may become fewer meanwhile.
    Raises: what the method raises, with the files that the tensors were read from.
    """
    for names in groups_of(base, method, options):
        if any(name in wanted for name in names):
            yield _merged(base, experts, method, options, names)


def _merged(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    method: str,
    options: Mapping[str, object],
    names: Sequence[str],
) -> Merge:
    """The merge of one group of tensors, which are let go before the next is read."""
    origin = read_tensors(base, names)
    if len(names) > 1:
        origin = tied_as_configured(base.config, origin)
    if method in ONE_STREAM:
        origin = with_tied_names(base, origin)
    states = {expert.name: read_tensors(expert, names) for expert in experts}
    try:
        return function_of(method)(Entries(origin), states, **options)
    except MergeError as error:
        raise located(error, [base, *experts], names) from error


def tied_as_configured(config: Mapping, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries, with one tensor for those that a configuration ties and that are equal, so that
    a method treats them as the one parameter that they are in the model.

    Args:
        config: with ``tie_word_embeddings`` and ``vocab_size``.
        entries: name -> tensor; those with a row for every token may be tied.
    """
    if not config.get("tie_word_embeddings"):
        return entries
    tied: dict[str, Tensor] = {}
    for name, value in entries.items():
        has_tokens = value.dim() > 0 and len(value) == config.get("vocab_size")
        like = [other for other in tied.values() if has_tokens and torch.equal(other, value)]
        tied[name] = like[0] if like else value
    return tied


def with_tied_names(base: Checkpoint, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries under all names that they have in the model, in its order: methods that draw
    random numbers draw some for every name.

    Where the configuration says that nothing is tied, the files have all names.

    Raises: Refused where the names cannot be told without transformers.
    """
    if base.config.get("tie_word_embeddings") is False:
        return entries
    named: dict[str, Tensor] = {}
    for name, first in names_in_model(base).items():
        source = name if name in entries else first
        is_merged = not isinstance(base, Backbone) or base.has_part(name)
        if source in entries and is_merged:
            named[name] = entries[source]
    return named | entries


def located(
    error: MergeError, checkpoints: Sequence[Checkpoint], names: Sequence[str]
) -> MergeError:
    """An error with the files of the tensors that it speaks of.

    Args:
        checkpoints: the base, then the experts.
        names: tensors that were being merged.
    """
    message = str(error)
    meant = [name for name in names if repr(name) in message]
    if not meant:
        return error
    base, *experts = checkpoints
    concerned = [base] if message.startswith("the base") else []
    concerned += [expert for expert in experts if f"expert {expert.name!r}" in message]
    files = []
    for checkpoint in concerned or checkpoints:
        places = checkpoint.files_of_tensors
        files += [str(checkpoint.folder / places[name]) for name in meant if name in places]
    read = ", ".join(dict.fromkeys(files))
    return MergeError(f"{message} (read from {read})")
