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
from .baselines import ALPHAS, ENTRIES, HEURISTICS, qp_label
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
# baselines that merge whole models, whatever differs
ANYWHERE = ("fisher", "tsv_merge", "iso_c", "dc_merge", "wudi", "esm", "adamerging")


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
        view, moments, updates = cls._gathered(suite, size, 0, scope)
        _, disjoint, _ = cls._gathered(suite, size, size, scope)
        return cls(suite, view, moments, disjoint, updates, scope)

    @staticmethod
    def _gathered(suite: Suite, size: int, skip: int, scope: str):
        """View, moments and updates of the suite's layer, on examples behind the first ``skip``."""
        batches = suite.calibration(size, skip=skip)
        layers = layer_moments(suite.base, suite.experts, batches, (suite.layer,), scope=scope)
        return layers[suite.layer]

    def update(self, state) -> Tensor:
        """``W - W0`` (g, m, n) of a merged state dict, in the layer's parameters."""
        return self.view.matrix(state) - self.view.matrix(self.suite.base.state_dict())

    def solve(self, solver) -> Merge:
        """The merge that a layer solver finds; a bias outside the scope is averaged."""
        update, row = solver(self.moments, self.updates)
        state, base = average(self.suite.base, self.suite.experts), self.suite.base.state_dict()
        for name, value in self.view.parts(self.view.matrix(base) + update).items():
            state[name] = value.to(base[name])
        return Merge(state, [{"layer": self.view.name, **row}])


def _candidates(problem: Problem, weights: Problem):
    """Methods that solve one layer, each with the merges that validation chooses from: α and
    FeatCal's constants; ridges need no label.

    Args:
        weights: the problem without the bias, which RegMean averages.
    Yields: name, label, [(options, merge)].
    """
    alphas = [({"alpha": alpha}, weights.solve(methods.RegMean(alpha))) for alpha in ALPHAS]
    yield "regmean", "RegMean", alphas
    grid = ENTRIES["featcal"].grid(TASKS, 0)
    constants = [(options, problem.solve(methods.FeatCal(**options))) for options in grid]
    yield "featcal", "FeatCal", constants
    yield "lot", "LOT", [({}, problem.solve(methods.QP("elements", ridge=0.0, prior=0.0)))]
    for family in FAMILIES:
        solver = methods.QP(basis=family, groups=HEADS if family == "groups" else None)
        yield f"qp_{family}", qp_label(family), [({}, problem.solve(solver))]


def _chosen(suite: Suite, problem: Problem, size: int):
    """Every method as validation tuned it.

    Yields: name, label, merge, options, validation scores of all candidates.
    """
    for name in ("base", *HEURISTICS, *ANYWHERE):
        entry = ENTRIES[name]
        yield name, entry.label, *entry.tuned(suite, suite.calibration(size))
    weights = Problem.of(suite, size, "weights")
    for name, label, candidates in _candidates(problem, weights):
        scores = [
            suite.normalised(merge.state_dict, "validation")["mean"] for _, merge in candidates
        ]
        options, merge = candidates[scores.index(max(scores))]
        yield name, label, merge, options, scores


def facts(problem: Problem) -> dict[str, float]:
    """What calibration moments promise of turning the rows before anything is merged, as of
    ``synthetic.promises``."""
    return promises(problem.updates, problem.moments.pool())


def result(suite: Suite, size: int) -> dict:
    """All methods on one layer, cached: ``facts``, and ``methods``, a list of rows like those of
    ``benchmark.result`` with captured energies in closed form."""

    def make():
        problem, rows = Problem.of(suite, size), []
        in_sample, disjoint = problem.moments.pool(), problem.disjoint.pool()
        for name, label, merge, options, scores in _chosen(suite, problem, size):
            update = problem.update(merge.state_dict)
            row = benchmark.judged(suite, name, label, merge, options, scores)
            row["captured"] = {
                "in_sample": in_sample.captured(update),
                "disjoint": disjoint.captured(update),
            }
            row["certificate"] = gap(in_sample, update) / in_sample.energy
            row["ridge"] = merge.table[0].get("ridge") if merge.table else None
            rows.append(row)
        rows.append(benchmark.ceilings(suite)[1])
        return {"layer": suite.layer, "seed": suite.seed, "facts": facts(problem), "methods": rows}

    return benchmark.kept(suite, "single", [suite.layer, size, FAMILIES, ALPHAS], make)


def each_layer(name: str, seed: int, tier="smoke", device="cpu", *, size: int) -> list[dict]:
    """An experiment as of ``evidence``: results of every layer of a suite and seed, rows as of
    :func:`result` with the ``suite``."""
    rows, tasks = [], task_names(name, tier)[:TASKS]
    for layer in single_layers(name, tier):
        suite = load(name, tier, seed, device, progress=False, layer=layer, tasks=tasks)
        rows.append(result(suite, size) | {"suite": name})
    return rows
