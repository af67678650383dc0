"""Heads fitted anew on the features of any encoder: what of a merge's loss lies in its features,
and what in heads that were made for other ones.

A fresh head is a multinomial logistic regression, as the probes of ``training`` are, but its ridge
pulls towards the head that the task keeps: fitted from nothing on so few examples, heads of all
encoders, the experts' too, would be worse than the kept ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear

from . import training
from .suite import Suite

# most examples of a task and split that are looked at; nearly all of a probe's time is features
ROWS = {"train": 320, "validation": 48, "test": 128}
RIDGES = (10.0, 1.0, 0.1)  # strongest first; the first hardly moves the kept head
ITERATIONS = 10  # of L-BFGS for a ridge, which goes on from the one before
CHUNK = 128


def refits(x: Tensor, y: Tensor, kept: dict[str, Tensor], ridges=RIDGES) -> list[dict]:
    """Linear heads on features, one by ridge: ``weight`` (classes, d) and ``bias`` (classes,) like
    those of the kept head.

    Args:
        x: features (N, d), of the type of the kept head.
        y: labels (N,).
        ridges: from strong to weak, times the squared distance to the kept weight.
    """
    change = {name: torch.zeros_like(value, requires_grad=True) for name, value in kept.items()}
    heads = []
    for ridge in ridges:
        _descend(x, y, kept, change, ridge)
        heads.append({name: value + change[name].detach() for name, value in kept.items()})
    return heads


def _descend(x: Tensor, y: Tensor, kept: dict, change: dict, ridge: float) -> None:
    """Bring the change of a head, in place, near the optimum for features (N, d) and labels
    (N,)."""
    solver = torch.optim.LBFGS(
        list(change.values()), max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        logits = linear(x, kept["weight"] + change["weight"], kept["bias"] + change["bias"])
        loss = cross_entropy(logits, y) + ridge * change["weight"].square().sum()
        loss.backward()
        return loss

    solver.step(closure)


def drawn(suite: Suite, task: str, split: str) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of the encoder (n, …) and labels (n,) of at most ``ROWS`` examples of a split,
    drawn with the suite's seed; the same for every encoder."""

    def draw():
        rows = suite.data[task][split]
        order = torch.randperm(len(rows), generator=training.seeded(suite.seed, task, split))
        chosen = order[: ROWS[split]].sort().values
        return training.tensors(rows, suite.collate, suite.device, chosen)

    return suite.cached(("probed", task, split), draw)


@torch.no_grad()
def _features(suite: Suite, state, task: str, split: str) -> tuple[Tensor, Tensor]:
    """Features (n, d), of the type of the task's head, and labels (n,) of the drawn examples under
    a state dict."""
    inputs, labels = drawn(suite, task, split)
    with training.autocast(suite.device, suite.precision):
        parts = [
            functional_call(suite.base, dict(state), (), training.trim(batch))
            for batch in training.batches(inputs, min(suite.chunk, CHUNK))
        ]
    return torch.cat(parts).to(suite.heads[task]["weight"]), labels


def _accuracies(suite: Suite, state, task: str, split: str, heads: list[dict]) -> list[float]:
    """Accuracy of every head on the drawn examples of a split under a state dict."""
    x, y = _features(suite, state, task, split)
    right = [linear(x, head["weight"], head["bias"]).argmax(1) == y for head in heads]
    return [float(of_head.double().mean()) for of_head in right]


def fresh_head(suite: Suite, states: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Test accuracy of encoders with the head that a task keeps and with one fitted on their own
    features.

    The fresh heads see training examples. Their ridge is one for all tasks: that of the highest
    mean accuracy on validation ones, the strongest where several have it.

    Args:
        states: task -> state dict of the encoder that serves it: the same for all tasks of a merge.
    Returns: task -> accuracy with the ``kept`` head and with the ``fresh`` one, in [0, 1], and the
        ``ridge`` chosen.
    """
    heads, validation = {}, []
    for task, state in states.items():
        x, y = _features(suite, state, task, "train")
        heads[task] = refits(x, y, suite.heads[task])
        validation.append(_accuracies(suite, state, task, "validation", heads[task]))
    means = torch.tensor(validation).mean(0)
    best = int((means == means.max()).nonzero()[0])
    by_task = {}
    for task, state in states.items():
        pair = [suite.heads[task], heads[task][best]]
        with_kept, with_fresh = _accuracies(suite, state, task, "test", pair)
        by_task[task] = {"kept": with_kept, "fresh": with_fresh, "ridge": RIDGES[best]}
    return by_task
