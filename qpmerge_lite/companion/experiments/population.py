"""The population on which the diagnostic is tried: merges of subsets of a suite's experts, good
ones, odd ones and bad ones.

Of every merge it is kept what can be known without labels (captured energies, agreement with the
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

ENERGIES = ("in_sample", "disjoint")
HEURISTIC, NEIGHBOUR, PROGRAMME, BAD = KINDS = (
    "heuristics",
    "neighbours",
    "programme",
    "made to be bad",
)
APART = 512  # disjoint examples come after so many of the draw, which no merge goes beyond
AUDITED, LAYERED, VALIDATED = (
    64,
    32,
    128,
)  # examples per task: end to end, layer by layer, with labels
# labelled examples judged at a time: text of like length is seldom padded far, and activations stay
# in the cache
CHUNK = 128


def _kind(method: str) -> str:
    return (
        PROGRAMME
        if method.startswith("qp_")
        else NEIGHBOUR
        if method in benchmark.NEIGHBOURS
        else HEURISTIC
    )


def one_layer(results: list[dict]):
    """Merges of ``single.results`` as a ``pandas.DataFrame``: a row per method and problem,
    energies in closed form."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "suite": r["suite"],
                "problem": f"{r['suite']} {r['layer']} {r['seed']}",
                "layer": r["layer"],
                "seed": r["seed"],
                "method": m["method"],
                "label": m["label"],
                "kind": _kind(m["method"]),
                "accuracy": m["normalised"]["mean"],
                "validation": m["validation"],
                **m["captured"],
            }
            for r in results
            for m in r["methods"]
            if "captured" in m
        ]
    )


def many_layers(name: str, results: list[dict], energy: str):
    """Merges of ``compare.compare`` likewise; ``energy`` is ``layers`` (their mean) or ``output``
    (end to end)."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "suite": name,
                "problem": f"{name} {r['seed']}",
                "seed": r["seed"],
                "method": r["method"],
                "label": r["label"],
                "kind": _kind(r["method"]),
                "accuracy": r["normalised"]["mean"],
                "validation": r["validation"],
                **{where: r["captured"][where][energy] for where in ENERGIES},
            }
            for r in results
            if "captured" in r
        ]
    )


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


CALLS = benchmark.ENTRIES | {
    "random": benchmark.Entry("random coefficients", random_coefficients, lambda *_: []),
    "qp": benchmark.Entry("QP", methods.qp, lambda *_: []),
}
FREE = (
    *benchmark.HEURISTICS,
    "tsv_merge",
    "iso_c",
    "wudi",
)  # of the baselines, those that need no data
MOST = {
    "fisher": 64,
    "adamerging": 64,
}  # examples per task, as a gradient for every one would take longer than all else


def _specs(experts: int, seed: int, largest: int) -> dict[str, list[Spec]]:
    """All merges that may be drawn, by kind: every baseline with every option of its grid in
    ``compare``, on sets of every size."""
    sizes = [n for n in (4, 8, 16, 32, 64, 128, 256, 512) if n <= largest]
    soup = {
        "task_arithmetic": {"scale": 1 / experts},
        "weighted_soup": {"weights": [1 / experts] * experts},
    }  # by other names
    where = lambda m: (
        [(0, "none")] if m in FREE else [(n, "own") for n in sizes if n <= MOST.get(m, n)]
    )
    aims = [{"inputs": "expert"}, {"targets": "propagated"}, {"targets": "own"}]
    qps = [
        {"basis": b, "ridge": r} | aim
        for b in benchmark.FAMILIES
        for r in (0.0, 1e-2, 1.0, "cross-fitted")
        for aim in aims
    ]
    poor = [
        ("task_arithmetic", {"scale": -0.3}, 0, "none"),
        ("task_arithmetic", {"scale": 1.5}, 0, "none"),
        ("random", {"seed": seed}, 0, "none"),
        ("qp", {"basis": "elements", "ridge": 0.0, "prior": 0.0, "folds": 1}, 2, "own"),
        *(
            (m, o, 32, s)
            for m, o in (("regmean", {}), ("qp", {"basis": "elements"}), ("qp", {"basis": "rows"}))
            for s in ("foreign", "scrambled")
        ),
    ]
    spec = lambda kind, method, options, *source: Spec(
        kind, _label(method, options), method, options, *source
    )
    baselines = lambda kind, names: [
        spec(kind, m, o, *at)
        for m in names
        for o in CALLS[m].grid(experts, seed)
        if o != soup.get(m)
        for at in where(m)
    ]
    return {
        HEURISTIC: baselines(HEURISTIC, benchmark.HEURISTICS),
        NEIGHBOUR: baselines(NEIGHBOUR, benchmark.NEIGHBOURS),
        PROGRAMME: [spec(PROGRAMME, "qp", o, n, "own") for o in qps for n in sizes],
        BAD: [spec(BAD, *p) for p in poor],
    }


def _label(method: str, options: dict) -> str:
    """What tells methods apart in tables and in the search for the best fixed one: sizes, ridges
    and strengths do not."""
    return f"QP {options['basis'].replace('_', ' ')}" if method == "qp" else CALLS[method].label


def subsets(tasks: list[str], sizes, seed: int) -> list[list[str]]:
    """One subset of a suite's tasks of each size, in the suite's order."""
    chosen = lambda k: (
        torch.randperm(len(tasks), generator=training.seeded(seed, str(k), "subset"))[:k]
        .sort()
        .values.tolist()
    )
    return [[tasks[i] for i in chosen(k)] for k in sizes]


def drawn(tasks: list[str], seed: int, counts, largest: int) -> list[Spec]:
    """The merges of one problem: so many of each kind, without repetition; methods are as likely as
    each other, however many options they have."""
    found, generator = [], training.seeded(seed, *tasks, "population")
    for count, specs in zip(counts, _specs(len(tasks), seed, largest).values(), strict=True):
        labels = [s.label for s in specs]
        odds = torch.tensor([1 / labels.count(label) for label in labels], dtype=torch.float64)
        found += [specs[i] for i in torch.multinomial(odds, count, generator=generator).tolist()]
    return found


def scrambled(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """A batch with the entries of every argument in random places; what is padding stays
    padding."""
    mask = batch.get("attention_mask")
    mixed = {}
    for name, value in batch.items():
        kept = (
            mask.bool()
            if mask is not None and value.shape == mask.shape
            else torch.ones_like(value, dtype=torch.bool)
        )
        entries, mixed[name] = value[kept], value.clone()
        mixed[name][kept] = entries[
            torch.randperm(len(entries), generator=generator).to(entries.device)
        ]
    return mixed


def examples(suite: Suite, tasks: list[str], spec: Spec) -> dict[str, list[dict]] | None:
    """What a merge is solved on, batches by task; None for one that needs no data."""
    if spec.source == "none":
        return None
    following = dict(zip(suite.tasks, suite.tasks[1:] + suite.tasks[:1]))
    source = {t: following[t] if spec.source == "foreign" else t for t in tasks}
    batches = {t: suite.calibration(spec.size, tasks=[s])[s] for t, s in source.items()}
    if spec.source == "scrambled":
        generator = training.seeded(suite.seed, "scrambled")
        batches = {t: [scrambled(b, generator) for b in parts] for t, parts in batches.items()}
    return batches


@torch.no_grad()
def features(suite: Suite, state, batches) -> Tensor:
    """Features (N, d) of unlabelled batches under a state dict, in the precision of the suite's
    heads."""
    with training.autocast(suite.device, suite.precision):
        found = torch.cat([functional_call(suite.base, dict(state), (), b) for b in batches])
    return found.to(next(suite.base.parameters()))


class Judge:
    """What all merges of one suite are held against: features of base and experts, labels, moments;
    made once.

    Args:
        tested: most test examples of a task.
    """

    def __init__(self, suite: Suite, tested: int):
        self.suite, self.base = suite, suite.base.state_dict()
        self.seen, self.apart, self._known = (
            suite.calibration(AUDITED),
            suite.calibration(AUDITED, skip=APART),
            {},
        )
        self.strict = Auditor(suite.base, suite.experts, suite.calibration(LAYERED, skip=APART))
        self.rows = {
            (t, split): self._spread(t, split, most)
            for t in suite.tasks
            for split, most in (("validation", VALIDATED), ("test", tested))
        }
        self.right = {
            key: self._correct(key, suite.experts[key[0]]).double().mean() for key in self.rows
        }

    def _spread(self, task, split, most):
        inputs, labels = self.suite.tensors(task, split)
        rows = torch.arange(len(labels))[:: max(1, len(labels) // most)][:most]
        batches = training.batches(
            {k: v[rows].to(self.suite.device) for k, v in inputs.items()},
            min(self.suite.chunk, CHUNK),
        )
        return [training.trim(b) for b in batches], labels[rows].to(self.suite.device)

    def known(self, task, batches, place=None) -> tuple[Tensor, Tensor]:
        """Features of base and expert on batches of a task; held where these are told by a
        ``place``."""
        if (task, place) in self._known:
            return self._known[task, place]
        found = (
            features(self.suite, self.base, batches),
            features(self.suite, self.suite.experts[task], batches),
        )
        return self._known.setdefault((task, place), found) if place else found

    def _correct(self, key, state) -> Tensor:
        batches, labels = self.rows[key]
        return (
            self.suite.classifiers()[key[0]](features(self.suite, state, batches)).argmax(1)
            == labels
        )

    def accuracy(self, state, task, split) -> tuple[float, list[int]]:
        """Accuracy over the expert's, and which examples were right."""
        right = self._correct((task, split), state)
        return float(right.double().mean() / self.right[task, split]), right.int().tolist()

    def ends(self, state, task, batches, place=None) -> dict[str, float]:
        """End to end, on unlabelled batches of one task: squared errors of merge and base per
        example, plain and as the head sees them, agreement, entropy."""
        made, (plain, aim) = features(self.suite, state, batches), self.known(task, batches, place)
        head = self.suite.classifiers()[task]
        V = self.suite.heads[task]["weight"]
        V = V - V.mean(0)
        errors = lambda z: float(z.double().square().sum(1).mean())
        predicted = head(made).softmax(1)
        return {
            "output": errors(made - aim),
            "output_base": errors(plain - aim),
            "head": errors((made - aim) @ V.mT),
            "head_base": errors((plain - aim) @ V.mT),
            "agreement": float((predicted.argmax(1) == head(aim).argmax(1)).double().mean()),
            "entropy": float(-torch.special.entr(predicted).sum(1).mean() / math.log(len(V))),
        }

    def static(self, state, tasks) -> tuple[dict[str, float], dict[str, float]]:
        """Captured energy of every layer on the experts' own inputs, in closed form on disjoint
        examples, and the layers' residual energies."""
        shares, energy = {}, {}
        for name, (view, moments, _) in self.suite.layers(AUDITED, APART).items():
            pooled = moments.only(tasks).pool()
            if pooled.energy:
                shares[name], energy[name] = (
                    pooled.captured(view.matrix(state) - view.matrix(self.base)),
                    pooled.energy,
                )
        return shares, energy


def _sizes(judge: Judge, state, tasks) -> dict[str, float]:
    """Trivial predictors: mean cosine between task vectors, and the update's norm and distance from
    the soup's, over the soup's norm."""
    flat = lambda s: torch.cat(
        [
            (s[k].double() - v.double()).flatten()
            for k, v in judge.base.items()
            if v.is_floating_point()
        ]
    )
    vectors = torch.stack([flat(judge.suite.experts[t]) for t in tasks])
    unit, update, soup = normalize(vectors, dim=1), flat(state), vectors.mean(0)
    between = (unit @ unit.T)[~torch.eye(len(tasks), dtype=torch.bool)]
    return {
        "cosine": float(between.mean()),
        "norm": float(update.norm() / soup.norm()),
        "distance": float((update - soup).norm() / soup.norm()),
    }


def _mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def _pooled(ends: list[dict]) -> dict[str, float]:
    """Captured energies of all tasks together, and the mean of what else ``Judge.ends`` tells of
    each."""
    total = {key: sum(e[key] for e in ends) for key in ends[0]}
    return {form: 1 - total[form] / total[f"{form}_base"] for form in ("output", "head")} | {
        form: total[form] / len(ends) for form in ("agreement", "entropy")
    }


def measured(judge: Judge, tasks: list[str], spec: Spec) -> dict:
    """One merge made and held against everything, see ``Judge``; energies by task are in ``tasks``,
    their pools beside."""
    suite = judge.suite
    experts, batches = {t: suite.experts[t] for t in tasks}, examples(suite, tasks, spec)
    merge = CALLS[spec.method].bound(suite)(suite.base, experts, batches, **spec.options)
    state, solved_on = merge.state_dict, batches or judge.seen
    place = {"own": (0, spec.size), "none": (0, AUDITED)}.get(spec.source)
    ends = {
        "in_sample": {t: judge.ends(state, t, solved_on[t], place) for t in tasks},
        "disjoint": {t: judge.ends(state, t, judge.apart[t], (APART, AUDITED)) for t in tasks},
    }
    row = {"seed": suite.seed, "experts": len(tasks), **asdict(spec), "energies": {}}
    for where, found in ends.items():
        row["energies"] |= {
            f"{form}.{where}": value for form, value in _pooled(list(found.values())).items()
        }
    shares, energy = judge.static(state, tasks)
    strict = judge.strict(state, tasks)["layers"]
    row["layers"] = {
        "static": shares,
        "layers": {k: v for k, v in strict.items() if v is not None},
        "energy": energy,
    }
    row["energies"] |= {
        f"{form}.disjoint": _mean(row["layers"][form].values()) for form in ("static", "layers")
    }
    row["energies"] |= {
        f"{form}.in_sample": _mean(r[key] for r in merge.table if r.get(key) is not None)
        for form, key in (("solved", "captured"), ("cross_fitted", "cross_fitted"))
    }
    row["trivial"] = _sizes(judge, state, tasks)
    row["tasks"] = {}
    for t in tasks:
        (test, _), (_, bits) = (
            judge.accuracy(state, t, "test"),
            judge.accuracy(state, t, "validation"),
        )
        row["tasks"][t] = {
            "accuracy": test,
            "validation": "".join(map(str, bits)),
            "expert": float(judge.right[t, "validation"]),
            **{
                form: 1 - ends["disjoint"][t][form] / ends["disjoint"][t][f"{form}_base"]
                for form in ("output", "head")
            },
        }
    row["accuracy"] = sum(v["accuracy"] for v in row["tasks"].values()) / len(tasks)
    return row


def population(name: str, tier: str, seeds: int, device="cpu", first_seed=0) -> list[dict]:
    """All merges of a suite that the tier's plan draws, kept one by one, as of :func:`measured`,
    with their ``suite`` and ``problem``."""
    planned, rows = plan(tier), []
    for seed in range(first_seed, first_seed + seeds):
        suite = load(name, tier, seed, device, progress=False)
        for tasks in subsets(suite.tasks, planned.subsets, seed):
            for spec in drawn(tasks, seed, planned.merges, planned.largest):
                rows.append(
                    _kept(suite, tasks, spec, planned.tested)
                    | {"suite": name, "problem": f"{name} {seed} {'+'.join(tasks)}"}
                )
    return rows


def _kept(suite: Suite, tasks, spec: Spec, tested: int) -> dict:
    def make():
        if ("judge", tested) not in suite._held:
            suite._held["judge", tested] = Judge(suite, tested)
        return measured(suite._held["judge", tested], tasks, spec)

    return benchmark.kept(suite, "population", [tasks, asdict(spec), tested], make)
