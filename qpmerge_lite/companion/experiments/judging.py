"""What merges of a suite are compared to: the outputs of base and experts, labels, and moments of
the layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import kl_div

from ...assess import Auditor
from ..suites import Suite, training

DISJOINT = 512  # disjoint examples come after so many of the draw, which no merge goes beyond
AUDITED = 64  # examples per task that merges are compared to experts on, end to end
LAYERED = 32  # examples per task that they are compared on layer by layer
VALIDATED = 128  # labelled examples per task
# labelled examples judged at a time: text of like length is seldom padded far, and activations stay
# in the cache
CHUNK = 128


@torch.no_grad()
def features(suite: Suite, state, batches) -> Tensor:
    """Features (N, d) of unlabelled batches under a state dict, in the precision of the suite's
    heads."""
    with training.autocast(suite.device, suite.precision):
        outputs = [functional_call(suite.base, dict(state), (), batch) for batch in batches]
    return torch.cat(outputs).to(next(suite.base.parameters()))


def _squared_error(difference: Tensor) -> float:
    """Mean over examples of the squared norm of rows (N, d)."""
    return float(difference.double().square().sum(1).mean())


def _divergence(expert: Tensor, other: Tensor) -> float:
    """Kullback-Leibler divergence of the expert's predictions from other ones, both as logits
    (N, classes), mean over examples, in nats."""
    log_expert, log_other = expert.double().log_softmax(1), other.double().log_softmax(1)
    return float(kl_div(log_other, log_expert, log_target=True, reduction="batchmean"))


class Judge:
    """What all merges of one suite are compared to: features of base and experts, labels, moments;
    computed once.

    Args:
        tested: most test examples of a task.
    """

    def __init__(self, suite: Suite, tested: int):
        self.suite, self.base = suite, suite.base.state_dict()
        self.seen = suite.calibration(AUDITED)
        self.disjoint = suite.calibration(AUDITED, skip=DISJOINT)
        self._features: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.strict = Auditor(suite.base, suite.experts, suite.calibration(LAYERED, skip=DISJOINT))
        self.rows = {}
        for task in suite.tasks:
            self.rows[task, "validation"] = self._spread(task, "validation", VALIDATED)
            self.rows[task, "test"] = self._spread(task, "test", tested)
        self.right = {
            (task, split): self._correct(task, split, suite.experts[task]).double().mean()
            for task, split in self.rows
        }

    def _spread(self, task, split, most):
        """Batches and labels (N,) of at most so many examples, spread evenly over a split."""
        inputs, labels = self.suite.tensors(task, split)
        rows = torch.arange(len(labels))[:: max(1, len(labels) // most)][:most]
        chosen = {name: value[rows].to(self.suite.device) for name, value in inputs.items()}
        batches = training.batches(chosen, min(self.suite.chunk, CHUNK))
        return [training.trim(batch) for batch in batches], labels[rows].to(self.suite.device)

    def base_and_expert(self, task, batches, place=None) -> tuple[Tensor, Tensor]:
        """Features (N, d) of base and expert on batches of a task; cached where the batches are
        told by a ``place``, (examples skipped, examples)."""
        if (task, place) in self._features:
            return self._features[task, place]
        pair = (
            features(self.suite, self.base, batches),
            features(self.suite, self.suite.experts[task], batches),
        )
        if place:
            self._features[task, place] = pair
        return pair

    def _correct(self, task, split, state) -> Tensor:
        batches, labels = self.rows[task, split]
        logits = self.suite.classifiers()[task](features(self.suite, state, batches))
        return logits.argmax(1) == labels

    def accuracy(self, state, task, split) -> tuple[float, list[int]]:
        """Accuracy over the expert's, and which examples were right."""
        right = self._correct(task, split, state)
        return float(right.double().mean() / self.right[task, split]), right.int().tolist()

    def ends(self, state, task, batches, place=None) -> dict[str, float]:
        """End to end, on unlabelled batches of one task: squared errors of merge and base per
        example, plain and as the head sees them, divergences of both from the expert's predictions,
        agreement, entropy.

        Args:
            place: (examples skipped, examples) of the task's draw where batches are such; features
                of base and expert are then cached.
        """
        merged = features(self.suite, state, batches)
        base, expert = self.base_and_expert(task, batches, place)
        head, weight = self.suite.classifiers()[task], self.suite.heads[task]["weight"]
        centred = weight - weight.mean(0)
        predicted = head(merged).softmax(1)
        agree = predicted.argmax(1) == head(expert).argmax(1)
        return {
            "output": _squared_error(merged - expert),
            "output_base": _squared_error(base - expert),
            "head": _squared_error((merged - expert) @ centred.mT),
            "head_base": _squared_error((base - expert) @ centred.mT),
            "divergence": _divergence(head(expert), head(merged)),
            "divergence_base": _divergence(head(expert), head(base)),
            "agreement": float(agree.double().mean()),
            "entropy": float(-torch.special.entr(predicted).sum(1).mean() / math.log(len(weight))),
        }

    def static(self, state, tasks) -> tuple[dict[str, float], dict[str, float]]:
        """Captured energy of every layer on the experts' own inputs, in closed form on disjoint
        examples, and the layers' residual energies."""
        shares, energy = {}, {}
        for name, (view, moments, _) in self.suite.layers(AUDITED, DISJOINT).items():
            pooled = moments.only(tasks).pool()
            if pooled.energy:
                shares[name] = pooled.captured(view.matrix(state) - view.matrix(self.base))
                energy[name] = pooled.energy
        return shares, energy
