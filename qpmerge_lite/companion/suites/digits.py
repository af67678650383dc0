"""The smallest real merge: one hidden layer fine-tuned on groups of scikit-learn's handwritten
digits, in a second or two.

An encoder ``relu(W [x, 1])`` and a head learn the parity of all ten digits (the base). Each expert
then learns to tell the digits of its group apart, encoder and a head of its own together. Encoders
are merged; every task keeps its head.

It is no suite of the registry, as ``vision`` and ``language`` are: chapters call it by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import MergeError
from ...moments import Moments

SPLITS = {"train": slice(0, 1200), "test": slice(1200, 1797)}
HALVES = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))


@dataclass(frozen=True)
class Digits:
    """Base weight ``W0`` (m, 65) with the bias as last column, updates (K, m, 65), float64; per
    task and split inputs (N, 65) and labels."""

    W0: Tensor
    updates: Tensor
    heads: dict[str, nn.Linear]
    data: dict[str, dict[str, tuple[Tensor, Tensor]]]

    @property
    def tasks(self) -> list[str]:
        """One task per group of digits."""
        return list(self.data)

    def residuals(self, task: str, split: str) -> tuple[Tensor, Tensor]:
        """Inputs (N, 65) and what the task's expert puts out beyond the base on them (N, m)."""
        X = self.data[task][split][0]
        return X, X @ self.updates[self.tasks.index(task)].mT

    def moments(self, split: str = "train", folds: int = 1) -> Moments:
        """Moments of the layer, images dealt to the folds in turn."""
        moments = Moments.zeros(
            self.tasks, self.W0.shape[1], self.W0.shape[0], folds=folds, layer="encoder"
        )
        for task in self.tasks:
            X, R = self.residuals(task, split)
            moments.update(task, X, R, torch.arange(len(X)) % folds)
        return moments

    def error(self, update: Tensor, split: str = "train") -> Tensor:
        """``½ Σ_t ‖R_t - update X_t‖² / N_t`` from the outputs themselves, no moments: (...) for
        updates (..., m, 65)."""
        pairs = [self.residuals(task, split) for task in self.tasks]
        return sum((R - X @ update.mT).square().sum((-2, -1)) / len(X) for X, R in pairs) / 2

    def on_plane(self, axis: Tensor, function) -> Tensor:
        """``function(d1 Δ_1 + d2 Δ_2)`` at every node of a square grid, (d2, d1) for ``axis``
        (a,)."""
        rows = []
        for d2 in axis:
            rows.append([function(d1 * self.updates[0] + d2 * self.updates[1]) for d1 in axis])
        return torch.tensor(rows, dtype=torch.float64)

    @torch.no_grad()
    def correct(self, update: Tensor, split: str = "test") -> int:
        """How many images of all tasks together ``W0 + update`` (m, 65) gets right, each under its
        own task's head."""
        right = 0
        for task, splits in self.data.items():
            X, labels = splits[split]
            logits = self.heads[task](torch.relu(X @ (self.W0 + update).mT))
            right += int((logits.argmax(1) == labels).sum())
        return right


def _fit(encoder, head, X, labels, steps):
    parameters = [*encoder.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(head(torch.relu(encoder(X))), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return encoder, head


def _network(width, classes):
    return nn.Linear(64, width, dtype=torch.float64), nn.Linear(width, classes, dtype=torch.float64)


def _weight(encoder):
    return torch.cat([encoder.weight, encoder.bias[:, None]], 1).detach()


def _splits_of(group, images: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Split -> inputs (N, 65) and labels (N,) of a group's images among all, (1797, 64)."""
    digits, splits = torch.tensor(group), {}
    for split, part in SPLITS.items():
        chosen = torch.isin(labels[part], digits)
        X = nn.functional.pad(images[part][chosen], (0, 1), value=1.0)
        splits[split] = (X, torch.searchsorted(digits, labels[part][chosen]))
    return splits


def load(
    groups=HALVES, width: int = 16, steps: int = 150, seed: int = 0, tier: str = "smoke"
) -> Digits:
    """Train base and experts (full-batch Adam on the training split) and hand them out as one
    layer's merge.

    Args:
        groups: digits of each task.
        width: number of outputs m of the hidden layer.
        tier: the data have one size, so only ``smoke`` exists.
    Raises: MergeError for any other tier.
    """
    if tier != "smoke":
        raise MergeError(
            f"suite digits: expected tier 'smoke', the only one it has, found {tier!r}; run this "
            "chapter with tier='smoke', and larger tiers on the benchmark chapters "
            "(qpmerge book run --only)"
        )
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images / 16  # float64, as everything here
    train = SPLITS["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(images))
        images, labels = images[order], labels[order]
        base, _ = _fit(*_network(width, 2), images[train], labels[train] % 2, steps)
        experts, heads, data = [], {}, {}
        for group in groups:
            task = f"{group[0]}-{group[-1]}"
            data[task] = _splits_of(group, images, labels)
            encoder, head = _network(width, len(group))
            encoder.load_state_dict(base.state_dict())
            X, target = data[task]["train"]
            encoder, heads[task] = _fit(encoder, head, X[:, :-1], target, steps)
            experts.append(_weight(encoder))
    W0 = _weight(base)
    return Digits(W0, torch.stack(experts) - W0, heads, data)
