"""Recipes: YAML files as mergekit reads them, and what can be refused about them before a weight is
read. What mergekit would pass over in silence, such as a misspelt field, is refused here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..calibration.records import require
from ..findings import Refused
from ..headers import NAMES
from .settings import RULES, Rule, Settings, found, read_settings, said

# fields that are known and not honoured -> what to do
NOT_HONOURED = {
    "modules": "write models, and merge models whose parts differ one by one",
    "chat_template": "leave it out: the merge gets the base's; change that file afterwards",
    "residual_weight": "leave it out",
}
TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
)
DTYPES = {word: dtype for dtype, word in NAMES.items()}
FOLD = "fold it into its model with peft's merge_and_unload(), save that, and name its folder"
DOWNLOAD = (
    "download the model and name its folder; relative paths begin in the folder that the command "
    "is run in"
)


@dataclass(frozen=True)
class Source:
    """One model of a recipe.

    Attributes:
        folder: where it is.
        settings: its own parameters.
        where: its field, for messages.
        layers: of how many layers the recipe speaks, None where it does not say.
    """

    folder: Path
    settings: Settings
    where: str
    layers: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe as understood.

    Attributes:
        path: of the file.
        sha256: of the file.
        method: a key of ``RULES``.
        sources: the models in mergekit's order, which is that of sums and of random numbers; a base
            that ``models`` does not list comes last.
        base: place of the base in ``sources``; of a method without a base, the model that gives
            the merge its files besides weights.
        common: parameters of the whole merge, those that count first coming first.
        dtype: that tensors are converted to and merged in, as safetensors has it; None for theirs.
        out_dtype: that the merge is stored in.
        own_tokenizer: whether the recipe asks for the base's tokenizer.
    """

    path: Path
    sha256: str
    method: str
    sources: Sequence[Source]
    base: int
    common: Sequence[Settings]
    dtype: str | None
    out_dtype: str | None
    own_tokenizer: bool

    @property
    def rule(self) -> Rule:
        """What the method does and takes."""
        return RULES[self.method]

    @property
    def experts(self) -> dict[str, Path]:
        """Name -> folder of all models but the base: the folder's name, or the whole path where
        that name is taken."""
        named: dict[str, Path] = {}
        for number, source in enumerate(self.sources):
            if number != self.base:
                name = source.folder.resolve().name
                named[str(source.folder) if name in named else name] = source.folder
        return named

    def as_json(self, random_seed: int) -> dict:
        """What a manifest says of it: the file's hash, and how it was understood, without a
        path."""
        names = list(self.experts)
        names.insert(self.base, "base")
        models = []
        for name, source in zip(names, self.sources):
            models.append({"name": name, "parameters": said(source.settings)})
        return {
            "sha256": self.sha256,
            "merge_method": self.method,
            "models": models,
            "parameters": [said(settings) for settings in self.common],
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "random_seed": random_seed,
        }


def read_recipe(path: Path) -> Recipe:
    """The recipe of a file.

    Raises: Refused naming file and field for what is no recipe, and for what is not honoured.
    """
    raw, content = _content(path)
    _check_fields(f"{path}", content, TOP)
    method = content.get("merge_method")
    if not isinstance(method, str) or method not in RULES:
        cure = "choose one of them, or merge with mergekit"
        raise Refused(f"{path}, merge_method", f"one of {', '.join(RULES)}", found(method), cure)
    rule = RULES[method]
    base = content.get("base_model")
    base_folder = None if base is None else _folder(f"{path}, base_model", base)
    given = _settings(f"{path}, parameters", content.get("parameters"), rule)
    sources, common = _sources(path, content, rule, base_folder)
    place = _place_of_base(path, method, sources, base_folder)
    _check_count(path, method, len(sources))
    dtype, out_dtype = (_dtype(path, name, content) for name in ("dtype", "out_dtype"))
    return Recipe(
        path,
        hashlib.sha256(raw).hexdigest(),
        method,
        sources,
        place,
        [*common, given],
        dtype,
        out_dtype or dtype,
        _asks_for_tokenizer(path, content),
    )


def _content(path: Path) -> tuple[bytes, dict]:
    """Bytes of a file, and the mapping that they are in YAML."""
    otherwise = "say the same by options of the command line"
    require("yaml", "which is PyYAML and reads recipes", otherwise, extra="yaml")
    import yaml

    try:
        raw = path.read_bytes()
        content = yaml.safe_load(raw.decode("utf-8"))
    except OSError as error:
        cure = "see that the file is there and may be read"
        raise Refused(path, "a recipe in YAML", str(error.strerror), cure) from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        cure = "correct it; values hold together by their indentation"
        raise Refused(path, "YAML in UTF-8", f"what does not parse ({reason})", cure) from error
    if not isinstance(content, dict):
        raise Refused(path, "fields and their values", found(content), "write NAME: VALUE")
    return raw, content


def _check_fields(where: str, given, known: Sequence[str]) -> None:
    """Refused for a field that is not honoured, or unknown."""
    if not isinstance(given, dict):
        raise Refused(where, f"fields {', '.join(known)}", found(given), "write NAME: VALUE")
    for name, value in given.items():
        place = f"{where}, {name}"
        if name in NOT_HONOURED:
            cure = NOT_HONOURED[name]
            raise Refused(place, "no such field, which is not honoured", found(value), cure)
        if name not in known:
            cure = "correct its name, or leave it out"
            raise Refused(place, f"one of the fields {', '.join(known)}", f"{name!r}", cure)


def _folder(where: str, given) -> Path:
    """The folder of a model, whose place is written as in mergekit: from the current folder on."""
    if not isinstance(given, str) or not given:
        raise Refused(where, "the folder of a model", found(given), "write its path")
    if "+" in given:
        raise Refused(where, "the folder of a whole model", f"{given!r}, with an adapter", FOLD)
    if not Path(given).exists():
        expected = "the folder of a model on this machine"
        raise Refused(where, expected, f"{given!r}, which is none", DOWNLOAD)
    return Path(given)


def _settings(where: str, given, rule: Rule) -> Settings:
    """Parameters that count for the merge and for every model."""
    return read_settings(where, given, rule, common=True, own=True)


def _sources(
    path: Path, content: Mapping, rule: Rule, base: Path | None
) -> tuple[list[Source], list[Settings]]:
    """The models that are listed, and the parameters of a slice."""
    if ("models" in content) == ("slices" in content):
        given = "both" if "models" in content else "neither"
        raise Refused(f"{path}, models", "models or slices", given, "write one of them")
    if "models" in content:
        where = f"{path}, models"
        return _listed(where, content["models"], ("model", "parameters"), rule, base), []
    where = f"{path}, slices"
    slices = content["slices"]
    if not isinstance(slices, list) or len(slices) != 1:
        count = f"{len(slices)}" if isinstance(slices, list) else found(slices)
        cure = "merge whole models only; models are put together of layers by mergekit"
        raise Refused(where, "one slice, of all layers", count, cure)
    only, where = slices[0], f"{where}[0]"
    _check_fields(where, only, ("sources", "parameters", "base_model"))
    own_base = only.get("base_model")
    if own_base is not None and (base is None or not _same(Path(f"{own_base}"), base)):
        cure = "leave it out, and name the base in the field base_model of the recipe"
        raise Refused(f"{where}, base_model", "the recipe's base", found(own_base), cure)
    fields = ("model", "layer_range", "parameters")
    sources = _listed(f"{where}, sources", only.get("sources"), fields, rule, base)
    if base is not None and not any(_same(source.folder, base) for source in sources):
        cure = "add it there, with its layer_range"
        raise Refused(f"{where}, sources", "the base among them", "it missing", cure)
    return sources, [_settings(f"{where}, parameters", only.get("parameters"), rule)]


def _listed(where: str, given, fields, rule: Rule, base: Path | None) -> list[Source]:
    """Models of a list."""
    if not isinstance(given, list) or not given:
        raise Refused(where, "a list of models", found(given), "write one model after another")
    sources: list[Source] = []
    for number, entry in enumerate(given):
        place = f"{where}[{number}]"
        _check_fields(place, entry, fields)
        folder = _folder(f"{place}, model", entry.get("model"))
        if any(_same(folder, other.folder) for other in sources):
            raise Refused(f"{place}, model", "every model once", f"{folder} again", "leave it out")
        own = not (rule.on_base and base is not None and _same(folder, base))
        settings = read_settings(
            f"{place}, parameters", entry.get("parameters"), rule, common=False, own=own
        )
        layers = _layers(place, entry) if "layer_range" in fields else None
        sources.append(Source(folder, settings, place, layers))
    return sources


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _layers(where: str, entry: Mapping) -> int:
    """The number of layers of a ``layer_range`` that begins with the first."""
    given = entry.get("layer_range")
    if isinstance(given, list) and len(given) == 2 and all(type(n) is int for n in given):
        first, stop = given
        if first == 0 and stop > 0:
            return stop
    cure = "merge whole models only, [0, number of layers]"
    raise Refused(f"{where}, layer_range", "all layers", found(given), cure)


def _place_of_base(path: Path, method: str, sources: list[Source], base: Path | None) -> int:
    """Place of the base among the models; one that is not there is added to them."""
    if base is None and RULES[method].on_base:
        cure = "name the model that the others were tuned from"
        raise Refused(f"{path}, base_model", f"a base, for {method}", "none", cure)
    if base is None:
        return 0
    for number, source in enumerate(sources):
        if _same(source.folder, base):
            return number
    sources.append(Source(base, {}, f"{path}, base_model"))
    return len(sources) - 1


def _check_count(path: Path, method: str, count: int) -> None:
    rule = RULES[method]
    if rule.least <= count <= rule.most:
        return
    expected = f"{rule.least} models" + (" or more" if rule.most > rule.least else "")
    given = f"{count} with the base" if rule.on_base else f"{count}"
    cure = "add some or leave some out, or choose another method"
    raise Refused(f"{path}, models", f"{expected}, for {method}", given, cure)


def _dtype(path: Path, name: str, content: Mapping) -> str | None:
    """A field with a dtype, as safetensors names it."""
    given = content.get(name)
    if given is None:
        return None
    word = given.removeprefix("torch.") if isinstance(given, str) else ""
    if word not in DTYPES:
        raise Refused(f"{path}, {name}", f"one of {', '.join(DTYPES)}", found(given), "write one")
    return DTYPES[word]


def _asks_for_tokenizer(path: Path, content: Mapping) -> bool:
    """Whether a recipe says that the merge gets the base's tokenizer."""
    place, given = f"{path}, tokenizer_source", content.get("tokenizer_source")
    if content.get("tokenizer") is not None:
        place, tokenizer = f"{path}, tokenizer", content["tokenizer"]
        _check_fields(place, tokenizer, ("source",))
        place, given = f"{place}, source", tokenizer.get("source", "union")
    if given in (None, "base"):
        return given == "base"
    cure = "leave it out; models need one vocabulary, and the merge gets the base's tokenizer"
    raise Refused(place, "base", found(given), cure)
