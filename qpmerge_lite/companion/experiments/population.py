"""The population on which the diagnostic is tried: merges of subsets of a suite's experts, good
ones, odd ones and bad ones.

Of every merge it is recorded what can be known without labels (captured energies and divergence,
agreement with the experts, entropy, sizes of updates), what a few labels would say, and how
accurate it is on test data.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..suites import Suite, load, plan
from . import benchmark, judging
from .judging import Judge
from .merge_specs import BAD as BAD
from .merge_specs import CALLS, Spec, drawn, examples, kind_of, subsets
from .merge_specs import HEURISTIC as HEURISTIC
from .merge_specs import PROGRAMME as PROGRAMME
from .trial.basis_capture import of_basis

ENERGIES = ("in_sample", "disjoint")


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
    """What a merge takes away of the base's squared errors, of the ``output`` or as the ``head``
    sees it, or of its ``divergence``."""
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
        "divergence": _captured(total, "divergence"),
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
    place = {"own": (0, spec.size), "none": (0, judging.AUDITED)}.get(spec.source)
    in_sample, disjoint = {}, {}
    for task in tasks:
        in_sample[task] = judge.ends(state, task, solved_on[task], place)
        unseen = judge.disjoint[task]
        disjoint[task] = judge.ends(state, task, unseen, (judging.DISJOINT, judging.AUDITED))
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


def population(name: str, seed: int, tier="smoke", device="cpu") -> list[dict]:
    """An experiment as of ``evidence``: all merges of a suite and seed that the tier's plan draws,
    cached one by one; rows as of :func:`measured`, with their ``suite`` and ``problem``, and of the
    programme's merges the ``bases`` as of ``basis_capture.of_basis``."""
    planned, rows = plan(tier), []
    suite = load(name, tier, seed, device, progress=False)
    for tasks in subsets(suite.tasks, planned.subsets, seed):
        place = {"suite": name, "problem": f"{name} {seed} {'+'.join(tasks)}"}
        for spec in drawn(tasks, seed, planned.merges, planned.largest):
            row = _cached(suite, tasks, spec, planned.tested) | place
            if spec.kind == PROGRAMME:
                row["bases"] = of_basis(suite, tasks, spec.options["basis"], spec.size)
            rows.append(row)
    return rows


def _cached(suite: Suite, tasks, spec: Spec, tested: int) -> dict:
    def make():
        judge = suite.cached(("judge", tested), lambda: Judge(suite, tested))
        return measured(judge, tasks, spec)

    return benchmark.kept(suite, "population", [tasks, asdict(spec), tested], make)
