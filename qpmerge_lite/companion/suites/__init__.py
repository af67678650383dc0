"""Benchmark suites: data, a pre-trained base, experts fine-tuned on the spot, their heads, and
evaluation.

A suite is one declarative module, registered below by name and tier; what it has to say is written
in :class:`SuiteSpec`. Encoders are merged; every task keeps its own linear head, which was fitted
as a probe on the base and then trained together with its expert. Where experts are public
checkpoints, nothing is trained, and two functions may stand in for heads.
"""

import importlib
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor, nn
from tqdm import tqdm

from ...errors import MergeError
from ..data.manifests import load_manifest, verify
from ..paths import cache_folder
from ..plans import PLANS as PLANS
from ..plans import Plan as Plan
from ..plans import plan as plan
from . import training
from .spec import SuiteSpec as SuiteSpec
from .suite import Suite as Suite
from .suite import choose

REGISTRY = {
    ("vision", "smoke"): "qpmerge_lite.companion.suites.vision",
    ("vision", "standard"): "qpmerge_lite.companion.suites.pictures",
    ("language", "smoke"): "qpmerge_lite.companion.suites.language",
    ("language", "standard"): "qpmerge_lite.companion.suites.sentences",
    ("clip", "paper"): "qpmerge_lite.companion.suites.clip",
    ("gpt2", "paper"): "qpmerge_lite.companion.suites.gpt2",
    ("flan_t5", "paper"): "qpmerge_lite.companion.suites.flan_t5",
}


def data_tier(name: str, tier: str) -> str:
    """The data tier that a suite is registered under, for the tier of a run (see ``plans``).

    Raises: MergeError for an unknown suite or tier.
    """
    registered = PLANS[tier].data if tier in PLANS else tier
    if (name, registered) not in REGISTRY:
        known = ", ".join(f"{n} ({t})" for n, t in REGISTRY)
        raise MergeError(f"suite: expected one of {known}, found {name} ({tier})")
    return registered


def spec_of(name: str, tier: str = "smoke") -> SuiteSpec:
    """What the definition of a suite says. Raises: MergeError for an unknown suite or tier, and for
    a definition that lacks something."""
    return SuiteSpec.of(importlib.import_module(REGISTRY[name, data_tier(name, tier)]))


def task_names(name: str, tier="smoke") -> list[str]:
    """Tasks of a suite, in order. Raises: MergeError for an unknown suite or tier."""
    return list(spec_of(name, tier).tasks)


def is_public(name: str, tier: str) -> bool:
    """Whether a suite's experts are public checkpoints rather than trained here. Raises: MergeError
    for an unknown suite or tier."""
    return spec_of(name, tier).is_public


def single_layers(name: str, tier="smoke") -> tuple[str, ...]:
    """Layers of a suite's encoder in which experts are trained where they differ in one layer.
    Raises: MergeError for an unknown suite or tier."""
    return spec_of(name, tier).layers


@lru_cache(maxsize=64)
def task_data(name: str, tier: str, task: str, seed: int):
    """Data of a task, and its training split as tensors where experts are trained, else None;
    computed once, as experts of several kinds are trained on the same."""
    spec = spec_of(name, tier)
    data = spec.data(task, seed)
    return data, None if spec.is_public else training.tensors(data["train"], spec.collate)


@dataclass(frozen=True)
class Ingredients:
    """What experts of a suite are made from.

    Attributes:
        base_sha256: hash of the base's weights as they were filed.
        recipes: by task; None where experts are public checkpoints.
        data: task -> ``datasets.DatasetDict``.
        examples: task -> arguments of the encoder (N, …) and labels (N,) of the training split;
            None where experts are public checkpoints.
    """

    spec: SuiteSpec
    base: nn.Module
    base_sha256: str
    recipes: dict[str, training.Recipe | None]
    data: dict
    examples: dict[str, tuple[dict[str, Tensor], Tensor] | None]

    @classmethod
    def gathered(cls, name: str, tier: str, *, seed, device, tasks, layer):
        """Those of a suite's tasks, from sources that match their manifest."""
        spec = spec_of(name, tier)
        if spec.manifest:
            verify(load_manifest(spec.manifest))
        base, base_sha256 = spec.base()
        base.to(device).eval().requires_grad_(False)
        recipes, data, examples = {}, {}, {}
        for task in tasks:
            recipes[task] = spec.recipe_of(task, layer)
            data[task], examples[task] = task_data(name, tier, task, seed)
        return cls(spec, base, base_sha256, recipes, data, examples)

    def expert(self, task: str, seed: int, folder, progress: bool):
        """State dicts of a task's expert and of its head: public, or from the cache, or trained."""
        if self.spec.is_public:
            return self.spec.experts(task)
        return training.expert(
            self.base,
            self.base_sha256,
            self.examples[task],
            task=task,
            classes=self.spec.n_classes[task],
            recipe=self.recipes[task],
            seed=seed,
            folder=folder,
            progress=progress,
        )


def load(
    name: str, tier="smoke", seed=0, device="cpu", *, progress=True, tasks=None, layer=None
) -> Suite:
    """Load a suite; its experts are public checkpoints, or read from the cache, or trained one by
    one and cached.

    Args:
        tier: of the run; the suite returned is of the data tier that its plan names, and its
            experts are those of every run on these data.
        seed: of training images, batch order, heads and calibration; base, public experts,
            validation and test never vary.
        tasks: a selection of the suite's tasks; all by default.
        layer: train this layer of the encoder alone, by the suite's recipe for that; all of it by
            default.
    Raises: MergeError for an unknown suite, tier or task; ManifestError when a source is not what
        the manifest says.
    """
    tier = data_tier(name, tier)
    tasks = choose(tasks, task_names(name, tier), f"suite {name!r}")
    if layer and is_public(name, tier):
        raise MergeError(
            f"suite {name!r}: expected no layer, as its experts are public checkpoints "
            f"and differ in all, found {layer!r}"
        )
    made_from = Ingredients.gathered(name, tier, seed=seed, device=device, tasks=tasks, layer=layer)
    spec, folder = made_from.spec, _expert_folder(name, tier)
    experts, heads = {}, {}
    for task in tqdm(tasks, desc=f"{name} experts", disable=not progress):
        expert, head = made_from.expert(task, seed, folder, progress)
        experts[task] = training.placed(expert, device)
        heads[task] = training.placed(head, device)
    return Suite(
        name=name,
        tier=tier,
        seed=seed,
        device=device,
        tasks=tasks,
        data=made_from.data,
        base=made_from.base,
        experts=experts,
        heads=heads,
        n_classes={task: spec.n_classes[task] for task in tasks},
        collate=spec.collate,
        layer=layer,
        precision=spec.precision,
        chunk=spec.chunk,
        alike=spec.alike,
        complete=spec.complete,
        score=spec.score,
    )


def multitask(suite: Suite, progress=False) -> tuple[Suite, dict[str, Tensor]]:
    """The ceiling of merging: one encoder trained on all tasks at once, cached like an expert.

    It takes twice the steps of an expert, each with a quarter of its batch of every task.

    Returns: the suite with the heads that were trained with the encoder, and the encoder's state
        dict, which has the shapes (…) of the base's.
    """
    made_from = Ingredients.gathered(
        suite.name,
        suite.tier,
        seed=suite.seed,
        device=suite.device,
        tasks=suite.tasks,
        layer=suite.layer,
    )
    recipe = made_from.recipes[suite.tasks[0]]
    state, heads = training.multitask(
        made_from.base,
        made_from.base_sha256,
        made_from.examples,
        classes=suite.n_classes,
        recipe=replace(recipe, steps=2 * recipe.steps, batch=recipe.batch // 4),
        seed=suite.seed,
        folder=_expert_folder(suite.name, suite.tier),
        progress=progress,
    )
    heads = {task: training.placed(head, suite.device) for task, head in heads.items()}
    return suite.with_heads(heads), training.placed(state, suite.device)


def _expert_folder(name: str, tier: str):
    return cache_folder() / f"{name}-{tier}"
