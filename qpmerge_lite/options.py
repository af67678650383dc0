"""Checks of what methods are given besides models and inputs; every refusal names the option."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from .errors import MergeError, NonFinite

MAX_SINGLE = 1e30  # of numbers that float32 has to hold, with room for what is done to them


def number(name: str, value, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a float, or a MergeError unless it is a real number of Python or NumPy.

    Args:
        low, high: between which it must lie; both count.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        cure = "; pass value.item()" if isinstance(value, Tensor) else ""
        raise MergeError(f"{name}: expected a number, found {type(value).__name__} {value!r}{cure}")
    try:
        as_float = float(value)
    except OverflowError:
        as_float = math.inf
    if not math.isfinite(as_float):
        raise MergeError(f"{name}: expected a finite number, found {value}")
    if not low <= as_float <= high:
        bounds = f"in [{low:g}, {high:g}]" if high < math.inf else f"≥ {low:g}"
        raise MergeError(f"{name}: expected a number {bounds}, found {value}")
    return as_float


def flag(name: str, value) -> bool:
    """``value``, or a MergeError unless it is True or False."""
    if not isinstance(value, bool):
        raise MergeError(f"{name}: expected True or False, found {type(value).__name__} {value!r}")
    return value


def whole(name: str, value, low: int = 0) -> int:
    """``value`` as an int, or a MergeError unless it is a whole number from ``low`` on."""
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    if not fits or not low <= value < 2**63:
        given = f"{type(value).__name__} {value!r}"
        raise MergeError(f"{name}: expected a whole number ≥ {low}, found {given}")
    return int(value)


def seeded(seed) -> torch.Generator:
    """A generator of random numbers, or a MergeError for what is no seed."""
    return torch.Generator().manual_seed(whole("seed", seed, -(2**63)))


def function(name: str, value) -> None:
    """MergeError unless ``value`` can be called."""
    if not callable(value):
        raise MergeError(f"{name}: expected a function, found {type(value).__name__} {value!r}")


def fraction(name: str, value, low: bool = False, high: bool = False) -> None:
    """MergeError unless ``value`` lies between 0 and 1, which count if ``low`` and ``high``."""
    number(name, value)
    if 0 < value < 1 or (low and value == 0) or (high and value == 1):
        return
    bounds = f"{'[' if low else '('}0, 1{']' if high else ')'}"
    raise MergeError(f"{name}: expected a fraction in {bounds}, found {value}")


def numbers(name: str, values, count: int) -> list[float]:
    """``values`` as a list of one number per expert, or a MergeError."""
    if isinstance(values, Mapping):
        cure = "pass a list, in the order of the experts"
    elif isinstance(values, str) or not isinstance(values, Sequence):
        cure = "pass a list, for example values.tolist()"
    else:
        checked = [number(name, value) for value in values]
        if len(checked) == count:
            return checked
        cure = "pass one per expert"
    raise MergeError(
        f"{name}: expected {count} numbers, found {type(values).__name__} {values!r}; {cure}"
    )


def words(name: str, values) -> list[str]:
    """One word or several as a list, or a MergeError."""
    if isinstance(values, str):
        return [values]
    several = isinstance(values, Iterable) and not isinstance(values, Tensor)
    given = list(values) if several else [values]
    if not all(isinstance(word, str) for word in given):
        kind = type(values).__name__
        raise MergeError(f"{name}: expected names (a list of strings), found {kind} {values!r}")
    return given


def one_of(name: str, value, known: Collection[str]) -> None:
    """MergeError unless ``value`` is one of the ``known`` words."""
    if not isinstance(value, str) or value not in known:
        raise MergeError(f"{name}: expected one of {', '.join(known)}, found {value!r}")


def score_of(where: str, score) -> float:
    """What a score function returned as a float: a number, or a tensor of one; NaN is refused.

    Raises: MergeError or NonFinite naming what was scored.
    """
    if isinstance(score, Tensor) and score.numel() == 1 and not score.is_complex():
        score = score.item()
    if not isinstance(score, Real):
        name = type(score).__name__
        raise MergeError(f"score of {where}: expected a number, found {name} {score!r}")
    value = float(score)
    if math.isnan(value):
        cure = "see what the score divides by, and whether the model's outputs are finite"
        raise NonFinite(f"score of {where}", torch.tensor(value), cure)
    return value


def refuse_complex(method: str, vectors: Mapping[str, Tensor]) -> None:
    """MergeError naming a complex parameter, for methods that need an order or signs.

    Args:
        vectors: parameter -> its task vectors (K, …).
    """
    for name, vector in vectors.items():
        if vector.is_complex():
            raise MergeError(
                f"{method}: parameter {name!r}: expected real weights, found complex ones, which "
                "have no signs and no order; use soup or task_arithmetic, or keep its real and "
                "imaginary parts as two parameters"
            )
