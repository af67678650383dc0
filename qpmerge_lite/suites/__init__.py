"""Benchmark suites: data, a pre-trained base, experts fine-tuned on the spot, their heads, and evaluation.

A suite is one declarative module, registered below by name and tier, with

    TASKS       names of the tasks, in order
    N_CLASSES   labels of each task
    MANIFEST    name of the manifest that its sources are checked against
    RECIPE      how experts are trained (``training.Recipe``)
    base()      the encoder and the SHA-256 of its weights; its blocks are the ``nn.ModuleList`` named ``blocks``
    data(task, seed)   a ``datasets.DatasetDict``: splits train, validation, test; a ``label`` column beside the inputs
    collate(rows)      columns of some rows to the keyword arguments of ``encoder.forward``, which returns (B, d)

Encoders are merged; every task keeps its own linear head, which was fitted as a probe on the base and then trained
together with its expert.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from ..errors import MergeError, MissingLayer, ShapeMismatch
from ..manifests import load_manifest, verify
from . import training

REGISTRY = {("vision", "smoke"): "qpmerge_lite.suites.vision"}


@dataclass
class Suite:
    """One suite at one tier and seed, ready to be merged and evaluated.

    Attributes:
        tasks: names, in order.
        data: task -> ``datasets.DatasetDict`` with splits train, validation, test.
        base: encoder, float32; ``forward(**batch)`` returns features (B, d).
        experts: task -> state dict of the same encoder after fine-tuning.
        heads: task -> state dict of the task's linear head, never merged.
        n_classes: task -> number of labels.
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
    _ceilings: dict = field(default_factory=dict, repr=False)
    _held: dict = field(default_factory=dict, repr=False)

    def calibration(self, n, split="train", seed=None, batch_size=64, tasks=None) -> dict[str, list[dict]]:
        """Unlabelled inputs of each task, drawn without replacement.

        A larger n extends a smaller one with the same seed.

        Args:
            n: examples per task.
            seed: of the draw; the suite's own by default.
        Returns: task -> batches of at most ``batch_size``, each the keyword arguments of ``base.forward``.
        Raises: MergeError when a split has fewer than n examples, or a task is unknown.
        """
        seed = self.seed if seed is None else seed
        return {task: self._draw(task, n, split, seed, batch_size) for task in self._known(tasks)}

    def _draw(self, task, n, split, seed, batch_size):
        rows = self._split(task, split)
        if not 0 < n <= len(rows):
            raise MergeError(f"{task}/{split}: expected 1 to {len(rows)} calibration examples, found {n}; ask for fewer")
        chosen = torch.randperm(len(rows), generator=training.seeded(seed, task, "calibration"))[:n]
        return training.batches(training.tensors(rows, self.collate, self.device, chosen)[0], batch_size)

    def evaluate(self, state_dict: dict[str, Tensor], split="test", tasks=None) -> dict[str, float]:
        """Accuracy of an encoder on each task with the task's own head.

        Raises: MissingLayer or ShapeMismatch when the state dict does not fit the encoder.
        """
        own = self.base.state_dict()
        if own.keys() != state_dict.keys():
            odd = sorted(own.keys() ^ state_dict.keys())
            raise MissingLayer(f"{odd[0]}: expected the {len(own)} entries of the base; {len(odd)} are missing or extra")
        for name, value in own.items():
            if value.shape != state_dict[name].shape:
                raise ShapeMismatch(name, value.shape, state_dict[name].shape)
        state = {name: state_dict[name].to(value) for name, value in own.items()}
        return {task: self._accuracy(state, task, split) for task in self._known(tasks)}

    def tensors(self, task, split) -> tuple[dict[str, Tensor], Tensor]:
        """Arguments of the encoder and labels of a whole split on the suite's device, converted once and held."""
        if (task, split) not in self._held:
            self._held[task, split] = training.tensors(self._split(task, split), self.collate, self.device)
        return self._held[task, split]

    @torch.no_grad()
    def _accuracy(self, state, task, split) -> float:
        (inputs, labels), head = self.tensors(task, split), self.heads[task]
        found = torch.cat([functional_call(self.base, state, (), batch) for batch in training.batches(inputs)])
        scores = found @ head["weight"].T + head["bias"]
        return int((scores.argmax(1) == labels).sum()) / len(labels)

    def normalised(self, state_dict: dict[str, Tensor], split="test", tasks=None) -> dict[str, float]:
        """Accuracy over that of the task's expert on the same split, for each task and as their ``mean``."""
        tasks = self._known(tasks)
        for task in tasks:
            if (task, split) not in self._ceilings:
                self._ceilings[task, split] = self.evaluate(self.experts[task], split, [task])[task]
        accuracy = self.evaluate(state_dict, split, tasks)
        ratios = {task: accuracy[task] / self._ceilings[task, split] for task in tasks}
        return {**ratios, "mean": sum(ratios.values()) / len(ratios)}

    def _known(self, tasks) -> list[str]:
        return _choose(tasks, self.tasks, f"suite {self.name!r}")

    def _split(self, task, split):
        if split not in self.data[task]:
            raise MergeError(f"{task}: expected a split among {', '.join(self.data[task])}, found {split!r}")
        return self.data[task][split]


def _choose(wanted, known, where) -> list[str]:
    for task in wanted if wanted is not None else ():
        if task not in known:
            raise MergeError(f"{where}: expected tasks among {', '.join(known)}, found {task!r}")
    return list(known) if wanted is None else [task for task in known if task in wanted]


def load(name: str, tier="smoke", seed=0, device="cpu", progress=True, tasks=None) -> Suite:
    """Load a suite; its experts are read from the cache or trained, one by one, and kept.

    Args:
        seed: of training images, batch order, heads and calibration; base, validation and test never vary.
        tasks: a selection of the suite's tasks; all by default.
    Raises: MergeError for an unknown suite, tier or task; ManifestError when a source is not what the manifest says.
    """
    if (name, tier) not in REGISTRY:
        known = ", ".join(f"{n} ({t})" for n, t in REGISTRY)
        raise MergeError(f"suite: expected one of {known}, found {name} ({tier})")
    definition = importlib.import_module(REGISTRY[name, tier])
    tasks = _choose(tasks, definition.TASKS, f"suite {name!r}")
    verify(load_manifest(definition.MANIFEST))
    base, sha256 = definition.base()
    base.to(device).eval().requires_grad_(False)
    data = {task: definition.data(task, seed) for task in tasks}
    folder = training.cache_folder() / f"{name}-{tier}"
    experts, heads = {}, {}
    for task in tqdm(tasks, desc=f"{name} experts", disable=not progress):
        parts = training.expert(
            base, sha256, data[task]["train"], definition.collate, definition.N_CLASSES[task], definition.RECIPE,
            seed, task, folder, progress,
        )  # fmt: skip
        experts[task], heads[task] = ({k: v.to(device) for k, v in part.items()} for part in parts)
    classes = {task: definition.N_CLASSES[task] for task in tasks}
    return Suite(name, tier, seed, device, tasks, data, base, experts, heads, classes, definition.collate)
