"""What the merge that is chosen without labels reaches, and what its parts matter: rows, tables and
records."""

import pandas as pd
import pytest
import torch

import qpmerge_lite as q
from qpmerge_lite.choice import automatic as choice
from qpmerge_lite.companion.experiments.unlabelled import automatic, factors, tables
from qpmerge_lite.companion.records import Records, load_records

FIRST, SECOND = list(choice.BLENDS)[:2]


@pytest.fixture
def small(suite, monkeypatch):
    """The toy suite, few labels and few draws."""
    monkeypatch.setattr(automatic, "LABELS", (1, 4))
    monkeypatch.setattr(automatic, "DRAWS", 5)
    monkeypatch.setattr(automatic, "load", lambda *args, **options: suite)
    monkeypatch.setattr(factors, "load", lambda *args, **options: suite)
    return suite


def test_the_row_is_of_the_merge_that_a_user_gets(small):
    [row] = automatic.automatic("toy", 0, size=8)
    merge = q.auto(small.base, small.experts, small.calibration(8), heads=small.classifiers())
    assert row["chosen"]["with heads"] == merge.chosen
    assert row["accuracy"] == small.evaluate(merge.state_dict)
    assert row["normalised"] == small.normalised(merge.state_dict)
    assert tuple(row["candidates"]) == choice.NAMES
    for found in merge.candidates:
        kept = row["candidates"][found["name"]]
        assert kept["divergence"] == pytest.approx(found["captured"], abs=1e-9)
    soup = q.soup(small.base, small.experts).state_dict
    assert row["candidates"]["soup"]["test"] == small.normalised(soup)["mean"]
    assert list(row["labels"]) == ["1", "4"]


def test_the_row_of_plentiful_inputs_is_of_that_merge_too(small):
    [row], [other] = automatic.plentiful("toy", 0, size=8), automatic.automatic("toy", 0, size=8)
    assert [row[name] for name in ("chosen", "accuracy", "normalised")] == [
        other[name] for name in ("chosen", "accuracy", "normalised")
    ]


def test_right_answers_are_those_of_the_suite(small, monkeypatch):
    monkeypatch.setattr(automatic, "LABELS", (10**6,))
    state = q.soup(small.base, small.experts).state_dict
    right = automatic.correct(small, state)
    accuracy = small.evaluate(state, "validation")
    assert {task: float(found.mean()) for task, found in right.items()} == pytest.approx(accuracy)


def test_enough_labels_choose_the_best_and_ties_are_shared(small, monkeypatch):
    count = 4
    monkeypatch.setattr(automatic, "LABELS", (count,))
    candidates = {"x": {"test": 0.9}, "y": {"test": 0.5}, "z": {"test": 0.1}}
    one, half = torch.ones(count).double(), torch.tensor([1.0, 0.0, 1.0, 0.0]).double()

    def chosen_by(**right):
        per_task = {name: dict.fromkeys(small.tasks, value) for name, value in right.items()}
        return automatic.by_labels(small, per_task, candidates)[str(count)]

    assert chosen_by(x=half, y=one, z=half) == 0.5
    assert chosen_by(x=one, y=half, z=half) == 0.9
    assert chosen_by(x=one, y=one, z=half) == pytest.approx(0.7)


def test_every_level_changes_one_choice():
    start = factors.recipe({}, {})
    for of_factor in factors.FACTORS.values():
        for change in of_factor.values():
            found = factors.recipe(change, {"w": torch.zeros(1)})
            if not change or "size" in change or "anchor" in change:
                continue
            for key, value in change.items():
                owner = found if key in factors.PASS else found.solver
                before = start if key in factors.PASS else start.solver
                assert getattr(owner, key) == value != getattr(before, key), (key, value)


def test_the_programme_of_the_factors_is_that_of_the_candidates(small, monkeypatch):
    monkeypatch.setattr(
        factors,
        "FACTORS",
        {
            "nothing": {"the programme": {}},
            "basis": {"rows": {"basis": ("rows",)}},
            "calibration": {"4": {"size": 4}},
            "anchor": {"TSV-M": {"anchor": True}},
        },
    )
    rows = {(row["factor"], row["level"]): row for row in factors.factors("toy", 0, size=8)}
    assert len(rows) == 4 + len(factors.MIXTURES)
    merge = choice.Candidates(small.base, small.experts, small.calibration(8)).blend({"half": 1.0})
    programme = rows["nothing", "the programme"]
    assert programme["test"] == small.normalised(merge.state_dict)["mean"]
    assert programme["coefficients"] > rows["basis", "rows"]["coefficients"]
    assert all(rows["mixture", level]["coefficients"] is None for level in factors.MIXTURES)


def rows_of(seeds=3):
    """Rows of the choice: it takes the second candidate, which is better by a tenth."""
    tests = dict.fromkeys(choice.NAMES, 0.5) | {SECOND: 0.6}
    found = []
    for seed in range(seeds):
        candidates = {
            name: {"divergence": 0.1, "energy": float(name == "soup"), "validation": 0.5, "test": t}
            for name, t in tests.items()
        }
        labels = {str(count): 0.5 + 0.11 * (count >= 8) for count in tables.LABELS}
        found.append(
            {
                "seed": seed,
                "chosen": {"with heads": SECOND, "without heads": FIRST},
                "normalised": {"mean": 0.6 + seed / 100},
                "candidates": candidates,
                "labels": labels,
            }
        )
    return found


def test_leads_are_paired_over_the_seeds_that_all_have(tmp_path):
    others = [
        {"seed": seed, "method": method, "normalised": {"mean": value + seed / 100}}
        for method, value in (("featcal", 0.55), ("soup", 0.3), ("experts", 1.0))
        for seed in range(4)
    ]
    table = tables.by_method(rows_of(), others)
    assert list(table.columns) == ["auto", "featcal", "soup"] and list(table.index) == [0, 1, 2]
    records = Records("x", "smoke", root=tmp_path)
    leads = tables.record_leads(records.record, "toy", table)
    assert list(leads) == ["FeatCal", "uniform soup"]
    mean, interval = leads["FeatCal"]["lead"]
    assert mean == pytest.approx(0.05) and interval.high - interval.low < 1e-9
    kept = load_records("smoke", root=tmp_path)
    assert kept["auto.toy.accuracy"].value == pytest.approx(0.61)
    assert kept["auto.toy.minus_soup"].value == pytest.approx(0.3)


def test_what_the_choice_is_worth_is_recorded(tmp_path):
    rows, records = rows_of(), Records("x", "smoke", root=tmp_path)
    curves = tables.record_choice(records.record, "toy", rows)
    kept = {id: record.value for id, record in load_records("smoke", root=tmp_path).items()}
    assert kept["auto.toy.regret"] == pytest.approx(0.6 - 0.61)
    assert kept["auto.toy.minus_first"] == kept["auto.toy.minus_energy"] == pytest.approx(0.11)
    assert (kept["auto.toy.labels_worth"], kept["auto.toy.switched"]) == (8, 3)
    assert curves["labels"][0] == 0.5 and curves["labels"][-1] == pytest.approx(0.61)
    assert len(set(map(len, curves.values()))) == 1
    table = tables.candidates(rows)
    assert table.loc[SECOND, "chosen"] == 3 and table.loc["soup", "energy"] == 1.0


def test_no_number_of_labels_may_be_enough(tmp_path):
    rows, records = rows_of(), Records("x", "smoke", root=tmp_path)
    for row in rows:
        row["labels"] = dict.fromkeys(row["labels"], 0.1)
    tables.record_choice(records.record, "toy", rows)
    assert load_records("smoke", root=tmp_path)["auto.toy.labels_worth"].value == 0


def test_effects_are_differences_from_the_programme(tmp_path):
    rows = [
        {"seed": seed, "factor": factor, "level": level, "test": value + seed / 10}
        for seed in (0, 1)
        for factor, level, value in (
            ("nothing", "the programme", 0.5),
            ("basis", "rotated rows", 0.4),
            ("mixture", "none, shorter", 0.7),
        )
    ]
    records = Records("x", "smoke", root=tmp_path)
    shown = tables.effects(rows, records.record, "toy")
    assert list(shown) == ["basis: rotated rows", "mixture: none, shorter"]
    kept = load_records("smoke", root=tmp_path)
    assert kept["auto.toy.factor.basis.rotated_rows"].value == pytest.approx(-0.1)
    assert kept["auto.toy.factor.mixture.none_shorter"].value == pytest.approx(0.2)
    assert isinstance(tables.by_rule(rows_of()), pd.DataFrame)


def test_the_cost_is_in_units_of_one_programme(small, tmp_path):
    records = Records("x", "smoke", root=tmp_path)
    tables.record_cost(records.record, small, 8)
    ratio = load_records("smoke", root=tmp_path)["auto.toy.cost"].value
    assert 0.1 < ratio < 100
