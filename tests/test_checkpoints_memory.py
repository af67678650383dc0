# ruff: noqa: F811 (fixtures come by import)
"""``qpmerge merge --memory``: the same merge within a stated amount, or a refusal beforehand; and
the time of a merge, from what it does and a machine's rates."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_families import (
    EXPERTS,
    ROOT,
    Family,
    contents,
    families,
    run,
    transformers,
)
from test_checkpoints_large import linux
from test_checkpoints_robust import MAIN, QUICK, models, python

from qpmerge_lite.checkpoints import merging
from qpmerge_lite.checkpoints.costs import estimated
from qpmerge_lite.checkpoints.findings import Refused, duration
from qpmerge_lite.checkpoints.large.budget import bytes_of
from qpmerge_lite.checkpoints.large.rates import Work, measured_rates
from qpmerge_lite.checkpoints.large.running import (
    Amount,
    memory_of_rows,
    memory_of_survey,
    size_of,
    usual_amount,
)
from qpmerge_lite.checkpoints.large.times import COUNTS, PLAIN, work_of
from qpmerge_lite.checkpoints.methods import CALIBRATED, METHODS
from qpmerge_lite.checkpoints.orders import Order
from qpmerge_lite.checkpoints.planning import plan_of
from qpmerge_lite.engine.rerun import Rerun

__all__ = ["families", "models"]  # fixtures


@pytest.mark.parametrize(
    ("words", "count"),
    [("8GB", 8 * 10**9), ("500 mb", 500 * 10**6), ("1.5GiB", 3 * 2**29), ("4096", 4096),
     ("2k", 2000), ("7B", 7)],
)  # fmt: skip
def test_amounts_are_read(words, count):
    assert bytes_of(words) == count


@pytest.mark.parametrize("words", ["", "much", "-1GB", "0GB", "8XB", "GB"])
def test_what_is_no_amount_is_refused(words):
    with pytest.raises(Refused, match="--memory: expected an amount such as 8GB"):
        bytes_of(words)


BY_PASSES = ["regmean", "featcal", "qp", "lot", "esm", "auto"]


@pytest.mark.parametrize("method", BY_PASSES)
def test_a_merge_that_holds_less_is_the_same(families, method, tmp_path, capsys, monkeypatch):
    family, begun = families["bert"], []
    words = ["merge", *family.folders, *family.given, "--method", method, *QUICK.get(method, [])]
    assert run(capsys, *words, "--out", tmp_path / "free")[0] == 0
    begin = Rerun.__init__
    monkeypatch.setattr(Rerun, "__init__", lambda *words: (begun.append(1), begin(*words))[1])
    monkeypatch.setattr(merging, "allowance", lambda plan: 0)
    assert run(capsys, *words, "--out", tmp_path / "tight")[0] == 0 and begun
    assert contents(tmp_path / "tight") == contents(tmp_path / "free")


@pytest.mark.parametrize("method", ["soup", "regmean"])
def test_too_little_is_refused_before_anything_runs(families, method, tmp_path, capsys):
    family = families["bert"]
    words = ["merge", *family.folders, "--method", method, "--out", tmp_path / "out"]
    words += family.given if method == "regmean" else []
    status, _, err = run(capsys, *words, "--memory", "1MB")
    assert status == 1 and list(tmp_path.iterdir()) == []
    assert "--memory: expected " in err and "at least (" in err and "found 1 MB" in err
    assert "for Python and its packages" in err and "give more" in err
    assert ("--samples" in err) == (method == "regmean")
    (least,) = re.findall(r"expected ([\d.]+) ([MG])B at least", err)
    enough = f"{1.2 * float(least[0])}{least[1]}B"
    assert run(capsys, *words, "--memory", enough)[0] == 0


def test_what_a_model_predicts_is_counted(families):
    family = families["llama"]
    experts = {name: family.root / name for name in EXPERTS}
    base = plan_of(Order(family.base, experts, family.root / "out")).report.base
    assert base.config["architectures"] == ["LlamaForCausalLM"]
    many = replace(base, config=base.config | {"vocab_size": 10**6})
    without = replace(many, config=many.config | {"architectures": ["LlamaModel"]})
    of_a_token, amount = 10**6 * size_of(base), usual_amount(2)

    survey = memory_of_survey(many, 7) - memory_of_survey(without, 7)
    assert survey > 9 * 7 * of_a_token  # all of its sequences are kept at once

    rows = [memory_of_rows(of, amount, n=8, answers=0, number=4) for of in (many, without)]
    assert rows[0] - rows[1] > 0.9 * amount.of_batch * of_a_token


def test_another_amount_is_the_same_order(families, tmp_path):
    family = families["bert"]
    experts = {name: family.root / name for name in EXPERTS}
    plans = [plan_of(Order(family.base, experts, tmp_path / "out", memory=m)) for m in (None, 9)]
    assert plans[0].digest == plans[1].digest


def wide():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=256, intermediate_size=768, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def high():
    config = transformers.BertConfig(
        vocab_size=4000, hidden_size=384, intermediate_size=1536, num_hidden_layers=1,
        num_attention_heads=8, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.BertModel(config)


def wordy():
    config = transformers.LlamaConfig(
        vocab_size=30000, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


SHAPES = {"wide": (wide, 96), "high": (high, 16), "wordy": (wordy, 16)}  # with texts of each expert


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Families whose layers, forwards that wait, or predictions take more than Python does."""
    made = {}
    for name, (make, count) in SHAPES.items():
        family = made[name] = Family(tmp_path_factory.mktemp("shapes") / name, make)
        for seed, file in enumerate(family.files.values()):
            draws = torch.randint(
                2, 38, (count, 128), generator=torch.Generator().manual_seed(seed)
            )
            rows = [" ".join(f"w{place}" for place in draw) for draw in draws.tolist()]
            file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return made


def in_a_process(family, method, out, *more):
    """A merge in a process of its own."""
    words = ["merge", *family.folders, *family.given, "--json", "--method", method, "--out", out]
    return python(MAIN, *words, *more, env=os.environ | {"PYTHONPATH": str(ROOT)})


def costs_of(done):
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["costs"]
    print(told)
    return told["estimated"], told["measured"]


MEASURED = ["regmean", "featcal", "qp", "auto"]


@linux
@pytest.mark.slow
@pytest.mark.parametrize("method", MEASURED)
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_about_what_was_estimated(shapes, shape, method, tmp_path):
    estimated, measured = costs_of(in_a_process(shapes[shape], method, tmp_path / "out"))
    assert 1 / 1.5 < measured["memory"] / estimated["memory"] < 1.5


@linux
@pytest.mark.slow
@pytest.mark.parametrize("method", MEASURED)
def test_a_merge_that_may_take_less_takes_no_more_than_that(shapes, method, tmp_path):
    """With the least that is not refused, which is read from a refusal and rounded up."""
    family = shapes["wide"]
    refused = in_a_process(family, method, tmp_path / "none", "--memory", "1MB")
    assert refused.returncode == 1 and not (tmp_path / "none").exists()
    (least,) = re.findall(r"expected (\d+) MB at least", refused.stderr)
    stated = bytes_of(f"{int(least) + 2}MB")
    _, free = costs_of(in_a_process(family, method, tmp_path / "free"))
    _, tight = costs_of(in_a_process(family, method, tmp_path / "tight", "--memory", stated))
    assert contents(tmp_path / "tight") == contents(tmp_path / "free")
    assert tight["own"] <= stated < 0.9 * free["own"]


# ------------------------------------------------------------------------------- time

ONES = Work(*[1.0] * len(Work._fields))


def report_of(models, count=2):
    experts = {f"e{k}": Path(models[1 + k % 2]) for k in range(count)}
    return plan_of(Order(Path(models[0]), experts, Path(models[0]).parent / "out")).report


def test_seconds_are_amounts_over_rates():
    work = Work(moved=10, passed=6)
    assert work.seconds(ONES) == 16 and work.seconds(Work(*[2.0] * 7)) == 8
    assert work.plus(Work(passed=1, called=3)) == Work(moved=10, passed=7, called=3)


def test_the_rates_of_this_machine_are_numbers(models):
    rates = measured_rates(next(Path(models[0]).glob("*.safetensors")))
    assert all(0 < rate < float("inf") for rate in (*rates, *measured_rates()))


@pytest.mark.parametrize("method", METHODS)
def test_more_experts_and_more_tokens_take_longer(models, method):
    fewer, more = (report_of(models, count) for count in (2, 3))
    costs = [estimated(report, method, {}) for report in (fewer, more)]
    seconds = work_of(fewer, method, {}, costs[0]).seconds(ONES)
    assert 0 < seconds < work_of(more, method, {}, costs[1]).seconds(ONES)
    short = work_of(fewer, method, {}, costs[0], Amount(50, 25, 25, 5, None, 2)).seconds(ONES)
    assert short < seconds if method in CALIBRATED else short == seconds


def test_what_is_counted_follows_from_the_shapes(models):
    """Four layers of a matrix (256, 128), its transpose and statistics, and a table (400, 128)."""
    report, K, cost = report_of(models), 2, estimated(report_of(models), "iso_c", {})
    matrices = [(400, 128)] + 4 * [(256, 128), (128, 256)]
    numbers = sum(m * n for m, n in matrices) + 4 * 128
    work = work_of(report, "iso_c", {}, cost)
    assert work.moved == cost.read + cost.written and work.multiplied == work.doubled == 0
    assert work.passed == numbers * (COUNTS["iso_c"].each * K + COUNTS["iso_c"].besides)
    assert work.decomposed == sum(m * n * min(m, n) for m, n in matrices)
    cost = estimated(report, "regmean", {})
    work = work_of(report, "regmean", {}, cost, Amount(10, 10, 10, 10, None, 1))
    assert work.passed == numbers * (PLAIN.each * K + PLAIN.besides)
    forwards = 2 * 10 * sum(m * n for m, n in matrices)
    sums = 2 * 10 * sum(n * n for _, n in matrices)
    assert work.multiplied == forwards + sums
    solved = sum(2 * m * n * n * (K + 2) + 2 * n**3 / 3 for m, n in matrices)
    assert work.doubled == pytest.approx(solved)


@pytest.mark.parametrize("method", BY_PASSES)
def test_a_check_counts_what_forwards_hold_of_as_many_inputs_as_are_taken(models, method):
    """Of which its last line tells: without them next to nothing would be left of a pass."""
    report = report_of(models)
    few, most = Amount(10, 10, 10, 10, 5, 1), usual_amount(2)
    assert most[:4] == (2 * 256 * 128, 8 * 128, 256 * 128, 128)
    usual = estimated(report, method, {})
    assert usual == estimated(report, method, {}, most)
    assert usual.memory > 10 * estimated(report, method, {}, few).memory


@pytest.mark.parametrize(("seconds", "words"), [
    (0.2, "less than a second"), (41.4, "41 s"), (130, "2 min"), (9000, "2.5 h"),
])  # fmt: skip
def test_times_are_told_in_a_unit_that_suits_them(seconds, words):
    assert duration(seconds) == words
