"""The picture of all claims: every one at its place, with the shape of its verdict, and told in
words."""

import re
from pathlib import Path

import pytest
import yaml

from qpmerge_lite.companion.book import claim_picture
from qpmerge_lite.companion.book.claims import ABOUT, VERDICTS, Claim, judge
from qpmerge_lite.companion.records import Record

RECORDS = {
    "a.high": Record("a.high", 0.9, n=7, interval=(0.8, 1.0)),
    "a.exact": Record("a.exact", 0),
}
MIDDLE = 50.0
ROOT = Path(__file__).parents[1]


def row(predicate, **fields):
    """The row of a claim with this predicate."""
    claim = {"id": "c.d", "source": "paper", "statement": "It is < so.", "about": "bases"}
    records = tuple(id for id in RECORDS if id in predicate)
    claim |= {"records": records, "predicate": predicate, "rule": "It is *so*.", "measured": "x"}
    return judge(Claim(**claim | fields), RECORDS)


def drawn(*rows):
    return claim_picture.picture(rows, "page#{}".format, lambda row, record: f"from {record.id}")


def places(html):
    """Where the marks of a picture are, in per cent of its width."""
    return [float(x) for x in re.findall(r'<svg x="([\d.]+)%"', html)]


@pytest.mark.parametrize(("predicate", "verdict", "side"), [
    ("a.high > 0.7", "holds", 1),
    ("a.high > 0.85", "undecided", 1),
    ("a.high > 0.95", "undecided", -1),
    ("a.high > 1.1", "fails", -1),
    ("a.exact == 0", "holds", 1),
    ("a.exact > 0", "fails", -1),
])  # fmt: skip
def test_a_claim_has_the_shape_of_its_verdict_on_its_side_of_the_line(predicate, verdict, side):
    html = drawn(row(predicate))
    (place,) = places(html)
    assert (place - MIDDLE) * side > 0
    (item,) = re.findall(r"<li.*?</li>", html)
    assert f'<li class="is-{verdict}">' in item
    shapes = {name for name, shape in claim_picture.SHAPES.items() if shape in item}
    assert shapes == {verdict}


def test_shapes_differ_without_their_colours():
    assert set(claim_picture.SHAPES) == set(VERDICTS)
    assert len(set(claim_picture.SHAPES.values())) == len(VERDICTS)


@pytest.mark.parametrize(("predicate", "lines"), [
    ("a.high > 0.7", "beyond"),
    ("a.high > 0.85", "across"),
    ("a.high > 1.1", "short"),
])  # fmt: skip
def test_an_interval_crosses_the_line_only_where_the_claim_is_undecided(predicate, lines):
    html = drawn(row(predicate))
    ends = re.findall(r'<line x1="([\d.]+)%" x2="([\d.]+)%" y1="50%"', html)
    ((low, high),) = [(float(low), float(high)) for low, high in ends]
    side = "beyond" if low > MIDDLE else "short" if high < MIDDLE else "across"
    assert side == lines and low < places(html)[0] < high


@pytest.mark.parametrize(("predicate", "has_arrow"), [
    ("a.high > 0", True), ("a.high > 2", True), ("a.exact == 0", False), ("a.high > 0.7", False),
])  # fmt: skip
def test_what_is_further_than_the_picture_has_an_arrow_and_no_line(predicate, has_arrow):
    html = drawn(row(predicate))
    assert (claim_picture.FURTHER in html) is has_arrow
    assert not has_arrow or 'y1="50%"' not in html
    assert all(0 < place < 100 for place in places(html))


def test_a_claim_that_is_not_run_is_on_no_side():
    html = drawn(judge(Claim("c", "paper", "It is so.", "bases"), {}))
    assert places(html) == [MIDDLE] and "<title>not run</title>" in html


@pytest.mark.parametrize(("predicate", "words"), [
    ("a.high > 0.7", "holds; 2.0 half widths beyond the threshold, interval from 1.0 to 3.0"),
    ("a.high > 1.1", "fails; 2.0 half widths short of the threshold, interval from -3.0 to -1.0"),
    ("a.exact == 0", "holds; no interval"),
])  # fmt: skip
def test_a_claim_is_told_to_those_who_do_not_see_it(predicate, words):
    assert f"<title>{words}</title>" in drawn(row(predicate))


def test_hover_and_focus_tell_rule_record_and_what_n_counts():
    html = drawn(row("a.high > 0.7", samples="seeds", source="review", short="so & so"))
    assert (
        '<a href="page#c.d" aria-describedby="about-c.d" class="told">' in html
        and "so &amp; so" in html
    )
    (told,) = re.findall(r'<div role="tooltip" id="about-c\.d">(.*?)</div>', html)
    assert "It is &lt; so." in told and "(its review)" in told and "It is so." in told
    assert "0.9: from a.high · n counts seeds" in told


def test_a_record_is_told_once_and_samples_are_those_of_intervals():
    """``samples`` says what the n of records with an interval counts, and of no others."""
    html = drawn(row("a.exact > -1 and a.exact < 1", samples="seeds"))
    assert html.count("from a.exact") == 1 and "n counts" not in html


def test_claims_stand_under_their_questions_and_are_counted():
    html = drawn(row("a.high > 0.7", about="energy"), row("a.high > 1.1", about="programme"))
    questions = re.findall(r"<p>([^<]+\?)</p>", html)
    assert questions == [ABOUT["programme"], ABOUT["energy"]]
    assert "holds: 1" in html and "fails: 1" in html and "undecided:" not in html


def test_a_claim_is_told_once_and_has_no_preview_besides():
    config = yaml.safe_load((ROOT / "book" / "_config.yml").read_text(encoding="utf-8"))
    skipped = config["sphinx"]["config"]["tippy_skip_anchor_classes"]
    (given,) = re.findall(r'<a [^>]*class="(\w+)"', drawn(row("a.exact == 0")))
    assert given in skipped
