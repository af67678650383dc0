"""Whether an adapter fits its base: every one of its tensors has a place there, or is named."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

from ..findings import ERROR, INFO, WARNING, Finding, shortened
from ..folders import ADAPTER
from ..headers import Entry
from .reading import REPLACEMENT, WEIGHTS, Adapter, Fold, gathered, renamed
from .settings import FOLD, rank_of

# parts that may change one tensor together
LINEAR, TABLE = {"down", "up"}, {"table_down", "table_up"}
TOGETHER: tuple[set[str], ...] = (
    set(),
    LINEAR,
    TABLE,
    LINEAR | {"magnitude"},
    TABLE | {"magnitude"},
    {"shift"},
    {"rows"},
)
OTHER_BASE = f"name the base that the adapter was trained on; or {FOLD}"


def fit(adapter: Adapter) -> list[Finding]:
    """Find out how the adapter changes the base's tensors: ``folds`` is filled. What does not fit
    is an error; every tensor of the adapter has its place or is named."""
    base, where = adapter.base, adapter.folder / WEIGHTS
    folds, findings = gathered(adapter)
    adapter.folds = renamed(folds, base.entries)
    unknown = [name for name in adapter.folds if name not in base.entries]
    if unknown:
        own = [key for name in unknown for key in adapter.folds[name].parts.values()]
        found = f"some for {shortened(unknown)}, which it has not: {shortened(own)}"
        expected = "changes of tensors of the base alone"
        findings.append(Finding(ERROR, str(where), expected, found, OTHER_BASE))
    if not folds and not findings:
        findings.append(Finding(ERROR, str(where), "tensors", "none", OTHER_BASE))
    for name, fold in adapter.folds.items():
        if name in base.entries:
            findings += _errors_of(adapter, name, fold)
    findings += _orient(adapter) if not findings else []
    return findings + _tied_tables(adapter) + _left_out(adapter) + _other_base(adapter)


def _errors_of(adapter: Adapter, name: str, fold: Fold) -> list[Finding]:
    """Why the parts of one fold are not those of a change of the base's tensor."""
    where = f"{adapter.folder / WEIGHTS}, {', '.join(map(repr, fold.parts.values()))}"
    entry, parts = adapter.entries[name], {*fold.parts} - {REPLACEMENT}
    if parts not in TOGETHER:
        expected = f"both factors for {name!r}, or what replaces it"
        return [Finding(ERROR, where, expected, f"{', '.join(sorted(parts))} alone", FOLD)]
    if parts & (LINEAR | TABLE) and ("magnitude" in parts) != bool(
        adapter.settings.get("use_dora")
    ):
        expected = f"a magnitude vector for {name!r} where use_dora says so, and only there"
        found = "one" if "magnitude" in parts else "none"
        return [Finding(ERROR, where, expected, found, FOLD)]
    errors = []
    for part, key in fold.parts.items():
        own = adapter.tensors[key]
        place = f"{adapter.folder / WEIGHTS}, tensor {key!r}"
        is_as_it_was = part == REPLACEMENT and own.dtype == entry.dtype
        if not (is_as_it_was or _is_real(own) and _is_real(entry)):
            like = f"numbers, as of {name!r} ({entry.dtype})"
            errors.append(Finding(ERROR, place, like, own.dtype, OTHER_BASE))
        wanted = _shape_of(part, fold, entry, adapter)
        if wanted is not None and own.shape != wanted:
            expected = f"shape {wanted} for {name!r}"
            errors.append(Finding(ERROR, place, expected, f"shape {own.shape}", OTHER_BASE))
    return errors + ([] if errors else _product_errors(adapter, name, fold))


def _is_real(entry: Entry) -> bool:
    return entry.dtype.startswith(("F", "BF"))


def _shape_of(part: str, fold: Fold, entry: Entry, adapter: Adapter) -> tuple[int, ...] | None:
    """The shape of a part, where the base's tensor and the configuration say it."""
    if part in (REPLACEMENT, "shift"):
        return entry.shape
    if part == "rows":
        return (len(fold.indices), *entry.shape[1:])
    own = adapter.tensors[fold.parts[part]].shape
    rank = rank_of(adapter.settings, fold.module)
    if part in ("down", "table_down"):
        return (rank, *own[1:])
    if part in ("up", "table_up"):
        return (own[0], rank, *(1 for _ in own[2:])) if own else (0, rank)
    return None


def _product_errors(adapter: Adapter, name: str, fold: Fold) -> list[Finding]:
    """Why the product of the factors, or what goes with it, is no change of the base's tensor."""
    entry, where = adapter.entries[name], f"{adapter.folder / WEIGHTS}, layer {fold.module!r}"
    if "rows" in fold.parts and max(fold.indices, default=-1) >= entry.shape[0]:
        expected, found = f"rows below {entry.shape[0]}", str(max(fold.indices))
        return [Finding(ERROR, where, expected, found, OTHER_BASE)]
    product = product_shape(adapter, fold)
    if product is None:
        return []
    is_table = "table_up" in fold.parts
    fits = product[::-1] == entry.shape and len(product) == 2
    fits = fits or not is_table and product == entry.shape
    if not fits:
        expected = f"factors of an update of shape {entry.shape} for {name!r}"
        return [Finding(ERROR, where, expected, f"of shape {product}", OTHER_BASE)]
    magnitude = fold.parts.get("magnitude")
    if magnitude and prod(adapter.tensors[magnitude].shape) != product[0]:
        found = f"shape {adapter.tensors[magnitude].shape}"
        return [Finding(ERROR, where, f"{product[0]} magnitudes", found, OTHER_BASE)]
    return []


def product_shape(adapter: Adapter, fold: Fold) -> tuple[int, ...] | None:
    """Shape of the product of a fold's factors, outputs first; None where it has none."""
    for down, up in (("down", "up"), ("table_down", "table_up")):
        if up in fold.parts:
            outputs = adapter.tensors[fold.parts[up]].shape[0]
            return (outputs, *adapter.tensors[fold.parts[down]].shape[1:])
    return None


def _orient(adapter: Adapter) -> list[Finding]:
    """Say of every fold whether the base has its matrix transposed; an error where nothing does.

    Shapes show it but for square matrices. These go with the others of the adapter, since
    ``fan_in_fan_out`` is what peft found at the last layer only, and with it where all are square.
    """
    square, seen = [], set()
    for name, fold in adapter.folds.items():
        product, shape = product_shape(adapter, fold), adapter.entries[name].shape
        if product is None:
            continue
        fold.is_transposed = product != shape or "table_up" in fold.parts
        if "table_up" in fold.parts:
            continue
        if product == shape == product[::-1] and len(shape) == 2:
            square.append(fold)
        else:
            seen.add(fold.is_transposed)
    if square and len(seen) > 1:
        where = f"{adapter.folder / WEIGHTS}, layer {square[0].module!r}"
        expected = "layers that all have their matrices as (outputs, inputs), or all transposed"
        return [Finding(ERROR, where, expected, "a square one among both", FOLD)]
    transposed = seen.pop() if seen else bool(adapter.settings.get("fan_in_fan_out"))
    for fold in square:
        fold.is_transposed = transposed
    return []


def _tied_tables(adapter: Adapter) -> list[Finding]:
    """What is to be known of changed embeddings that the base ties to its output layer.

    Where peft replaces such an embedding, its model is tied no longer, which the base's files have
    no room for.
    """
    base = adapter.base
    if not ties_words(base.config):
        return []
    tables = [name for name, entry in base.entries.items() if _has_words(entry, base.config)]
    changed = [name for name in tables if name in adapter.folds]
    if not changed:
        return []
    where = f"{adapter.folder / WEIGHTS}, for {changed[0]!r}"
    expected = "embeddings as the base has them, which ties them to its output layer"
    if len(tables) > 1 or any(_is_replaced(adapter, adapter.folds[name]) for name in changed):
        cure = f"{FOLD}, beside a base that is not tied either"
        return [Finding(ERROR, where, expected, "others, which peft unties", cure)]
    cure = "nothing is to be done if that is meant: both change, as with peft's merge_and_unload()"
    return [Finding(WARNING, where, expected, "an update of them", cure)]


def _is_replaced(adapter: Adapter, fold: Fold) -> bool:
    """Whether a tensor is that of a layer which peft replaces as a whole."""
    whole = _listed(adapter, "modules_to_save")
    return any(f".{fold.module}".endswith(f".{name}") for name in whole)


def _listed(adapter: Adapter, option: str) -> list:
    """The names that a field of the configuration lists; none where it is a pattern."""
    names = adapter.settings.get(option)
    return names if isinstance(names, list) else []


def ties_words(config: Mapping) -> bool:
    """Whether a configuration ties the output layer to the embeddings: it says so, or it says
    nothing and the model has such a layer, as versions of transformers leave a default out."""
    said = config.get("tie_word_embeddings")
    names = config.get("architectures") or []
    has_head = any("LM" in name or "ConditionalGeneration" in name for name in map(str, names))
    return has_head if said is None else bool(said)


def _has_words(entry: Entry, config: Mapping) -> bool:
    return len(entry.shape) == 2 and entry.shape[0] == config.get("vocab_size")


def _left_out(adapter: Adapter) -> list[Finding]:
    """A word on layers that the configuration names and the base has, but that stay as they are."""
    findings = []
    for option in ("target_modules", "modules_to_save"):
        for name in _listed(adapter, option):
            within = f".{name}."
            is_there = any(within in f".{tensor}" for tensor in adapter.entries)
            if is_there and not any(within in f".{tensor}" for tensor in adapter.folds):
                where = f"{adapter.folder / ADAPTER}, {option}"
                expected = f"a change of the layers called {name!r}"
                cure = "they stay the base's; see that the file is the whole adapter"
                findings.append(Finding(WARNING, where, expected, "none", cure))
    return findings


def _other_base(adapter: Adapter) -> list[Finding]:
    """A word on a base that the configuration calls otherwise."""
    named, base = adapter.settings.get("base_model_name_or_path"), adapter.base
    if not named:
        return []
    names = {base.folder.resolve().name, Path(str(base.config.get("_name_or_path"))).name}
    if Path(str(named)).name in names:
        return []
    where = f"{adapter.folder / ADAPTER}, base_model_name_or_path"
    cure = "see that it was trained on this base, wherever that lies"
    return [Finding(INFO, where, repr(base.folder.resolve().name), repr(named), cure)]
