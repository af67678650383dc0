"""Comparisons: chosen on validation, test touched once, results kept."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from toys import TASKS

from qpmerge_lite import datafree, methods
from qpmerge_lite.assess import audit
from qpmerge_lite.companion import suites
from qpmerge_lite.companion.experiments import benchmark, cache, intervals, summary
from qpmerge_lite.companion.experiments.baselines import WHOLE
from qpmerge_lite.companion.records import Records, load_records
from qpmerge_lite.companion.suites import Suite, training
from qpmerge_lite.companion.suites.suite import PART, SHARE


@pytest.mark.parametrize("name", benchmark.ENTRIES)
def test_every_entry_reports_every_task(suite, name):
    found = benchmark.result(suite, name, 8)
    assert set(found["accuracy"]) == set(TASKS) and set(found["normalised"]) == {*TASKS, "mean"}
    assert found["options"] in benchmark.ENTRIES[name].grid(3, 0)


def test_choices_look_at_validation_and_test_is_scored_for_the_chosen_merge_only(
    suite, monkeypatch
):
    """Of a grid this large the better half on a part of the validation split is judged on all."""
    seen = []
    evaluate = Suite.evaluate
    monkeypatch.setattr(
        Suite,
        "evaluate",
        lambda self, state, split="test", tasks=None: (
            seen.append((split, state)) or evaluate(self, state, split, tasks)
        ),
    )
    grid = benchmark.ENTRIES["task_arithmetic"].grid(3, 0)
    found = benchmark.result(suite, "task_arithmetic", 8)
    experts = [id(e) for e in suite.experts.values()]
    states = {
        split: {id(state) for where, state in seen if where == split} - set(experts)
        for split in ("test", "validation", PART)
    }
    assert len(states["test"]) == 1 and len(states["validation"]) == (len(grid) + 1) // 2

    merges = [datafree.task_arithmetic(suite.base, suite.experts, **o).state_dict for o in grid]
    scores = [suite.normalised(m, "validation")["mean"] for m in merges]
    judged = [place for place, score in enumerate(found["scores"]) if score is not None]
    dropped = set(range(len(grid))) - set(judged)
    weights = {task: 1 / suite.expert_accuracy(task, "validation") for task in suite.tasks}
    on_part = [
        sum(weights[task] * right for task, right in suite.evaluate(m, PART).items())
        for m in merges
    ]
    assert min(on_part[p] for p in judged) >= max(on_part[p] for p in dropped)
    assert [found["scores"][p] for p in judged] == [scores[p] for p in judged]
    best = max(judged, key=scores.__getitem__)
    assert found["options"] == grid[best] and found["validation"] == scores[best]


def test_small_grids_are_judged_on_all_validation_data(suite):
    found = benchmark.result(suite, "regmean", 8)
    assert None not in found["scores"] and len(found["scores"]) == WHOLE


def test_energies_are_those_of_an_audit_and_experts_are_run_once_for_all_merges(suite):
    first, second = (
        datafree.task_arithmetic(suite.base, suite.experts, scale=scale).state_dict
        for scale in (0.1, 0.4)
    )
    benchmark.energies(suite, first, 8)
    found = benchmark.energies(suite, second, 8)["disjoint"]
    expected = audit(suite.base, second, suite.experts, suite.calibration(8, skip=8))
    layers = [share for share in expected["layers"].values() if share is not None]
    assert found["output"] == expected["output"]
    assert found["layers"] == sum(layers) / len(layers)
    assert suite.auditor(8, 8) is suite.auditor(8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vision", "language"])
def test_two_rounds_choose_as_one_does(name):
    """What is lost on the whole validation split is below its standard error, in every large
    grid."""
    embedded = suites.load(name, progress=False)

    def score(merge):
        return embedded.normalised(merge.state_dict, "validation")["mean"]

    examples = sum(len(embedded.tensors(task, "validation")[1]) for task in embedded.tasks)
    for entry in benchmark.ENTRIES.values():
        grid, calibration = entry.grid(len(embedded.tasks), 0), embedded.calibration(64)
        if len(grid) > WHOLE:
            merges = methods.many(
                entry.bound(embedded), grid, embedded.base, embedded.experts, calibration
            )
            best = max(score(merge) for merge in merges)
            merge, _, _ = entry.tuned(embedded, calibration)
            assert best - score(merge) < (best * (1 - best) / examples) ** 0.5


def test_a_part_of_the_validation_split_is_drawn_from_it_and_the_same_for_every_seed(suite):
    (part, labels), (whole, _) = suite.tensors("b", PART), suite.tensors("b", "validation")
    assert len(labels) == -(-len(whole["pixels"]) // SHARE)
    places = [
        (whole["pixels"] == image).flatten(1).all(1).nonzero().item() for image in part["pixels"]
    ]
    assert len(set(places)) == len(labels)
    other = replace(suite, seed=1, _cache={})
    assert torch.equal(other.tensors("b", PART)[0]["pixels"], part["pixels"])


def test_results_are_kept_and_belong_to_their_experts(suite, monkeypatch):
    first = benchmark.result(suite, "soup", 8)
    monkeypatch.setattr(Suite, "evaluate", lambda *a, **k: pytest.fail("computed again"))
    assert benchmark.result(suite, "soup", 8) == first
    monkeypatch.setenv("QPMERGE_NOT_BEFORE", "inf")
    with pytest.raises(pytest.fail.Exception):
        benchmark.result(suite, "soup", 8)
    monkeypatch.delenv("QPMERGE_NOT_BEFORE")
    suite.experts["a"]["cls"] += 1
    with pytest.raises(pytest.fail.Exception):
        benchmark.result(suite, "soup", 8)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_results_belong_to_the_images_they_are_judged_on(suite, split):
    before = cache._experts_and_data(suite)
    assert cache._experts_and_data(suite) == before
    suite.tensors("b", split)[0]["pixels"] += 1
    assert cache._experts_and_data(suite) != before


def test_experts_and_data_are_hashed_once(suite, monkeypatch):
    before = cache._experts_and_data(suite)
    suite.experts["a"] = {name: value.clone() for name, value in suite.experts["a"].items()}
    assert cache._experts_and_data(suite) == before, "other tensors with the same values"
    monkeypatch.setattr(training, "digest", lambda *tensors: pytest.fail("hashed again"))
    assert cache._experts_and_data(suite) == before
    suite.heads["b"]["bias"] = suite.heads["b"]["bias"].clone()
    with pytest.raises(pytest.fail.Exception):
        cache._experts_and_data(suite)


def test_a_result_that_another_process_is_making_is_waited_for(suite, tmp_path):
    """The other is a thread here: it holds the lock, and writes the file before it lets go."""
    made = []

    def make():
        made.append(1)
        time.sleep(0.2)
        return {"value": len(made)}

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(cache.kept, suite, "slow", [], make) for _ in range(2)]
    assert [future.result() for future in asked] == [{"value": 1}] * 2


@pytest.mark.parametrize(
    "name, options, edge",
    [
        ("ties", {"density": 0.2, "scale": 0.2}, ["scale"]),
        ("ties", {"density": 0.02, "scale": 1.0}, ["density", "scale"]),
        ("task_arithmetic", {"scale": 0.2}, []),
        ("regmean", {"alpha": 1.0}, []),
        ("regmean", {"alpha": 0.5}, ["alpha"]),
        ("qp_rows", {"basis": "rows", "targets": "own", "prior": 0.125}, []),
        ("dare", {"drop": 0.3, "scale": 0.2, "seed": 0}, []),
        ("qp_rows", {"basis": "rows", "targets": "own"}, []),
    ],
)
def test_choices_at_an_end_of_their_grid_are_marked(name, options, edge):
    found = {
        "method": name,
        "label": name,
        "seed": 0,
        "options": options,
        "accuracy": dict.fromkeys("abcdefgh", 1.0),
    }
    assert summary.at_grid_edge(found) == edge
    assert summary.choices([found]).loc[name, summary.CHOSEN].count("*") == len(edge)


def test_choices_are_named():
    found = {
        "method": "fisher",
        "label": "Fisher",
        "seed": 0,
        "options": {"normalise": False, "seed": 0},
        "accuracy": dict.fromkeys("ab", 1.0),
    }
    chosen = summary.choices([found]).loc["Fisher", summary.CHOSEN]
    assert chosen.replace("\N{NO-BREAK SPACE}", " ") == "not normalise (1)"
    assert summary.choices([row | {"options": {}} for row in (found, found)]).empty


def test_a_choice_says_on_how_many_seeds_it_was_made():
    """The most frequent first, and a line breaks between choices only."""
    grid = [{"density": 0.2, "scale": scale} for scale in (0.5, 0.35, 0.2, 0.35)]
    plain = {"method": "ties", "label": "TIES", "accuracy": dict.fromkeys("abcdefgh", 1.0)}
    rows = [plain | {"seed": seed, "options": options} for seed, options in enumerate(grid)]
    table = summary.choices(rows)
    chosen = table.loc["TIES", summary.CHOSEN].split(" ")
    words = [part.replace("\N{NO-BREAK SPACE}", " ") for part in chosen]
    assert list(table.columns) == [summary.CHOSEN] and words == [
        "density 0.2, scale 0.35 (2);",
        "density 0.2, scale 0.5 (1);",
        "density 0.2, scale 0.2* (1)",
    ]


def test_seed_interval_is_students():
    mean, (low, high) = intervals.seed_interval([1.0, 2.0, 3.0])
    assert (
        mean == 2
        and high - mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
        and mean - low == pytest.approx(high - mean)
    )


def row(method, seed, *values):
    """A result on tasks a, b, …"""
    by_task = dict(zip("ab", values))
    return {
        "method": method,
        "label": method,
        "seed": seed,
        "validation": 1.0,
        "accuracy": by_task,
        "normalised": by_task | {"mean": sum(values) / len(values)},
    }


def test_ranks_are_places_among_the_merges_of_a_seed():
    places = summary.ranks(
        [
            row("experts", 0, 1.0),
            row("multitask", 0, 0.99),
            row("x", 0, 0.8),
            row("y", 0, 0.9),
            row("z", 0, 0.8),
            row("x", 1, 0.5),
        ]
    )
    assert places.loc[0].to_dict() == {"x": 2.5, "y": 1.0, "z": 2.5}


def test_intervals_of_one_seed_are_taken_over_tasks(tmp_path):
    results = [row("experts", 0, 0.9, 0.8), row("base", 0, 0.5, 0.7), row("soup", 0, 0.7, 0.8)]
    _, means, _ = summary.summarise(Records("05_toy", "smoke", root=tmp_path), "toy", results)
    assert list(means.index) == ["a", "b"] and summary.ranks(results).loc["a"].to_dict() == {
        "base": 2.0,
        "soup": 1.0,
    }
    kept = load_records("smoke", tmp_path)
    gain = kept["toy.soup.minus_base"]
    mean, interval = intervals.seed_interval([0.2, 0.1])
    assert (
        gain.value == pytest.approx(mean)
        and gain.interval == pytest.approx(interval)
        and (gain.n, gain.note) == (2, "over tasks")
    )
    assert (
        kept["toy.margin"].value == 0  # one seed shows no spread: nothing is equal
        and "toy.regmean.minus_soup" not in kept
        and "toy.best_qp.label" not in kept
        and kept["toy.best_heuristic.label"].value == "soup"
    )


def test_a_plan_spreads_its_options_over_a_grid():
    assert suites.Plan(options=4).spread(list(range(10))) == [0, 2, 5, 7] and suites.Plan(
        options=4
    ).spread([1, 2]) == [1, 2]
    assert suites.Plan().spread(list(range(10))) == list(range(10))
