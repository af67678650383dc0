"""What the folder of a merge holds besides weights, where it may be, and whether there is room."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .. import __version__
from .deltas.reading import behind
from .findings import Refused, size
from .folders import CONFIG, INDEX, MANIFEST, OTHERS, TOKENIZER, Checkpoint, read_json
from .headers import NAMES, read_header
from .heads.card import about_heads
from .partial import explained, refuse_if_there, tidy

CARD = "README.md"


def check_place(out: Path, inputs: Sequence[Path]) -> None:
    """Refused for an output that is there and not empty, has no folder to be in, or lies in an
    input."""
    if out.is_dir() and not out.is_symlink():
        tidy(out.absolute())
    refuse_if_there(out)
    _check_parent(out)
    for place in inputs:
        folder = behind(place) or place
        if out.resolve().is_relative_to(folder.resolve()):
            cure = "choose a folder that is not there yet"
            found = f"one in {folder}, which is an input"
            raise Refused(f"--out {out}", "a folder of its own", found, cure)


def check_new_file(out: Path, suffix: str) -> None:
    """Refused for an output file that is there, has another suffix, or has no folder to be in."""
    if out.exists() or out.is_symlink():
        cure = "choose another name, or remove what is there"
        raise Refused(f"--out {out}", "a new file", "something of that name", cure)
    if out.suffix != suffix:
        cure = f"call it {out.stem}{suffix}"
        raise Refused(f"--out {out}", f"a name that ends in {suffix}", repr(out.name), cure)
    _check_parent(out)


def _check_parent(out: Path) -> None:
    parent = out.absolute().parent
    if not parent.is_dir():
        cure = "make that folder first"
        raise Refused(f"--out {out}", f"a folder {parent} to be in", "none", cure)


@contextmanager
def new_file(out: Path, name: str, option: str = "--out") -> Iterator[Path]:
    """A folder beside ``out``, to be filled: one of its files becomes ``out`` at the end, and the
    rest goes, as does all of it at an error. A file that was there is replaced.

    A process that is killed leaves the folder, whose name begins with a dot, but no ``out``.

    Args:
        name: of that file. option: that named the output, for messages.
    Raises: Refused where the folder cannot be written, as on a full disk.
    """
    shown, out = out, Path(os.path.abspath(out))
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with explained(f"{option} {shown}", partial):
        partial.mkdir()
        try:
            yield partial
            os.replace(partial / name, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_room(out: Path, needed: int) -> None:
    """Refused where the file system of an output has less free space than it will take.

    Args:
        needed: bytes that are still to be written.
    """
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        cure = "make room, or choose a folder on another disk"
        raise Refused(f"--out {out}", f"{size(needed)} of free space", size(free), cure)


def copy_files(base: Checkpoint, folder: Path) -> list[str]:
    """Copy what belongs to a model besides its weights (configuration, tokenizer, processor, chat
    template, licence); names of the files, relative to the folder."""
    names = base.matching((*OTHERS, *TOKENIZER))
    if base.is_sharded:
        names.append(INDEX)
    for name in names:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(base.folder / name, target)
    return names


def say_dtype(folder: Path, dtype: str) -> None:
    """Write into a merge's configuration and index that its weights are of another dtype than the
    base's.

    Args:
        dtype: as safetensors names it.
    """
    config = read_json(folder / CONFIG)
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    write_json(folder / CONFIG, config | {field: NAMES[dtype]})
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        headers = [read_header(folder / file) for file in {*index["weight_map"].values()}]
        total = sum(header.size - len(header.raw) for header in headers)
        index["metadata"] = index.get("metadata", {}) | {"total_size": total}
        write_json(folder / INDEX, index)


def write_json(path: Path, value: dict) -> None:
    """Write plain values as JSON; what JSON has no word for becomes a number, None or a string."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def versions(with_transformers: bool) -> dict[str, str]:
    """Versions of what computed the output."""
    import torch

    found = {"qpmerge_lite": __version__, "torch": torch.__version__}
    if with_transformers:
        import transformers

        found["transformers"] = transformers.__version__
    return found | {"python": platform.python_version(), "threads": str(torch.get_num_threads())}


def plain(value):
    """A value of numbers, strings, lists and mappings as JSON has it; NaN and infinity are None."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if number - number == 0 else None


def number_of(count: int, thing: str) -> str:
    """A count and what is counted, in the plural but for one."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def card(manifest: dict) -> str:
    """A model card in Markdown: the recipe, the inputs with their hashes, and what was averaged."""
    options = ", ".join(f"`{k}={v}`" for k, v in manifest["options"].items()) or "its defaults"
    lines = [
        "---",
        "tags:",
        "- merge",
        "- qpmerge-lite",
        "---",
        "",
        "# A merge",
        "",
        f"Made by qpmerge-lite {manifest['versions']['qpmerge_lite']} with the method "
        f"`{manifest['method']}` and {options}. [{MANIFEST}]({MANIFEST}) has all that is needed to "
        "make it again.",
        "",
        "| input | folder | weights (SHA-256) |",
        "|---|---|---|",
    ]
    for source in manifest["inputs"]:
        files = source["files"].items()
        hashes = [f"`{file}` {digest}" for file, digest in files if file.endswith(".safetensors")]
        lines.append(f"| {source['name']} | {source['folder']} | {'<br>'.join(hashes)} |")
    for name, given in manifest["calibration"].items():
        count = f"{given['inputs']} of {given['of']} inputs"
        lines += ["", f"Calibration of {name}: {count} of `{given['file']}`."]
    for name, files in manifest["moments"].items():
        for file in files:
            count = file["calibration"].get("inputs")
            lines += ["", f"Moments of {name}: `{file['file']}`, measured on {count} inputs."]
    for reason, names in manifest["averaged"].items():
        lines += ["", f"Averaged, {number_of(len(names), 'tensor')}: {reason}."]
    lines += about_heads(manifest)
    return "\n".join(lines) + "\n"
