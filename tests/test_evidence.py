"""Committed rows: written and read, compared with what a run measures itself, and let go where they
do not cover it."""

import json
import lzma
from dataclasses import replace
from pathlib import Path

import pytest

from qpmerge_lite.companion import cli, evidence
from qpmerge_lite.companion.book import run
from qpmerge_lite.companion.evidence import studies, units
from qpmerge_lite.companion.evidence.replication import compared
from qpmerge_lite.companion.experiments import benchmark
from qpmerge_lite.companion.plans import plan
from qpmerge_lite.errors import MergeError

ROOT = Path(__file__).parents[1]
METHODS = ["soup", "tsv_merge", "regmean", "qp_rows"]
SETTINGS = {"size": 8, "entries": METHODS}


def measured(suite, seed, tier, device, *, shift=0.0, words=("a", "b")):
    """An experiment with nothing behind it."""
    return [
        {
            "seed": seed,
            "method": word,
            "accuracy": {"first": 0.5 + shift, "mean": 0.123456789},
            "options": {"scale": 0.1 * (1 + shift)},
            "seconds": shift,
            "energy": None,
        }
        for word in words
    ]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QPMERGE_EVIDENCE", str(tmp_path / "evidence"))
    return tmp_path / "evidence"


def file(seeds, measure=measured, suite="toy", **settings):
    return [units.write(measure, suite, seed, "full", "cpu", settings) for seed in seeds]


def test_rows_of_all_seeds_are_found_and_the_live_one_is_compared(folder):
    paths = file((0, 1, 2), words=["a"])
    assert [path.relative_to(folder).as_posix() for path in paths] == [
        f"full/measured/toy-{seed}.json.xz" for seed in (0, 1, 2)
    ]
    found = evidence.gather(measured, "toy", [1], words=["a"])
    assert found.is_covered and found.seeds == [0, 1, 2] and not found.is_stale
    assert [row["accuracy"]["mean"] for row in found.rows] == [0.12346] * 3
    assert "seconds" not in found.rows[0] and found.live[0]["seed"] == 1
    assert (found.compared, found.largest) == (3, 0.0)  # the seed and two accuracies


@pytest.mark.parametrize("seeds, settings", [([7], {}), ([0, 7], {}), ([0], {"shift": 0.2})])
def test_a_run_that_nothing_committed_covers_stands_alone(seeds, settings):
    file((0, 1))
    found = evidence.gather(measured, "toy", seeds, **settings)
    assert not found.is_covered and found.seeds == seeds and found.rows == found.live
    assert evidence.said([found])["measured"] == "in this run alone"


def test_committed_rows_are_not_always_measured_again():
    file((0, 1))
    spared = evidence.gather(measured, "toy", [0], repeat=False)
    assert spared.seeds == [0, 1] and (spared.live, spared.compared) == ([], 0)
    assert "largest difference" not in evidence.said([spared])  # nothing was compared
    assert "largest difference" in evidence.said([evidence.gather(measured, "toy", [0])])
    assert evidence.gather(measured, "toy", [7], repeat=False).seeds == [7]


def test_a_tier_without_evidence_stands_alone():
    file((0, 1))
    assert not evidence.gather(measured, "toy", [0], "standard").is_covered


def test_a_difference_is_named_with_both_numbers_and_the_way_out():
    [path] = file((0,), shift=0.2)
    unit = json.loads(lzma.decompress(path.read_bytes()))
    path.write_bytes(lzma.compress(json.dumps(unit | {"settings": {}}).encode()))
    with pytest.raises(evidence.ReplicationError) as raised:
        evidence.gather(measured, "toy", [0])
    for part in ("measured, toy, seed 0, a, accuracy, first", "0.7 within", "found 0.5", "renew"):
        assert part in str(raised.value)


def test_rows_that_came_or_went_are_a_difference():
    file((0,), words=["a", "b"])
    evidence.gather(measured, "toy", [0], words=["a", "b"])
    with pytest.raises(evidence.ReplicationError, match="1 entries, found 2"):
        compared(measured("toy", 0, "", ""), measured("toy", 0, "", "", words="a"), "x")
    with pytest.raises(evidence.ReplicationError, match="'a', found 'c'"):
        compared(measured("toy", 0, "", "", words="c"), measured("toy", 0, "", "", words="a"), "x")


def test_where_another_option_was_chosen_only_its_quality_has_to_agree():
    one, other = (
        {"method": "a", "options": {"scale": scale}, "accuracy": 0.5, "captured": scale}
        for scale in (0.1, 0.9)
    )
    assert compared([one], [other], "x") == [0.0]
    with pytest.raises(evidence.ReplicationError, match="x, a, accuracy"):
        compared([one], [other | {"accuracy": 0.6}], "x")
    with pytest.raises(evidence.ReplicationError, match="x, a, captured"):
        compared([one], [one | {"captured": 0.9}], "x")


def test_steps_from_a_merge_that_was_chosen_have_to_be_of_one_quality():
    step = {"ridge": "10.0", "validation": 0.9, "calibration": -0.1, "disjoint": 0.1}
    other = step | {"calibration": 0.2, "disjoint": 0.3}
    assert compared([{"start": "a", "points": [step]}], [{"start": "a", "points": [other]}], "x")
    with pytest.raises(evidence.ReplicationError, match="points, 0, validation"):
        changed = [{"start": "a", "points": [other | {"validation": 0.7}]}]
        compared([{"start": "a", "points": [step]}], changed, "x")


def test_which_examples_were_right_is_compared_as_a_share():
    """An example at the edge of its decision may fall to the other side on another processor."""
    right, almost, other = "1" * 40, "1" * 39 + "0", "1" * 30 + "0" * 10
    assert compared([{"right": right}], [{"right": almost}], "x") == [1 / 40]
    with pytest.raises(evidence.ReplicationError, match="x, 0, right: .* found 0.25"):
        compared([{"right": right}], [{"right": other}], "x")
    with pytest.raises(evidence.ReplicationError, match="'11', found '1'"):
        compared([{"right": "1"}], [{"right": "11"}], "x")


@pytest.mark.parametrize(
    "row", [{"method": "lot"}, {"options": {"ridge": 0.0}}, {"kind": "made to be bad"}]
)
def test_merges_that_rounding_decides_are_not_compared(row):
    assert compared([row | {"energy": -9.0}], [row | {"energy": -5.0}], "x") == []


def test_only_problems_that_a_run_has_are_compared():
    rows = [{"problem": problem, "energy": number} for number, problem in enumerate("abc")]
    assert compared(rows[1:2], rows, "x") == [0.0]


def test_a_file_that_is_no_unit_says_what_to_do(folder):
    [path] = file((0,))
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(MergeError, match=r"toy-0.json.xz: not a unit .*; delete it and run"):
        evidence.gather(measured, "toy", [0])
    path.write_bytes(lzma.compress(b'{"schema": 0}'))
    with pytest.raises(MergeError, match="expected schema 1, found 0"):
        units.read(path)


def test_a_changed_constant_of_a_method_is_found(suite, monkeypatch, tmp_path):
    """Run as the book does, on the toy suite: what was measured by other code is not repeated."""
    monkeypatch.setattr(benchmark, "load", lambda *args, **options: suite)
    monkeypatch.setattr(benchmark, "is_public", lambda *args: True)  # no common training
    file((0,), benchmark.comparison, **SETTINGS)
    assert evidence.gather(benchmark.comparison, "toy", [0], **SETTINGS).largest < 1e-5
    monkeypatch.setenv("QPMERGE_CACHE", str(tmp_path / "other"))
    steps = [{"scale": 5.0}]  # in place of those that TSV-M is tuned over
    entry = replace(benchmark.ENTRIES["tsv_merge"], grid=lambda experts, seed: steps)
    monkeypatch.setitem(benchmark.ENTRIES, "tsv_merge", entry)
    with pytest.raises(evidence.ReplicationError, match=r"comparison, toy, seed 0, tsv_merge, "):
        evidence.gather(benchmark.comparison, "toy", [0], **SETTINGS)


def test_evidence_is_stale_when_code_that_it_hangs_on_has_changed(monkeypatch):
    file((0,))
    assert units.why_due(measured, "toy", 0, "full", {}) == ""
    assert units.why_due(measured, "toy", 1, "full", {}) == "missing"
    shifted = units.why_due(measured, "toy", 0, "full", {"shift": 1.0})
    assert shifted == "measured under other settings"
    monkeypatch.setattr(units, "code", lambda *args: "other")
    monkeypatch.setattr(evidence, "code", lambda *args: "other")
    other = units.why_due(measured, "toy", 0, "full", {})
    assert other.startswith("measured by other code, on 2")
    found = evidence.gather(measured, "toy", [0])
    assert found.is_stale and evidence.said([found])["its code since"] == "changed"


def test_what_is_said_of_evidence_is_recorded():
    file((0, 1, 2))
    records = {}
    table = evidence.report(
        lambda id, value, **rest: records.update({id: value}),
        "toy",
        [evidence.gather(measured, "toy", [1])],
    )
    assert records == {
        "toy.evidence.seeds": 3,
        "toy.evidence.live": 1,
        "toy.evidence.difference": 0.0,
    }
    assert table.loc["its code since", "toy"] == "unchanged" and table.loc["on", "toy"] == "cpu"


def test_all_experiments_on_a_suite_are_said_in_one_column():
    """A chapter rests on the fewest seeds of any of them."""
    file((0, 1), words=["a"])
    file((0, 1, 2), suite="other")
    found = [evidence.gather(measured, suite, [1]) for suite in ("toy", "other")]
    found.append(evidence.gather(measured, "toy", [1], words=["a"]))
    records = {}
    table = evidence.report(
        lambda id, value, **rest: records.update({id: (value, rest)}), "x", found
    )
    assert list(table.columns) == ["toy", "other"]
    assert table.loc["experiments"].to_list() == [2, 1]
    assert table.loc["seeds"].to_list() == [1, 3] and records["x.evidence.seeds"][0] == 1
    assert table.loc["in this run alone"].to_list() == ["1 of 2", "—"]
    compared = sum(part.compared for part in found)
    assert records["x.evidence.difference"][1]["n"] == compared > 0


# ----------------------------------------------------------------------------------- shards


def test_shards_share_out_all_units_and_keep_those_of_a_seed_together():
    everything = [str(unit) for unit in studies.units()]
    dealt = [[str(unit) for unit in studies.units(shard=(i, 3))] for i in (1, 2, 3)]
    assert sorted(sum(dealt, [])) == sorted(everything) and len(set(everything)) == len(everything)
    places = [{tuple(unit.split()[1:]) for unit in part} for part in dealt]
    assert not places[0] & places[1] and not places[1] & places[2]
    assert len(studies.units("scopes")) == plan("full").seeds == studies.SEEDS["full"]
    assert [str(unit) for unit in studies.units("comparison", tier="standard")] == [
        f"comparison {suite} {seed}" for seed in range(3) for suite in ("vision", "language")
    ]
    assert studies.units("factors", tier="standard") == []


def test_units_of_public_data_are_filed_and_found_by_themselves(folder, monkeypatch):
    here = studies.Study(measured, {"words": ["a"]}, ("vision",), tiers=("standard",))
    monkeypatch.setattr(studies, "STUDIES", (here,))
    assert cli.main(["book", "evidence", "--tier", "standard", "--shard", "2/3"]) == 0
    assert [path.name for path in (folder / "standard" / "measured").iterdir()] == [
        "vision-1.json.xz"
    ]
    found = evidence.gather(measured, "vision", [1], "standard", words=["a"])
    assert found.is_covered and not found.is_stale and found.seeds == [1]
    assert not evidence.gather(measured, "vision", [1], "smoke", words=["a"]).is_covered
    assert len(studies.due(tier="standard")) == 2 and studies.due() == []


def test_measuring_goes_on_where_it_broke_off(monkeypatch, capsys):
    study = studies.Study(measured, {"words": ["a"]}, ("vision",))
    monkeypatch.setattr(studies, "STUDIES", (study,))
    first = studies.due()[0]
    assert str(first) == "measured vision 0"
    first.run()
    assert cli.main(["book", "evidence", "--list"]) == 0
    *named, count = capsys.readouterr().out.splitlines()
    assert named[0] == "measured vision 1: missing" and len(named) == 9
    assert count == "9 of 10 units are to be measured"
    left = studies.due()
    assert [str(unit) for unit in left] == [
        f"measured vision {seed}" for seed in range(1, plan("full").seeds)
    ]
    assert cli.main(["book", "evidence"]) == 0
    assert studies.due() == [] and len(studies.due(force=True)) == 10


def test_what_chapters_ask_for_is_what_is_measured():
    """Parameters that nobody has changed are covered."""
    declared = {path.stem[:2]: run.declared(path) for path in run.notebooks(ROOT)}
    one_layer, points, calibration = (declared[chapter] for chapter in ("03", "05", "12"))
    sizes = {"size": plan("smoke").calibration}
    shared = {key: calibration[key] for key in ("draws", "few", "tasks")}
    asked = {
        "comparison": sizes | {"entries": declared["06"]["methods"]},
        "each_layer": {"size": one_layer["calibration"]},
        "choices": {"size": declared["04"]["calibration_images"]},
        "scopes": sizes,
        "fresh_heads": sizes,
        "paths": {"size": points["calibration"]},
        "population": {},
        "pairs": {},
        "optimism_gaps": {
            "sizes": calibration["gap_sizes"],
            "draws": calibration["gap_draws"],
            "ridge": calibration["ridge"],
            "tasks": calibration["tasks"],
        },
        "sensitivity": shared,
        "other_methods": {"tasks": calibration["tasks"]},
        "automatic": sizes,
        "factors": sizes,
        "ideas": sizes,
    }
    assert declared["14"]["calibration"] is None
    settings = {study.measure.__name__: study.settings for study in studies.STUDIES}
    ranks = settings.pop("sketches")["ranks"]
    assert settings.pop("plentiful")["size"] == 4 * sizes["size"]
    assert settings == asked and f"ranks = {ranks}" in (
        ROOT / "notebooks" / "12_calibration.ipynb"
    ).read_text(encoding="utf-8")
    assert declared["08"]["calibration_layer"] == one_layer["calibration"]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b"])
def test_a_shard_that_is_none_is_refused(text, capsys):
    assert cli.main(["book", "evidence", "--shard", text, "--list"]) == 1
    assert "--shard: expected I/N" in capsys.readouterr().err


def test_an_unknown_experiment_is_refused(capsys):
    assert cli.main(["book", "evidence", "--only", "nothing", "--list"]) == 1
    assert "expected one of comparison, " in capsys.readouterr().err
