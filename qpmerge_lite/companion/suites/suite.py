"""A suite ready to be merged and evaluated: data, a base, its experts, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from ...assess import Auditor, Layers, layer_moments
from ...errors import MergeError, MissingLayer, ShapeMismatch
from ..plans import EMBEDDED
from . import prefixes, training

# Examples evaluated at a time on a CPU: activations then stay in its cache.
IN_CACHE = 128
# A split of every suite: one in so many examples of the validation split, drawn at random, the same
# for every seed.
PART, SHARE = "part of validation", 8


@dataclass
class Suite:
    """One suite at one tier and seed.

    Attributes:
        tasks: names, in order.
        data: task -> ``datasets.DatasetDict`` with splits train, validation, test.
        base: encoder, float32; ``forward(**batch)`` returns features (B, d).
        experts: task -> state dict of the same encoder after fine-tuning.
        heads: task -> state dict of the task's linear head, never merged.
        n_classes: task -> number of labels.
        collate: columns of some rows to the keyword arguments of ``base.forward``.
        layer: the one layer in which experts differ from the base; None when all were trained.
        precision: of matrix products in training and evaluation; merges are computed in that of the
            base's weights.
        chunk: examples evaluated at a time, on a CPU at most ``IN_CACHE``.
        alike: calibration sentences are put in the order of their lengths, and on a CPU so many are
            a batch; None leaves them as drawn.
        complete: where a suite has no heads; ``complete(encoder, expert, batch)`` gives an
            unlabelled batch with what the expert adds to it.
        score: where a suite has no heads; ``score(task, encoder, state, batches, labels)`` gives
            the quality of the encoder under a state dict.
    """

    name: str
    tier: str
    seed: int
    device: str
    tasks: list[str]
    data: dict
    base: nn.Module
    experts: dict[str, dict[str, Tensor]]
    heads: dict[str, dict[str, Tensor]]
    n_classes: dict[str, int]
    collate: Callable = field(repr=False)
    layer: str | None = None
    precision: str = "float32"
    chunk: int = training.CHUNK
    alike: int | None = None
    complete: Callable | None = field(default=None, repr=False)
    score: Callable | None = field(default=None, repr=False)
    _cache: dict = field(default_factory=dict, repr=False)

    def cached(self, key: Hashable, make: Callable):
        """What ``make()`` returns: computed once for a key and then held in memory with the
        suite."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def with_heads(self, heads: dict[str, dict[str, Tensor]]) -> Suite:
        """The same suite with other heads, by task ``weight`` (classes, d) and ``bias`` (classes,);
        of what is cached it takes what no head has a part in."""
        headless = ("tensors", "block outputs")
        shared = {key: value for key, value in self._cache.items() if key[0] in headless}
        return replace(self, heads=heads, _cache=shared)

    def calibration(
        self, n: int, *, split="train", seed=None, batch_size=128, tasks=None, skip=0
    ) -> dict[str, list[dict]]:
        """Unlabelled inputs of each task, drawn without replacement.

        A larger n extends a smaller one with the same seed.

        Args:
            n: examples per task.
            seed: of the draw; the suite's own by default.
            skip: leave out the first so many of the draw, which gives a set disjoint from that one.
        Returns: task -> batches of at most ``batch_size``, each the keyword arguments of
            ``base.forward``.
        Raises: MergeError when a split has fewer than n examples, or a task is unknown.
        """
        seed = self.seed if seed is None else seed
        drawn = {}
        for task in self._chosen(tasks):
            inputs = self._draw(task, n, split, seed, skip)
            drawn[task] = self._calibration_batches(task, inputs, batch_size)
        return drawn

    def _draw(self, task: str, n: int, split: str, seed: int, skip: int) -> dict[str, Tensor]:
        rows = self._rows(task, split)
        most = len(rows) - skip
        if not 0 < n <= most:
            raise MergeError(
                f"{task}/{split}: expected 1 to {most} calibration examples, found {n}; "
                "ask for fewer"
            )
        order = torch.randperm(len(rows), generator=training.seeded(seed, task, "calibration"))
        inputs, _ = training.tensors(rows, self.collate, self.device, order[skip : skip + n])
        return inputs

    def _calibration_batches(self, task: str, inputs: dict[str, Tensor], size: int) -> list[dict]:
        if self.alike:
            inputs = training.by_length(inputs)
            if self.device == "cpu":
                size = min(size, self.alike)
        batches = [training.trim(batch) for batch in training.batches(inputs, size)]
        if self.complete is None:
            return batches
        return [self.complete(self.base, self.experts[task], batch) for batch in batches]

    def layers(self, n: int, skip: int = 0) -> Layers:
        """Moments of every layer on the experts' own inputs, of n calibration examples per task
        behind the first ``skip`` of the draw; computed once."""

        def gather():
            batches = self.calibration(n, skip=skip)
            return layer_moments(self.base, self.experts, batches, folds=1, full_energy=False)

        return self.cached(("layers", n, skip), gather)

    def auditor(self, n: int, skip: int = 0) -> Auditor:
        """What tells the captured energies of merges on n calibration examples per task behind the
        first ``skip`` of the draw; made once.

        What base and experts put out is kept for an embedded suite; for others it is too large.
        """
        return self.cached(
            ("auditor", n, skip),
            lambda: Auditor(
                self.base,
                self.experts,
                self.calibration(n, skip=skip),
                hold=self.tier == EMBEDDED,
            ),
        )

    def evaluate(self, state_dict: dict[str, Tensor], split="test", tasks=None) -> dict[str, float]:
        """Accuracy of an encoder on each task with the task's own head.

        Args:
            state_dict: the base's names, each with a tensor of the base's shape (…).
        Raises: MissingLayer or ShapeMismatch when the state dict does not fit the encoder.
        """
        own = self.base.state_dict()
        odd = sorted(own.keys() ^ state_dict.keys())
        if odd:
            raise MissingLayer(
                f"{odd[0]}: expected the {len(own)} entries of the base; "
                f"{len(odd)} are missing or extra"
            )
        for name, value in own.items():
            if value.shape != state_dict[name].shape:
                raise ShapeMismatch(name, value.shape, state_dict[name].shape)
        state = {name: state_dict[name].to(value) for name, value in own.items()}
        return {task: self._accuracy(state, task, split) for task in self._chosen(tasks)}

    def tensors(self, task: str, split: str) -> tuple[dict[str, Tensor], Tensor]:
        """Arguments of the encoder (N, …) and labels (N,) of a whole split, converted once and held
        in the machine's memory; also of ``PART``."""

        def convert():
            if split == PART:
                return self._part(task)
            return training.tensors(self._rows(task, split), self.collate)

        return self.cached(("tensors", task, split), convert)

    def _part(self, task: str) -> tuple[dict[str, Tensor], Tensor]:
        """One in ``SHARE`` validation examples: arguments of the encoder and labels."""
        inputs, labels = self.tensors(task, "validation")
        order = torch.randperm(len(labels), generator=training.seeded(0, task, PART))
        rows = order[: -(-len(labels) // SHARE)]
        return {name: value[rows] for name, value in inputs.items()}, labels[rows]

    def classifiers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Task -> its head as a function of features (N, d) to logits (N, classes)."""
        return {
            task: partial(linear, weight=head["weight"], bias=head["bias"])
            for task, head in self.heads.items()
        }

    @torch.no_grad()
    def _accuracy(self, state: dict[str, Tensor], task: str, split: str) -> float:
        labels = self.tensors(task, split)[1].to(self.device)
        with training.autocast(self.device, self.precision):
            if self.score:
                return self.score(task, self.base, state, self._batches(task, split), labels)
            features = self._features(state, task, split).to(self.heads[task]["weight"])
        predicted = self.classifiers()[task](features).argmax(1)
        return int((predicted == labels).sum()) / len(labels)

    def _features(self, state: dict[str, Tensor], task: str, split: str) -> Tensor:
        """Features (N, d) of a split. A model that is the base but for ``layer`` starts at that
        layer's block, with what the base gave."""
        if not self._differs_in_layer_only(state):
            batches = self._batches(task, split)
            return torch.cat([functional_call(self.base, state, (), batch) for batch in batches])
        before = prefixes.blocks_before(self.base, self.layer)
        features = []
        for batch, output in zip(self._batches(task, split), self._block_outputs(task, split)):
            with prefixes.standing_in(before, output):
                features.append(functional_call(self.base, state, (), batch))
        return torch.cat(features)

    def _differs_in_layer_only(self, state: dict[str, Tensor]) -> bool:
        if self.layer is None:
            return False
        own = self.base.state_dict()
        elsewhere = [name for name in state if not name.startswith(f"{self.layer}.")]
        return all(torch.equal(state[name], own[name]) for name in elsewhere)

    def _block_outputs(self, task: str, split: str) -> list[Tensor | None]:
        """What the block before ``layer`` puts out in the base, by batch of a split."""

        def run():
            before, own = prefixes.blocks_before(self.base, self.layer), self.base.state_dict()
            batches = self._batches(task, split)
            return [prefixes.last_output(self.base, before, own, batch) for batch in batches]

        return self.cached(("block outputs", task, split), run)

    def _batches(self, task: str, split: str) -> Iterator[dict[str, Tensor]]:
        size = min(self.chunk, IN_CACHE) if self.device == "cpu" else self.chunk
        for batch in training.batches(self.tensors(task, split)[0], size):
            yield training.placed(batch, self.device)

    def normalised(
        self, state_dict: dict[str, Tensor], split="test", tasks=None
    ) -> dict[str, float]:
        """Accuracy over that of the task's expert on the same split, for each task and as their
        ``mean``.

        Args:
            state_dict: the base's names, each with a tensor of the base's shape (…).
        """
        return self.over_experts(self.evaluate(state_dict, split, tasks), split)

    def expert_accuracy(self, task: str, split: str = "test") -> float:
        """Accuracy of a task's own expert, computed once.

        Raises: MergeError for an expert that is never right.
        """
        accuracy = self.cached(
            ("expert accuracy", task, split),
            lambda: self.evaluate(self.experts[task], split, [task])[task],
        )
        if not accuracy > 0:
            raise MergeError(
                f"{task}/{split}: expected an expert that is right at times, "
                f"found a score of {accuracy:g}; its weights or its head do not belong to the "
                "task: make them again or leave the task out"
            )
        return accuracy

    def over_experts(self, accuracy: dict[str, float], split="test") -> dict[str, float]:
        """Accuracies by task divided by those of the experts, and their ``mean``.

        Raises: MergeError for an expert that is never right.
        """
        ratios = {
            task: value / self.expert_accuracy(task, split) for task, value in accuracy.items()
        }
        return {**ratios, "mean": sum(ratios.values()) / len(ratios)}

    def _chosen(self, tasks) -> list[str]:
        return choose(tasks, self.tasks, f"suite {self.name!r}")

    def _rows(self, task: str, split: str):
        if split not in self.data[task]:
            raise MergeError(
                f"{task}: expected a split among {', '.join(self.data[task])}, found {split!r}"
            )
        return self.data[task][split]


def choose(wanted, known, where: str) -> list[str]:
    """The wanted ones of the known tasks, in the order of these; all where ``wanted`` is None.

    Raises: MergeError for a task that is not known, with ``where`` it was asked for.
    """
    if wanted is None:
        return list(known)
    for task in wanted:
        if task not in known:
            raise MergeError(f"{where}: expected tasks among {', '.join(known)}, found {task!r}")
    return [task for task in known if task in wanted]
