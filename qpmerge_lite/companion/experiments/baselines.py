"""The rows of a comparison: every method with the options that it is chosen from on validation
data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ... import datafree, gradient, methods
from ...merge import Merge
from ..suites import Suite, plan
from ..suites.suite import PART

FAMILIES = ("layer", "rows", "rotated_rows", "rotated_columns", "elements")
HEURISTICS = ("soup", "weighted_soup", "task_arithmetic", "ties", "dare")
BASELINES = (
    "fisher",
    "tsv_merge",
    "iso_c",
    "dc_merge",
    "wudi",
    "esm",
    "adamerging",
    "featcal",
    "lot",
    "regmean",
    "regmean_plus_plus",
)
ANCHOR = methods.FeatCal.anchor  # in units of the sum of the updates
WHOLE = 4  # entries of a grid that are all judged on the whole validation split
ALPHAS = (0.5, 0.9, 0.95, 1.0)


def qp_label(family: str) -> str:
    """How the programme over a family of bases is called in tables."""
    return f"QP {family.replace('_', ' ')}"


@dataclass(frozen=True)
class Entry:
    """One row of a comparison.

    Attributes:
        label: how the method is called in tables.
        call: ``call(base, experts, calibration, **options)`` gives the merge.
        grid: ``grid(experts, seed)`` gives the options that validation data choose from, for a
            number of experts and a seed.
        heads: whether the call takes the tasks' heads.
    """

    label: str
    call: Callable
    grid: Callable[[int, int], list[dict]]
    heads: bool = False

    def bound(self, suite: Suite) -> Callable:
        """The call, with the suite's heads where it takes them."""
        return partial(self.call, heads=suite.classifiers()) if self.heads else self.call

    def tuned(
        self, suite: Suite, calibration, tables: list | None = None
    ) -> tuple[Merge, dict, list[float | None]]:
        """The merge with the highest mean normalised validation accuracy, its options, and that
        accuracy for every entry of the grid.

        Of a grid of more than ``WHOLE`` entries only the better half on a part of the validation
        data is judged on all of them; the accuracy of the others is None.

        ``tables`` takes the table of every merge of the grid.
        """
        call = self.bound(suite)
        if self.call is gradient.fisher:  # the options of its grid do not change the gradients
            information = gradient.information(
                suite.base,
                suite.experts,
                calibration,
                heads=suite.classifiers(),
                seed=suite.seed,
            )
            call = partial(call, known=information)

        def score(state):
            return suite.normalised(state, "validation")["mean"]

        def score_on_part(state):
            return suite.over_experts(suite.evaluate(state, PART), "validation")["mean"]

        def note(merge):
            tables.append(merge.table)

        grid = plan(suite.tier).spread(self.grid(len(suite.experts), suite.seed))
        return methods.tune(
            call,
            grid,
            score,
            suite.base,
            suite.experts,
            calibration,
            None if tables is None else note,
            score_on_part if len(grid) > WHOLE else None,
        )


def unmerged(base, experts, calibration=None) -> Merge:
    """The base as it is, which every merge has to be better than."""
    return Merge(dict(base.state_dict()))


def product(**options) -> list[dict]:
    """All combinations of the values given for each option."""
    grid: list[dict] = [{}]
    for name, values in options.items():
        grid = [{**chosen, name: value} for chosen in grid for value in values]
    return grid


def no_options(experts: int, seed: int) -> list[dict]:
    """The grid of a method that has nothing to choose."""
    return [{}]


def weighted_soup_grid(experts: int, seed: int) -> list[dict]:
    """Weights of a soup: uniform, or one expert counted twice."""
    grid = [{"weights": [1 / experts] * experts}]
    for favourite in range(experts):
        weights = [1 / (experts + 1)] * experts
        weights[favourite] = 2 / (experts + 1)
        grid.append({"weights": weights})
    return grid


def task_arithmetic_grid(experts: int, seed: int) -> list[dict]:
    """Scales of the sum of the updates, one over the number of experts among them."""
    return product(scale=(0.05, 0.1, 1 / experts, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0))


def ties_grid(experts: int, seed: int) -> list[dict]:
    """Shares of the entries that TIES keeps, and scales."""
    return product(density=(0.02, 0.05, 0.2, 0.4), scale=(0.2, 0.35, 0.5, 0.7, 1.0))


def dare_grid(experts: int, seed: int) -> list[dict]:
    """Shares of the entries that DARE drops, and scales; the seed decides which.

    Below the smallest share there is only task arithmetic, which has a row of its own.
    """
    return product(drop=(0.1, 0.5, 0.9), scale=(0.05, 0.1, 1 / experts, 0.3), seed=(seed,))


def fisher_grid(experts: int, seed: int) -> list[dict]:
    """Fisher information with and without being normalised; the seed draws labels."""
    return product(normalise=(False, True), seed=(seed,))


def tsv_merge_grid(experts: int, seed: int) -> list[dict]:
    """Scales of TSV-M."""
    return product(scale=(0.2, 0.35, 0.5, 0.7, 1.0))


def iso_c_grid(experts: int, seed: int) -> list[dict]:
    """Scales of Iso-C."""
    return product(scale=(0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5))


def dc_merge_grid(experts: int, seed: int) -> list[dict]:
    """Shares of the entries that DC-Merge keeps, the published one first, and scales."""
    return product(density=(1e-3, 3e-4, 1e-2, 1e-1), scale=(1.0, 0.5, 2.0))


def esm_grid(experts: int, seed: int) -> list[dict]:
    """Scales of ESM, one pass and decomposition for all."""
    return product(scale=(0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5))


def wudi_grid(experts: int, seed: int) -> list[dict]:
    """Rates and scales of WUDI, its published ones first."""
    return [{"rate": 1e-5, "scale": 1.0}, *product(rate=(1e-4, 3e-4, 1e-3), scale=(0.2, 0.35, 0.7))]


def adamerging_grid(experts: int, seed: int) -> list[dict]:
    """Scales that AdaMerging starts from, and its rates."""
    pairs = ((0.05, 1e-2), (0.1, 5e-4), (0.1, 2e-3), (0.1, 1e-2), (0.3, 2e-2))
    return [{"scale": scale, "rate": rate, "seed": seed} for scale, rate in pairs]


def featcal_grid(experts: int, seed: int) -> list[dict]:
    """Ridges and anchors of FeatCal: the smaller the ridge, the further away an anchor may be."""
    return [
        *product(ridge=(0.25,), anchor=(0.25, ANCHOR, 1.2)),
        *product(ridge=(0.05,), anchor=(ANCHOR, 1.2, 2.5)),
        *product(ridge=(0.01,), anchor=(ANCHOR, 2.5, 4.0, 6.0)),
        *product(ridge=(0.002,), anchor=(2.5, 6.0)),
    ]


def regmean_grid(experts: int, seed: int) -> list[dict]:
    """How far RegMean keeps off-diagonal entries of the Gram matrices."""
    return product(alpha=ALPHAS)


def qp_grid(experts: int, seed: int, *, family: str, **scope) -> list[dict]:
    """Targets and priors of the programme over one family of bases."""
    options = {"basis": (family,), "targets": ("own", "propagated"), "prior": (1 / experts, ANCHOR)}
    return product(**options, **scope)


def qp_entry(family: str) -> Entry:
    """The programme over one family of bases."""
    return Entry(qp_label(family), methods.qp, partial(qp_grid, family=family))


ENTRIES = {
    "base": Entry("base", unmerged, no_options),
    "soup": Entry("uniform soup", datafree.soup, no_options),
    "weighted_soup": Entry("weighted soup", datafree.soup, weighted_soup_grid),
    "task_arithmetic": Entry("task arithmetic", datafree.task_arithmetic, task_arithmetic_grid),
    "ties": Entry("TIES", datafree.ties, ties_grid),
    "dare": Entry("DARE", datafree.dare, dare_grid),
    "fisher": Entry("Fisher", gradient.fisher, fisher_grid, heads=True),
    "tsv_merge": Entry("TSV-M", datafree.tsv_merge, tsv_merge_grid),
    "iso_c": Entry("Iso-C", datafree.iso_c, iso_c_grid),
    "dc_merge": Entry("DC-Merge", datafree.dc_merge, dc_merge_grid),
    "wudi": Entry("WUDI", datafree.wudi, wudi_grid),
    "esm": Entry("ESM", methods.esm, esm_grid),
    "adamerging": Entry("AdaMerging", gradient.adamerging, adamerging_grid, heads=True),
    "featcal": Entry("FeatCal", methods.featcal, featcal_grid),
    "lot": Entry("LOT", methods.lot, no_options),
    "regmean": Entry("RegMean", methods.regmean, regmean_grid),
    "regmean_plus_plus": Entry("RegMean++", methods.regmean_plus_plus, regmean_grid),
    **{f"qp_{family}": qp_entry(family) for family in FAMILIES},
    "qp_weights": Entry(
        qp_label("weights only"),
        methods.qp,
        partial(qp_grid, family="elements", scope=("weights",)),
    ),
}
