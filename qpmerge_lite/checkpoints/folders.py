"""Folders of Hugging Face models: configuration, files of weights, and what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from .digests import Digest
from .findings import ERROR, Finding, Refused
from .headers import SAVE_AGAIN, Entry, Header, read_header

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
ADAPTER = "adapter_config.json"
MANIFEST = "merge.json"  # which says of a merge how it was made
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
OTHERS = (
    CONFIG,
    "generation_config.json",
    *PROCESSOR,
    "video_preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)
LEAVE = "nothing can be merged without it"
# end of a norm's names in a model -> in older files, whose names transformers changes as it reads
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


@dataclass
class Checkpoint:
    """A folder with a model, as far as its configuration and headers say.

    Attributes:
        name: what it is called in messages and manifest: ``base``, or the expert's name.
        folder: where it is.
        config: what config.json says.
        headers: file of weights -> its header, in the order of the files' names.
    """

    name: str
    folder: Path
    config: dict = field(default_factory=dict)
    headers: dict[str, Header] = field(default_factory=dict)

    config_file = CONFIG

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Tensor -> its entry, over all files; to be asked for when all headers are there."""
        return {name: e for header in self.headers.values() for name, e in header.entries.items()}

    @cached_property
    def files_of_tensors(self) -> dict[str, str]:
        """Tensor -> the file that it is in; to be asked for when all headers are there."""
        return {name: file for file, header in self.headers.items() for name in header.entries}

    @cached_property
    def digests(self) -> dict[str, Digest]:
        """File of weights -> its digest, which grows as tensors are read."""
        return {file: Digest(h.path, h.raw) for file, h in self.headers.items()}

    @property
    def bytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(header.size for header in self.headers.values())

    @property
    def is_sharded(self) -> bool:
        """Whether an index says in which file a tensor is."""
        return SINGLE not in self.headers

    def matching(self, patterns: Iterable[str]) -> list[str]:
        """Files of the folder whose names fit one of the patterns, relative to it and sorted."""
        return matching(self.folder, patterns)


@dataclass
class Change(Checkpoint):
    """An expert that is no model by itself, but a change of its base: to whoever reads its tensors,
    a checkpoint with all those of the base.

    Attributes:
        base: what it is a change of.
    """

    base: Checkpoint = field(kw_only=True)

    kind = "a change of a model"  # what messages call it
    make_whole = ""  # how a model is made of it

    @property
    def place(self) -> Path:
        """What messages name: its folder, or its one file."""
        return self.folder

    @property
    def entries(self) -> dict[str, Entry]:
        """The base's entries, which all values are those of when they are stored."""
        return self.base.entries


def matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Files in a folder and in the folders inside it whose names fit one of the patterns, relative
    to it and sorted."""
    patterns = tuple(patterns)
    here = [path for depth in ("*", "*/*") for path in folder.glob(depth) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in here]
    return sorted(name for name in names if any(_fits(name, pattern) for pattern in patterns))


def _fits(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern of as many parts."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def other_name(name: str) -> str | None:
    """The newer name of a norm's tensor for the older, or the older for the newer; None for others,
    which have one name."""
    for newer, older in OLD_NAMES.items():
        if name.endswith(older):
            return name.removesuffix(older) + newer
        if name.endswith(newer):
            return name.removesuffix(newer) + older
    return None


def under_names_of(base: Checkpoint, checkpoint: Checkpoint) -> list[str]:
    """Give tensors of a checkpoint the base's names, where these are the older or the newer ones of
    the same; the names that they have in their files. Entries keep these."""
    changed = []
    for file, header in checkpoint.headers.items():
        entries = {}
        for name, entry in header.entries.items():
            other = other_name(name)
            if name not in base.entries and other in base.entries:
                changed.append(name)
                name = str(other)
            entries[name] = entry
        checkpoint.headers[file] = replace(header, entries=entries)
    return changed


def read_folder(name: str, folder: Path) -> tuple[Checkpoint, list[Finding]]:
    """A checkpoint, and an error for everything that is wrong with it by itself.

    What could be read is there, even where there are errors.
    """
    checkpoint, findings = Checkpoint(name, folder), []

    def attempt(step: Callable, *arguments):
        """What a step returns, None where it refuses; the refusal is kept."""
        try:
            return step(*arguments)
        except Refused as refusal:
            findings.append(refusal.finding)
            return None

    if not folder.is_dir():
        cure = "pass the folder that save_pretrained wrote or a download has made"
        found = "a file" if folder.exists() else "nothing"
        return checkpoint, [Finding(ERROR, str(folder), "a folder with a model", found, cure)]

    checkpoint.config = attempt(read_json, folder / CONFIG) or {}
    for file in attempt(weight_files, folder) or []:
        header = attempt(read_header, folder / file)
        if header is not None:
            checkpoint.headers[file] = header
    if not findings:
        attempt(check_index, checkpoint)
    return checkpoint, findings


def read_json(path: Path) -> dict:
    """A file of JSON that holds an object.

    Raises: Refused naming the file.
    """
    if not path.is_file():
        raise Refused(path, "a file", "none", LEAVE)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cure = "fetch or write the file again"
        raise Refused(path, "JSON in UTF-8", f"what does not parse ({error})", cure) from error
    if not isinstance(value, dict):
        found = f"a {type(value).__name__}"
        raise Refused(path, "an object of JSON", found, "fetch or write the file again")
    return value


def weight_files(folder: Path) -> list[str]:
    """Names of a folder's files of weights: the single one, or the shards of its index, sorted.

    Raises: Refused where there are none, or only pickled ones; where the index names a file that is
        missing or outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    pickled = matching(folder, PICKLED)
    if pickled:
        found = f"pickled ones only ({shortlist(pickled)}), which can run any code when read"
        raise Refused(folder, "weights in safetensors", found, SAVE_AGAIN)
    if (folder / ADAPTER).is_file():
        cure = "name its base first and the adapter as an expert, or use peft's merge_and_unload()"
        raise Refused(folder, "the weights of a whole model", "an adapter alone", cure)
    raise Refused(folder, f"{SINGLE} or {INDEX}", "neither", "pass the folder of a saved model")


def shortlist(names: list[str]) -> str:
    """The first three names, and whether there are more."""
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _shards(index: Path) -> list[str]:
    """Names of the files that an index speaks of."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        cure = "fetch the file again"
        raise Refused(f"{index}, weight_map", "tensors and their files", repr(places), cure)
    shards = sorted({str(file) for file in places.values()})
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or shard in (".", ".."):
            cure = "the index is damaged or not to be trusted"
            raise Refused(f"{index}, weight_map", "files in its own folder", repr(shard), cure)
        if not (index.parent / shard).is_file():
            cure = "fetch the missing file"
            raise Refused(f"{index}, weight_map", f"a file {shard!r}", "none of that name", cure)
    return shards


def check_index(checkpoint: Checkpoint) -> None:
    """Refused where a tensor is in two files, or not in the one that the index names."""
    cure = "fetch the files again, all from one place"
    seen: dict[str, str] = {}
    for file, header in checkpoint.headers.items():
        for name in header.entries:
            if name in seen:
                where = f"{checkpoint.folder / file}, tensor {name!r}"
                raise Refused(where, "one file that has it", f"it in {seen[name]} too", cure)
            seen[name] = file
    if not checkpoint.is_sharded:
        return
    index = checkpoint.folder / INDEX
    places = read_json(index)["weight_map"]
    for name, file in places.items():
        if seen.get(name) != file:
            found = f"it in {seen[name]}" if name in seen else "it nowhere"
            raise Refused(f"{index}, tensor {name!r}", f"the tensor in {file}", found, cure)
    for name, file in seen.items():
        if name not in places:
            where = f"{checkpoint.folder / file}, tensor {name!r}"
            raise Refused(where, f"its name in {INDEX}", "it missing there", cure)
