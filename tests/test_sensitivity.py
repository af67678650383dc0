"""Calibration sets that are chosen, foreign or scrambled, and the studies made of them, on toy
suites."""

import numpy as np
import pandas as pd
import pytest
import torch
from toys import TASKS

from qpmerge_lite.companion.experiments import calibration
from qpmerge_lite.companion.experiments import calibration_records as report
from qpmerge_lite.companion.records import Records, load_records
from qpmerge_lite.diagnostic import OPTIMISM


@pytest.fixture
def small(suite, monkeypatch):
    monkeypatch.setattr(calibration, "POOL", 16)
    monkeypatch.setattr(calibration, "HELD_OUT", 4)
    return suite


@pytest.mark.parametrize("rule", calibration.RULES)
def test_a_rule_picks_from_the_pool_and_nothing_twice(small, rule):
    (pool,), (chosen,) = (
        b["a"]
        for b in (
            small.calibration(16, seed=3, tasks=["a"]),
            calibration.selected(small, rule, 3, ["a"], 6),
        )
    )
    places = [
        [i for i, z in enumerate(pool["pixels"]) if torch.equal(z, x)] for x in chosen["pixels"]
    ]
    assert (
        sorted({i for p in places for i in p}) == sorted(i for (i,) in places) and len(places) == 6
    )


def test_balanced_classes_differ_by_one_at_most(small):
    (chosen,) = calibration.selected(small, "balanced", 0, ["a"], 6)["a"]
    rows = small.tensors("a", "train")
    labels = [
        int(rows[1][i])
        for x in chosen["pixels"]
        for i, z in enumerate(rows[0]["pixels"])
        if torch.equal(z, x)
    ]
    counts = torch.tensor(labels).bincount(minlength=3)
    assert counts.max() - counts.min() <= 1


def test_domains(small):
    own, another, mixed = (
        calibration.foreign(small, d, 1, list(TASKS), 6) for d in ("own", "another", "mixed")
    )
    assert torch.equal(another["a"][0]["pixels"], own["b"][0]["pixels"]) and torch.equal(
        another["c"][0]["pixels"], own["a"][0]["pixels"]
    )
    assert torch.equal(
        torch.cat([b["pixels"] for b in mixed["b"]]),
        torch.cat([own[t][0]["pixels"][:2] for t in TASKS]),
    )


def test_a_study_is_recorded(small, tmp_path):
    merge = {"basis": "rows", "ridge": 0.1, "folds": 1}
    rows = [
        {"factor": factor, **row}
        for factor, levels, n in (("draw", [8], 3), ("sizes", [4, 12], 2))
        for row in calibration.study(small, "size", levels, n, merge, 3)
    ]
    rows += [
        {"factor": "experts", **row}
        for row in calibration.study(small, "experts", [2], 1, merge | {"ridge": 0.2})
    ]
    table = pd.DataFrame(rows).assign(suite="toy", seed=0)
    record = Records("00_toy", "smoke", tmp_path).record
    others = pd.DataFrame(
        [("toy", 0, "soup", 0.5), ("toy", 0, "other", 0.75)],
        columns=["suite", "seed", "label", "accuracy"],
    )
    report.record_merges(record, table, others)
    assert list(report.spreads(record, table).index) == ["draw", "size", "experts"]
    found = load_records("smoke", tmp_path)
    paired = (
        table[table.factor == "sizes"].query("level == 4").accuracy.to_numpy()
        - table[table.factor == "draw"].accuracy[:2].to_numpy()
    )
    assert found["calibration.toy.size.4.minus_random"].value == pytest.approx(paired.mean())
    assert found["calibration.toy.draws.sd"].value == pytest.approx(
        table[table.factor == "draw"].accuracy.std()
    )
    assert found["calibration.toy.methods.sd"].value == pytest.approx(0.25 / 2**0.5)


def test_several_seeds_are_the_units_of_intervals(tmp_path):
    """Draws of one seed share its experts: they are averaged first, and spreads are those inside
    seeds."""
    draw, rows = np.random.default_rng(0), []
    for seed in range(4):
        for place in range(5):
            for factor, level, shift in (("draw", 16, 0.0), ("sizes", 4, -0.1)):
                accuracy = 0.5 + 10 * seed + shift + 0.01 * draw.normal()
                one = {"suite": "toy", "seed": seed, "factor": factor, "level": level}
                rows.append(one | {"draw": place, "accuracy": accuracy, "output": accuracy})
    table = pd.DataFrame(rows)
    others = [
        {"suite": "toy", "seed": seed, "label": label, "accuracy": 10 * seed + accuracy}
        for seed in range(4)
        for label, accuracy in (("soup", 0.4), ("other", 0.5))
    ]
    record = Records("00_toy", "smoke", tmp_path).record
    report.record_merges(record, table, pd.DataFrame(others))
    found = load_records("smoke", tmp_path)
    shorter = found["calibration.toy.size.4.minus_random"]
    assert shorter.n == 4 and shorter.value == pytest.approx(-0.1, abs=0.02)
    assert shorter.interval[0] < -0.1 < shorter.interval[1] and "seeds" in shorter.note
    assert 0.005 < found["calibration.toy.draws.sd"].value < 0.02
    assert found["calibration.toy.methods.sd"].value == pytest.approx(0.1 / 2**0.5)
    assert found["calibration.toy.draws.minus_soup"].value == pytest.approx(0.1, abs=0.02)
    assert found["calibration.toy.draws.ranks"].value == pytest.approx(1.0)
    assert report.spreads(record, table).loc["size", "toy"] == pytest.approx(0.1 / 2**0.5, abs=0.02)


def test_gaps_are_recorded(small, tmp_path):
    gaps = pd.DataFrame(calibration.gaps(small, [8], 2, 0.1, held_out=8, tasks=3)).assign(
        suite="toy", seed=0
    )
    gaps["measured"] = gaps.in_sample - gaps.disjoint
    assert (gaps[list(OPTIMISM)] >= -1e-9).all().all() and (
        gaps.groupby("family").in_sample.mean() <= 1
    ).all()
    report.record_gaps(Records("00_toy", "smoke", tmp_path).record, gaps)
    sums = gaps.groupby("draw")[["measured", "refit"]].sum()
    found = load_records("smoke", tmp_path)["calibration.toy.optimism.ratio"]
    assert found.value == pytest.approx((sums.refit / sums.measured).mean())
