"""Model merging by output-space projection: a convex quadratic programme over residual updates."""

from .assess import audit, certify, layer_moments
from .bases import FAMILIES, build
from .datafree import (
    breadcrumbs,
    dare,
    della,
    greedy_soup,
    iso_c,
    model_stock,
    slerp,
    soup,
    task_arithmetic,
    ties,
    tsv_merge,
    wudi,
)
from .diagnostic import captured_energy, cross_fitted, disjoint, gap, optimism, spectral_capture
from .engine.recipes import Recipe
from .gradient import adamerging, fisher
from .merge import Merge
from .methods import featcal, lot, many, qp, regmean, regmean_plus_plus, sketched, tune
from .moments import Moments, Pooled
from .programme import Programme, programme
from .sequential import merge_sequentially, merge_together
from .solve import Factored, Solution, minimise, minimise_constrained
from .solvers import QP, FeatCal, RegMean, Sketched

__version__ = "0.1.0"
__all__ = [
    "FAMILIES",
    "Factored",
    "FeatCal",
    "Merge",
    "Moments",
    "Pooled",
    "Programme",
    "QP",
    "Recipe",
    "RegMean",
    "Sketched",
    "Solution",
    "adamerging",
    "audit",
    "breadcrumbs",
    "build",
    "captured_energy",
    "certify",
    "cross_fitted",
    "dare",
    "della",
    "disjoint",
    "featcal",
    "fisher",
    "gap",
    "greedy_soup",
    "iso_c",
    "layer_moments",
    "lot",
    "many",
    "merge_sequentially",
    "merge_together",
    "minimise",
    "minimise_constrained",
    "model_stock",
    "optimism",
    "programme",
    "qp",
    "regmean",
    "regmean_plus_plus",
    "sketched",
    "slerp",
    "soup",
    "spectral_capture",
    "task_arithmetic",
    "ties",
    "tsv_merge",
    "tune",
    "wudi",
]
