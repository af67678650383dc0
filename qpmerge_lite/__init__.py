"""Model merging by output-space projection: a convex quadratic programme over residual updates."""
from .assess import audit, certify, layer_moments
from .bases import FAMILIES, build
from .datafree import breadcrumbs, dare, della, greedy_soup, iso_c, model_stock, slerp, soup, task_arithmetic, ties, tsv_merge, wudi
from .diagnostic import captured_energy, cross_fitted, disjoint, gap, optimism, spectral_capture
from .gradient import adamerging, fisher
from .methods import QP, FeatCal, RegMean, Sketched, featcal, lot, qp, regmean, regmean_plus_plus, sketched, tune
from .moments import Moments, Pooled
from .programme import Programme, programme
from .sequential import Merge, merge_sequentially
from .solve import Factored, Solution, minimise, minimise_constrained

__version__ = "0.1.0"
__all__ = ["FAMILIES", "Factored", "FeatCal", "Merge", "Moments", "Pooled", "Programme", "QP", "RegMean", "Sketched", "Solution",
           "adamerging", "audit", "breadcrumbs", "build", "captured_energy", "certify", "cross_fitted", "dare", "della", "disjoint",
           "featcal", "fisher", "gap", "greedy_soup", "iso_c", "layer_moments", "lot", "merge_sequentially", "minimise",
           "minimise_constrained", "model_stock", "optimism", "programme", "qp", "regmean", "regmean_plus_plus", "sketched", "slerp",
           "soup", "spectral_capture", "task_arithmetic", "ties", "tsv_merge", "tune", "wudi"]
