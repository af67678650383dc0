"""The experiments that there is evidence of, and how it is measured: a unit at a time, in
shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..experiments import (
    ablations,
    benchmark,
    calibration,
    population,
    predictors,
    single_layer,
    special_cases,
)
from ..experiments.unlabelled.automatic import automatic, plentiful
from ..experiments.unlabelled.factors import factors
from ..experiments.unlabelled.ideas import ideas
from ..plans import plan
from . import units as files

SEEDS = {"full": 10, "standard": 3}  # tier -> seeds that there is to be evidence of
EMBEDDED, EVERY = ("full",), tuple(SEEDS)


@dataclass(frozen=True)
class Study:
    """One experiment as the chapters ask for it.

    Attributes:
        measure: see ``evidence``.
        settings: those that the chapters' parameters have where nobody changed them; a test holds
            the two together.
        suites: names.
        tiers: on which data.
    """

    measure: Callable
    settings: dict = field(default_factory=dict)
    suites: tuple[str, ...] = ("vision", "language")
    tiers: tuple[str, ...] = EMBEDDED


GAPS = {"sizes": [8, 32, 128], "draws": 2, "ridge": 0.01, "tasks": 4}
SIZE = {"size": plan("full").calibration}
STUDIES = (
    Study(benchmark.comparison, SIZE | {"entries": None}, tiers=EVERY),
    Study(single_layer.each_layer, {"size": 128}, tiers=EVERY),
    Study(ablations.choices, SIZE),
    Study(ablations.scopes, SIZE, suites=("language",), tiers=EVERY),
    Study(ablations.fresh_heads, SIZE, tiers=EVERY),
    Study(special_cases.paths, SIZE),
    Study(population.population),
    Study(predictors.pairs),
    Study(calibration.optimism_gaps, GAPS),
    Study(calibration.sensitivity, {"draws": 10, "few": 2, "tasks": 4}),
    Study(calibration.other_methods, {"tasks": 4}),
    Study(calibration.sketches, {"ranks": [8, 32, 512], "ridge": 0.01, "tasks": 4}),
    Study(automatic, SIZE, tiers=EVERY),
    Study(plentiful, {"size": 256}, suites=("language",), tiers=("standard",)),
    Study(factors, SIZE),
    Study(ideas, SIZE),
)


@dataclass(frozen=True)
class Unit:
    """One study on one suite and seed of a tier."""

    study: Study
    suite: str
    seed: int
    tier: str

    def __str__(self):
        return f"{self.study.measure.__name__} {self.suite} {self.seed}"

    def why_due(self) -> str:
        """Why it is to be measured; empty for one that is committed as it would be now."""
        study = self.study
        return files.why_due(study.measure, self.suite, self.seed, self.tier, study.settings)

    def run(self, device: str = "cpu"):
        """Measure and file it. Returns: the path."""
        study = self.study
        return files.write(study.measure, self.suite, self.seed, self.tier, device, study.settings)


def units(
    only: str | None = None, shard: tuple[int, int] = (1, 1), tier: str = "full"
) -> list[Unit]:
    """All units of a shard, those of a suite and seed one after the other, as they share experts.

    Args:
        only: name of one experiment.
        shard: (number from 1 on, of how many); suites and seeds are dealt out in turn.
        tier: a key of ``SEEDS``.
    """
    number, count = shard
    studies = [study for study in STUDIES if tier in study.tiers]
    names = dict.fromkeys(name for study in studies for name in study.suites)
    places = [(seed, name) for seed in range(SEEDS[tier]) for name in names]
    chosen = []
    for seed, name in places[number - 1 :: count]:
        for study in studies:
            if name in study.suites and only in (None, study.measure.__name__):
                chosen.append(Unit(study, name, seed, tier))
    return chosen


def due(only=None, shard=(1, 1), force=False, tier="full") -> list[Unit]:
    """The units of a shard, as of :func:`units`, that are not current; all with ``force``."""
    return [unit for unit in units(only, shard, tier) if force or unit.why_due()]
