"""What processes that share a pass must have in common, so that their sums are about one thing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..calibration import Batch
from ..errors import MergeError
from ..experts import State
from .recipes import Recipe
from .survey import Survey


def digest(entries: Mapping) -> str:
    """Hexadecimal digits that are equal for equal names and values, among them tensors (…)."""
    hashed = hashlib.sha256()
    for name, value in entries.items():
        if isinstance(value, Tensor):
            hashed.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            plain = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            hashed.update(plain.numpy().data)
        else:
            hashed.update(f"{name} {value!r}".encode())
    return hashed.hexdigest()


def digests(
    base: State,
    experts: Mapping[str, State],
    batches: Sequence[Batch],
    known: Survey,
    recipes: Mapping[str, Recipe],
    options: Mapping[str, object],
) -> dict[str, str]:
    """Digests of what a process is given for a pass, and of the layers that its survey shows, by
    what they are of.

    Args:
        batches: all of the calibration.
        recipes: by the names of their merges. Of a solver the class alone counts, as its solutions
            are taken from one process.
        options: of the whole pass.
    """
    given = {"experts": digest(dict.fromkeys(experts)), "base": digest(base)}
    given |= {f"expert {task!r}": digest(state) for task, state in experts.items()}
    for task in experts:
        own = {b.number: digest(b.arguments) for b in batches if b.task == task}
        given[f"calibration of {task!r}"] = digest(own)
    layers = known.sequence, known.stages, sorted(known.left_out.items())
    given["layers"] = digest({"layers": layers})
    for name, recipe in recipes.items():
        anchor = None if recipe.anchor is None else digest(recipe.anchor)
        readable = {"anchor": anchor, "solver": type(recipe.solver).__name__}
        given[f"options of {name!r}"] = digest({**vars(recipe), **readable, **options})
    return given


def refuse_differences(told: Sequence[Mapping[str, str]]) -> None:
    """MergeError naming the first thing that is not the same in all processes.

    Args:
        told: of every process, name of a thing -> its digest.
    """
    for name, first in told[0].items():
        for number, of_one in enumerate(told):
            if of_one.get(name) != first:
                raise MergeError(
                    f"group: expected the same {name} in all processes, found others in process "
                    f"{number} than in process 0; give all of it to each, as to one: every process "
                    "takes its own share of the batches"
                )
