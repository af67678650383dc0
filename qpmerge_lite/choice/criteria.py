"""How far any weights are from the experts on unlabelled inputs, end to end and input by input."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..calibration import Batch
from ..engine.processes import processes_of
from ..errors import MergeError, NonFinite, is_finite
from ..experts import State
from ..forwards import evaluating, main_output
from ..heads import Heads, logits_of, outputs_of

DIVERGENCE, ENERGY = "captured divergence", "captured energy"


class Lead(NamedTuple):
    """By how much one model captures more than another, and the standard error of that, over the
    inputs that both were judged on."""

    difference: float
    error: float


class Criterion:
    r"""What models capture of the way from the base to the experts.

    With heads, ``1 - Σ_t KL(p_t ‖ p) / Σ_t KL(p_t ‖ p_base)`` of the predictions, KL the mean over
    the inputs of task t; without, ``1 - Σ_t ‖h - h_t‖² / Σ_t ‖h_base - h_t‖²`` of what the model
    returns, over positions that are no padding. One is an expert on every task, zero the base.

    Args:
        base: the model, in the mode and on the device it is in.
        experts: task -> state dict, as ``check_experts`` returns them.
        batches: task -> batches that no merge to be judged was solved on.
        heads: task -> function from what the model returns to logits (N, classes), or None.
        group: of ``torch.distributed``, whose processes share the batches; each is given all, and
            judges by all.
    Attributes:
        name: ``captured divergence`` or ``captured energy``.
    """

    @torch.no_grad()
    def __init__(
        self,
        base: nn.Module,
        experts: Mapping[str, State],
        batches: Mapping[str, list[Batch]],
        heads: Heads | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        self.name = ENERGY if heads is None else DIVERGENCE
        self._base, self._heads, self._batches = base, heads, batches
        self._processes = processes_of(group)
        every = [batch for of_task in batches.values() for batch in of_task]
        self._own = self._processes.own(every)
        self._expected: dict[tuple[str, int], Tensor] = {}
        self._processes.each(partial(self._expect, experts))
        self._of_base = self.errors(base.state_dict())
        self._total = sum(float(errors.mean()) for errors in self._of_base.values())

    @torch.no_grad()
    def _expect(self, experts: Mapping[str, State]) -> None:
        """Note what the experts put out on the batches of this process."""
        with evaluating(self._base):
            for batch in self._own:
                key = batch.task, batch.number
                self._expected[key] = self._output(experts[batch.task], batch)

    @torch.no_grad()
    def errors(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Task -> divergences or squared distances of its inputs (N,), float64.

        Args:
            state: weights of any model of the base's architecture, names as in its state dict.
        Raises: NonFinite naming task and batch for outputs that are not finite.
        """
        told = self._processes.each(partial(self._own_errors, state))
        every = {key: errors for of_one in told for key, errors in of_one.items()}
        divergences = {}
        for task, batches in self._batches.items():
            divergences[task] = torch.cat([every[task, batch.number] for batch in batches])
        return divergences

    def _own_errors(self, state: Mapping[str, Tensor]) -> dict[tuple[str, int], Tensor]:
        """Errors on the CPU of the inputs of every batch of this process, by task and number."""
        errors = {}
        with evaluating(self._base):
            for batch in self._own:
                errors[batch.task, batch.number] = self._errors(state, batch).cpu()
        return errors

    def captured(self, errors: Mapping[str, Tensor]) -> float:
        """The criterion of a model with these errors; 1 where base and experts agree and it does
        too."""
        total = sum(float(of_task.mean()) for of_task in errors.values())
        if self._total == 0:
            return 1.0 if total == 0 else -torch.inf
        return 1 - total / self._total

    def lead(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Lead:
        """By how much the first captures more, paired over inputs within each task.

        The base's part of the criterion is taken as it is. A task of one input adds no error.
        """
        if self._total == 0:
            return Lead(0.0, 0.0)
        variance = 0.0
        for task, errors in one.items():
            saved = other[task] - errors
            if len(saved) > 1:
                variance += float(saved.var()) / len(saved)
        difference = self.captured(one) - self.captured(other)
        return Lead(difference, variance**0.5 / self._total)

    def _output(self, state: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """What is compared: log-probabilities (B, classes), or outputs (B, …, d)."""
        output = outputs_of(self._base, dict(state), batch)
        if self._heads is not None:
            return logits_of(self._heads, batch, output).double().log_softmax(1)
        output = main_output(output)
        if not is_finite(output):
            where = f"task {batch.task!r}, batch {batch.number}: the model's output"
            raise NonFinite(where, output, "look for overflow in the model or damaged inputs")
        return output if len(output) == batch.size else output.unsqueeze(0)

    def _errors(self, state: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Divergences or squared distances of the inputs of a batch (B,)."""
        output, expected = self._output(state, batch), self._expected[batch.task, batch.number]
        if output.shape != expected.shape:
            raise MergeError(
                f"task {batch.task!r}, batch {batch.number}: expected the model to return shape "
                f"{tuple(expected.shape)} as the expert does, found {tuple(output.shape)}; make "
                "what it returns depend on its inputs alone"
            )
        if self._heads is not None:
            return (expected.exp() * (expected - output)).sum(1)
        squares = (output - expected).double().square()
        squares = squares.flatten(2).sum(2) if squares.dim() > 2 else squares
        masks = [mask for mask in batch.masks.values() if mask.shape == squares.shape]
        if output.dim() > 2 and masks:
            squares = squares * (masks[-1] != 0)
        return squares.flatten(1).sum(1)
