"""The diagnostic's population on a toy suite, and its statistics on tables whose answers are
known."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from strategies import layers
from toys import TASKS, tokens

import qpmerge_lite as q
from qpmerge_lite.assess import layer_moments
from qpmerge_lite.companion.experiments import (
    baselines,
    benchmark,
    judging,
    merge_specs,
    population,
    statistics,
)
from qpmerge_lite.companion.suites import plan

ROOT = Path(__file__).parents[1]


@pytest.fixture
def judge(suite, monkeypatch):
    for name, value in (("DISJOINT", 12), ("AUDITED", 8), ("LAYERED", 8), ("VALIDATED", 10)):
        monkeypatch.setattr(judging, name, value)
    return judging.Judge(suite, 30)


def spec(method="regmean", options=None, size=4, source="own"):
    return merge_specs.Spec("neighbours", "a label", method, options or {}, size, source)


def test_energies_are_those_of_an_audit_and_of_moments(judge):
    suite, tasks = judge.suite, ["a", "c"]
    found, experts = (
        population.measured(judge, tasks, spec()),
        {t: judge.suite.experts[t] for t in tasks},
    )
    state = q.regmean(suite.base, experts, suite.calibration(4, tasks=tasks)).state_dict
    for where, size, skip in (("in_sample", 4, 0), ("disjoint", 8, 12)):
        assert found["energies"][f"output.{where}"] == pytest.approx(
            q.audit(suite.base, state, experts, suite.calibration(size, skip=skip, tasks=tasks))[
                "output"
            ]
        )
    disjoint = suite.calibration(8, skip=12, tasks=tasks)
    assert found["layers"]["layers"] == pytest.approx(
        q.audit(suite.base, state, experts, disjoint)["layers"]
    )
    for name, (view, moments, _) in layer_moments(suite.base, experts, disjoint, folds=1).items():
        assert found["layers"]["static"][name] == pytest.approx(
            moments.pool().captured(view.matrix(state) - view.matrix(suite.base.state_dict()))
        )
    accuracy = suite.normalised(state, tasks=tasks)
    assert found["accuracy"] == pytest.approx(accuracy["mean"]) and all(
        found["tasks"][t]["accuracy"] == pytest.approx(accuracy[t]) for t in tasks
    )
    assert all(len(v["validation"]) == 10 for v in found["tasks"].values())


def test_an_expert_agrees_with_itself_and_the_base_captures_nothing(judge):
    own = judge.ends(judge.suite.experts["a"], "a", judge.disjoint["a"], (12, 8))
    assert own["output"] == own["head"] == 0 and own["agreement"] == 1
    base = judge.ends(judge.base, "a", judge.disjoint["a"])
    assert base["output"] == base["output_base"] > 0 and base["head"] == base["head_base"] > 0


def test_directions_that_the_head_does_not_read_do_not_count_for_it(judge):
    """The class-centred head has a null space, of which the vector of ones over classes is not a
    part."""
    head = judge.suite.heads["a"]
    head["weight"] = torch.tensor(
        [[1.0, 0, 0, 0, 0, 0, 0, 0], [2.0, 0, 0, 0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0, 0, 0, 0]],
        dtype=torch.float64,
    )
    moved = {k: v.clone() for k, v in judge.suite.experts["a"].items()}
    moved["norm.bias"][1:] += 1
    ends = judge.ends(moved, "a", judge.disjoint["a"], (12, 8))
    assert ends["output"] > 1 and ends["head"] < 1e-12 and ends["agreement"] == 1


def test_what_a_merge_is_solved_on(judge):
    suite = judge.suite
    assert merge_specs.examples(suite, ["a"], spec(source="none")) is None
    foreign = merge_specs.examples(suite, ["a", "c"], spec(source="foreign"))
    assert torch.equal(foreign["a"][0]["pixels"], suite.calibration(4)["b"][0]["pixels"])
    assert torch.equal(foreign["c"][0]["pixels"], suite.calibration(4)["a"][0]["pixels"])
    mixed, plain = (
        merge_specs.examples(suite, ["a"], spec(source=s))["a"][0]["pixels"]
        for s in ("scrambled", "own")
    )
    assert not torch.equal(mixed, plain) and torch.equal(
        mixed.flatten().sort().values, plain.flatten().sort().values
    )


def test_scrambling_keeps_padding():
    batch = tokens()[2]["a"][0]
    mixed, mask = (
        merge_specs.scrambled(batch, torch.Generator().manual_seed(0)),
        batch["attention_mask"].bool(),
    )
    assert torch.equal(mixed["attention_mask"], batch["attention_mask"]) and torch.equal(
        mixed["input_ids"][~mask], batch["input_ids"][~mask]
    )
    assert torch.equal(
        mixed["input_ids"][mask].sort().values, batch["input_ids"][mask].sort().values
    )


@pytest.mark.parametrize("tier", ["smoke", "full"])
def test_the_population_is_as_large_as_asked_for(tier):
    """At least 120 merges of two suites in the default tier, 400 in the larger; no problem has a
    merge twice."""
    planned, names, total = plan(tier), [f"task {i}" for i in range(8)], 0
    for seed in range(planned.seeds):
        for tasks in merge_specs.subsets(names, planned.subsets, seed):
            specs = merge_specs.drawn(tasks, seed, planned.merges, planned.largest)
            assert len({repr(s) for s in specs}) == len(specs) == sum(planned.merges)
            assert {s.kind for s in specs} == set(merge_specs.KINDS) and max(
                s.size for s in specs
            ) <= min(planned.largest, judging.DISJOINT)
            assert specs == merge_specs.drawn(tasks, seed, planned.merges, planned.largest)
            total += 2 * len(specs)
    assert total >= {"smoke": 120, "full": 400}[tier]


def test_every_baseline_may_be_drawn_at_several_strengths():
    """All but the base itself, of the kind that chapters count them to, once each; gradients are
    spared large sets."""
    found = [s for specs in merge_specs.possible(5, 0, 512).values() for s in specs]
    assert len({json.dumps(asdict(s)) for s in found}) == len(found)
    plausible = {
        m: [s for s in found if s.method == m and s.kind != merge_specs.BAD]
        for m in benchmark.ENTRIES
    }
    for method, specs in plausible.items():
        if method != "base" and not method.startswith("qp_"):
            assert {s.kind for s in specs} == {merge_specs.kind_of(method)} and all(
                (s.size > 0) == (s.source == "own") for s in specs
            )
            assert len({json.dumps(s.options) for s in specs}) > 1 or method in ("soup", "lot")
            assert max(s.size for s in specs) == (
                0 if method in merge_specs.FREE else merge_specs.MOST.get(method, 512)
            )


def test_methods_are_drawn_as_often_as_each_other():
    labels = [
        s.label
        for seed in range(400)
        for s in merge_specs.drawn(["a", "b"], seed, (1, 3, 1, 1), 512)
        if s.kind == merge_specs.BASELINE
    ]
    assert (
        len(set(labels)) == len(baselines.BASELINES)
        and min(map(labels.count, set(labels))) > 400 * 3 / len(baselines.BASELINES) * 0.75
    )


def test_every_merge_that_may_be_drawn_can_be_made(judge):
    for specs in merge_specs.possible(2, 0, 4).values():
        for one in [*{s.label: s for s in specs}.values(), *specs[:: max(1, len(specs) // 12)]]:
            one = replace(one, size=min(one.size, 8))
            assert np.isfinite(
                population.measured(judge, ["a", "b"], one)["energies"]["output.disjoint"]
            )


def test_a_population_is_kept_merge_by_merge(judge, monkeypatch):
    planned = replace(plan("smoke"), subsets=(2,), merges=(1, 1, 1, 1), largest=4, tested=30)
    monkeypatch.setattr(population, "plan", lambda tier: planned)
    monkeypatch.setattr(population, "load", lambda *args, **options: judge.suite)
    monkeypatch.setattr(population, "drawn", lambda *args: [spec(), spec("soup", source="none")])
    first = population.population("toy", "smoke", 1)
    monkeypatch.setattr(population, "measured", lambda *args: pytest.fail("made again"))
    assert population.population("toy", "smoke", 1) == first and len(first) == 2
    assert (
        len(statistics.frame(first)) == 2
        and len(statistics.by_task(first)) == 4
        and "static, minimum" in statistics.aggregated(first)
    )


def table(slope, noise, problems=8, merges=10, seed=0):
    """Merges whose accuracy is a slope times their energy and noise; a constant of its own for
    every problem."""
    draw = np.random.default_rng(seed)
    rows = [
        {
            "suite": "toy",
            "problem": f"toy {i}",
            "experts": 2 + i % 3,
            "size": draw.integers(9),
            "cosine": draw.normal(),
            "norm": draw.normal(),
            "distance": draw.normal(),
            "label": f"method {j % 3}",
            "kind": "neighbours",
            statistics.PRIMARY: (energy := draw.uniform()),
            "accuracy": slope * energy + noise * draw.normal() + 0.1 * i,
        }
        for i in range(problems)
        for j in range(merges)
    ]
    return pd.DataFrame(rows)


def test_correlations():
    found = table(1, 0.3)
    x, y = found[statistics.PRIMARY].round(1), found.accuracy
    assert statistics.spearman(x, y) == pytest.approx(
        stats.spearmanr(x, y).statistic
    ) and statistics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert statistics.spearman([1, 1, 1], [1, 2, 3]) == 0
    inside = statistics.inside(found, statistics.PRIMARY)
    assert inside["toy 3"] == pytest.approx(
        stats.spearmanr(
            *found[found.problem == "toy 3"][[statistics.PRIMARY, "accuracy"]].to_numpy().T
        ).statistic
    )
    assert (
        len(
            statistics.inside(
                found.assign(few=found[statistics.PRIMARY].where(found.problem == "toy 1")), "few"
            )
        )
        == 1
    )
    value, (low, high) = statistics.bootstrap(inside, 500, 0)
    assert low < value < high and value == pytest.approx(inside.mean())
    value, (low, high) = statistics.pooled(found, statistics.PRIMARY, None, 200, 0)
    assert (
        value == pytest.approx(stats.spearmanr(found[statistics.PRIMARY], found.accuracy).statistic)
        and low < value < high
    )
    each = [
        stats.spearmanr(g[statistics.PRIMARY], g.accuracy).statistic
        for _, g in found.groupby("experts")
    ]
    assert statistics.pooled(found, statistics.PRIMARY, "experts", 10, 0)[0] == pytest.approx(
        np.mean(each)
    )


def test_chance_is_told_from_order():
    assert statistics.permutation(table(1, 0.1), statistics.PRIMARY, 99, 0) == 0.01
    assert statistics.permutation(table(0, 1), statistics.PRIMARY, 99, 0) > 0.05


def test_what_an_energy_adds():
    """Nothing where accuracy does not hang on it, most of what trivial predictors leave where it
    does."""
    useful, useless = (
        statistics.increment(table(slope, 0.05, seed=1), statistics.PRIMARY, 200, 0)["increment"]
        for slope in (1, 0)
    )
    assert useful[1][0] > 0.2 and useless[0] < 0.05 and useless[1][0] < 0.02


def problem_rows(accuracies, energies, name="toy"):
    """Merges with as many validation examples right as their accuracy says; label = place."""
    bits = lambda a: "".join(str(int((i * 37) % 64 < round(64 * a))) for i in range(64))
    empty = dict.fromkeys(("seed", "experts", "kind", "method", "size", "source"), 0)
    return [
        empty
        | {
            "suite": "toy",
            "problem": name,
            "label": f"method {j}",
            "accuracy": a,
            "energies": {statistics.PRIMARY: e},
            "trivial": {},
            "options": {},
            "layers": {},
            "tasks": {
                t: {"accuracy": a, "validation": bits(a), "expert": 1.0, "output": e} for t in TASKS
            },
        }
        for j, (a, e) in enumerate(zip(accuracies, energies))
    ]


def test_regrets():
    rows = problem_rows([0.9, 0.8, 0.2], [0.1, 0.9, 0.3], "toy 1") + problem_rows(
        [0.5, 0.7, 0.3], [0.0, 1.0, 0.5], "toy 2"
    )
    losses = statistics.regrets(rows, 0)
    assert losses[statistics.PRIMARY].tolist() == pytest.approx([0.1, 0.0])
    assert losses["random"].tolist() == pytest.approx([0.9 - 1.9 / 3, 0.2])
    assert losses["fixed"].tolist() == pytest.approx(
        [0.1, 0.2]
    )  # what was best on the other problem
    assert (
        losses["256 labels"].iloc[1] == pytest.approx(0)
        and losses["8 labels"].mean() > losses["256 labels"].mean()
    )
    assert (
        statistics.worth(losses.assign(**{statistics.PRIMARY: 1.0})) == 0
        and statistics.worth(losses.assign(**{statistics.PRIMARY: -1.0})) == 512
    )


def test_flattered_merges_stand_too_high():
    found = statistics.misjudged(
        statistics.frame(problem_rows([0.9, 0.8, 0.2], [0.1, 0.5, 0.9])),
        flattered=statistics.PRIMARY,
    )
    assert found.flattered.tolist() == pytest.approx([-2 / 3, 0, 2 / 3])


@given(layer=layers(), seed=st.integers(0, 99))
def test_captured_energy_does_not_depend_on_order_or_copies_of_the_data(layer, seed):
    """Permuting the experts with their tasks and doubling every sample leave the captured energy of
    any merge as it is."""
    pooled = layer.moments().pool()
    assume(pooled.energy > 0)
    update = torch.randn(
        pooled.A.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    backwards = replace(layer, X=layer.X[::-1], R=layer.R[::-1], fold=layer.fold[::-1])
    twice = replace(
        layer,
        **{k: tuple(torch.cat([z, z]) for z in getattr(layer, k)) for k in ("X", "R", "fold")},
    )
    for other in (backwards, twice):
        assert other.moments().pool().captured(update) == pytest.approx(
            pooled.captured(update), rel=1e-9, abs=1e-9
        )


@given(layer=layers(), scale=st.sampled_from([0.1, 10.0]), seed=st.integers(0, 99))
def test_captured_energy_under_a_rescaled_task(layer, scale, seed):
    """Inputs and outputs of one task in other units: no matter where tasks weigh by energy; per
    token the larger one counts more."""
    rescaled = replace(
        layer, X=(scale * layer.X[0], *layer.X[1:]), R=(scale * layer.R[0], *layer.R[1:])
    )
    before, after = (z.moments().pool(weights="energy") for z in (layer, rescaled))
    assume(before.energy > 0)
    update = torch.randn(
        before.A.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    assert after.captured(update) == pytest.approx(before.captured(update), rel=1e-6, abs=1e-9)


def test_claims_repeat_the_questions():
    """Predicates were fixed before the numbers; a claim may not soften them."""
    claims = {c["id"]: c for c in yaml.safe_load((ROOT / "book" / "claims.yml").read_text("utf-8"))}
    for question in yaml.safe_load((ROOT / "book" / "questions.yml").read_text("utf-8"))[
        "questions"
    ]:
        assert claims[question["id"]]["predicate"].split() == question["predicate"].split(), (
            question["id"]
        )


def test_labels_tell_methods_apart_that_a_user_would(judge):
    labels = {s.label for specs in merge_specs.possible(2, 0, 64).values() for s in specs}
    assert {
        "uniform soup",
        "TIES",
        "RegMean",
        *(benchmark.ENTRIES[f"qp_{f}"].label for f in benchmark.FAMILIES),
    } <= labels
