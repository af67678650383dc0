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
from ..experiments.unlabelled.automatic import automatic
from ..experiments.unlabelled.factors import factors
from ..plans import plan
from . import units as files

TIER = "full"


@dataclass(frozen=True)
class Study:
    """One experiment as the chapters ask for it.

    Attributes:
        measure: see ``evidence``.
        settings: those that the chapters' parameters have where nobody changed them; a test holds
            the two together.
        suites: names.
    """

    measure: Callable
    settings: dict = field(default_factory=dict)
    suites: tuple[str, ...] = ("vision", "language")


GAPS = {"sizes": [8, 32, 128], "draws": 2, "ridge": 0.01, "tasks": 4}
SIZE = {"size": plan(TIER).calibration}
STUDIES = (
    Study(benchmark.comparison, SIZE | {"entries": None}),
    Study(single_layer.each_layer, {"size": 128}),
    Study(ablations.choices, SIZE),
    Study(ablations.scopes, SIZE, suites=("language",)),
    Study(ablations.fresh_heads, SIZE),
    Study(special_cases.paths, SIZE),
    Study(population.population),
    Study(predictors.pairs),
    Study(calibration.optimism_gaps, GAPS),
    Study(calibration.sensitivity, {"draws": 10, "few": 2, "tasks": 4}),
    Study(calibration.other_methods, {"tasks": 4}),
    Study(calibration.sketches, {"ranks": [8, 32, 512], "ridge": 0.01, "tasks": 4}),
    Study(automatic, SIZE),
    Study(factors, SIZE),
)


@dataclass(frozen=True)
class Unit:
    """One study on one suite and seed."""

    study: Study
    suite: str
    seed: int

    def __str__(self):
        return f"{self.study.measure.__name__} {self.suite} {self.seed}"

    def is_current(self) -> bool:
        """Whether it is committed, under these settings and by the code as it is."""
        study = self.study
        return files.is_current(study.measure, self.suite, self.seed, TIER, study.settings)

    def run(self, device: str = "cpu"):
        """Measure and file it. Returns: the path."""
        study = self.study
        return files.write(study.measure, self.suite, self.seed, TIER, device, study.settings)


def units(only: str | None = None, shard: tuple[int, int] = (1, 1)) -> list[Unit]:
    """All units of a shard, those of a suite and seed one after the other, as they share experts.

    Args:
        only: name of one experiment.
        shard: (number from 1 on, of how many); suites and seeds are dealt out in turn.
    """
    number, count = shard
    names = dict.fromkeys(name for study in STUDIES for name in study.suites)
    places = [(seed, name) for seed in range(plan(TIER).seeds) for name in names]
    chosen = []
    for seed, name in places[number - 1 :: count]:
        for study in STUDIES:
            if name in study.suites and only in (None, study.measure.__name__):
                chosen.append(Unit(study, name, seed))
    return chosen


def due(only=None, shard=(1, 1), force=False) -> list[Unit]:
    """The units of a shard, as of :func:`units`, that are not current; all with ``force``."""
    return [unit for unit in units(only, shard) if force or not unit.is_current()]
