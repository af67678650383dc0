"""Benchmark suites: data, a pre-trained base, experts fine-tuned on the spot, their heads, and
evaluation.

A suite is one declarative module, registered below by name and tier, with

    TASKS       names of the tasks, in order
    N_CLASSES   labels of each task
    ALIKE       sentences of like length that a CPU takes at a time, where there are any
    MANIFEST    name of the manifest that its sources are checked against; None where ``base`` and
    ``data`` check what they read RECIPE      how experts are trained (``training.Recipe``);
    RECIPES, where there are any, by task instead; LAYER_RECIPE for experts
                trained in one of the LAYERS
    base()      the encoder and the SHA-256 of its weights; its blocks are the ``nn.ModuleList``
    with most parameters data(task, seed)   a ``datasets.DatasetDict``: splits train, validation,
    test; a ``label`` column beside the inputs collate(rows)      columns of some rows to the
    keyword arguments of ``encoder.forward``, which returns (B, d)

Encoders are merged; every task keeps its own linear head, which was fitted as a probe on the base
and then trained together with its expert. Where experts are public checkpoints, RECIPE is None and
there are

    CHUNK           examples evaluated at a time
    experts(task)   state dict of the expert, and that of its head; where that is empty, two
    functions stand in for heads: complete(encoder, expert, batch)   arguments of the encoder that
        the expert adds to unlabelled ones
    score(task, encoder, state, batches, labels)   quality of the encoder under a state dict
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from tqdm import tqdm

from ...assess import Layers, layer_moments
from ...errors import MergeError, MissingLayer, ShapeMismatch
from ..data.manifests import load_manifest, verify
from ..paths import cache_folder
from ..plans import PLANS as PLANS
from ..plans import Plan as Plan
from ..plans import plan as plan
from . import prefixes, training

REGISTRY = {
    ("vision", "smoke"): "qpmerge_lite.companion.suites.vision",
    ("vision", "standard"): "qpmerge_lite.companion.suites.pictures",
    ("language", "smoke"): "qpmerge_lite.companion.suites.language",
    ("language", "standard"): "qpmerge_lite.companion.suites.sentences",
    ("clip", "paper"): "qpmerge_lite.companion.suites.clip",
    ("gpt2", "paper"): "qpmerge_lite.companion.suites.gpt2",
    ("flan_t5", "paper"): "qpmerge_lite.companion.suites.flan_t5",
}


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
        layer: the one layer in which experts differ from the base; None when all were trained.
        precision: of matrix products in training and evaluation; merges are computed in that of the
            base's weights.
        chunk: examples evaluated at a time.
        alike: calibration sentences are put in the order of their lengths, and on a CPU so many are
            a batch; None leaves them as drawn.
        complete, score: of suites without heads, see above.
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
    _ceilings: dict = field(default_factory=dict, repr=False)
    _held: dict = field(default_factory=dict, repr=False)
    _prefixes: dict = field(default_factory=dict, repr=False)

    def calibration(
        self, n, split="train", seed=None, batch_size=128, tasks=None, skip=0
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
        return {
            task: self._draw(task, n, split, seed, batch_size, skip) for task in self._known(tasks)
        }

    def _draw(self, task, n, split, seed, batch_size, skip):
        rows = self._split(task, split)
        if not 0 < n <= len(rows) - skip:
            raise MergeError(
                f"{task}/{split}: expected 1 to {len(rows) - skip} calibration examples, found {n}; ask for fewer"
            )
        chosen = torch.randperm(len(rows), generator=training.seeded(seed, task, "calibration"))[
            skip : skip + n
        ]
        inputs = training.tensors(rows, self.collate, self.device, chosen)[0]
        if self.alike:
            inputs, batch_size = (
                training.by_length(inputs),
                min(batch_size, self.alike) if self.device == "cpu" else batch_size,
            )
        batches = [training.trim(b) for b in training.batches(inputs, batch_size)]
        return (
            [self.complete(self.base, self.experts[task], b) for b in batches]
            if self.complete
            else batches
        )

    def layers(self, n, skip=0) -> Layers:
        """Moments of every layer on the experts' own inputs, of n calibration examples per task;
        made once and held."""
        if ("layers", n, skip) not in self._held:
            batches = self.calibration(n, skip=skip)
            self._held["layers", n, skip] = layer_moments(
                self.base, self.experts, batches, folds=1, full_energy=False
            )
        return self._held["layers", n, skip]

    def evaluate(self, state_dict: dict[str, Tensor], split="test", tasks=None) -> dict[str, float]:
        """Accuracy of an encoder on each task with the task's own head.

        Raises: MissingLayer or ShapeMismatch when the state dict does not fit the encoder.
        """
        own = self.base.state_dict()
        if own.keys() != state_dict.keys():
            odd = sorted(own.keys() ^ state_dict.keys())
            raise MissingLayer(
                f"{odd[0]}: expected the {len(own)} entries of the base; {len(odd)} are missing or extra"
            )
        for name, value in own.items():
            if value.shape != state_dict[name].shape:
                raise ShapeMismatch(name, value.shape, state_dict[name].shape)
        state = {name: state_dict[name].to(value) for name, value in own.items()}
        return {task: self._accuracy(state, task, split) for task in self._known(tasks)}

    def tensors(self, task, split) -> tuple[dict[str, Tensor], Tensor]:
        """Arguments of the encoder and labels of a whole split, converted once and held in the
        machine's memory."""
        if (task, split) not in self._held:
            self._held[task, split] = training.tensors(self._split(task, split), self.collate)
        return self._held[task, split]

    def classifiers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Task -> its head as a function of features (N, d) to logits (N, classes)."""
        return {
            t: partial(linear, weight=head["weight"], bias=head["bias"])
            for t, head in self.heads.items()
        }

    @torch.no_grad()
    def _accuracy(self, state, task, split) -> float:
        labels = self.tensors(task, split)[1].to(self.device)
        with training.autocast(self.device, self.precision):
            if self.score:
                return self.score(task, self.base, state, self._batches(task, split), labels)
            features = self._features(state, task, split).to(self.heads[task]["weight"])
        return int((self.classifiers()[task](features).argmax(1) == labels).sum()) / len(labels)

    def _features(self, state, task, split) -> Tensor:
        """Features (N, d) of a split. A model that is the base but for ``layer`` starts at that
        layer's block, with what the base gave."""
        own = self.base.state_dict()
        if self.layer is None or any(
            not torch.equal(v, own[k])
            for k, v in state.items()
            if not k.startswith(f"{self.layer}.")
        ):
            return torch.cat(
                [
                    functional_call(self.base, state, (), batch)
                    for batch in self._batches(task, split)
                ]
            )
        before = prefixes.blocks_before(self.base, self.layer)
        if (task, split) not in self._prefixes:
            self._prefixes[task, split] = [
                prefixes.put_out(self.base, before, own, batch)
                for batch in self._batches(task, split)
            ]
        features = []
        for batch, put in zip(self._batches(task, split), self._prefixes[task, split]):
            with prefixes.standing_in(before, put):
                features.append(functional_call(self.base, state, (), batch))
        return torch.cat(features)

    def _batches(self, task, split):
        for batch in training.batches(self.tensors(task, split)[0], self.chunk):
            yield {name: value.to(self.device) for name, value in batch.items()}

    def normalised(
        self, state_dict: dict[str, Tensor], split="test", tasks=None
    ) -> dict[str, float]:
        """Accuracy over that of the task's expert on the same split, for each task and as their
        ``mean``."""
        return self.over_experts(self.evaluate(state_dict, split, tasks), split)

    def over_experts(self, accuracy: dict[str, float], split="test") -> dict[str, float]:
        """Accuracies by task divided by those of the experts, and their ``mean``. Raises:
        MergeError for an expert that is never right."""
        for task in accuracy:
            if (task, split) not in self._ceilings:
                self._ceilings[task, split] = self.evaluate(self.experts[task], split, [task])[task]
            if not self._ceilings[task, split] > 0:
                raise MergeError(
                    f"{task}/{split}: expected an expert that is right at times, found a score of {self._ceilings[task, split]:g}; "
                    "its weights or its head do not belong to the task: make them again or leave the task out"
                )
        ratios = {task: value / self._ceilings[task, split] for task, value in accuracy.items()}
        return {**ratios, "mean": sum(ratios.values()) / len(ratios)}

    def _known(self, tasks) -> list[str]:
        return _choose(tasks, self.tasks, f"suite {self.name!r}")

    def _split(self, task, split):
        if split not in self.data[task]:
            raise MergeError(
                f"{task}: expected a split among {', '.join(self.data[task])}, found {split!r}"
            )
        return self.data[task][split]


def _choose(wanted, known, where) -> list[str]:
    for task in wanted if wanted is not None else ():
        if task not in known:
            raise MergeError(f"{where}: expected tasks among {', '.join(known)}, found {task!r}")
    return list(known) if wanted is None else [task for task in known if task in wanted]


@lru_cache(maxsize=64)
def _data(definition: str, task: str, seed: int):
    """Data of a task, and its training split as tensors: experts of several kinds are trained on
    the same."""
    module = importlib.import_module(definition)
    data = module.data(task, seed)
    return data, training.tensors(data["train"], module.collate) if module.RECIPE else None


def _data_tier(name: str, tier: str) -> str:
    """The data tier that a suite is registered under, for the tier of a run (see ``plans``)."""
    found = PLANS[tier].data if tier in PLANS else tier
    if (name, found) not in REGISTRY:
        known = ", ".join(f"{n} ({t})" for n, t in REGISTRY)
        raise MergeError(f"suite: expected one of {known}, found {name} ({tier})")
    return found


def _definition(name: str, tier: str):
    return importlib.import_module(REGISTRY[name, _data_tier(name, tier)])


def task_names(name: str, tier="smoke") -> list[str]:
    """Tasks of a suite, in order. Raises: MergeError for an unknown suite or tier."""
    return list(_definition(name, tier).TASKS)


def is_public(name: str, tier: str) -> bool:
    """Whether a suite's experts are public checkpoints rather than trained here; errors as of
    :func:`task_names`."""
    return _definition(name, tier).RECIPE is None


def single_layers(name: str, tier="smoke") -> tuple[str, ...]:
    """Layers of a suite's encoder in which experts are trained where they differ in one layer;
    errors as of :func:`task_names`."""
    return _definition(name, tier).LAYERS


def _parts(name, tier, seed, device, tasks, layer):
    """Definition of a suite, its base beside its hash, and by task the data, and the training split
    as tensors."""
    definition = _definition(name, tier)
    if definition.MANIFEST:
        verify(load_manifest(definition.MANIFEST))
    base, sha256 = definition.base()
    base.to(device).eval().requires_grad_(False)
    recipes = getattr(definition, "RECIPES", {}) if layer is None else {}
    recipe = definition.RECIPE if layer is None else replace(definition.LAYER_RECIPE, layer=layer)
    data, examples = (
        {task: _data(REGISTRY[name, tier], task, seed)[i] for task in tasks} for i in (0, 1)
    )
    return (
        definition,
        base,
        sha256,
        {task: recipes.get(task, recipe) for task in tasks},
        data,
        examples,
    )


def load(
    name: str, tier="smoke", seed=0, device="cpu", progress=True, tasks=None, layer=None
) -> Suite:
    """Load a suite; its experts are public checkpoints, or read from the cache or trained, one by
    one, and kept.

    Args:
        tier: of the run; the suite returned is of the data tier that its plan names, and its experts
            are those of every run on these data.
        seed: of training images, batch order, heads and calibration; base, public experts,
            validation and test never vary.
        tasks: a selection of the suite's tasks; all by default.
        layer: train this layer of the encoder alone, by the suite's recipe for that; all of it by
            default.
    Raises: MergeError for an unknown suite, tier or task; ManifestError when a source is not what
        the manifest says.
    """
    tier = _data_tier(name, tier)
    tasks = _choose(tasks, task_names(name, tier), f"suite {name!r}")
    if layer and is_public(name, tier):
        raise MergeError(
            f"suite {name!r}: expected no layer, as its experts are public checkpoints and differ in all, found {layer!r}"
        )
    definition, base, sha256, recipes, data, examples = _parts(
        name, tier, seed, device, tasks, layer
    )
    experts, heads, folder = {}, {}, cache_folder() / f"{name}-{tier}"
    for task in tqdm(tasks, desc=f"{name} experts", disable=not progress):
        parts = (
            definition.experts(task)
            if definition.RECIPE is None
            else training.expert(
                base,
                sha256,
                examples[task],
                definition.N_CLASSES[task],
                recipes[task],
                seed,
                task,
                folder,
                progress,
            )
        )
        experts[task], heads[task] = ({k: v.to(device) for k, v in part.items()} for part in parts)
    classes = {task: definition.N_CLASSES[task] for task in tasks}
    how = (
        training.Recipe(chunk=definition.CHUNK) if definition.RECIPE is None else definition.RECIPE
    )
    how = {"precision": how.precision, "chunk": how.chunk} | {
        part: getattr(definition, part, None) for part in ("complete", "score")
    }
    how["alike"] = getattr(definition, "ALIKE", None)
    return Suite(
        name,
        tier,
        seed,
        device,
        tasks,
        data,
        base,
        experts,
        heads,
        classes,
        definition.collate,
        layer,
        **how,
    )


def multitask(suite: Suite, progress=False) -> tuple[Suite, dict[str, Tensor]]:
    """The ceiling of merging: one encoder trained on all tasks at once, and the suite with the
    heads trained with it. Kept like an expert.

    Twice the steps of an expert, each with a quarter of its batch of every task.
    """
    _, base, sha256, recipes, _, examples = _parts(
        suite.name, suite.tier, suite.seed, suite.device, suite.tasks, suite.layer
    )
    recipe = next(iter(recipes.values()))
    recipe = replace(recipe, steps=2 * recipe.steps, batch=recipe.batch // 4)
    folder = cache_folder() / f"{suite.name}-{suite.tier}"
    state, heads = training.multitask(
        base, sha256, examples, suite.n_classes, recipe, suite.seed, folder, progress
    )
    on = lambda part: {k: v.to(suite.device) for k, v in part.items()}
    return replace(
        suite, heads={t: on(head) for t, head in heads.items()}, _held=suite._held, _ceilings={}
    ), on(state)
