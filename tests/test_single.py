"""The single-layer setting and the evidence for the diagnostic, on toy suites."""

import numpy as np
import pandas as pd
import pytest
import torch
from toys import TASKS

import qpmerge_lite as q
from qpmerge_lite.companion.experiments import (
    benchmark,
    merge_specs,
    population,
    single_layer,
    statistics,
    summary,
)
from qpmerge_lite.companion.experiments.intervals import seed_interval
from qpmerge_lite.companion.records import Records, load_records

LAYER = "blocks.0.up"


@pytest.fixture
def one_layer(suite, monkeypatch):
    monkeypatch.setattr(
        benchmark, "multitask", lambda suite: (suite, suite.base.state_dict())
    )  # toy suites are not trained,
    monkeypatch.setattr(benchmark, "is_public", lambda *suite: False)  # and are in no registry
    base = suite.base.state_dict()
    suite.experts = {
        t: {k: e[k] if k.startswith(LAYER + ".") else v for k, v in base.items()}
        for t, e in suite.experts.items()
    }
    suite.layer = LAYER
    return suite


def test_energies_of_one_layer_are_those_of_an_audit(one_layer):
    found = single_layer.result(one_layer, 8)
    assert [m["method"] for m in found["methods"]] == [
        "base",
        *benchmark.HEURISTICS,
        *single_layer.ANYWHERE,
        "regmean",
        "featcal",
        "lot",
        *(f"qp_{f}" for f in single_layer.FAMILIES),
        "multitask",
    ]
    problem = single_layer.Problem.of(one_layer, 8)
    for solver, method in ((q.QP("rows"), "qp_rows"), (q.QP("elements"), "qp_elements")):
        merge, kept = (
            problem.solve(solver),
            next(m for m in found["methods"] if m["method"] == method),
        )
        assert kept["captured"]["in_sample"] == pytest.approx(merge.table[0]["captured"])
        for where, skip in (("in_sample", 0), ("disjoint", 8)):
            audited = q.audit(
                one_layer.base,
                merge.state_dict,
                one_layer.experts,
                one_layer.calibration(8, skip=skip),
            )
            assert kept["captured"][where] == pytest.approx(
                audited["layers"][LAYER], rel=1e-6, abs=1e-9
            )


def test_only_the_layer_is_merged(one_layer):
    problem = single_layer.Problem.of(one_layer, 8, "weights")
    merge = problem.solve(q.RegMean(1.0))
    full = q.regmean(one_layer.base, one_layer.experts, one_layer.calibration(8), alpha=1.0)
    for name, value in merge.state_dict.items():
        if not name.startswith(LAYER):
            torch.testing.assert_close(value, one_layer.base.state_dict()[name])
    torch.testing.assert_close(merge.state_dict[f"{LAYER}.bias"], full.state_dict[f"{LAYER}.bias"])
    X = problem.moments.pool().C
    difference = problem.update(merge.state_dict) - problem.update(full.state_dict)
    assert float(((difference @ X) * difference).sum()) <= 1e-12 * float(
        X.diagonal(dim1=-2, dim2=-1).sum()
    )


def test_the_full_span_wins_in_sample(one_layer):
    energies = {
        m["method"]: m["captured"]["in_sample"]
        for m in single_layer.result(one_layer, 8)["methods"]
        if "captured" in m
    }
    best = single_layer.Problem.of(one_layer, 8).solve(q.QP("elements", ridge=0.0))
    assert max(energies.values()) <= best.table[0]["captured"] + 1e-9 and energies["base"] == 0


def test_summaries_pair_methods_by_seed(tmp_path):
    draw, results = np.random.default_rng(0), []
    for seed in range(3):
        results += [
            {
                "method": name,
                "label": entry.label,
                "seed": seed,
                "validation": draw.random(),
                "accuracy": dict(zip(TASKS, draw.random(3))),
                "normalised": {"mean": draw.random()},
            }
            for name, entry in benchmark.ENTRIES.items()
        ]
        results.append(
            {
                "method": "experts",
                "label": "experts",
                "seed": seed,
                "validation": 1.0,
                "accuracy": dict.fromkeys(TASKS, 0.5),
                "normalised": {"mean": 1.0},
            }
        )
    labels, means, ranges = summary.summarise(
        Records("05_toy", "smoke", root=tmp_path), "toy", results
    )
    kept = load_records("smoke", tmp_path)
    assert list(means.mean()) == sorted(means.mean(), reverse=True) and "experts" not in means
    mean, interval = seed_interval(means["soup"] - means["base"])
    assert (kept["toy.soup.minus_base"].value, kept["toy.soup.minus_base"].interval) == (
        mean,
        interval,
    )
    validation = {
        m: np.mean([r["validation"] for r in results if r["method"] == m])
        for m in benchmark.HEURISTICS
    }
    assert kept["toy.best_heuristic.label"].value == labels[max(validation, key=validation.get)]
    assert (
        kept["toy.soup.accuracy"].value == ranges["soup"][0]
        and kept["toy.experts.raw"].value == 0.5
        and kept["toy.margin"].value == 0  # all experts alike
    )


def test_the_margin_is_the_spread_of_the_experts_between_seeds(tmp_path):
    def row(method, seed, accuracy):
        place = {"method": method, "label": method, "seed": seed, "validation": 0.5}
        return place | {"accuracy": {"a": accuracy, "b": accuracy}, "normalised": {"mean": 1.0}}

    results = [row("experts", seed, accuracy) for seed, accuracy in enumerate((0.8, 0.9, 0.7))]
    results += [row("soup", seed, 0.5) for seed in range(3)]
    summary.summarise(Records("05_toy", "smoke", root=tmp_path), "toy", results)
    margin = load_records("smoke", tmp_path)["toy.margin"]
    assert (margin.value, margin.n) == (pytest.approx(0.1 / 0.8), 3)


def test_results_tell_every_validation_score_and_captured_energies(suite):
    found = benchmark.result(suite, "qp_rows", 8)
    assert len(found["scores"]) == 4 and found["validation"] == max(found["scores"])
    merge = q.qp(suite.base, suite.experts, suite.calibration(8), **found["options"])
    assert found["captured"] == benchmark.energies(suite, merge.state_dict, 8)
    made = benchmark.variant(suite, 8, **found["options"])
    assert (
        made["validation"] == found["validation"]
        and made["audit"]["output"] == found["captured"]["disjoint"]["output"]
    )
    plain = lambda table: [{k: v for k, v in row.items() if k != "seconds"} for row in table]
    assert (
        plain(made["table"]) == plain(found["tables"][found["scores"].index(found["validation"])])
        and len(found["tables"]) == 4
    )
    assert benchmark.result(suite, "soup", 8)["tables"] is None


def evidence(noise):
    draw = np.random.default_rng(0)
    rows = [
        {
            "problem": f"p{p}",
            "method": f"m{m}",
            "disjoint": m + 100 * p,
            "accuracy": m - 10 * p + noise * draw.normal(),
        }
        for p in range(4)
        for m in range(6)
    ]
    return pd.DataFrame(
        [
            *rows,
            *(
                {"problem": f"p{p}", "method": "base", "disjoint": 0, "accuracy": 99}
                for p in range(4)
            ),
        ]
    )


def test_rank_correlation_within_problems_and_pooled():
    """Inside every problem perfect, across them reversed; the base does not count."""
    value, (low, high) = statistics.rank_correlation(evidence(0), "disjoint", 200, 0, within=True)
    assert value == pytest.approx(1) and low == pytest.approx(1) and high == pytest.approx(1)
    pooled, (low, high) = statistics.rank_correlation(evidence(0), "disjoint", 200, 0, within=False)
    assert pooled < 0 and low <= pooled <= high
    noisy, (low, high) = statistics.rank_correlation(evidence(3), "disjoint", 200, 0, within=True)
    assert low < noisy < high < 1


def test_evidence_has_a_row_per_merge(one_layer):
    frame = population.one_layer([single_layer.result(one_layer, 8) | {"suite": "toy"}])
    assert (
        len(frame)
        == len(frame.method.unique())
        == 6 + len(single_layer.ANYWHERE) + 3 + len(single_layer.FAMILIES)
        and frame.problem.nunique() == 1
    )
    assert set(frame.kind) == {merge_specs.HEURISTIC, merge_specs.BASELINE, merge_specs.PROGRAMME}


def test_of_one_problem_the_merges_are_resampled():
    frame = pd.DataFrame(
        {
            "method": ["base", *"abcdef"],
            "problem": 1,
            "accuracy": [0.1, 0.3, 0.2, 0.5, 0.4, 0.7, 0.6],
            "disjoint": [0, 1, 2, 3, 4, 5, 6],
        }
    )
    value, (low, high) = statistics.rank_correlation(frame, "disjoint", 200, 0, within=True)
    assert value == pytest.approx(1 - 6 * 6 / (6 * 35)) and low < value < high <= 1
