r"""Methods that differentiate through the model and the tasks' heads, on unlabelled inputs.

``heads`` maps every task to a function from what the model returns to logits (N, classes), for
example an ``nn.Linear``, or ``lambda output: output.logits[:, -1]``. Calibration batches are run
one by one, as they are: none is padded to the length of another.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .calibration import Batch
from .errors import MergeError
from .forwards import evaluating
from .heads import Heads, inputs_of, logits_of, outputs_of, spread_over_ties, trained
from .inputs import draw, joined, take
from .merge import Merge, add_update, check_experts, differences, tied
from .options import MAX_SINGLE, flag, number, seeded, whole

# ----------------------------------------------------------------------------------- Fisher


def _fisher(base, state, batches: list[Batch], heads: Heads, generator) -> dict[str, Tensor]:
    """Mean over inputs of the squared gradient of ``log p(y|x)``, one y drawn per input; float64.

    y is drawn from the prediction.
    """
    weights, squares = {}, {}
    for name in trained(base):
        value = state[name]
        weights[name] = value.clone().requires_grad_(True)
        squares[name] = torch.zeros(value.shape, dtype=torch.float64, device=value.device)
    everything = spread_over_ties(base, state, weights)
    count = sum(batch.size for batch in batches)
    for batch in batches:
        for i in range(batch.size):
            one = take(batch, torch.tensor([i]))
            logits = logits_of(heads, one, outputs_of(base, everything, one))
            prediction = logits.detach().softmax(-1).cpu()
            drawn = torch.multinomial(prediction, 1, generator=generator).to(logits.device)
            score = logits.log_softmax(-1).gather(1, drawn).sum()
            gradients = torch.autograd.grad(score, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients):
                if gradient is not None:
                    size = (gradient.abs() if gradient.is_complex() else gradient).double()
                    squares[name].addcmul_(size, size, value=1 / count)
    return squares


@torch.enable_grad()
def information(
    base: nn.Module, experts, calibration, *, heads: Heads, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Diagonal of every expert's Fisher information on its own inputs, float64 by parameter.

    Estimated from one label per input, drawn from the expert's prediction. Tied parameters are
    there once, under the first of their names.

    Args:
        experts: task -> state dict, in any precision; they run in the base's.
        calibration: task -> batches of keyword arguments of ``base.forward``.
        heads: task -> function from what the model returns to logits (N, classes).
        seed: of the drawn labels.
    Raises: MergeError naming task, batch and key for batches that are none; NonFinite for logits
        that are not finite. Cost: one gradient per input.
    """
    experts = check_experts(base, experts, cast=True)
    batches = inputs_of(base, experts, calibration, heads)
    generator = seeded(seed)
    with evaluating(base):
        return [_fisher(base, state, batches[t], heads, generator) for t, state in experts.items()]


def fisher_weights(
    base: nn.Module,
    experts,
    calibration,
    *,
    normalise: bool = False,
    floor: float = 1e-6,
    known: list[dict[str, Tensor]] | None = None,
    **options,
) -> dict[str, Tensor]:
    """Fisher weights ``F_k`` by parameter: (K, …), float64, the floor included.

    Args:
        normalise: divide every F_k by its norm over the whole model.
        floor: added to every F_k and to its norm.
        known: what :func:`information` returned, to save its gradients.
        options: of :func:`information`, where ``known`` is None.
    """
    floor, normalise = number("floor", floor, low=0), flag("normalise", normalise)
    if known is None:
        diagonals = information(base, experts, calibration, **options)
    else:
        diagonals = _checked(base, known, len(experts))
    norms = [_norm(F) + floor if normalise else 1.0 for F in diagonals]
    weights = {}
    for name in diagonals[0]:
        weights[name] = torch.stack([(F[name] + floor) / n for F, n in zip(diagonals, norms)])
    return weights


def _norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm () of tensors of any shapes together."""
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm()


def _checked(base: nn.Module, known, count: int) -> list[dict[str, Tensor]]:
    """What :func:`information` returned, or a MergeError for anything else."""
    state = base.state_dict()
    shapes = {name: state[name].shape for name in trained(base)}
    fits = isinstance(known, list) and len(known) == count
    for F in known if fits else ():
        fits = fits and isinstance(F, Mapping) and F.keys() == shapes.keys()
        fits = fits and all(isinstance(value, Tensor) for value in F.values())
        fits = fits and all(F[name].shape == shape for name, shape in shapes.items())
    if not fits:
        raise MergeError(
            f"known: expected a list of {count} mappings of the base's parameters, found "
            f"{type(known).__name__}; pass what information() returned for these experts"
        )
    return known


def fisher(
    base: nn.Module,
    experts,
    calibration,
    *,
    heads: Heads | None = None,
    normalise: bool = False,
    floor: float = 1e-6,
    seed: int = 0,
    known: list[dict[str, Tensor]] | None = None,
) -> Merge:
    r"""Fisher averaging (arXiv:2111.09832): ``Σ_k F_k θ_k / Σ_k F_k``, entry by entry.

    ``F_k`` is the diagonal of expert k's Fisher information on its own inputs, estimated from one
    drawn label per input.

    Args:
        heads: task -> function from what the model returns to logits (N, classes); only with
            ``known`` can they be left out.
        normalise: divide every F_k by its norm over the whole model, as MergeLM does; False by
            default.
        floor: added to every F_k and to its norm, 1e-6; where gradients vanish it decides.
        seed: of the drawn labels.
        known: what :func:`information` returned for these heads and this seed, to try several
            options on the same gradients.
    Raises: MergeError as :func:`information` does. Cost: one gradient per input.
    """
    experts = check_experts(base, experts)
    F = fisher_weights(
        base,
        experts,
        calibration,
        normalise=normalise,
        floor=floor,
        known=known,
        heads=heads,
        seed=seed,
    )
    vectors = differences(base, experts)
    update = {name: (f * vectors[name]).sum(0) / f.sum(0) for name, f in F.items()}
    return add_update(base, experts, update)


# ------------------------------------------------------------------------------- AdaMerging


def _entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions (N, classes)."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


class _Losses:
    """Mean entropy of drawn inputs per task, summed over tasks.

    Tasks whose inputs have one shape go through the model together, where it returns a tensor.
    """

    def __init__(self, base: nn.Module, heads: Heads):
        self.base, self.heads, self.together = base, heads, True

    def __call__(self, state: dict, drawn: dict[str, list[Batch]]) -> Tensor:
        outputs = self._outputs_together(state, drawn)
        entropies = []
        for task, batches in drawn.items():
            if outputs is not None:
                entropies.append(_entropy(logits_of(self.heads, batches[0], outputs[task])))
            else:
                entropies.append(self._one_task(state, batches))
        return torch.stack(entropies).sum()

    def _outputs_together(self, state: dict, drawn: dict[str, list[Batch]]):
        """Task -> output, or None where tasks have to run one by one."""
        if not self.together or any(len(batches) > 1 for batches in drawn.values()):
            return None
        everyone = joined([batches[0] for batches in drawn.values()])
        if everyone is None:
            return None
        output = outputs_of(self.base, state, everyone)
        if not isinstance(output, Tensor) or output.shape[:1] != (everyone.size,):
            self.together = False
            return None
        sizes = [batches[0].size for batches in drawn.values()]
        return dict(zip(drawn, output.split(sizes)))

    def _one_task(self, state: dict, batches: list[Batch]) -> Tensor:
        """Mean entropy () of a task's inputs, batch by batch."""
        parts = []
        for batch in batches:
            output = outputs_of(self.base, state, batch)
            parts.append(_entropy(logits_of(self.heads, batch, output)))
        if len(parts) == 1:
            return parts[0]
        sizes = torch.tensor([batch.size for batch in batches]).to(parts[0])
        return (sizes * torch.stack(parts)).sum() / sizes.sum()


@torch.enable_grad()
def adamerging(
    base: nn.Module,
    experts,
    calibration,
    *,
    heads: Heads,
    scale: float = 0.3,
    steps: int = 50,
    rate: float = 2e-2,
    batch: int = 16,
    seed: int = 0,
) -> Merge:
    r"""Layer-wise AdaMerging (arXiv:2310.02575): ``θ_0 + Σ_k λ_k τ_k``, one λ per parameter.

    One λ per expert and parameter tensor, all starting at ``scale``. Adam lowers the mean entropy
    of the predictions on unlabelled inputs, here of the calibration set; the authors adapt on the
    test images. They take 1000 steps at rate 1e-3; the defaults move as far in fewer. Floating
    buffers are averaged and take no part.

    Args:
        heads: task -> function from what the model returns to logits (N, classes).
        batch: inputs per task and step, drawn with replacement; those of one calibration batch
            run together.
        seed: of the drawn inputs.
    Returns: a Merge whose table holds the coefficients of every parameter that differs.
    Raises: MergeError naming task, batch and key for batches that are none; NonFinite for logits
        that are not finite.
    """
    scale = number("scale", scale, -MAX_SINGLE, MAX_SINGLE)
    rate = number("rate", rate, 0, MAX_SINGLE)
    steps, batch = whole("steps", steps), whole("batch", batch, low=1)
    generator = seeded(seed)
    experts = check_experts(base, experts)
    batches = inputs_of(base, experts, calibration, heads)
    pools = {task: _pool(of_task) for task, of_task in batches.items()}
    vectors, ties = differences(base, experts), tied(base)
    vectors = {name: v for name, v in vectors.items() if ties[name][0] == name and v.any()}
    lambdas = {}
    for name, v in vectors.items():
        start = torch.full((len(experts),), scale, device=v.device)
        lambdas[name] = start.requires_grad_(True)
    if lambdas:
        origin = add_update(base, experts, {}).state_dict
        losses = _Losses(base, heads)
        moved = {name: v.to(origin[name]) for name, v in vectors.items()}
        adam = torch.optim.Adam(lambdas.values(), lr=rate)
        with evaluating(base):
            for _ in range(steps):
                drawn = {task: draw(pool, batch, generator) for task, pool in pools.items()}
                losses(_moved(base, origin, moved, lambdas), drawn).backward()
                adam.step()
                adam.zero_grad()
    return _with_coefficients(base, experts, vectors, lambdas)


def _moved(base, origin, moved, lambdas) -> dict[str, Tensor]:
    """The state that the coefficients make, differentiable in them."""
    merged = {}
    for name, v in moved.items():
        merged[name] = origin[name] + torch.tensordot(lambdas[name].to(v), v, 1)
    return spread_over_ties(base, origin, merged)


def _pool(batches: list[Batch]) -> list[Batch]:
    """A task's batches to draw from: in one where they can be joined as they are."""
    whole = joined(batches)
    return batches if whole is None else [whole]


def _with_coefficients(base, experts, vectors, lambdas) -> Merge:
    """The merge by the found coefficients, which its table lists."""
    update = {}
    for name, v in lambdas.items():
        update[name] = torch.tensordot(v.detach().to(vectors[name]), vectors[name], 1)
    merge = add_update(base, experts, update)
    merge.table.extend({"layer": name, "lambda": v.tolist()} for name, v in lambdas.items())
    return merge
