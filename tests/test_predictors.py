"""What others predict merges by: metrics of pairs of experts, divergences of predictions, and how
well any columns predict the merges of a task that was left out."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy
from toys import loaded

from qpmerge_lite.companion.experiments import (
    judging,
    merge_specs,
    population,
    predictors,
    statistics,
)
from qpmerge_lite.companion.records import Records, load_records

TASKS = ("a", "b", "c", "d")


@pytest.fixture
def small(suite, monkeypatch):
    """The toy suite, with sets as small as its splits."""
    for name, value in (("DISJOINT", 12), ("AUDITED", 8), ("LAYERED", 8), ("VALIDATED", 10)):
        monkeypatch.setattr(judging, name, value)
    return suite


# ------------------------------------------------------------------------------- pairs of experts


def test_two_vectors_are_compared():
    found = predictors.compared(torch.tensor([[3.0, 0.0], [3.0, 4.0]]))
    assert found == pytest.approx({"cosine": 0.6, "distance": 4.0, "dot": 9.0, "ratio": 0.6})


def test_spans_overlap_by_the_share_of_their_directions():
    axes = torch.eye(4)
    assert predictors._overlap(axes[:2], axes[:2]) == pytest.approx(1)
    assert predictors._overlap(axes[:2], axes[2:]) == 0
    assert predictors._overlap(axes[:2], axes[1:3]) == pytest.approx(0.5**0.5)


def test_a_pair_of_equal_experts(small):
    small.experts["b"] = small.experts["a"]
    found = predictors.measured_pairs(small)
    assert list(found) == ["a+b", "a+c", "b+c"]
    same, other = found["a+b"], found["a+c"]
    for name in ("vectors.cosine", "vectors.ratio", "ranks.effective", "ranks.by_layer"):
        assert same[name] == pytest.approx(1, abs=1e-6), name
    for name in ("values", "left", "right", "last"):
        assert same[f"subspaces.{name}"] == pytest.approx(1), name
    assert same["vectors.distance"] == same["activations.distance"] == 0
    assert same["ranks.ratio"] == pytest.approx(0, abs=1e-6)
    assert found["b+c"]["vectors.cosine"] == pytest.approx(other["vectors.cosine"])
    assert other["vectors.distance"] > 0 and other["ranks.effective"] > 1.5


def test_every_metric_is_there_under_its_name(small):
    found = predictors.measured_pairs(small)
    assert all(tuple(metrics) == predictors.PAIRS for metrics in found.values())
    assert all(np.isfinite(list(metrics.values())).all() for metrics in found.values())


def test_a_gradient_is_that_of_the_experts_own_predictions(small):
    batches = small.calibration(8)["a"]
    model = loaded(small.base, small.experts["a"]).requires_grad_(True)
    logits = torch.cat([small.classifiers()["a"](model(**batch)) for batch in batches])
    cross_entropy(logits, logits.argmax(1)).backward()
    expected = torch.cat([value.grad.flatten() for value in model.parameters()])
    found = predictors.gradient(small, "a", batches)
    torch.testing.assert_close(found, expected)
    assert found.norm() > 0


def test_pairs_are_measured_once(small, monkeypatch):
    monkeypatch.setattr(predictors, "load", lambda *args, **options: small)
    first = predictors.pairs("toy", 0)
    monkeypatch.setattr(predictors, "measured_pairs", lambda suite: pytest.fail("made again"))
    assert predictors.pairs("toy", 0) == first and {row["seed"] for row in first} == {0}
    table = predictors.frame_of_two(first)
    assert table.tasks.tolist() == [("a", "b"), ("a", "c"), ("b", "c")]
    assert set(predictors.PAIRS) < set(table.columns) and table.problem.is_unique


def test_a_soup_of_two_is_judged_as_a_merge_of_the_population(small):
    found = predictors.measured_soups(small)
    spec = merge_specs.Spec("heuristics", "soup", "soup", {})
    judge = judging.Judge(small, predictors.TESTED)
    for pair, values in found.items():
        row = population.measured(judge, pair.split("+"), spec)
        assert values["accuracy"] == pytest.approx(row["accuracy"])
        assert values[statistics.PRIMARY] == pytest.approx(row["energies"][statistics.PRIMARY])
    assert list(found) == list(predictors.measured_pairs(small))


# ------------------------------------------------------------------------------- predictions


def test_divergence_is_that_of_the_distributions():
    expert, other = torch.randn(5, 3), torch.randn(5, 3)
    p, q = (torch.distributions.Categorical(logits=z.double()) for z in (expert, other))
    expected = torch.distributions.kl_divergence(p, q).mean()
    assert judging._divergence(expert, other) == pytest.approx(float(expected))


def test_an_expert_captures_all_divergence_and_the_base_none(small):
    judge = judging.Judge(small, 30)
    ends = judge.ends(small.experts["a"], "a", judge.disjoint["a"])
    assert ends["divergence"] == pytest.approx(0, abs=1e-12) and ends["divergence_base"] > 0
    assert population._pooled([ends])["divergence"] == pytest.approx(1)
    base = judge.ends(judge.base, "a", judge.disjoint["a"])
    assert population._pooled([base])["divergence"] == pytest.approx(0)


# ------------------------------------------------------------------------------- a task left out


def merges(seed=0, problems=12, each=8, noise=0.0):
    """A table of merges like that of ``predictors.frame``: problems of two tasks each, the output's
    energy being accuracy and noise, everything else drawn; metrics of pairs know problems only."""
    draw, rows = np.random.default_rng(seed), []
    numbers = [n for n in ("size", "norm", "distance") if n not in predictors.PAIRS]
    for problem in range(problems):
        tasks = tuple(sorted(draw.choice(TASKS, 2, replace=False)))
        shared = {name: draw.normal() for name in predictors.PAIRS}
        for merge in range(each):
            accuracy = draw.normal() + shared["vectors.cosine"]
            row = shared | {name: draw.normal() for name in numbers}
            row |= {name: draw.normal() for name in ("head.disjoint", "divergence.disjoint")}
            row |= {"agreement.disjoint": draw.normal(), "experts": 2, "tasks": tasks}
            row |= {"label": f"method {merge % 3}", "problem": f"toy {problem} {'+'.join(tasks)}"}
            row |= {statistics.PRIMARY: accuracy + noise * draw.normal(), "accuracy": accuracy}
            rows.append(row)
    return pd.DataFrame(rows)


def test_a_predictor_that_is_the_truth_orders_all_and_one_that_is_not_none():
    found = predictors.leave_one_task_out(merges(problems=40), draws=100, seed=0)
    value, (low, high) = found["output"]["order"]
    assert value == low == high == pytest.approx(1)
    value, (low, high) = found["output"]["alone"]
    assert 0.9 < low <= value <= high <= 1  # a line through ranks, not through the values
    assert found["output"]["added"][0] > 0.3
    for drawn in ("head", "divergence", "agreement"):
        assert abs(found[drawn]["alone"][0]) < 0.25 and abs(found[drawn]["order"][0]) < 0.25
        assert abs(found[drawn]["added"][0]) < 0.05


def test_accuracies_permuted_are_not_predicted():
    table = merges(problems=40)
    table["accuracy"] = np.random.default_rng(1).permutation(table.accuracy)
    found = predictors.leave_one_task_out(table, draws=100, seed=0)
    assert all(abs(values["alone"][0]) < 0.25 for values in found.values())
    assert all(abs(values["order"][0]) < 0.25 for values in found.values())


def test_metrics_of_pairs_tell_problems_apart_and_no_merges_of_one():
    found = predictors.leave_one_task_out(merges(problems=60), draws=100, seed=0)
    assert found["pairs"]["alone"][1].low > 0.2  # the cosine moves a problem's accuracies
    assert found["pairs"]["order"] == (0, (0, 0)) and found["gradients"]["order"] == (0, (0, 0))


def test_no_problem_with_the_task_is_learnt_from():
    table = merges()
    before = predictors.left_out(table, (statistics.PRIMARY,))
    with_a = np.array(["a" in tasks for tasks in table.tasks])
    changed = table.assign(accuracy=np.where(with_a, -table.accuracy, table.accuracy))
    after = predictors.left_out(changed, (statistics.PRIMARY,))
    assert before[before.task == "a"].predicted.equals(after[after.task == "a"].predicted)
    assert not before[before.task == "b"].predicted.equals(after[after.task == "b"].predicted)
    held = before[before.task == "a"]
    assert len(held) == with_a.sum() and all("a" in p.split()[-1].split("+") for p in held.problem)


def test_a_task_that_is_everywhere_is_passed_over():
    table = merges()
    table["tasks"] = [(*tasks, "z") for tasks in table.tasks]
    assert "z" not in set(predictors.left_out(table, (statistics.PRIMARY,)).task)


def test_correlations_of_resampled_problems_are_those_of_the_merges_themselves():
    folds = predictors.left_out(merges(noise=1.0), (statistics.PRIMARY, "size"))
    problems = sorted(folds.problem.unique())
    counts = np.random.default_rng(0).multinomial(12, [1 / 12] * 12, 3)
    found = predictors._correlations(predictors._moments(folds), counts)
    for value, count in zip(found, counts):
        times = dict(zip(problems, count))
        expected = []
        for _, fold in folds.groupby("task"):
            taken = fold.loc[fold.index.repeat(fold.problem.map(times))]
            if len(taken):
                expected.append(statistics.pearson(taken.predicted, taken.accuracy))
        assert value == pytest.approx(np.mean(expected))


def test_a_frame_holds_the_mean_over_pairs():
    of_pairs = []
    for place, pair in enumerate(("a+b", "a+c", "b+c")):
        metrics = dict.fromkeys(predictors.PAIRS, float(place))
        of_pairs.append({"seed": 3, "pair": pair, "metrics": metrics})
    plain = dict.fromkeys(statistics.COLUMNS, 0) | {"seed": 3, "options": {}, "trivial": {}}
    row = plain | {"energies": {statistics.PRIMARY: 0.5}}
    rows = [row | {"tasks": dict.fromkeys("abc")}, row | {"tasks": dict.fromkeys("bc")}]
    table = predictors.frame(rows, of_pairs)
    assert table["vectors.cosine"].tolist() == [1.0, 2.0] and table.tasks[1] == ("b", "c")


def test_soups_that_hang_on_their_gradients_are_predicted_by_them():
    draw, of_pairs = np.random.default_rng(0), []
    for pair in combinations([f"task {place}" for place in range(8)], 2):
        metrics = {metric: draw.normal() for metric in predictors.PAIRS}
        quality = -metrics["gradients.distance"] + 0.1 * draw.normal()
        soup = {"accuracy": quality, statistics.PRIMARY: draw.normal()}
        of_pairs.append({"seed": 0, "pair": "+".join(pair), "metrics": metrics, "soup": soup})
    table = predictors.frame_of_two(of_pairs)
    found = predictors.soups_left_out(table, draws=100, seed=0)
    assert found["gradients"]["soups"][1].low > 0.9 and found["pairs"]["soups"][0] > 0.5
    assert abs(found["output"]["soups"][0]) < 0.5


def test_what_is_found_is_recorded(tmp_path):
    records = Records("10_trial", "smoke", root=tmp_path)
    found = predictors.leave_one_task_out(merges(), draws=20, seed=0)
    table = predictors.record(records.record, "vision", found, 96)
    written = load_records("smoke", tmp_path)
    for predictor in predictors.PREDICTORS:
        for measure in ("alone", "added", "order"):
            one = written[f"trial.predictors.vision.{predictor}.{measure}"]
            value, interval = found[predictor][measure]
            assert (one.value, one.interval, one.n) == (value, interval, 96)
            assert table.loc[predictors.LABELS[predictor], measure] == value
    assert "trial.predictors.vision.all.alone" in written
    assert set(predictors.LABELS) == set(predictors.PREDICTORS)
