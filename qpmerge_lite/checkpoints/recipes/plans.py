"""What a recipe says of every tensor of the models that it names, and the refusals that need their
configurations and headers; no weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..compatibility import Report
from ..digests import sha256
from ..findings import Refused, shortened
from ..folders import TOKENIZER, Checkpoint, read_json
from ..headers import Header
from .reading import Recipe
from .settings import REQUIRED, depths, value_for

VOCABULARY = "tokenizer.json"
KEEP = "leave the field out: the merge gets the base's tokenizer and keeps all rows"


@dataclass(frozen=True)
class Plan:
    """How one tensor is merged.

    Attributes:
        common: parameter of the whole merge -> value.
        own: parameter of a model -> one value for every source that has it, in their order.
    """

    common: Mapping[str, float]
    own: Mapping[str, list[float]]


def plans(recipe: Recipe, report: Report) -> dict[str, Plan]:
    """The plan of every tensor of the base.

    Raises: Refused for a value that is missing or out of range, for gradients over several stacks
        of layers, slices that are no whole model, numbers of several dtypes where the recipe names
        none, and tokenizers that do not fit.
    """
    base = report.base
    places = depths(base.entries)
    _check_layers(recipe, places)
    _check_dtypes(recipe, [base, *report.experts])
    if recipe.own_tokenizer:
        _check_tokenizers(recipe, base, report.experts)
    last = max((number for _, number in places.values()), default=0)
    planned = {}
    for name in base.entries:
        depth = 0.0
        if name in places:
            depth = places[name][1] / last if last else 1.0
        planned[name] = _plan(recipe, name, depth)
    return planned


def _plan(recipe: Recipe, name: str, depth: float) -> Plan:
    """What the recipe says of one tensor."""
    rule = recipe.rule
    common = {}
    for parameter, default in rule.common.items():
        value = value_for(recipe.common, parameter, name, depth)
        common[parameter] = _given(recipe, f"parameters.{parameter}", name, value, default)
    own: dict[str, list[float]] = {}
    for parameter, default in rule.own.items():
        own[parameter] = []
        for number, source in enumerate(recipe.sources):
            if number == recipe.base and rule.on_base:
                continue
            value = value_for([source.settings, *recipe.common], parameter, name, depth)
            where = f"model {source.folder}, parameters.{parameter}"
            own[parameter].append(_given(recipe, where, name, value, default))
    if "epsilon" in own:
        _check_chances(recipe, name, own)
    return Plan(common, own)


def _given(recipe: Recipe, where: str, name: str, value, default):
    """A value, or the default in its place."""
    if value is None and default is REQUIRED:
        expected = f"a value for tensor {name!r}, which {recipe.method} needs"
        cure = "write one there, or under parameters for all models"
        raise Refused(f"{recipe.path}, {where}", expected, "none", cure)
    return default if value is None else value


def _check_chances(recipe: Recipe, name: str, own: Mapping[str, list[float]]) -> None:
    """Refused unless all entries of a tensor have a probability within (0, 1)."""
    for density, epsilon in zip(own["density"], own["epsilon"]):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            where = f"{recipe.path}, parameters.epsilon"
            given = f"{density} ± {epsilon} for tensor {name!r}"
            raise Refused(where, "density ± epsilon within (0, 1)", given, "lower epsilon")


def _check_layers(recipe: Recipe, places: Mapping[str, tuple[str, int]]) -> None:
    """Refused where gradients have no one stack of layers, or a slice not all layers."""
    stacks = sorted({stack for stack, _ in places.values()})
    count = len(set(places.values()))
    if _has_gradient(recipe) and len(stacks) != 1:
        given = f"{len(stacks)} ({shortened(stacks)})" if stacks else "none"
        cure = "write one value for all layers, or conditions with filter"
        where = f"{recipe.path}, parameters"
        raise Refused(where, "one stack of layers for a list of values", given, cure)
    for source in recipe.sources:
        if source.layers not in (None, count) or (source.layers and len(stacks) != 1):
            expected = f"all {count} layers of one stack"
            cure = "merge whole models only; models are put together of layers by mergekit"
            where = f"{source.where}, layer_range"
            raise Refused(where, expected, f"[0, {source.layers}]", cure)


def _has_gradient(recipe: Recipe) -> bool:
    for settings in [*recipe.common, *(source.settings for source in recipe.sources)]:
        for conditions in settings.values():
            if any(len(condition.values) > 1 for condition in conditions):
                return True
    return False


def _check_dtypes(recipe: Recipe, checkpoints: Iterable[Checkpoint]) -> None:
    """Refused where numbers are of several dtypes and the recipe does not say which to take."""
    dtypes = set()
    for checkpoint in checkpoints:
        dtypes |= {e.dtype for e in checkpoint.entries.values() if e.is_number}
    if len(dtypes) > 1 and recipe.dtype is None:
        cure = "add one, such as dtype: bfloat16"
        expected = "a dtype, as those of the tensors differ"
        where = f"{recipe.path}, dtype"
        raise Refused(where, expected, f"none beside {', '.join(sorted(dtypes))}", cure)


def settle_dtypes(report: Report) -> None:
    """Drop the warnings that dtypes differ: the recipe says which one is taken."""
    findings = report.findings
    report.findings = [f for f in findings if not f.expected.startswith("dtype ")]


def _check_tokenizers(recipe: Recipe, base: Checkpoint, experts: Iterable[Checkpoint]) -> None:
    """Refused unless all models have the base's tokenizer, with a token for every row: for others
    mergekit sorts the rows anew."""
    where = f"{recipe.path}, tokenizer"
    names = base.matching([VOCABULARY])
    if not names:
        raise Refused(where, f"a {VOCABULARY} in {base.folder}", "none", KEEP)
    for expert in experts:
        if expert.matching(TOKENIZER) and expert.matching(names) != names:
            raise Refused(where, f"a {VOCABULARY} in {expert.folder}", "none", KEEP)
        if expert.matching(names) and _differ(base, expert):
            expected = "one vocabulary for all models"
            cure = f"tune with the base's tokenizer, or {KEEP}"
            raise Refused(where, expected, f"another one in {expert.folder}", cure)
    rows, tokens = base.config.get("vocab_size"), _tokens(base)
    if rows != tokens:
        cure = f"mergekit would cut the rows to the tokens; {KEEP}"
        raise Refused(where, f"a token for each of {rows} rows", f"{tokens} tokens", cure)


def _differ(base: Checkpoint, expert: Checkpoint) -> bool:
    return sha256(base.folder / VOCABULARY) != sha256(expert.folder / VOCABULARY)


def _tokens(base: Checkpoint) -> int:
    """How many tokens a tokenizer knows."""
    content = read_json(base.folder / VOCABULARY)
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # of pairs, in a unigram model
        vocabulary = [token for token, _ in vocabulary]
    added = [token["content"] for token in content.get("added_tokens") or []]
    return len({*vocabulary, *added})


def stored_headers(recipe: Recipe | None, base: Checkpoint) -> dict[str, Header]:
    """Headers of the merge: the base's, with the dtype that a recipe asks for."""
    if recipe is None or recipe.out_dtype is None:
        return base.headers
    return {file: header.as_dtype(recipe.out_dtype) for file, header in base.headers.items()}
