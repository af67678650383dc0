"""Which methods merge checkpoints, the options that each takes, and how much of a model each has to
see at once."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib import import_module
from inspect import Parameter, signature

from .findings import Refused
from .folders import Checkpoint

PACKAGE = __name__.partition(".")[0]  # which imports the module of a name when it is asked for
WEIGHTS_ONLY = (
    "soup",
    "task_arithmetic",
    "ties",
    "dare",
    "breadcrumbs",
    "della",
    "slerp",
    "model_stock",
    "tsv_merge",
    "iso_c",
    "dc_merge",
    "wudi",
)
CALIBRATED = (
    "qp",
    "regmean",
    "regmean_plus_plus",
    "lot",
    "featcal",
    "esm",
    "sketched",
    "auto",
)
METHODS = (*CALIBRATED, *WEIGHTS_ONLY)
FROM_PYTHON = ("fisher", "adamerging", "greedy_soup")  # which need labels, heads or a score
OWN_PRECISION = ("esm", "auto")  # which, besides running experts, compute with their weights alone
FROM_MOMENTS = ("qp", "regmean")  # which need no more of the data than an expert's own sums
WITH_CALIBRATION, WITH_MOMENTS, WITHOUT = "auto", "qp", "soup"
BY_MOMENTS = {"basis": "elements"}  # options of the default with moments
WHY_BY_MOMENTS = (
    "the default with moments: over single entries it did better than regmean on average, both "
    "untuned, on validation data of the book's suites of language and vision"
)
SETTLED = ("inputs", "targets", "products", "activations")  # options that moments have settled
SOLVERS = {"qp": "QP", "sketched": "Sketched"}  # whose fields are options of a method too
# what a method is given anyhow, or what no command line can say
NOT_OPTIONS = ("base", "experts", "calibration", "blocks", "heads", "anchor", "group", "progress")
ONE_STREAM = ("dare", "della")  # one stream of random numbers for the whole model
TENSORS, SHAPES, MODEL = "a tensor", "all tensors of one shape", "the whole model"


def function_of(method: str):
    """The function of this package that a method's name stands for.

    Raises: Refused for an unknown name.
    """
    if method not in METHODS:
        cure = "choose one of them"
        if method in FROM_PYTHON:
            cure += f", or call qpmerge_lite.{method} from Python, where alone it can be had"
        raise Refused("--method", f"one of {', '.join(METHODS)}", repr(method), cure)
    return getattr(import_module(PACKAGE), method)


def options_of(method: str) -> list[str]:
    """Names of the options that a method takes from the command line."""
    parameters = dict(signature(function_of(method)).parameters)
    if method in SOLVERS:
        solver = getattr(import_module(PACKAGE), SOLVERS[method])
        parameters |= signature(solver).parameters
    named = [n for n, p in parameters.items() if p.kind is not Parameter.VAR_KEYWORD]
    return [name for name in named if name not in NOT_OPTIONS]


def check_options(method: str, options: Mapping[str, object]) -> None:
    """Refused for an option that the method does not have."""
    known = options_of(method)
    for name in options:
        if name not in known:
            expected = f"an option of {method} ({', '.join(known) or 'it has none'})"
            raise Refused("--option", expected, repr(name), "leave it out or choose one of them")


def assignment(text: str, option: str, example: str) -> tuple[str, str]:
    """``NAME=VALUE`` as a pair of words.

    Raises: Refused naming the option of the command line that it was given to.
    """
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise Refused(option, f"NAME=VALUE, such as {example}", repr(text), "write it so")
    return name, value


def literal(text: str) -> object:
    """A value of the command line: what Python reads in it (a number, True, a list), or a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def chosen(method: str | None, calibrated: bool, measured: bool = False) -> tuple[str, str]:
    """The method that is used, and why.

    Args:
        method: what was asked for, None for the default.
        calibrated: whether there is calibration for the experts.
        measured: whether there are moments of the experts.
    """
    if method is not None:
        function_of(method)
        return method, "it was asked for"
    if measured:
        return WITH_MOMENTS, WHY_BY_MOMENTS
    if calibrated:
        return WITH_CALIBRATION, "the default where every expert has calibration"
    return WITHOUT, "the default where no expert has calibration"


def at_once(method: str, options: Mapping[str, object]) -> str:
    """How much of a model a method has to see to merge one tensor exactly as it would merge it
    beside all others: ``TENSORS``, ``SHAPES`` or ``MODEL``."""
    if method in CALIBRATED or method in ONE_STREAM:
        return MODEL
    if method == "wudi":  # descends on all matrices of one shape together
        return SHAPES
    if method == "ties":
        if "semantics" not in options:  # the authors' then: one threshold for all
            return MODEL
        from ..sparse import TIES

        per_tensor = [name for name, rule in TIES.items() if not rule.whole_model]
        return TENSORS if options["semantics"] in per_tensor else MODEL
    return TENSORS


def groups_of(base: Checkpoint, method: str, options: Mapping[str, object]) -> list[list[str]]:
    """Names of the tensors that are merged in one call, for all calls.

    Every tensor gets what the method would give it in one call for the whole model.
    """
    extent, names = at_once(method, options), list(base.entries)
    if extent == MODEL:
        return [names]
    if extent == TENSORS:
        return [[name] for name in names]
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, entry in base.entries.items():
        groups.setdefault(entry.shape, []).append(name)
    return list(groups.values())
