r"""Methods that differentiate through the model and the tasks' heads, on unlabelled calibration inputs.

``heads`` maps every task to a function from what the model returns to logits (N, classes), for example an ``nn.Linear``.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from .datafree import add_update, task_vectors
from .errors import EmptyCalibration, MergeError
from .sequential import Merge, check_experts, evaluating

Heads = Mapping[str, Callable[[Tensor], Tensor]]


def _inputs(experts, calibration, heads: Heads, device) -> dict[str, dict[str, Tensor]]:
    """Calibration inputs of every task in one batch."""
    for task in experts:
        if task not in heads:
            raise MergeError(f"heads: expected one for every expert, found none for {task!r}; pass heads={{task: function to logits}}")
        if not calibration or not calibration.get(task):
            raise EmptyCalibration(f"no calibration batches for {task!r}; give every expert at least one batch of unlabelled inputs")
    return {t: {k: _joined([b[k] for b in calibration[t]]).to(device) for k in calibration[t][0]} for t in experts}


def _joined(parts: list[Tensor]) -> Tensor:
    """Batches end to end; sequences (B, L) that were padded to several lengths are padded with zeros, as their masks are, to the longest."""
    widest = max(p.shape[1] if p.dim() == 2 else 0 for p in parts)
    return torch.cat([pad(p, (0, widest - p.shape[1])) if p.dim() == 2 else p for p in parts])


def _fisher(base, state, names, inputs, head, generator) -> dict[str, Tensor]:
    """Mean over inputs of the squared gradient of ``log p(y|x)``, one y drawn per input from the prediction; float64."""
    trained = {k: state[k].clone().requires_grad_(True) for k in names}
    squares, count = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in trained.items()}, len(next(iter(inputs.values())))
    for i in range(count):
        logits = head(functional_call(base, {**state, **trained}, (), {k: v[i : i + 1] for k, v in inputs.items()}))
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).to(logits.device)
        gradients = torch.autograd.grad(logits.log_softmax(-1).gather(1, drawn).sum(), list(trained.values()), allow_unused=True)
        for k, g in zip(names, gradients):
            if g is not None:
                g = g.double()
                squares[k].addcmul_(g, g, value=1 / count)
    return squares


def information(base: nn.Module, experts, calibration, *, heads: Heads, seed: int = 0) -> list[dict[str, Tensor]]:
    """Every expert's diagonal of the Fisher information, float64 by parameter: see :func:`fisher`. Cost: one gradient per input."""
    experts = check_experts(base, experts)
    inputs = _inputs(experts, calibration, heads, next(base.parameters()).device)
    generator, names = torch.Generator().manual_seed(seed), [k for k, _ in base.named_parameters()]
    with evaluating(base):
        return [_fisher(base, state, names, inputs[t], heads[t], generator) for t, state in experts.items()]


def fisher_weights(base: nn.Module, experts, calibration, *, normalise: bool = False, floor: float = 1e-6, known=None, **options) -> dict[str, Tensor]:
    """``F_k``, (K, …) float64 by parameter: see :func:`fisher`."""
    weights = information(base, experts, calibration, **options) if known is None else known
    norms = [torch.stack([s.norm() for s in w.values()]).norm() + floor if normalise else 1.0 for w in weights]
    return {k: torch.stack([(w[k] + floor) / norm for w, norm in zip(weights, norms)]) for k in weights[0]}


def fisher(base: nn.Module, experts, calibration, **options) -> Merge:
    r"""Fisher averaging (arXiv:2111.09832): ``Σ_k F_k θ_k / Σ_k F_k``, entry by entry.

    ``F_k`` is the diagonal of expert k's Fisher information on its own inputs, estimated from one drawn label per input.

    Args:
        heads: see above.
        normalise: divide every F_k by its norm over the whole model, as MergeLM does; False by default.
        floor: added to every F_k and to its norm, 1e-6; where gradients vanish it decides. seed: of the drawn labels.
        known: what :func:`information` returned for these heads and this seed, to try several options on the same gradients.
    Cost: one gradient per input.
    """
    F = fisher_weights(base, experts, calibration, **options)
    return add_update(base, {k: (F[k] * v).sum(0) / F[k].sum(0) if k in F else v.mean(0) for k, v in task_vectors(base, experts).items()})


def _rows(inputs: dict[str, Tensor], count: int, generator) -> dict[str, Tensor]:
    """``count`` inputs drawn with replacement."""
    rows = torch.randint(len(next(iter(inputs.values()))), (count,), generator=generator)
    return {k: v[rows.to(v.device)] for k, v in inputs.items()}


def _entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions (N, classes)."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def adamerging(base: nn.Module, experts, calibration, *, heads: Heads, scale: float = 0.3, steps: int = 50, rate: float = 2e-2,
               batch: int = 16, seed: int = 0) -> Merge:
    r"""Layer-wise AdaMerging (arXiv:2310.02575): ``θ_0 + Σ_k λ_k τ_k`` with one λ per expert and parameter tensor, all starting at ``scale``.

    Adam lowers the mean entropy of the predictions on unlabelled inputs, here of the calibration set; the authors adapt on the test
    images. They take 1000 steps at rate 1e-3; the defaults move as far in fewer.

    Args:
        batch: inputs per task and step, drawn with replacement.
    """
    experts = check_experts(base, experts)
    inputs = _inputs(experts, calibration, heads, next(base.parameters()).device)
    generator = torch.Generator().manual_seed(seed)
    vectors = task_vectors(base, experts)
    origin = base.state_dict()
    moved = {k: v.to(origin[k]) for k, v in vectors.items() if v.any()}
    lambdas = {k: torch.full((len(experts),), scale, device=v.device).requires_grad_(True) for k, v in moved.items()}
    adam = torch.optim.Adam(lambdas.values(), lr=rate)
    with evaluating(base):
        for _ in range(steps):
            state = origin | {k: origin[k] + torch.tensordot(lambdas[k].to(v), v, 1) for k, v in moved.items()}
            drawn = {t: _rows(z, batch, generator) for t, z in inputs.items()}
            alike = len({tuple(v.shape[1:] for v in z.values()) for z in drawn.values()}) == 1
            groups = [list(drawn)] if alike else [[t] for t in drawn]
            loss = 0.0
            for group in groups:
                found = functional_call(base, state, (), {k: torch.cat([drawn[t][k] for t in group]) for k in drawn[group[0]]})
                loss += sum(_entropy(heads[t](z)) for t, z in zip(group, found.split(batch)))
            loss.backward()
            adam.step()
            adam.zero_grad()
    update = {k: torch.tensordot(lambdas[k].detach().double(), vectors[k], 1) if k in moved else v.sum(0) for k, v in vectors.items()}
    merge = add_update(base, update)
    merge.table.extend({"layer": k, "lambda": v.detach().tolist()} for k, v in lambdas.items())
    return merge
