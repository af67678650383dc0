"""Records: what is written is what is read, and nothing unreadable gets in."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from qpmerge_lite.companion import records
from qpmerge_lite.companion.records import (
    PROVENANCE,
    RecordError,
    Records,
    find,
    keep,
    load_records,
)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "book" / "_records"


def test_a_record_survives_the_file(root):
    recorder = Records("06_vision", "smoke", root)
    returned = recorder.record(
        "vision.rows.accuracy",
        np.float64(0.5),
        unit="share",
        n=10,
        seed=3,
        interval=(0.4, 0.6),
        note="x",
    )
    assert type(returned) is float
    record = load_records("smoke", root)["vision.rows.accuracy"]
    assert (record.value, record.unit, record.n, record.seed, record.interval) == (
        0.5,
        "share",
        10,
        3,
        (0.4, 0.6),
    )
    assert (record.notebook, record.tier, record.note) == ("06_vision", "smoke", "x")


@pytest.mark.parametrize("value", [True, 7, "rows", 0.25])
def test_plain_values_keep_their_type(root, value):
    Records("01_a", "smoke", root).record("a.b", value)
    read = load_records("smoke", root)["a.b"].value
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("scalar", "plain"), [(torch.tensor(3), 3), (np.bool_(True), True), (np.float32(0.5), 0.5)]
)
def test_scalars_of_numpy_and_torch_become_plain(root, scalar, plain):
    Records("01_a", "smoke", root).record("a.b", scalar)
    read = load_records("smoke", root)["a.b"].value
    assert read == plain and type(read) is type(plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_values_that_are_not_finite_are_refused(root, value):
    with pytest.raises(RecordError, match=r"a\.b.*finite"):
        Records("01_a", "smoke", root).record("a.b", value)


@pytest.mark.parametrize("value", [[1, 2], None, {"a": 1}])
def test_values_that_are_not_plain_are_refused(root, value):
    with pytest.raises(RecordError, match="expected a number, a word or a truth value"):
        Records("01_a", "smoke", root).record("a.b", value)


@pytest.mark.parametrize(
    "id", ["accuracy", "Vision.rows", "vision..rows", "vision.rows ", "vision.row-s"]
)
def test_malformed_ids_are_refused(root, id):
    with pytest.raises(RecordError, match="dotted lower-case"):
        Records("01_a", "smoke", root).record(id, 1.0)


def test_an_interval_out_of_order_is_refused(root):
    with pytest.raises(RecordError, match="low, high"):
        Records("01_a", "smoke", root).record("a.b", 1.0, interval=(2.0, 1.0))


def test_an_id_is_recorded_once(root):
    recorder = Records("01_a", "smoke", root)
    recorder.record("a.b", 1.0)
    with pytest.raises(RecordError, match="recorded twice in 01_a"):
        recorder.record("a.b", 2.0)


def test_an_id_belongs_to_one_notebook(root):
    Records("01_a", "smoke", root).record("a.b", 1.0)
    Records("02_b", "smoke", root).record("a.b", 1.0)
    with pytest.raises(RecordError, match="both 01_a and 02_b"):
        load_records("smoke", root)


def test_a_new_run_forgets_the_old_one(root):
    Records("01_a", "smoke", root).record("a.old", 1.0)
    Records("01_a", "smoke", root).record("a.new", 1.0)
    assert list(load_records("smoke", root)) == ["a.new"]


def test_every_call_leaves_a_whole_file_and_nothing_else(root):
    recorder = Records("01_a", "smoke", root)
    for number in range(3):
        recorder.record(f"a.n{number}", number)
        assert len(load_records("smoke", root)) == number + 1
    assert [path.name for path in (root / "smoke").iterdir()] == ["01_a.json"]


def test_a_tier_that_was_not_run_here_is_read_from_the_recorded_ones(root):
    Records("01_a", "paper", root.parent / "recorded").record("a.b", 1.0)
    assert load_records("paper", root)["a.b"].tier == "paper"


def test_no_records_at_all_is_an_error_that_says_what_to_run(root):
    with pytest.raises(RecordError, match="qpmerge book run --tier standard"):
        load_records("standard", root)


def test_a_foreign_file_is_named(root):
    (root / "smoke").mkdir(parents=True)
    (root / "smoke" / "01_a.json").write_text("{")
    with pytest.raises(RecordError, match=r"01_a\.json: not valid JSON"):
        load_records("smoke", root)
    (root / "smoke" / "01_a.json").write_text('{"schema": 0}')
    with pytest.raises(RecordError, match=r"01_a\.json: expected record schema 1, found 0"):
        load_records("smoke", root)


def test_a_missing_id_is_an_error_that_names_its_neighbours(root):
    Records("01_a", "smoke", root).record("a.near", 1.0)
    with pytest.raises(RecordError, match=r"no record 'a\.far'.*a\.near"):
        find(load_records("smoke", root), "a.far")


def test_provenance_says_what_ran(root):
    Records("01_a", "smoke", root, device="cpu").record("a.b", 1.0)
    provenance = json.loads((root / "smoke" / "01_a.json").read_text())["provenance"]
    assert provenance["packages"]["torch"] == torch.__version__
    assert {"date", "device", "python", "machine", "threads", "commit"} <= set(provenance)


def test_no_manifests_are_no_data(root, tmp_path, monkeypatch):
    """Rather than the SHA-256 of nothing, which would pass for that of some data."""
    assert re.fullmatch("[0-9a-f]{64}", records.provenance()["data"])
    monkeypatch.setattr(records, "MANIFESTS", tmp_path / "nowhere")
    assert records.provenance()["data"] is None
    Records("01_a", "standard", root).record("a.b", 1.0)
    with pytest.raises(RecordError, match="01_a.json: expected a provenance with .*data"):
        keep("standard", root)


def test_recorded_tiers_keep_their_provenance(root):
    Records("01_a", "standard", root).record("a.b", 1.0)
    (path,) = keep("standard", root)
    assert (
        path == root.parent / "recorded" / "standard" / "01_a.json"
        and path.read_text() == (root / "standard" / "01_a.json").read_text()
    )


@pytest.mark.parametrize("field", PROVENANCE)
def test_records_without_all_of_their_provenance_are_not_kept(root, field):
    Records("01_a", "standard", root).record("a.b", 1.0)
    path = root / "standard" / "01_a.json"
    content = json.loads(path.read_text())
    del content["provenance"][field]
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=f"01_a.json: expected a provenance with {field}"):
        keep("standard", root)
    assert not (root.parent / "recorded").exists()


def test_there_is_nothing_to_keep_before_a_run(root):
    with pytest.raises(RecordError, match="run `qpmerge book run --tier standard` first"):
        keep("standard", root)


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[1] / "book" / "recorded").glob("*/[0-9][0-9]_*.json")),
    ids=lambda p: p.stem,
)
def test_committed_records_say_what_ran(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    tier, _, commit = path.parent.name.partition(
        "-"
    )  # an earlier state of a tier's suites is filed under its commit
    assert (
        content["tier"] == tier != "smoke"
        and content["notebook"] == path.stem
        and content["records"]
    )
    assert commit in ("", content["provenance"]["commit"])
    assert set(PROVENANCE) == {name for name, value in content["provenance"].items() if value}
    assert "dirty" not in content["provenance"]["commit"]
