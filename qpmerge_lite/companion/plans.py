"""What a run's tier stands for: which data the suites have, and how much the chapters do with them.

There are more tiers of runs than of data: *full* runs the embedded suites of *smoke* at a larger
size. Records are filed under the run's tier; manifests, suites and trained experts under that of
the data.
"""

from dataclasses import dataclass

from ..errors import MergeError

EMBEDDED = "smoke"  # the data tier that needs nothing but the repository


@dataclass(frozen=True)
class Plan:
    """The data tier of a run and its size: what the chapters do where their parameters leave it
    open.

    Attributes:
        data: the data tier that suites are loaded at.
        seeds: how many are run; with one, and no evidence, intervals are taken over tasks.
        evidence: the tier whose committed rows the chapters rest on, beside what they run.
        calibration: examples per task in merges of many layers.
        options: most options of a method's grid that are tried, spread evenly over it; None tries
            all.
        chapters: how the names of the notebooks begin that are run; the others study the embedded
            suites only.
        subsets: of the population of ``population.py``, how many experts its problems have, per
            suite and seed.
        merges: how many of every kind are drawn for each of its problems.
        largest: most calibration examples per task of its merges.
        tested: most test examples per task that they are judged on.
    """

    data: str = EMBEDDED
    seeds: int = 1
    evidence: str | None = None
    calibration: int = 64
    options: int | None = None
    chapters: tuple[str, ...] = ("",)
    subsets: tuple[int, ...] = (2, 4, 8)
    merges: tuple[int, int, int, int] = (2, 3, 5, 2)
    largest: int = 512
    tested: int = 512

    def spread(self, grid: list) -> list:
        """A grid, or as many of its points as the plan allows, from the first on."""
        most = min(self.options or len(grid), len(grid))
        return [grid[i * len(grid) // most] for i in range(most)]


PLANS = {
    "smoke": Plan(evidence="full", subsets=(2, 4)),
    "full": Plan(seeds=10),
    "standard": Plan("standard", evidence="standard", options=3, chapters=("05", "06", "07")),
    "paper": Plan("paper", calibration=256, options=3, chapters=("09",)),
}
DATA_TIERS = tuple(dict.fromkeys(planned.data for planned in PLANS.values()))


def plan(tier: str) -> Plan:
    """The plan of a run's tier. Raises: MergeError for a tier that has none."""
    if tier not in PLANS:
        raise MergeError(f"tier: expected one of {', '.join(PLANS)}, found {tier!r}")
    return PLANS[tier]
