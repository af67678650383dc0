"""Layer solvers that are tried beside the programme of the merge that is chosen without labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ....choice.automatic import PRIOR, RIDGE
from ....cholesky import solve_definite
from ....diagnostic import RIDGES, choose
from ....moments import Moments
from ....solvers import QP
from ...suites import Suite
from ...suites.training import seeded
from .factors import SOLVER

PRIORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # times Σ_k Δ_k


def programme(**changes) -> QP:
    """The programme of the choice without labels, as a solver, with some of its fields changed."""
    return QP(**SOLVER | changes)


@dataclass(frozen=True)
class FittedPrior:
    """The programme with the scale of its prior chosen for every layer by cross-fitted captured
    energy, together with the ridge.

    Attributes:
        basis: a family.
        ridges: to choose from.
    """

    basis: str = "elements"
    ridges: tuple[float, ...] = RIDGES

    @property
    def full_energy(self) -> bool:
        """Whether the moments must hold all of M."""
        return self.basis == "rotated_rows"

    def __call__(self, moments: Moments, updates: Tensor) -> tuple[Tensor, dict]:
        """Update (g, m, n) of one layer, for updates (K, g, m, n), and its table row."""
        options = {"priors": PRIORS, "prior": 1.0, "penalty": "diagonal"}
        place, _ = choose(moments, updates, self.basis, self.ridges, **options)
        scale, ridge = PRIORS[int(place[0])], self.ridges[int(place[1])]
        update, row = programme(basis=self.basis, ridge=ridge, prior=scale)(moments, updates)
        return update, row | {"prior": scale}


@dataclass(frozen=True)
class ByKind:
    """Another prior for some layers.

    Attributes:
        words: of which one is in the name of each layer that has ``prior``.
        prior: in units of ``Σ_k Δ_k``; all other layers have the programme's.
    """

    words: tuple[str, ...]
    prior: float
    full_energy = False

    def __call__(self, moments: Moments, updates: Tensor) -> tuple[Tensor, dict]:
        """Update (g, m, n) of one layer, for updates (K, g, m, n), and its table row."""
        differs = any(word in moments.layer for word in self.words)
        prior = self.prior if differs else PRIOR
        return programme(prior=prior)(moments, updates)


@dataclass(frozen=True)
class BySensitivity:
    """The programme over single entries, with the residual of every output weighted by what it does
    to the predictions of its own task.

    Attributes:
        slopes: layer -> weights (T, m), as of :func:`sensitivities`. Layers without any, and those
            of several copies, are solved as ever.
    """

    slopes: Mapping[str, Tensor]
    full_energy = False

    def __call__(self, moments: Moments, updates: Tensor) -> tuple[Tensor, dict]:
        """Update (g, m, n) of one layer, for updates (K, g, m, n), and its table row."""
        update, row = programme()(moments, updates)
        if moments.layer not in self.slopes:
            return update, row
        weights = self.slopes[moments.layer] / moments.count[:, :1]
        C, A = moments.C[:, 0, 0], moments.A[:, 0, 0]
        H = torch.einsum("tr,tij->rij", weights, C)  # one matrix for every output
        target = torch.einsum("tr,trj->rj", weights, A)
        prior = PRIOR * updates.to(C).sum(0)[0]
        pull = target - (prior.unsqueeze(1) @ H).squeeze(1)
        penalty = RIDGE * H.diagonal(dim1=1, dim2=2)
        penalty = penalty + (penalty == 0).to(C)  # an input that is never on has none
        step = solve_definite(H + torch.diag_embed(penalty), pull.unsqueeze(1))
        return (prior + step.squeeze(1)).unsqueeze(0), row


def sensitivities(suite: Suite, inputs: Mapping[str, list[dict]]) -> dict[str, Tensor]:
    """Expected squared slope of the log-probability of a class, drawn from an expert's own
    prediction, along every output of its dense layers: the diagonal of the Fisher information of a
    layer's output, averaged over tokens.

    Args:
        inputs: task -> calibration batches, whose labels are not needed.
    Returns: layer -> (T, m) float64.
    """
    model = deepcopy(suite.base).requires_grad_(True)
    dense = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    outputs: dict[str, Tensor] = {}
    for name, part in dense.items():
        part.register_forward_hook(partial(_keep, outputs, name))
    slopes: dict[str, list[Tensor]] = defaultdict(list)
    for task, head in suite.classifiers().items():
        model.load_state_dict(suite.experts[task])
        sums = {name: torch.zeros(part.out_features).double() for name, part in dense.items()}
        tokens = dict.fromkeys(dense, 0)
        generator = seeded(suite.seed, task, "sensitivities")
        for batch in inputs[task]:
            logs = head(model(**batch)).log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            logs.gather(1, drawn).sum().backward()
            for name, output in outputs.items():
                squares = output.grad.double().square().flatten(0, -2)
                sums[name] += squares.sum(0)
                tokens[name] += len(squares)
        for name, total in sums.items():
            slopes[name].append(total / tokens[name])
    return {name: torch.stack(by_task) for name, by_task in slopes.items()}


def _keep(outputs: dict[str, Tensor], name: str, part: nn.Module, args, output: Tensor) -> None:
    output.retain_grad()
    outputs[name] = output


def evened(slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights (T, m) of every layer whose mean over outputs is the same for all tasks, one."""
    return {name: weights / weights.mean(1, keepdim=True) for name, weights in slopes.items()}
