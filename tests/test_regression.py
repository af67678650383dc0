"""Regression: each kind of tolerance accepts what it should and refuses the rest; missing and extra
ids are failures."""

import json

import pytest

from qpmerge_lite.companion.book.expected import (
    RegressionError,
    compare,
    disagreement,
    load_expected,
    update,
)
from qpmerge_lite.companion.records import Record, Records


def expected(kind, value=1.0, by=None, **more):
    return {"value": value, "tolerance": {"kind": kind, "by": by}, "why": "a reason"} | more


@pytest.mark.parametrize(("kind", "value", "by", "inside", "outside"), [
    ("exact", 3, None, 3, 4),
    ("exact", "rows", None, "rows", "columns"),
    ("exact", True, None, True, False),
    ("exact", 1, None, 1, 1.0),
    ("relative", 2.0, 0.1, 2.19, 2.21),
    ("relative", -2.0, 0.1, -1.81, -1.79),
    ("absolute", 0.0, 0.1, -0.09, 0.11),
    ("at_least", 0.9, 0.8, 0.81, 0.79),
    ("at_most", 1e-9, 1e-6, 1e-7, 1e-5),
    ("present", "rows", None, "columns", " "),
    ("present", "rows", None, "columns", 3),
    ("relative", 2.0, 0.1, 2.0, "rows"),
])  # fmt: skip
def test_a_tolerance_divides_inside_from_outside(kind, value, by, inside, outside):
    assert disagreement(Record("a.b", inside), expected(kind, value, by)) is None
    assert "a reason" in disagreement(Record("a.b", outside), expected(kind, value, by))


def test_intervals_have_to_meet():
    aim = expected("interval", 0.5, interval=[0.4, 0.6])
    assert disagreement(Record("a.b", 0.65, interval=(0.6, 0.7)), aim) is None
    assert "[0.61, 0.7]" in disagreement(Record("a.b", 0.65, interval=(0.61, 0.7)), aim)
    assert "found 0.5, expected interval" in disagreement(Record("a.b", 0.5), aim)


def test_an_unknown_kind_is_an_error():
    with pytest.raises(RegressionError, match="'roughly'; expected one of exact"):
        disagreement(Record("a.b", 1.0), expected("roughly"))


@pytest.fixture
def checkout(tmp_path):
    recorder = Records("01_a", "smoke", tmp_path / "book" / "_records")
    recorder.record("a.count", 3)
    recorder.record("a.loss", 0.5)
    recorder.record("a.accuracy", 0.9, interval=(0.85, 0.95))
    return tmp_path


def rewrite(checkout, change):
    path = checkout / "tests" / "expected" / "smoke" / "01_a.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_updated_expectations_agree_and_get_a_tolerance_by_type(checkout):
    update(root=checkout)
    assert compare(root=checkout) == []
    kinds = {
        id: entry["tolerance"]["kind"] for id, entry in load_expected("smoke", checkout).items()
    }
    assert kinds == {"a.count": "exact", "a.loss": "relative", "a.accuracy": "interval"}


@pytest.mark.parametrize(("id", "value", "tolerance", "why"), [
    ("a.b", 3, {"kind": "exact"}, "count"),
    ("a.b", "rows", {"kind": "present"}, "change places"),
    ("a.b", 0.5, {"kind": "relative", "by": 1e-3}, "BLAS"),
    ("vision.b", 0.5, {"kind": "relative", "by": 0.1}, "float32"),
    ("a.b", 1e-12, {"kind": "at_most", "by": 1e-6}, "rounding"),
    ("vision.b", 0.0, {"kind": "at_most", "by": 1e-6}, "rounding"),
    ("a.b", -1e-12, {"kind": "absolute", "by": 1e-6}, "rounding"),
])  # fmt: skip
def test_a_new_id_gets_the_tolerance_of_its_type(tmp_path, id, value, tolerance, why):
    Records("01_a", "smoke", tmp_path / "book" / "_records").record(id, value)
    update(root=tmp_path)
    entry = load_expected("smoke", tmp_path)[id]
    assert entry["tolerance"] == tolerance and why in entry["why"]
    assert compare(root=tmp_path) == []


def test_missing_extra_and_changed_records_are_found(checkout):
    update(root=checkout)
    rewrite(checkout, lambda entries: entries.update({"a.gone": entries.pop("a.loss")}))
    rewrite(checkout, lambda entries: entries["a.count"].update(value=4))
    problems = {finding.id: finding.problem for finding in compare(root=checkout)}
    assert set(problems) == {"a.gone", "a.loss", "a.count"}
    assert problems["a.gone"].startswith("missing") and problems["a.loss"].startswith("extra")


def test_update_keeps_tolerance_and_reason(checkout):
    update(root=checkout)
    rewrite(
        checkout,
        lambda entries: entries["a.loss"].update(
            value=9.0, tolerance={"kind": "at_most", "by": 1.0}, why="mine"
        ),
    )
    update(root=checkout)
    entry = load_expected("smoke", checkout)["a.loss"]
    assert (entry["value"], entry["tolerance"], entry["why"]) == (
        0.5,
        {"kind": "at_most", "by": 1.0},
        "mine",
    )


def test_update_completes_a_partial_file_and_keeps_its_bar(checkout):
    path = checkout / "tests" / "expected" / "smoke" / "01_a.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"a.accuracy": expected("at_least", 0.99, 0.95)}))
    update(root=checkout)
    assert set(load_expected("smoke", checkout)) == {"a.count", "a.loss", "a.accuracy"}
    assert [finding.problem for finding in compare(root=checkout)] == [
        "found 0.9, expected at least 0.95 (a reason)"
    ]


def test_update_gives_up_a_kind_that_the_record_no_longer_fits(checkout):
    update(root=checkout)
    recorder = Records("01_a", "smoke", checkout / "book" / "_records")
    recorder.record("a.count", "three")
    recorder.record("a.loss", "small")
    recorder.record("a.accuracy", 0.9)
    assert {finding.id for finding in compare(root=checkout)} == {"a.count", "a.loss", "a.accuracy"}
    update(root=checkout)
    assert compare(root=checkout) == []


def test_update_drops_what_is_no_longer_recorded(checkout):
    update(root=checkout)
    rewrite(checkout, lambda entries: entries.update({"a.gone": entries["a.loss"]}))
    update(root=checkout)
    assert "a.gone" not in load_expected("smoke", checkout)


def test_an_expectation_without_a_reason_is_refused(checkout):
    update(root=checkout)
    rewrite(checkout, lambda entries: entries["a.loss"].pop("why"))
    with pytest.raises(RegressionError, match=r"01_a\.json: a\.loss lacks why"):
        compare(root=checkout)


def test_an_expected_interval_without_ends_is_refused(checkout):
    update(root=checkout)
    rewrite(checkout, lambda entries: entries["a.accuracy"].pop("interval"))
    with pytest.raises(RegressionError, match=r"01_a\.json: a\.accuracy lacks interval"):
        compare(root=checkout)


def test_only_restricts_both_sides(checkout):
    update(root=checkout)
    Records("02_b", "smoke", checkout / "book" / "_records").record("b.new", 1)
    assert compare(root=checkout, only="01") == []
    assert [finding.id for finding in compare(root=checkout)] == ["b.new"]
