"""Model merging by output-space projection: a convex quadratic programme over residual updates."""
from .bases import FAMILIES, build
from .diagnostic import captured_energy, cross_fitted, disjoint, gap, spectral_capture
from .methods import QP, RegMean, dare, qp, regmean, regmean_plus_plus, soup, task_arithmetic, ties, tune
from .moments import Moments, Pooled
from .programme import Programme, programme
from .sequential import Merge, audit, layer_moments, merge_sequentially
from .solve import Factored, Solution, minimise, minimise_constrained

__version__ = "0.1.0"
__all__ = ["FAMILIES", "Factored", "Merge", "Moments", "Pooled", "Programme", "QP", "RegMean", "Solution", "audit", "build",
           "captured_energy", "cross_fitted", "dare", "disjoint", "gap", "layer_moments", "merge_sequentially", "minimise",
           "minimise_constrained", "programme", "qp", "regmean", "regmean_plus_plus", "soup", "spectral_capture",
           "task_arithmetic", "ties", "tune"]
