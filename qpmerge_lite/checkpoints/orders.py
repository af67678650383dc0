"""What is to be merged, how, and where to; and whether that fits together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .calibration.sources import SAMPLES
from .compatibility import refuse_errors
from .findings import Refused
from .heads.telling import AUTO, MERGED, OPTION, WISHES
from .hub import is_away, local
from .methods import CALIBRATED, FROM_MOMENTS, SETTLED, WEIGHTS_ONLY
from .outlines import check_places
from .recipes.reading import Recipe


@dataclass
class Order:
    """What is to be merged, how, and where to.

    Attributes:
        base: folder of the model that the experts were tuned from, or its reference at the Hub.
        experts: name -> folder, or reference, or ``delta:FILE``.
        out: the folder to be made.
        method: a name, None for the default.
        calibration: expert's name -> file, folder, or address at the Hub, see ``sources``.
        columns: expert's name -> fields to read, where they are not called as is usual.
        moments: expert's name -> files of moments, in place of calibration; several are added.
        options: of the method.
        samples: calibration inputs of an expert at the most.
        max_length: tokens of a calibration text at the most.
        batch_size: inputs of a forward.
        recipe: in place of a method and its options, and where base and experts are from.
        random_seed: of a recipe's random methods.
        heads: whether experts' heads are their own, see ``heads.telling.split``.
        memory: bytes that the process may take; the merge is the same for any.
    """

    base: Path
    experts: dict[str, Path]
    out: Path
    method: str | None = None
    calibration: dict[str, str | Path] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    moments: dict[str, list[Path]] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)
    samples: int = SAMPLES
    max_length: int = 128
    batch_size: int = 8
    recipe: Recipe | None = None
    random_seed: int = 0
    heads: str = AUTO
    memory: int | None = None


def ordered(recipe: Recipe, out: Path, random_seed: int = 0, memory: int | None = None) -> Order:
    """The order that a recipe is, which merges heads like everything else."""
    base = recipe.sources[recipe.base].folder
    asked = {"recipe": recipe, "random_seed": random_seed, "memory": memory}
    return Order(base, recipe.experts, out, heads=MERGED, **asked)


def check_calibration(order: Order, method: str) -> None:
    """Refused unless there is calibration for every expert where the method needs it, and none
    where it does not."""
    check_names("--calibration", order.calibration, order.experts)
    check_names("--column", order.columns, order.experts)
    if method in CALIBRATED:
        expected = f"a file for every expert, for {method}"
        told = "or choose a method that needs none"
        check_all_named("--calibration", order.calibration, order.experts, expected, told)
    if method in WEIGHTS_ONLY and order.calibration:
        cure = f"leave it out, or choose one of {', '.join(CALIBRATED)}"
        raise Refused("--calibration", f"none, as {method} looks at weights only", "some", cure)
    check_sizes(order, "samples", "max_length", "batch_size")


def check_moments(order: Order, method: str) -> None:
    """Refused unless there are moments for every expert, nothing beside them, and a method that
    needs no more."""
    if order.calibration:
        cure = "leave one of them out: moments stand in for the data"
        raise Refused("--moments", "no --calibration beside them", "both", cure)
    check_names("--moments", order.moments, order.experts)
    told = "which qpmerge moments writes"
    check_all_named("--moments", order.moments, order.experts, "a file for every expert", told)
    if method not in FROM_MOMENTS:
        expected = f"one of {', '.join(FROM_MOMENTS)}, which moments are enough for"
        cure = "choose one of them, or leave --moments out"
        raise Refused("--method", expected, repr(method), cure)
    for name in order.options:
        if name in SETTLED:
            expected = f"none of {', '.join(SETTLED)}, which moments have settled"
            cure = "leave it out: inputs are the experts' own"
            raise Refused("--option", expected, repr(name), cure)


def check_names(option: str, names: Iterable[str], experts: Mapping[str, Path]) -> None:
    """Refused for a name that no expert has."""
    for name in names:
        if name not in experts:
            known = ", ".join(experts)
            cure = "name an expert as it is called, NAME=FILE"
            raise Refused(option, f"one of the experts ({known})", repr(name), cure)


def check_all_named(
    option: str, given: Collection[str], experts: Iterable[str], expected: str, told: str
) -> None:
    """Refused for an expert that an option says nothing of; ``told`` ends the cure."""
    missing = [name for name in experts if name not in given]
    if missing:
        lacking = f"none for {', '.join(map(repr, missing))}"
        raise Refused(option, expected, lacking, f"add {option} {missing[0]}=FILE, {told}")


def check_heads(wish: str) -> None:
    """Refused for an unknown word about heads."""
    if wish not in WISHES:
        raise Refused(OPTION, f"one of {', '.join(WISHES)}", repr(wish), "choose one of them")


def check_sizes(order, *fields: str) -> None:
    """Refused where one of these fields of an order is below one."""
    for name in fields:
        value = getattr(order, name)
        if value < 1:
            option = f"--{name.replace('_', '-')}"
            raise Refused(option, "a whole number from 1 on", f"{value}", "give one")


def downloaded(order: Order, progress: bool = False) -> Order:
    """The order with folders in place of references to the Hub; nothing is downloaded but headers
    where these show that no merge is made."""
    base, experts = fetched(order.base, order.experts, order.heads, progress)
    return replace(order, base=base, experts=experts)


def fetched(
    base: Path, experts: Mapping[str, Path], heads: str = AUTO, progress: bool = False
) -> tuple[Path, dict[str, Path]]:
    """Base and experts with folders in place of references; nothing is downloaded but headers where
    these show what is wrong.

    Args:
        base, experts, heads: as of :func:`outlines.check_places`.
    """
    if not any(is_away(place) for place in (base, *experts.values())):
        return base, dict(experts)
    report, _ = check_places(base, experts, heads)
    refuse_errors(report)
    folders = {name: local(place, progress=progress) for name, place in experts.items()}
    return local(base, progress=progress), folders
