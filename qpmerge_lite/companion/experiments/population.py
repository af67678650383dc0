"""The population on which the diagnostic is tried: merges of subsets of a suite's experts, good
ones, odd ones and bad ones.

Of every merge it is recorded what can be known without labels (captured energies, agreement with the
experts, entropy, sizes of updates), what a few labels would say, and how accurate it is on test
data.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import normalize

from ... import datafree, methods
from ...assess import Auditor
from ...merge import Merge
from ..suites import Suite, load, plan, training
from . import benchmark
from .baselines import BASELINES, ENTRIES, FAMILIES, HEURISTICS, Entry, no_options, qp_label

ENERGIES = ("in_sample", "disjoint")
# The word for baselines is the one that records and caches of results hold.
HEURISTIC, BASELINE, PROGRAMME, BAD = KINDS = (
    "heuristics",
    "neighbours",
    "programme",
    "made to be bad",
)
DISJOINT = 512  # disjoint examples come after so many of the draw, which no merge goes beyond
AUDITED = 64  # examples per task that merges are compared to experts on, end to end
LAYERED = 32  # examples per task that they are compared on layer by layer
VALIDATED = 128  # labelled examples per task
# labelled examples judged at a time: text of like length is seldom padded far, and activations stay
# in the cache
CHUNK = 128


def kind_of(method: str) -> str:
    """What chapters count a method to: one of the first three of ``KINDS``."""
    if method.startswith("qp_"):
        return PROGRAMME
    return BASELINE if method in BASELINES else HEURISTIC


def _columns(row: dict) -> dict:
    """What tables of merges hold of a row of ``benchmark.result``."""
    return {
        "method": row["method"],
        "label": row["label"],
        "kind": kind_of(row["method"]),
        "accuracy": row["normalised"]["mean"],
        "validation": row["validation"],
    }


def one_layer(results: list[dict]):
    """Merges of ``single_layer.results`` as a ``pandas.DataFrame``: a row per method and problem,
    energies in closed form."""
    import pandas as pd

    rows = []
    for result in results:
        name, layer, seed = result["suite"], result["layer"], result["seed"]
        place = {"suite": name, "problem": f"{name} {layer} {seed}", "layer": layer, "seed": seed}
        for method in result["methods"]:
            if "captured" in method:
                rows.append(place | _columns(method) | method["captured"])
    return pd.DataFrame(rows)


def many_layers(name: str, results: list[dict], energy: str):
    """Merges of ``benchmark.compare`` as a ``pandas.DataFrame``: a row per method and problem,
    which is a seed; ``energy`` is ``layers`` (their mean) or ``output`` (end to end)."""
    import pandas as pd

    rows = []
    for result in results:
        if "captured" in result:
            seed = result["seed"]
            place = {"suite": name, "problem": f"{name} {seed}", "seed": seed}
            energies = {where: result["captured"][where][energy] for where in ENERGIES}
            rows.append(place | _columns(result) | energies)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Spec:
    """One merge to be made: a method of ``CALLS`` and its options, and which examples it is solved
    on.

    ``source`` is ``own`` (examples of the expert's task), ``foreign`` (of another task),
    ``scrambled`` (its own, entries in random places), or ``none``; ``size`` how many per task.
    """

    kind: str
    label: str
    method: str
    options: dict
    size: int = 0
    source: str = "none"


def random_coefficients(base, experts, calibration=None, *, seed: int) -> Merge:
    """Every expert's update in every parameter times a normal number of its own: mean 1/K, as much
    spread."""
    generator, base_state = torch.Generator().manual_seed(seed), base.state_dict()
    state = dict(base_state)
    for name, vectors in datafree.task_vectors(base, experts).items():
        scales = (1 + torch.randn(len(vectors), generator=generator).to(vectors)) / len(vectors)
        state[name] = (base_state[name].double() + torch.tensordot(scales, vectors, 1)).to(
            base_state[name]
        )
    return Merge(state)


CALLS = ENTRIES | {
    "random": Entry("random coefficients", random_coefficients, no_options),
    "qp": Entry("QP", methods.qp, no_options),
}
FREE = (*HEURISTICS, "tsv_merge", "iso_c", "wudi")  # of the baselines, those that need no data
# examples per task, as a gradient for every one would take longer than all else
MOST = {"fisher": 64, "adamerging": 64}
SIZES = (4, 8, 16, 32, 64, 128, 256, 512)


def specs(experts: int, seed: int, largest: int) -> dict[str, list[Spec]]:
    """All merges that may be drawn, by kind: every baseline with every option of its grid in
    ``baselines``, on sets of every size up to the ``largest``."""
    sizes = [size for size in SIZES if size <= largest]
    return {
        HEURISTIC: list(_baseline_specs(HEURISTIC, HEURISTICS, experts, seed, sizes)),
        BASELINE: list(_baseline_specs(BASELINE, BASELINES, experts, seed, sizes)),
        PROGRAMME: list(_programme_specs(sizes)),
        BAD: list(_bad_specs(seed)),
    }


def _baseline_specs(kind: str, names, experts: int, seed: int, sizes: list[int]):
    """Every option of the grid of every method, but for the soup by another name."""
    uniform = {
        "task_arithmetic": {"scale": 1 / experts},
        "weighted_soup": {"weights": [1 / experts] * experts},
    }
    for method in names:
        for options in CALLS[method].grid(experts, seed):
            if options == uniform.get(method):
                continue
            if method in FREE:
                yield Spec(kind, _label(method, options), method, options)
                continue
            for size in sizes:
                if size <= MOST.get(method, size):
                    yield Spec(kind, _label(method, options), method, options, size, "own")


def _programme_specs(sizes: list[int]):
    """The programme over every family, with every ridge, on every kind of inputs and targets."""
    passes = ({"inputs": "expert"}, {"targets": "propagated"}, {"targets": "own"})
    for family in FAMILIES:
        for ridge in (0.0, 1e-2, 1.0, "cross-fitted"):
            for inputs_or_targets in passes:
                options = {"basis": family, "ridge": ridge, **inputs_or_targets}
                for size in sizes:
                    yield Spec(PROGRAMME, _label("qp", options), "qp", options, size, "own")


def _bad_specs(seed: int):
    """Merges against the updates, far beyond them or along none of them, and such as are solved on
    two examples or on examples that tell nothing of the task."""

    def bad(method, options, size=0, source="none"):
        return Spec(BAD, _label(method, options), method, options, size, source)

    yield bad("task_arithmetic", {"scale": -0.3})
    yield bad("task_arithmetic", {"scale": 1.5})
    yield bad("random", {"seed": seed})
    overfitted = {"basis": "elements", "ridge": 0.0, "prior": 0.0, "folds": 1}
    yield bad("qp", overfitted, size=2, source="own")
    for method, options in (
        ("regmean", {}),
        ("qp", {"basis": "elements"}),
        ("qp", {"basis": "rows"}),
    ):
        for source in ("foreign", "scrambled"):
            yield bad(method, options, size=32, source=source)


def _label(method: str, options: dict) -> str:
    """What tells methods apart in tables and in the search for the best fixed one: sizes, ridges
    and strengths do not."""
    return qp_label(options["basis"]) if method == "qp" else CALLS[method].label


def subsets(tasks: list[str], sizes, seed: int) -> list[list[str]]:
    """One subset of a suite's tasks of each size, in the suite's order."""
    chosen = []
    for size in sizes:
        generator = training.seeded(seed, str(size), "subset")
        places = torch.randperm(len(tasks), generator=generator)[:size].sort().values
        chosen.append([tasks[place] for place in places.tolist()])
    return chosen


def drawn(tasks: list[str], seed: int, counts, largest: int) -> list[Spec]:
    """The merges of one problem: so many of each kind, without repetition; methods are as likely as
    each other, however many options they have."""
    chosen, generator = [], training.seeded(seed, *tasks, "population")
    kinds = specs(len(tasks), seed, largest).values()
    for count, possible in zip(counts, kinds, strict=True):
        labels = [spec.label for spec in possible]
        odds = torch.tensor([1 / labels.count(label) for label in labels], dtype=torch.float64)
        places = torch.multinomial(odds, count, generator=generator)
        chosen += [possible[place] for place in places.tolist()]
    return chosen


def scrambled(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """A batch (B, …) with the entries of every argument in random places; what is padding stays
    padding."""
    mask = batch.get("attention_mask")
    mixed = {}
    for name, value in batch.items():
        if mask is not None and value.shape == mask.shape:
            real = mask.bool()
        else:
            real = torch.ones_like(value, dtype=torch.bool)
        entries = value[real]
        order = torch.randperm(len(entries), generator=generator).to(entries.device)
        mixed[name] = value.clone()
        mixed[name][real] = entries[order]
    return mixed


def examples(suite: Suite, tasks: list[str], spec: Spec) -> dict[str, list[dict]] | None:
    """What a merge is solved on, batches by task; None for one that needs no data."""
    if spec.source == "none":
        return None
    following = dict(zip(suite.tasks, suite.tasks[1:] + suite.tasks[:1]))
    batches = {}
    for task in tasks:
        source = following[task] if spec.source == "foreign" else task
        batches[task] = suite.calibration(spec.size, tasks=[source])[source]
    if spec.source == "scrambled":
        generator = training.seeded(suite.seed, "scrambled")
        for task, ordered in batches.items():
            batches[task] = [scrambled(batch, generator) for batch in ordered]
    return batches


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
        example, plain and as the head sees them, agreement, entropy.

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


def _flat_update(state, base) -> Tensor:
    """Difference of two state dicts as one vector, (P,) float64, buffers of integers left out."""
    parts = [
        (state[name].double() - value.double()).flatten()
        for name, value in base.items()
        if value.is_floating_point()
    ]
    return torch.cat(parts)


def _sizes(judge: Judge, state, tasks) -> dict[str, float]:
    """Trivial predictors: mean cosine between task vectors, and the update's norm and distance from
    the soup's, over the soup's norm."""
    vectors = torch.stack([_flat_update(judge.suite.experts[task], judge.base) for task in tasks])
    update, soup = _flat_update(state, judge.base), vectors.mean(0)
    unit = normalize(vectors, dim=1)
    between = (unit @ unit.T)[~torch.eye(len(tasks), dtype=torch.bool)]
    return {
        "cosine": float(between.mean()),
        "norm": float(update.norm() / soup.norm()),
        "distance": float((update - soup).norm() / soup.norm()),
    }


def _mean(values) -> float | None:
    """Mean of the values that are not None; None where there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _captured(ends: dict, form: str) -> float:
    """Captured energy, ``output`` or as the ``head`` sees it, from squared errors."""
    return 1 - ends[form] / ends[f"{form}_base"]


def _pooled(ends: list[dict]) -> dict[str, float]:
    """Captured energies of all tasks together, and the mean of what else ``Judge.ends`` tells of
    each."""
    total = {}
    for key in ends[0]:
        total[key] = sum(of_task[key] for of_task in ends)
    return {
        "output": _captured(total, "output"),
        "head": _captured(total, "head"),
        "agreement": total["agreement"] / len(ends),
        "entropy": total["entropy"] / len(ends),
    }


def measured(judge: Judge, tasks: list[str], spec: Spec) -> dict:
    """One merge made and compared to all that a ``Judge`` knows; energies by task are in ``tasks``,
    their pools beside."""
    suite = judge.suite
    experts, batches = {task: suite.experts[task] for task in tasks}, examples(suite, tasks, spec)
    merge = CALLS[spec.method].bound(suite)(suite.base, experts, batches, **spec.options)
    state, solved_on = merge.state_dict, batches or judge.seen
    place = {"own": (0, spec.size), "none": (0, AUDITED)}.get(spec.source)
    in_sample, disjoint = {}, {}
    for task in tasks:
        in_sample[task] = judge.ends(state, task, solved_on[task], place)
        unseen = judge.disjoint[task]
        disjoint[task] = judge.ends(state, task, unseen, (DISJOINT, AUDITED))
    row = {"seed": suite.seed, "experts": len(tasks), **asdict(spec)}
    row["layers"] = _layers(judge, state, tasks)
    row["energies"] = {
        **{f"{form}.in_sample": v for form, v in _pooled(list(in_sample.values())).items()},
        **{f"{form}.disjoint": v for form, v in _pooled(list(disjoint.values())).items()},
        "static.disjoint": _mean(row["layers"]["static"].values()),
        "layers.disjoint": _mean(row["layers"]["layers"].values()),
        "solved.in_sample": _mean(r.get("captured") for r in merge.table),
        "cross_fitted.in_sample": _mean(r.get("cross_fitted") for r in merge.table),
    }
    row["trivial"] = _sizes(judge, state, tasks)
    row["tasks"] = {task: _of_task(judge, state, task, disjoint[task]) for task in tasks}
    row["accuracy"] = sum(v["accuracy"] for v in row["tasks"].values()) / len(tasks)
    return row


def _layers(judge: Judge, state, tasks) -> dict[str, dict[str, float]]:
    """Captured energies by layer, ``static`` in closed form and on the merge's own inputs
    (``layers``), and the layers' residual energies."""
    shares, energy = judge.static(state, tasks)
    audited = judge.strict(state, tasks)["layers"]
    strict = {name: share for name, share in audited.items() if share is not None}
    return {"static": shares, "layers": strict, "energy": energy}


def _of_task(judge: Judge, state, task: str, disjoint: dict[str, float]) -> dict:
    """Accuracies of a merge on one task, and its captured energies on disjoint examples."""
    accuracy, _ = judge.accuracy(state, task, "test")
    _, right = judge.accuracy(state, task, "validation")
    return {
        "accuracy": accuracy,
        "validation": "".join(map(str, right)),
        "expert": float(judge.right[task, "validation"]),
        "output": _captured(disjoint, "output"),
        "head": _captured(disjoint, "head"),
    }


def population(name: str, tier: str, seeds: int, device="cpu", first_seed=0) -> list[dict]:
    """All merges of a suite that the tier's plan draws, cached one by one: rows as of
    :func:`measured`, with their ``suite`` and ``problem``."""
    planned, rows = plan(tier), []
    for seed in range(first_seed, first_seed + seeds):
        suite = load(name, planned.suites or tier, seed, device, progress=False)
        for tasks in subsets(suite.tasks, planned.subsets, seed):
            place = {"suite": name, "problem": f"{name} {seed} {'+'.join(tasks)}"}
            for spec in drawn(tasks, seed, planned.merges, planned.largest):
                rows.append(_cached(suite, tasks, spec, planned.tested) | place)
    return rows


def _cached(suite: Suite, tasks, spec: Spec, tested: int) -> dict:
    def make():
        judge = suite.cached(("judge", tested), lambda: Judge(suite, tested))
        return measured(judge, tasks, spec)

    return benchmark.kept(suite, "population", [tasks, asdict(spec), tested], make)
