"""Claims: predicates over intervals are three-valued and evaluate nothing but what they may;
verdicts follow from records."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpmerge_lite.companion.book import claim_pages, claims
from qpmerge_lite.companion.book.claim_pages import BEGIN, END, block, short_table
from qpmerge_lite.companion.book.claims import (
    Claim,
    ClaimError,
    evaluate,
    format_record,
    judge,
    load_claims,
)
from qpmerge_lite.companion.book.predicates import outlook, standing
from qpmerge_lite.companion.records import Record, RecordError, read_json

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
    assert standing(predicate, RECORDS).truth is truth


@pytest.mark.parametrize("predicate", [
    "__import__('os')", "a.low.__class__", "a.unknown > 0", "a.low", "a.low > 0 > a.high", "a.low "
    "> 'x'", "a.low * 2 > 0",
    "a.word == a.low", "a.low >", "[a.low]", "a.low != 0", "lambda: 0",
])  # fmt: skip
def test_nothing_else_is_evaluated(predicate):
    with pytest.raises(ClaimError):
        evaluate(predicate, RECORDS)


@pytest.mark.parametrize(("predicate", "place", "ids"), [
    ("a.high > 0.5", (4, 3, 5), ["a.high"]),
    ("a.high < 0.5", (-4, -5, -3), ["a.high"]),
    ("not a.high < 0.5", (4, 3, 5), ["a.high"]),
    ("a.low >= a.wide", (-0.75, -1.75, 0.25), ["a.low", "a.wide"]),
    ("a.high > 0.5 and a.low > 0", (2, 1, 3), ["a.low"]),  # both hold: the one nearer to failing
    ("a.high > 0.5 and a.low > 0.5", (-3, -4, -2), ["a.low"]),  # what fails decides
    ("a.high > 0.5 or a.low > 0.5", (4, 3, 5), ["a.high"]),
    ("a.high > 0.5 and a.lambda > 0", (4, 3, 5), ["a.high"]),  # without an interval nothing is near
    ("a.lambda > 0 and a.yes", (math.inf,) * 3, ["a.lambda", "a.yes"]),
    ("a.lambda > 0.6 or a.lambda > 0.7", (-math.inf,) * 3, ["a.lambda", "a.lambda"]),
    ("a.low == a.wide", (0, 0, 0), ["a.low", "a.wide"]),
])  # fmt: skip
def test_a_predicate_stands_as_many_half_widths_from_its_threshold(predicate, place, ids):
    found = standing(predicate, RECORDS)
    assert (found.at, found.low, found.high) == pytest.approx(place)
    assert [record.id for record in found.records] == ids


@given(value=st.floats(-1, 1), below=st.floats(0.01, 3), above=st.floats(0.01, 3))
def test_right_of_the_line_is_what_holds(value, below, above):
    """A lopsided interval too lies right of the line where the rule is met by all of it, left where
    by none, across where by some, and is two units long."""
    record = Record("s.x", value, interval=(value - below, value + above))
    found = standing("s.x > 0.1", {"s.x": record})
    assert found.high - found.low == pytest.approx(2)
    assert found.truth is (True if found.low > 0 else False if found.high <= 0 else None)


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
    ("a.lambda", ".2f ci", "0.50 (no interval)"),
    ("a.yes", "ci", "yes"),
    ("a.count", "", "1,234"),
    ("a.yes", "", "yes"),
    ("a.word", ".3f", "rows"),
])  # fmt: skip
def test_a_record_is_formatted_as_asked(id, spec, text):
    assert format_record(RECORDS[id], spec) == text


def test_the_unit_is_shown_on_request():
    assert format_record(Record("a.b", 2.0, unit="s"), ".1f unit") == "2.0 s"


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (-0.0, ".2f", "0.00"),
        (-1e-9, ".2f", "0.00"),
        (-0.001, ".2f", "-0.001"),
        (0.00044, "+.3f", "+0.0004"),
        (-0.006, ".2f", "-0.01"),
        (math.nan, ".2f", "nan"),
        (0, "", "0"),
    ],
)
def test_it_can_be_seen_on_which_side_of_zero_a_number_is(value, spec, text):
    assert format_record(Record("a.b", value), spec) == text


@pytest.mark.parametrize(("id", "spec"), [("a.low", ".3f .2f"), ("a.low", ".3q")])
def test_a_format_that_cannot_be_is_an_error(id, spec):
    with pytest.raises(ClaimError, match=id):
        format_record(RECORDS[id], spec)


def claim(**fields):
    return Claim(**({"id": "c", "source": "paper", "statement": "s", "about": "bases"} | fields))


@pytest.mark.parametrize(("predicate", "verdict"), [
    ("a.high > a.low", "holds"),
    ("a.low >= a.wide", "undecided"),
    ("a.low > a.high", "fails"),
])  # fmt: skip
def test_a_verdict_is_one_of_three_words_and_what_it_means_stands_beside(predicate, verdict):
    row = judge(
        claim(
            chapter="06_vision",
            records=("a.low", "a.wide", "a.high"),
            predicate=predicate,
            measured="{a.low .1f}",
            sentence={verdict: "So it is."},
        ),
        RECORDS,
    )
    assert (row.measured, row.verdict, row.sentence) == ("0.2", verdict, "So it is.")
    assert f"- **Verdict: {verdict}.** So it is." in block(row, "smoke")


def test_parts_are_judged_beside_the_whole():
    parts = {"high": "a.high > a.low", "wide": "a.wide > a.low"}
    whole = " and ".join(parts.values())
    row = judge(claim(records=("a.low", "a.wide", "a.high"), predicate=whole, parts=parts), RECORDS)
    assert row.verdict == "undecided"
    assert row.parts == {"high": "holds", "wide": "undecided"}
    shown = block(row, "smoke")
    assert "Part by part: high *holds*; wide *undecided*." in shown
    assert shown.count("a.wide > a.low") == 1  # the whole has it


def test_a_claim_without_records_is_not_run():
    assert judge(claim(), {}).verdict == "not run"


def test_a_claim_of_a_tier_that_recorded_nothing_of_it_is_not_run_but_one_gap_is_an_error():
    asked = claim(records=("b.x", "b.y"), predicate="b.x > b.y", tier="full")
    assert judge(asked, RECORDS).verdict == "not run"
    with pytest.raises(RecordError, match=r"b\.y"):
        judge(asked, {"b.x": Record("b.x", 1.0)})


# ----------------------------------------------------------------------- how many would decide


def sampled(id, value, half, n=10):
    return Record(id, value, n=n, interval=(value - half, value + half))


@pytest.mark.parametrize(("predicate", "factor", "truth", "id"), [
    ("s.near > 0", 16, True, "s.near"),  # reaches four times as far as it has to go
    ("s.near < 0", 16, False, "s.near"),
    ("s.near > 0.2", 16, False, "s.near"),
    ("s.far > 0", 0, True, "s.far"),  # decided
    ("s.far - s.near > 0", 0, True, "s.near"),
    ("s.far - s.near > 0.7", 9, True, "s.near"),
    ("s.near > 0 and s.nearer > 0", 64, True, "s.nearer"),  # all have to be decided
    ("s.near > 0 and s.nearer < 0", 64, False, "s.nearer"),  # the first to fail is enough
    ("s.near < 0 and s.nearer < 0", 16, False, "s.near"),
    ("s.near > 0 or s.nearer > 0", 16, True, "s.near"),
    ("not (s.near > 0 and s.nearer > 0)", 64, False, "s.nearer"),
])  # fmt: skip
def test_how_many_samples_would_decide(predicate, factor, truth, id):
    records = {
        "s.near": sampled("s.near", 0.1, 0.4),
        "s.nearer": sampled("s.nearer", 0.05, 0.4),
        "s.far": sampled("s.far", 1.0, 0.2),
    }
    found = outlook(predicate, records)
    assert found.truth is truth and found.factor == pytest.approx(factor)
    assert id in [record.id for record in found.records]


@given(
    value=st.floats(-1, 1).filter(lambda x: abs(x) > 1e-3),
    half=st.floats(0.01, 3),
    n=st.integers(2, 50),
)
def test_as_many_samples_as_are_said_decide_and_a_tenth_fewer_do_not(value, half, n):
    """Intervals that narrow as one over the root of their number."""
    present = sampled("s.x", value, half, n)
    if evaluate("s.x > 0", {"s.x": present}) is not None:
        return
    found = outlook("s.x > 0", {"s.x": present})

    def with_so_many(count):
        return evaluate("s.x > 0", {"s.x": sampled("s.x", value, half * (n / count) ** 0.5)})

    assert with_so_many(found.factor * n * 1.001) is found.truth
    assert with_so_many(found.factor * n * 0.9) is None


def test_an_estimate_on_the_threshold_is_decided_by_no_number():
    record = sampled("s.x", 0.4996, 0.1)
    asked = claim(records=("s.x",), predicate="s.x > 0.5", measured="{s.x .2f}", samples="seeds")
    assert judge(asked, {"s.x": record}).needed.startswith("none at this estimate: `s.x`")
    exact = claim(records=("s.x",), predicate="s.x > 0.5", measured="{s.x .4f}", samples="seeds")
    needed = judge(exact, {"s.x": record}).needed
    assert "625,000 seeds instead of 10 behind `s.x`" in needed and "would fail" in needed


def test_the_number_is_in_what_the_record_counts():
    records = {"s.x": sampled("s.x", 0.1, 0.2, 3), "s.y": sampled("s.y", 0.1, 0.15, 8)}
    asked = claim(
        records=("s.x", "s.y"),
        predicate="s.x > 0 and s.y > 0",
        samples={"s.x": "seeds", "s.y": "tasks"},
    )
    assert judge(asked, records).needed.startswith("about 12 seeds instead of 3 behind `s.x`")


def test_records_that_do_not_say_how_many_they_are_give_a_factor():
    records = {"s.x": Record("s.x", 0.1, interval=(-0.1, 0.3))}
    asked = claim(records=("s.x",), predicate="s.x > 0")
    assert judge(asked, records).needed.startswith("4.0 times as many samples behind `s.x`")


@pytest.mark.parametrize(("predicate", "verdict"), [
    ("s.point > 0", "holds"),
    ("s.point > 0.5", "fails"),
    ("s.point > 0.4", "fails"),  # on the threshold
    ("s.point >= 0.4", "holds"),
    ("s.near - s.point < 0", "undecided"),
    ("s.point > 0 and s.near > 0", "undecided"),
])  # fmt: skip
def test_a_record_without_an_interval_is_judged_by_its_value(predicate, verdict):
    """A reader's own run has one seed; ``samples`` may say nothing of its records."""
    records = {"s.point": Record("s.point", 0.4, n=1), "s.near": sampled("s.near", 0.1, 0.4)}
    measured = "{s.point .1f ci} and {s.near .1f ci}"
    asked = claim(
        records=tuple(records),
        predicate=predicate,
        measured=measured,
        samples={"s.point": "seeds"},
    )
    row = judge(asked, records)
    assert row.verdict == verdict and bool(row.needed) == (verdict == "undecided")
    assert row.measured == "0.4 (no interval) and 0.1 [-0.3, 0.5]"


def test_equal_within_a_margin_takes_both_sides():
    """Two one-sided tests: the whole interval inside plus and minus the margin."""
    equal = "s.x > -s.margin and s.x < s.margin"
    for half, truth in ((0.05, True), (0.2, None)):
        records = {"s.x": sampled("s.x", 0.0, half), "s.margin": Record("s.margin", 0.1)}
        assert evaluate(equal, records) is truth
    records["s.x"] = sampled("s.x", 0.3, 0.1)
    assert evaluate(equal, records) is False
    records["s.margin"] = Record("s.margin", 0.0)  # of one seed: nothing is equal
    records["s.x"] = sampled("s.x", 0.0, 0.01)
    assert evaluate(equal, records) is None


def test_a_claim_with_a_missing_record_is_an_error():
    with pytest.raises(RecordError, match=r"a\.gone"):
        judge(claim(records=("a.gone",), predicate="a.gone > 0", measured="x"), RECORDS)


def test_measured_shows_only_the_records_of_its_claim():
    with pytest.raises(ClaimError, match=r"measured.*a\.high"):
        judge(claim(records=("a.low",), predicate="a.low > 0", measured="{a.high}"), RECORDS)


@pytest.mark.parametrize(("text", "problem"), [
    ("- {id: c, source: paper}", "statement"),
    ("- {id: c, source: rumour, about: bases, statement: s}", "rumour"),
    ("- {id: c, source: paper, about: gossip, statement: s}", "gossip"),
    ("- {id: c, source: paper, about: bases, statement: s, sentence: {so_so: x}}", "so_so"),
    ("- {id: c, source: paper, about: bases, statement: s, verdict: holds}", "verdict"),
    ("- {id: c, source: paper, about: bases, statement: s, records: [a.b]}",
     "predicate, rule, why, measured"),
    ("- {id: c, source: paper, about: bases, statement: s}\n"
     "- {id: c, source: ours, about: bases, statement: s}", "used twice"),
])  # fmt: skip
def test_a_malformed_claim_is_named(tmp_path, text, problem):
    (tmp_path / "claims.yml").write_text(text)
    with pytest.raises(ClaimError, match=f"claim c.*{problem}"):
        load_claims(tmp_path / "claims.yml")


def test_the_table_keeps_bars_out_of_its_cells():
    shown = short_table([judge(claim(statement="a | b\nc"), {})])
    assert shown.splitlines()[-1] == "| a \\| b c *(paper)* | **not run** | — |"


def test_claims_are_counted_by_voice():
    rows = [judge(claim(), {}), judge(claim(records=("a.yes",), predicate="a.yes"), RECORDS)]
    assert "| paper | 1 | 0 | 0 | 1 |" in claim_pages.counts(rows)


def test_a_block_shows_the_rule_and_reads_its_numbers_from_records():
    asked = claim(
        records=("a.low",),
        predicate="a.low >  0",
        rule="It is positive.",
        why="Zero is nothing.",
        measured="low {a.low .1f ci}",
        tier="full",
    )
    shown = block(judge(asked, RECORDS), "smoke")
    for part in (
        "*Rule.* It is positive.",
        "*As computed (records of tier full).* `a.low > 0`",
        "*Why so.* Zero is nothing.",
        "*Measured (tier full, recorded).* low {res}`full:a.low .1f ci`",
    ):
        assert part in shown


def test_statements_that_semicolons_part_are_items():
    asked = claim(
        records=("a.low", "a.high"), predicate="a.low > 0", measured="low {a.low}; high {a.high}"
    )
    shown = block(judge(asked, RECORDS), "smoke")
    assert "- *Measured.*\n  - low {res}`smoke:a.low `\n  - high {res}`smoke:a.high `" in shown


def test_only_what_is_between_the_markers_is_replaced():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    replaced = claim_pages.replace_between_markers(text, "new")
    assert replaced == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ClaimError, match="claims: end"):
        claim_pages.replace_between_markers(f"{BEGIN}\n", "new")


@pytest.mark.book
def test_every_claim_of_the_book_can_be_judged_and_the_readme_says_the_same():
    """What README.md says is what the records of this build say, to the letter; `qpmerge book
    claims` rewrites it."""
    rows = claims.rows(ROOT)
    between = (ROOT / "README.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]

    def link(chapter):
        return f"[{chapter}](notebooks/{chapter}.ipynb)"

    assert between.strip() == claim_pages.summary(rows, link)


def test_the_readme_lists_the_claims_of_others_and_counts_all():
    rows = [
        judge(claim(id=source, source=source, statement=f"Said by {source}."), {})
        for source in claims.SOURCES
    ]
    shown = claim_pages.summary(rows, str)
    assert "Said by paper." in shown and "Said by review." in shown
    assert "Said by ours." not in shown and "| this book | 0 | 0 | 0 | 1 |" in shown
    assert "All 3 claims" in shown


def book_claims():
    return load_claims(ROOT / "book" / "claims.yml")


def test_each_voice_is_heard():
    assert {c.source for c in book_claims()} == {"paper", "review", "ours"}


def recorded(tier):
    """Ids that a tier has recorded; of the build's own, those that it is expected to record."""
    expected = (ROOT / "tests" / "expected" / "smoke").glob("*.json")
    if not tier:
        return {id for path in expected for id in read_json(path)}
    files = (ROOT / "book" / "recorded" / tier).glob("*.json")
    return {id for path in files for id in read_json(path)["records"]}


@pytest.mark.parametrize("asked", book_claims(), ids=lambda c: c.id)
def test_a_claim_rests_on_records_that_there_are(asked):
    """Its own tier may not have recorded it yet, but then the build does."""
    found = set(asked.records) & recorded(asked.tier)
    assert found == set(asked.records) or (not found and set(asked.records) <= recorded(""))


@pytest.mark.parametrize("asked", book_claims(), ids=lambda c: c.id)
def test_a_claim_that_samples_could_decide_says_what_they_are(asked):
    """Words for the n of every record with an interval in the predicate."""
    ids = [id for id in asked.records if id in asked.predicate]
    paths = sorted((ROOT / "tests" / "expected" / "smoke").glob("*.json"))
    smoke = {id: entry for path in paths for id, entry in read_json(path).items()}
    with_interval = [id for id in ids if "interval" in smoke.get(id, {})]
    if isinstance(asked.samples, dict):
        assert set(with_interval) == set(asked.samples)
    elif with_interval:
        assert asked.samples


def test_the_parts_of_the_page_hold_every_claim():
    """The claims page asks the questions of ``ABOUT``, and no claim is about anything else."""
    page = (ROOT / "book" / "claims.md").read_text(encoding="utf-8")
    parts = [part.partition("\n")[0] for part in page.split("\n## ") if ":about:" in part]
    assert parts == list(claims.ABOUT.values())
    assert re.findall(r":about: (\w+)", page) == list(claims.ABOUT)
    assert {c.about for c in book_claims()} == set(claims.ABOUT)


@pytest.mark.parametrize(
    "asked", [c for c in book_claims() if c.source != "ours"], ids=lambda c: c.id
)
def test_the_first_page_and_the_readme_have_room_for_a_claim(asked):
    assert 0 < len(asked.short) <= 28 and len(asked.statement) <= 200


def sentences():
    """The sentences of the first page."""
    page = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    return re.split(r"^\d\. ", page.partition("::::{container} drawn")[0], flags=re.MULTILINE)[1:]


def test_the_first_page_types_no_verdict():
    """Its words are roles, which read them from the claims, and no claim of the paper is left
    out."""
    assert len(sentences()) == 5
    roles = re.findall(r"\{verdict\}`([^`]+)`", " ".join(sentences()))
    said = {id for role in roles for id in role.split()}
    assert said >= {c.id for c in book_claims() if c.source == "paper"}
    page = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    typed = re.sub(r"\{\w+\}`[^`]*`", "", page)
    assert not re.search(r"\b(?:holds?|undecided|fails?|not run)\b", typed)


def test_a_sentence_of_the_first_page_shows_numbers_of_the_claims_that_it_judges():
    of = {c.id: c for c in book_claims()}
    for sentence in sentences():
        judged = re.findall(r"\{verdict\}`([^`]+)`", sentence)
        asked = [of[id] for role in judged for id in role.split()]
        assert asked
        for number in re.findall(r"\{res\}`([^` ]+)", sentence):
            assert any(number in c.records and not c.tier for c in asked), number


def test_matching_takes_a_margin_or_says_why_there_is_none():
    for asked in book_claims():
        if "matches" in asked.statement:
            assert "margin" in asked.predicate or "margin" in asked.why, asked.id
