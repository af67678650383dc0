"""Claims: predicates over intervals are three-valued and evaluate nothing but what they may;
verdicts follow from records."""

import re
from pathlib import Path

import pytest

from qpmerge_lite.companion.book import claims
from qpmerge_lite.companion.book.claims import (
    BEGIN,
    END,
    Claim,
    ClaimError,
    evaluate,
    format_record,
    judge,
    load_claims,
    markdown_table,
)
from qpmerge_lite.companion.records import Record, RecordError

ROOT = Path(__file__).parents[1]
RECORDS = {
    "a.low": Record("a.low", 0.2, interval=(0.1, 0.3)),
    "a.wide": Record("a.wide", 0.35, interval=(0.25, 0.45)),
    "a.high": Record("a.high", 0.9, interval=(0.8, 1.0)),
    "a.lambda": Record("a.lambda", 0.5),
    "a.yes": Record("a.yes", True),
    "a.word": Record("a.word", "rows"),
    "a.count": Record("a.count", 1234),
}


@pytest.mark.parametrize(("predicate", "truth"), [
    ("a.high > a.low", True),
    ("a.low > a.high", False),
    ("a.low >= a.wide", None),
    ("a.wide >= a.low", None),
    ("a.low < a.high", True),
    ("a.high - a.low > 0.5", None),
    ("a.high - a.low > 0.4", True),
    ("a.low + a.low <= 0.1", False),
    ("a.lambda == 0.5", True),
    ("a.lambda == 0.6", False),
    ("a.low == a.wide", None),
    ("a.lambda > -1e-9", True),
    ("a.high > a.low and a.low >= a.wide", None),
    ("a.low > a.high and a.low >= a.wide", False),
    ("a.high > a.low or a.low >= a.wide", True),
    ("not (a.low > a.high)", True),
    ("not a.low >= a.wide", None),
    ("a.yes", True),
    ("a.yes and a.high > a.low", True),
])  # fmt: skip
def test_a_predicate_is_true_false_or_undecided(predicate, truth):
    assert evaluate(predicate, RECORDS) is truth


@pytest.mark.parametrize("predicate", [
    "__import__('os')", "a.low.__class__", "a.unknown > 0", "a.low", "a.low > 0 > a.high", "a.low "
    "> 'x'", "a.low * 2 > 0",
    "a.word == a.low", "a.low >", "[a.low]", "a.low != 0", "lambda: 0",
])  # fmt: skip
def test_nothing_else_is_evaluated(predicate):
    with pytest.raises(ClaimError):
        evaluate(predicate, RECORDS)


def test_an_id_inside_another_is_not_mistaken():
    records = {
        "a.b": Record("a.b", 1.0),
        "a.b.c": Record("a.b.c", 2.0),
        "aa.b": Record("aa.b", 3.0),
    }
    assert evaluate("a.b < a.b.c and a.b.c < aa.b and a.b == 1", records) is True


@pytest.mark.parametrize(("id", "spec", "text"), [
    ("a.low", "", "0.2"),
    ("a.low", ".3f ci", "0.200 [0.100, 0.300]"),
    ("a.low", "|.3f|ci", "0.200 [0.100, 0.300]"),
    ("a.low", "pct", "20.0%"),
    ("a.low", "ci pct", "20.0% [10.0%, 30.0%]"),
    ("a.low", ".0%", "20%"),
    ("a.count", "", "1,234"),
    ("a.yes", "", "yes"),
    ("a.word", ".3f", "rows"),
])  # fmt: skip
def test_a_record_is_formatted_as_asked(id, spec, text):
    assert format_record(RECORDS[id], spec) == text


def test_the_unit_is_shown_on_request():
    assert format_record(Record("a.b", 2.0, unit="s"), ".1f unit") == "2.0 s"


def test_zero_has_no_sign():
    assert (
        format_record(Record("a.b", -0.0), ".2f") == "0.00"
        and format_record(Record("a.b", -0.001), ".2f") == "-0.00"
    )


@pytest.mark.parametrize(
    ("id", "spec"), [("a.lambda", "ci"), ("a.low", ".3f .2f"), ("a.low", ".3q")]
)
def test_a_format_that_cannot_be_is_an_error(id, spec):
    with pytest.raises(ClaimError, match=id):
        format_record(RECORDS[id], spec)


def claim(**fields):
    return Claim(**({"id": "c", "source": "paper", "statement": "s"} | fields))


@pytest.mark.parametrize(("predicate", "words"), [
    ("a.high > a.low", "holds"),
    ("a.low >= a.wide", "holds within the interval (no clear difference)"),
    ("a.low > a.high", "fails"),
])  # fmt: skip
def test_the_verdict_is_put_in_words(predicate, words):
    row = judge(
        claim(
            chapter="05_vision",
            records=("a.low", "a.wide", "a.high"),
            predicate=predicate,
            measured="{a.low .1f}",
        ),
        RECORDS,
    )
    assert (row.measured, row.words) == ("0.2", words)


def test_a_claim_may_bring_its_own_words():
    row = judge(
        claim(records=("a.yes",), predicate="a.yes", measured="{a.yes}", words={"holds": "proved"}),
        RECORDS,
    )
    assert row.words == "proved"


def test_a_claim_without_records_is_not_yet_tested():
    assert judge(claim(), {}).words == "not yet tested"


def test_a_claim_with_a_missing_record_is_an_error():
    with pytest.raises(RecordError, match=r"a\.gone"):
        judge(claim(records=("a.gone",), predicate="a.gone > 0", measured="x"), RECORDS)


def test_measured_shows_only_the_records_of_its_claim():
    with pytest.raises(ClaimError, match=r"measured.*a\.high"):
        judge(claim(records=("a.low",), predicate="a.low > 0", measured="{a.high}"), RECORDS)


@pytest.mark.parametrize(("text", "problem"), [
    ("- {id: c, source: paper}", "statement"),
    ("- {id: c, source: rumour, statement: s}", "rumour"),
    ("- {id: c, source: paper, statement: s, verdict: holds}", "verdict"),
    ("- {id: c, source: paper, statement: s, records: [a.b]}", "predicate, measured"),
    ("- {id: c, source: paper, statement: s}\n- {id: c, source: ours, statement: s}", "used twice"),
])  # fmt: skip
def test_a_malformed_claim_is_named(tmp_path, text, problem):
    (tmp_path / "claims.yml").write_text(text)
    with pytest.raises(ClaimError, match=f"claim c.*{problem}"):
        load_claims(tmp_path / "claims.yml")


def test_the_table_keeps_bars_out_of_its_cells():
    table = markdown_table([judge(claim(statement="a | b\nc"), {})])
    assert table.splitlines()[-1] == "| a \\| b c *(paper)* | — | **not yet tested** | — |"


def test_only_what_is_between_the_markers_is_replaced():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert claims.replace_between_markers(text, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ClaimError, match="claims: end"):
        claims.replace_between_markers(f"{BEGIN}\n", "new")


@pytest.mark.book
def test_every_claim_of_the_book_can_be_judged_and_the_readme_says_the_same():
    """Verdicts in README.md are those of the records of this build; `qpmerge book claims` rewrites
    them."""
    rows = claims.rows(ROOT)
    between = (ROOT / "README.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    shown = [re.split(r"(?<!\\)\|", line)[1:5:2] for line in between.strip().splitlines()[2:]]
    fresh = [re.split(r"(?<!\\)\|", line)[1:5:2] for line in markdown_table(rows).splitlines()[2:]]
    assert shown == fresh


def test_each_voice_is_heard_and_untested_claims_are_kept():
    sources = {c.source for c in load_claims(ROOT / "book" / "claims.yml")}
    assert sources == {"paper", "review", "ours"}
