"""What chapters on whole suites share: their tables, their records, and means that are recorded
with an interval."""

import pytest

from qpmerge_lite.companion.experiments import chapter
from qpmerge_lite.companion.experiments.intervals import record_mean, record_share, seed_interval
from qpmerge_lite.companion.experiments.summary import regret
from qpmerge_lite.companion.records import RecordError, Records, load_records


@pytest.fixture
def records(tmp_path):
    return Records("06_vision", "smoke", root=tmp_path)


def read(tmp_path):
    return load_records("smoke", tmp_path)


def result(method, seed, **fields):
    """One row of a comparison of two tasks, as ``benchmark.result`` gives it."""
    accuracy = {"one": 0.5 + 0.1 * seed, "two": 0.7}
    plain = {"label": method, "options": {}, "validation": 0.6, "tables": None}
    normalised = accuracy | {"mean": sum(accuracy.values()) / 2}
    row = {"method": method, "seed": seed, "accuracy": accuracy, "normalised": normalised}
    return plain | row | fields


def programme(family, seed):
    layers = [
        {"layer": "a", "p": 2, "captured": 0.5, "cross_fitted": 0.4, "ridge": 0.0},
        {"layer": "b", "p": 2, "captured": 0.7, "cross_fitted": 0.2, "ridge": 0.1},
    ]
    return result(f"qp_{family}", seed, tables=[layers, []])


def test_a_mean_is_recorded_with_its_interval(records, tmp_path):
    values = [1.0, 2.0, 3.0]
    mean, interval = record_mean(records.record, "a.mean", values, note="over seeds")
    assert (mean, interval) == seed_interval(values)
    found = read(tmp_path)["a.mean"]
    assert (found.value, found.interval, found.n, found.note) == (2.0, interval, 3, "over seeds")


def test_one_value_has_no_interval_and_samples_can_be_others(records, tmp_path):
    assert record_mean(records.record, "a.mean", [0.5], n=12) == (0.5, None)
    assert (read(tmp_path)["a.mean"].interval, read(tmp_path)["a.mean"].n) == (None, 12)


def test_another_interval_can_be_asked_for(records, tmp_path):
    record_mean(records.record, "a.mean", [1.0, 3.0], of=lambda z: (sum(z) / 2, (min(z), max(z))))
    assert read(tmp_path)["a.mean"].interval == (1.0, 3.0)


def test_a_share_has_an_interval_that_holds_it(records, tmp_path):
    assert record_share(records.record, "a.share", 3, 4) == 0.75
    found = read(tmp_path)["a.share"]
    assert found.n == 4 and 0 <= found.interval[0] < 0.75 < found.interval[1] <= 1
    record_share(records.record, "a.none", 0, 4)
    assert read(tmp_path)["a.none"].interval[0] == 0.0


def test_chosen_numbers_at_the_end_of_their_grid_are_counted(records, tmp_path):
    ties = [{"density": 0.2, "scale": 1.0}, {"density": 0.02, "scale": 0.2}]
    results = [result("ties", seed, options=options) for seed, options in enumerate(ties)]
    table = chapter.record_choices(records, "vision", [*results, result("experts", 0)])
    found = read(tmp_path)
    assert found["vision.choices.at_edge"].value == 3
    assert found["vision.choices.numbers"].value == found["vision.choices.at_edge"].n == 4
    assert list(table.index) == ["ties"] and table.loc["ties"].item().count("(1)") == 2


def test_layers_are_those_of_one_seed_and_of_the_first_targets(records, tmp_path):
    results = [programme("rows", 0), programme("elements", 0), programme("rows", 1)]
    tables = chapter.layer_tables(results, seed=0)
    assert list(tables) == ["rows", "elements"]  # the order of the families
    assert list(tables["rows"].layer) == ["a", "b"]
    means = chapter.record_energies(records, "vision", tables, seed=0)
    found = read(tmp_path)
    assert found["vision.qp_rows.captured"].value == pytest.approx(0.6)
    assert found["vision.qp_elements.cross_fitted"].value == pytest.approx(0.3)
    assert means.loc["rows", "p"] == 2 and means.loc["rows", "captured"] == pytest.approx(0.6)


def test_the_setting_is_recorded_under_the_name_of_what_is_calibrated_on(records, tmp_path):
    chapter.record_setting(records, "language", 64, "texts")
    assert read(tmp_path)["language.calibration_texts"].value == 64
    with pytest.raises(RecordError, match="recorded twice"):
        chapter.record_setting(records, "language", 64, "texts")


def test_tables_keep_the_order_they_are_given():
    results = [result(m, seed) for m in ("base", "soup") for seed in (0, 1)]
    cells = chapter.by_task(results, ["soup", "base"], ["two", "one"])
    assert list(cells.index) == ["soup", "base"] and list(cells.columns) == ["two", "one"]
    assert cells.loc["soup", "one"] == pytest.approx(0.55)
    ranked = chapter.places(results, {"base": "the base", "soup": "uniform soup"})
    assert set(ranked.index) == {"the base", "uniform soup"}


def test_regret_is_what_a_pick_loses_against_the_best_of_its_problem():
    pandas = pytest.importorskip("pandas")
    columns = ["problem", "accuracy", "energy"]
    rows = [("a", 0.9, 1.0), ("a", 0.7, 2.0), ("b", 0.5, 3.0), ("b", 0.4, 1.0)]
    merges = pandas.DataFrame(rows, columns=columns)
    assert regret(merges, "energy") == pytest.approx(0.1)  # 0.2 in a, nothing in b
    assert regret(merges, "accuracy") == 0
    assert regret(merges) == pytest.approx((0.1 + 0.05) / 2)
