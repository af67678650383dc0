"""Evidence: rows of experiments on many seeds, measured once and committed, of which every build
measures a part again.

An experiment is a function ``measure(suite, seed, tier, device, **settings)`` that gives rows:
dictionaries of words, numbers, lists and further dictionaries. What is committed of one suite and
seed is a *unit*, the file ``book/recorded/full/<measure>/<suite>-<seed>.json.xz``, see ``units``.
``studies`` lists the experiments that there is evidence of and measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .replication import ReplicationError as ReplicationError
from .replication import compared
from .units import code, committed, portable


@dataclass(frozen=True)
class Evidence:
    """The rows of one experiment on one suite that a chapter rests on.

    Attributes:
        suite: its name.
        rows: of all seeds; those of this run alone where nothing committed covers them.
        live: what this run measured itself.
        units: what is committed, a seed each; empty where nothing covers this run.
        compared, largest: how many numbers of ``live`` were compared with the committed ones, and
            the largest difference.
        is_stale: whether code that committed rows hang on has changed since.
    """

    suite: str
    rows: list[dict]
    live: list[dict]
    units: list[dict]
    compared: int = 0
    largest: float = 0.0
    is_stale: bool = False

    @property
    def seeds(self) -> list[int]:
        """Seeds of the rows."""
        return sorted({row["seed"] for row in self.rows})

    @property
    def live_seeds(self) -> list[int]:
        """Seeds that this run measured."""
        return sorted({row["seed"] for row in self.live})

    @property
    def is_covered(self) -> bool:
        """Whether the rows are committed ones, of which this run repeated some."""
        return bool(self.units)


def said(found: list[Evidence]) -> dict:
    """How many experiments on one suite, on how many seeds at least, how many of these were run
    here, and when, where and under which commit the rest was measured, in words for a table."""
    words = {
        "experiments": len(found),
        "seeds": min(len(part.seeds) for part in found),
        "run here": min(len(part.live_seeds) for part in found),
    }
    facts = [unit["provenance"] for part in found for unit in part.units]
    if not facts:
        return words | {"measured": "in this run alone"}
    dates = sorted({fact["date"][:10] for fact in facts})
    compared, largest = agreement(found)
    words |= {
        "measured": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "on": ", ".join(sorted({fact["device"] for fact in facts})),
        "commit": ", ".join(sorted({fact["commit"] for fact in facts})),
        "its code since": "changed" if any(part.is_stale for part in found) else "unchanged",
    }
    if compared:
        words["largest difference"] = f"{largest:.2g} of {compared:,} numbers"
    alone = sum(not part.is_covered for part in found)
    return words | ({"in this run alone": f"{alone} of {len(found)}"} if alone else {})


def agreement(found: list[Evidence]) -> tuple[int, float]:
    """How many numbers of this run were compared with committed ones, and the largest
    difference."""
    largest = max(evidence.largest for evidence in found)
    return sum(evidence.compared for evidence in found), largest


def gather(
    measure: Callable,
    suite: str,
    seeds: Iterable[int],
    tier="smoke",
    device="cpu",
    *,
    repeat: bool = True,
    **settings,
) -> Evidence:
    """Measure an experiment on the given seeds, and take the rows of all others that are committed
    under the same settings.

    Where one of the seeds, or the settings, are not among what is committed, the rows are those of
    this run alone.

    Args:
        measure: see the module.
        repeat: whether seeds are measured that are committed; those that are not always are.
        settings: whatever else the experiment takes, as JSON.
    Raises: ReplicationError where committed rows and those of this run differ by more than
        ``TOLERANCE``, which names the place, both numbers and what to do.
    """
    seeds, units = list(seeds), committed(measure, suite, tier, settings)
    is_covered = set(seeds) <= units.keys()
    if is_covered and not repeat:
        seeds = []
    live = {seed: measure(suite, seed, tier, device, **settings) for seed in seeds}
    own = [row for rows in live.values() for row in rows]
    if not is_covered:
        return Evidence(suite, own, own, [])
    differences: list[float] = []
    for seed, rows in live.items():
        where = f"{measure.__name__}, {suite}, seed {seed}"
        differences += compared(portable(rows), units[seed]["rows"], where)
    now, ordered = code(measure, suite, tier), list(units.values())
    return Evidence(
        suite,
        rows=[row for unit in ordered for row in unit["rows"]],
        live=own,
        units=ordered,
        compared=len(differences),
        largest=max(differences, default=0.0),
        is_stale=any(unit["code"] != now for unit in ordered),
    )


def report(record: Callable, id: str, gathered: Iterable[Evidence]):
    """Record under ``id`` how many seeds there are, how many this run measured, and how it agrees
    with what is committed, over all experiments that a chapter rests on; a ``pandas.DataFrame``
    with a column per suite says so of each.

    Args:
        record: ``Records.record``, or anything called like it.
    """
    import pandas as pd

    gathered, by_suite = list(gathered), dict[str, list[Evidence]]()
    for evidence in gathered:
        by_suite.setdefault(evidence.suite, []).append(evidence)
    seeds = min(len(evidence.seeds) for evidence in gathered)
    live = min(len(evidence.live_seeds) for evidence in gathered)
    record(f"{id}.evidence.seeds", seeds, note="that the numbers rest on")
    record(f"{id}.evidence.live", live, note="seeds that were measured in this run")
    compared, largest = agreement(gathered)
    note = "largest difference between this run and the committed rows of the same seeds"
    record(f"{id}.evidence.difference", largest, n=compared, note=note)
    return pd.DataFrame({suite: said(parts) for suite, parts in by_suite.items()}).fillna("—")
