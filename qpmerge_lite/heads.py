"""The model and the tasks' heads, run and differentiated under other weights than its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .calibration import Batch, check_calibration
from .engine.effects import refused
from .errors import MergeError, NonFinite, is_finite
from .forwards import refuse_what_cannot_run
from .inputs import refuse_lost_entries
from .merge import parameters_of, tied

Heads = Mapping[str, Callable[..., Tensor]]


def inputs_of(base: nn.Module, experts, calibration, heads: Heads) -> dict[str, list[Batch]]:
    """Calibration batches of every expert's task, on the device of the base."""
    refuse_what_cannot_run(base)
    if not isinstance(heads, Mapping):
        kind = type(heads).__name__
        raise MergeError(f"heads: expected a mapping of tasks to functions, found {kind}")
    for task in experts:
        if not callable(heads.get(task)):
            raise MergeError(
                f"heads: expected one for every expert, found none for {task!r}; pass "
                "heads={task: function to logits}"
            )
    batches = check_calibration(calibration, experts, next(base.parameters()).device)
    for of_task in batches.values():
        refuse_lost_entries(of_task)
    return batches


def logits_of(heads: Heads, batch: Batch, output) -> Tensor:
    """What the task's head makes of the model's output: logits (N, classes).

    Raises: MergeError naming task and batch for heads that fail or return anything else; NonFinite
        for logits that are not finite.
    """
    where = f"task {batch.task!r}, batch {batch.number}"
    try:
        logits = heads[batch.task](output)
    except Exception as error:
        raise MergeError(
            f"{where}: the head does not take what the model returns, {_shape(output)}; heads are "
            f"functions of it ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise MergeError(
            f"{where}: expected the head to return logits (N, classes), found {_shape(logits)}"
        )
    if not logits.is_floating_point() or logits.shape[-1] == 0:
        raise MergeError(
            f"{where}: expected the head to return floating logits (N, classes), found "
            f"{_shape(logits)} of {logits.dtype}"
        )
    if torch.is_grad_enabled() and not logits.requires_grad:
        raise MergeError(
            f"{where}: expected logits that can be differentiated, found a head that detaches "
            "them; let neither the model nor its head run under no_grad or call detach"
        )
    if not is_finite(logits):
        raise NonFinite(f"{where}: logits", logits, "look for overflow in the model or its head")
    return logits


def _shape(output) -> str:
    """The type of what a model or head returned, and the shape of a tensor, for messages."""
    shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
    return f"{type(output).__name__}{shape}"


def spread_over_ties(
    base: nn.Module, state: Mapping[str, Tensor], chosen: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A state, name -> (…), in which ``chosen`` parameters stand under all the names that they are
    tied to."""
    everything = dict(state)
    ties = tied(base)
    for name, value in chosen.items():
        everything |= dict.fromkeys(ties[name], value)
    return everything


def _places(base: nn.Module) -> list[str]:
    """A name for every place of a parameter or buffer, one of them where a module has several.

    Swapping a tensor in under two names of one place would leave it there afterwards.
    """
    names = []
    for path, module in base.named_modules():
        for key in (*module._parameters, *module._buffers):
            names.append(f"{path}.{key}" if path else key)
    return names


def outputs_of(base: nn.Module, state: dict, batch: Batch):
    """The output of the base under another state, every tied name of which is given."""
    state = {name: state[name] for name in _places(base) if name in state}
    try:
        return functional_call(base, state, (), batch.arguments, tie_weights=False)
    except Exception as error:
        raise refused(batch, error) from error


def trained(base: nn.Module) -> list[str]:
    """Names of the parameters, tied ones under the first of their names only."""
    known = parameters_of(base)
    return [name for name, _ in base.named_parameters() if name in known]
