"""The single-layer setting: experts that were fine-tuned in one layer of the encoder, merged there
by every method and basis.

Their inputs are the base's, whatever is merged, so one pass over the calibration data gives the
moments for all programmes, own and propagated targets agree, and the loss of any merge is known in
closed form on any moments.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ... import methods
from ...assess import layer_moments
from ...diagnostic import gap
from ...engine.views import View
from ...merge import Merge, average
from ...moments import Moments
from ..suites import Suite, load, single_layers, task_names
from . import benchmark
from .synthetic import promises

FAMILIES = (
    "layer",
    "groups",
    "rows",
    "rotated_rows",
    "columns",
    "rotated_columns",
    "singular",
    "elements",
)
HEADS = 4  # groups of rows
TASKS = 3  # the first ones of a suite
ANYWHERE = (
    "fisher",
    "tsv_merge",
    "iso_c",
    "wudi",
    "adamerging",
)  # neighbours that merge whole models, whatever differs


@dataclass(frozen=True)
class Problem:
    """One layer of one suite: what its programmes are made of, on calibration data and on as many
    disjoint ones."""

    suite: Suite
    view: View
    moments: Moments
    disjoint: Moments
    updates: Tensor
    scope: str = "all"

    @classmethod
    def of(cls, suite: Suite, size: int, scope: str = "all") -> Problem:
        """The problem of a suite loaded with ``layer``; ``size`` examples per task on either
        side."""
        gather = lambda skip: layer_moments(
            suite.base,
            suite.experts,
            suite.calibration(size, skip=skip),
            (suite.layer,),
            scope=scope,
        )[suite.layer]
        view, moments, updates = gather(0)
        return cls(suite, view, moments, gather(size)[1], updates, scope)

    def update(self, state) -> Tensor:
        """``W - W0`` (g, m, n) of a merged state dict."""
        return self.view.matrix(state) - self.view.matrix(self.suite.base.state_dict())

    def solve(self, solver) -> Merge:
        """The merge that a layer solver finds; a bias outside the scope is averaged."""
        update, row = solver(self.moments, self.updates)
        state, base = average(self.suite.base, self.suite.experts), self.suite.base.state_dict()
        parts = self.view.parts(self.view.matrix(base) + update)
        return Merge(
            state | {k: v.to(base[k]) for k, v in parts.items()}, [{"layer": self.view.name, **row}]
        )


def _solvers(problem: Problem, weights: Problem) -> dict:
    """name -> (label, candidate merges as (options, merge)); α and FeatCal's constants are tuned on
    validation data, ridges need no label."""
    entries = {
        "regmean": (
            "RegMean",
            [({"alpha": a}, weights.solve(methods.RegMean(a))) for a in benchmark.ALPHAS],
        ),
        "featcal": (
            "FeatCal",
            [
                (o, problem.solve(methods.FeatCal(**o)))
                for o in benchmark.ENTRIES["featcal"].grid(TASKS, 0)
            ],
        ),
        "lot": ("LOT", [({}, problem.solve(methods.QP("elements", ridge=0.0, prior=0.0)))]),
    }
    for family in FAMILIES:
        solver = methods.QP(basis=family, groups=HEADS if family == "groups" else None)
        entries[f"qp_{family}"] = f"QP {family.replace('_', ' ')}", [({}, problem.solve(solver))]
    return entries


def _chosen(suite: Suite, problem: Problem, size: int):
    """Every method with its merge, options and validation scores."""
    for name in ("base", *benchmark.HEURISTICS, *ANYWHERE):
        entry = benchmark.ENTRIES[name]
        yield name, entry.label, *entry.tuned(suite, suite.calibration(size))
    for name, (label, candidates) in _solvers(problem, Problem.of(suite, size, "weights")).items():
        scores = [
            suite.normalised(merge.state_dict, "validation")["mean"] for _, merge in candidates
        ]
        options, merge = candidates[scores.index(max(scores))]
        yield name, label, merge, options, scores


def facts(problem: Problem) -> dict[str, float]:
    """What calibration moments promise of turning the rows before anything is merged, see
    ``synthetic.compare``."""
    return promises(problem.updates, problem.moments.pool())


def result(suite: Suite, size: int) -> dict:
    """All methods on one layer, kept: ``facts``, and ``methods``, a list as of ``compare.result``
    with captured energies in closed form."""

    def make():
        problem, found = Problem.of(suite, size), []
        pools = {"in_sample": problem.moments.pool(), "disjoint": problem.disjoint.pool()}
        for name, label, merge, options, scores in _chosen(suite, problem, size):
            row = benchmark.judged(suite, name, label, merge, options, scores)
            row["captured"] = {
                where: pool.captured(problem.update(merge.state_dict))
                for where, pool in pools.items()
            }
            row["certificate"] = (
                gap(pools["in_sample"], problem.update(merge.state_dict))
                / pools["in_sample"].energy
            )
            found.append(row | {"ridge": merge.table[0].get("ridge") if merge.table else None})
        found.append(benchmark.ceilings(suite)[1])
        return {"layer": suite.layer, "seed": suite.seed, "facts": facts(problem), "methods": found}

    return benchmark.kept(suite, "single", [suite.layer, size, FAMILIES, benchmark.ALPHAS], make)


def results(
    name: str, seeds: int, size: int, tier="smoke", device="cpu", first_seed=0
) -> list[dict]:
    """Results of every layer and seed of a suite; seeds outside, so that layers of a seed share
    their data."""
    return [
        result(
            load(
                name,
                tier,
                seed,
                device,
                progress=False,
                layer=layer,
                tasks=task_names(name, tier)[:TASKS],
            ),
            size,
        )
        | {"suite": name}
        for seed in range(first_seed, first_seed + seeds)
        for layer in single_layers(name, tier)
    ]
