"""Model merging by output-space projection: a convex quadratic programme over residual updates."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

# Type checkers and editors read these imports; at run time each is made when its name is first
# used.
if TYPE_CHECKING:
    from .assess import audit, certify, layer_moments
    from .bases import FAMILIES, build
    from .choice.automatic import AutoMerge, auto
    from .datafree import (
        breadcrumbs,
        dare,
        dc_merge,
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
    from .spectral.essential import esm

__version__ = "1.0.0"
__all__ = [
    "AutoMerge",
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
    "auto",
    "breadcrumbs",
    "build",
    "captured_energy",
    "certify",
    "cross_fitted",
    "dare",
    "dc_merge",
    "della",
    "disjoint",
    "esm",
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

# The module that defines each of these names; so importing the package alone loads no torch.
_HOMES = {
    "AutoMerge": "choice.automatic",
    "FAMILIES": "bases",
    "Factored": "solve",
    "FeatCal": "solvers",
    "Merge": "merge",
    "Moments": "moments",
    "Pooled": "moments",
    "Programme": "programme",
    "QP": "solvers",
    "Recipe": "engine.recipes",
    "RegMean": "solvers",
    "Sketched": "solvers",
    "Solution": "solve",
    "adamerging": "gradient",
    "audit": "assess",
    "auto": "choice.automatic",
    "breadcrumbs": "datafree",
    "build": "bases",
    "captured_energy": "diagnostic",
    "certify": "assess",
    "cross_fitted": "diagnostic",
    "dare": "datafree",
    "dc_merge": "datafree",
    "della": "datafree",
    "disjoint": "diagnostic",
    "esm": "spectral.essential",
    "featcal": "methods",
    "fisher": "gradient",
    "gap": "diagnostic",
    "greedy_soup": "datafree",
    "iso_c": "datafree",
    "layer_moments": "assess",
    "lot": "methods",
    "many": "methods",
    "merge_sequentially": "sequential",
    "merge_together": "sequential",
    "minimise": "solve",
    "minimise_constrained": "solve",
    "model_stock": "datafree",
    "optimism": "diagnostic",
    "programme": "programme",
    "qp": "methods",
    "regmean": "methods",
    "regmean_plus_plus": "methods",
    "sketched": "methods",
    "slerp": "datafree",
    "soup": "datafree",
    "spectral_capture": "diagnostic",
    "task_arithmetic": "datafree",
    "ties": "datafree",
    "tsv_merge": "datafree",
    "tune": "methods",
    "wudi": "datafree",
}


class _Package(ModuleType):
    """The package as a module: its functions keep their names when a module of the same name is
    imported, as that of ``programme`` is."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and name in _HOMES:
            value = getattr(value, name)
        super().__setattr__(name, value)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
            return globals()[name]
        if name in {home.partition(".")[0] for home in _HOMES.values()}:  # qpmerge_lite.solve
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
