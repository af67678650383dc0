"""Parameters of a recipe: what each method of mergekit takes, and the value that a tensor gets.

A parameter is one value, or a list of them that is spread over the layers (a gradient), or a list
of conditions, the first of which whose ``filter`` is part of the tensor's name decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..findings import Refused

REQUIRED = object()  # in place of a default
SPARSE = {"normalize": False, "rescale": False, "lambda": 1.0}
LAYER = re.compile(r"\.(\d+)\.")
FRACTIONS = ("density", "gamma", "epsilon")
FLAGS = ("normalize", "rescale", "int8_mask", "filter_wise")
TOGETHER = 2**24  # numbers of tensors that are merged at the same time; larger ones alone
UNUSED = "leave it out: mergekit does not look at it either"


@dataclass(frozen=True)
class Rule:
    """What one ``merge_method`` of mergekit does and takes.

    Attributes:
        common: parameters of the whole merge -> default.
        own: parameters of every model -> default.
        on_base: whether the method merges updates of a base model, which then has no ``own``.
        least, most: models that it needs and takes, the base among them.
        thinning: how entries of updates are dropped: ``magnitude``, ``random``, ``outliers``,
            ``ranks``, or not at all.
        elects: whether a sign is elected for every entry.
    """

    common: Mapping[str, object] = field(default_factory=dict)
    own: Mapping[str, object] = field(default_factory=dict)
    on_base: bool = True
    least: int = 2
    most: float = math.inf
    thinning: str | None = None
    elects: bool = False

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn, one stream of them for all tensors."""
        return self.thinning in ("random", "ranks")

    def at_once(self, numbers: int, threads: int) -> int:
        """How many tensors of so many numbers are merged at the same time; random numbers are drawn
        for one after the other."""
        return 1 if self.draws else max(1, min(threads, TOGETHER // max(numbers, 1)))


def _sparse(thinning: str, elects: bool, changed: Mapping[str, bool], **own: float) -> Rule:
    """A method that drops entries of updates; ``changed`` are defaults unlike ``SPARSE``."""
    each = {"weight": REQUIRED, "density": 1.0, **own}
    return Rule({**SPARSE, **changed}, each, thinning=thinning, elects=elects)


RULES = {
    "linear": Rule({"normalize": True}, {"weight": REQUIRED}, on_base=False, least=1),
    "slerp": Rule({"t": REQUIRED}, most=2),
    "model_stock": Rule({"filter_wise": False}, least=3),
    "task_arithmetic": Rule({"normalize": False, "lambda": 1.0}, {"weight": REQUIRED}),
    "ties": _sparse("magnitude", True, {"normalize": True}),
    "dare_linear": _sparse("random", False, {"rescale": True}),
    "dare_ties": _sparse("random", True, {"rescale": True}),
    "breadcrumbs": _sparse("outliers", False, {}, gamma=0.01),
    "breadcrumbs_ties": _sparse("outliers", True, {}, gamma=0.01),
    "della": _sparse("ranks", True, {"normalize": True, "rescale": True}, epsilon=0.15),
    "della_linear": _sparse("ranks", False, {"rescale": True}, epsilon=0.15),
}


@dataclass(frozen=True)
class Condition:
    """Values for the tensors whose names have ``part`` in them; more than one are a gradient."""

    part: str
    values: tuple[float, ...]


Settings = Mapping[str, Sequence[Condition]]


def read_settings(where: str, given, rule: Rule, *, common: bool, own: bool) -> Settings:
    """Parameters of a recipe, of a slice or of a model: name -> conditions.

    Args:
        common, own: which parameters of the method count at this place.
    Raises: Refused naming the field.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise Refused(where, "parameters and their values", found(given), "write NAME: VALUE")
    known = [*(rule.common if common else ()), *(rule.own if own else ())]
    settings = {}
    for name, value in given.items():
        place = f"{where}.{name}"
        if name == "int8_mask" and common:
            _conditions(place, name, value)  # of mergekit's memory alone: no weight depends on it
        elif name in known:
            settings[name] = _conditions(place, name, value)
        else:
            elsewhere = name in rule.common or name in rule.own
            cure = "write it there" if elsewhere else UNUSED
            expected = f"one of {', '.join(known)}" if known else "no parameters at this place"
            if elsewhere:
                level = "the whole merge" if name in rule.common else "models"
                expected = f"this one among the parameters of {level}"
            raise Refused(place, expected, f"{name!r}", cure)
    return settings


def said(settings: Settings) -> dict[str, list[dict]]:
    """Parameters in plain values, as conditions."""
    plain: dict[str, list[dict]] = {}
    for name, conditions in settings.items():
        plain[name] = [{"filter": c.part, "values": list(c.values)} for c in conditions]
    return plain


def found(value) -> str:
    """A value of a recipe, for messages."""
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.80}"


def _conditions(where: str, name: str, given) -> list[Condition]:
    """One parameter as conditions."""
    if isinstance(given, dict):
        given = [given]
    if not (isinstance(given, list) and any(isinstance(value, dict) for value in given)):
        return [Condition("", _values(where, name, given))]
    conditions = []
    for number, condition in enumerate(given):
        place = f"{where}[{number}]"
        fits = isinstance(condition, dict) and "value" in condition
        if not fits or condition.keys() - {"value", "filter"}:
            expected = "value, and filter where it is meant for some tensors"
            raise Refused(place, expected, found(condition), "write both so, and nothing else")
        part = condition.get("filter")
        if not isinstance(part, (str, type(None))):
            cure = "write a part of the tensors' names, such as mlp"
            raise Refused(f"{place}.filter", "a word", found(part), cure)
        values = _values(f"{place}.value", name, condition["value"])
        conditions.append(Condition("" if part in (None, "*") else part, values))
    return conditions


def _values(where: str, name: str, given) -> tuple[float, ...]:
    """One value, or those of a gradient."""
    if given == []:
        raise Refused(where, "a value, or a list of them", "an empty list", "give one")
    if isinstance(given, list):
        return tuple(_value(f"{where}[{i}]", name, value) for i, value in enumerate(given))
    return (_value(where, name, given),)


def _value(where: str, name: str, given) -> float:
    """A number, or True or False, as the parameter of this name has it."""
    if name in FLAGS:
        if isinstance(given, bool):
            return given
        raise Refused(where, "true or false", found(given), "write one of them")
    number = _number(given)
    if number is None or not math.isfinite(number):
        raise Refused(where, "a finite number", found(given), "write one")
    if name in FRACTIONS and not 0 <= number <= 1:
        raise Refused(where, "a number from 0 to 1", f"{given}", "write one")
    return number


def _number(given) -> float | None:
    """A number of YAML, which takes one such as 1e-4, without a point, for a word."""
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        return None
    try:
        return float(given)
    except ValueError:
        return None


def value_for(settings: Iterable[Settings], parameter: str, tensor: str, depth: float):
    """The value of a parameter for one tensor, None where nothing is said.

    Args:
        settings: those that count first come first.
        depth: of the tensor's layer, from 0 for the first to 1 for the last.
    """
    for setting in settings:
        for condition in setting.get(parameter, ()):
            if condition.part in tensor:
                return _on_gradient(condition.values, depth)
    return None


def _on_gradient(values: Sequence[float], depth: float) -> float:
    """The value at a depth, between the two that are next to it; of flags, the one before."""
    place = depth * (len(values) - 1)
    before = int(place)
    after = min(len(values) - 1, before + 1)
    if isinstance(values[before], bool):
        return values[before]
    share = place - before
    return (1 - share) * values[before] + share * values[after]


def depths(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Tensors of numbered layers -> what stands before the number, and the number."""
    places = {}
    for name in names:
        layer = LAYER.search(name)
        if layer:
            places[name] = name[: layer.start()], int(layer[1])
    return places
