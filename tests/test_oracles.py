"""Ours against what mergekit, peft and fusion_bench made of the same experts, and the ways in which
those differ by name only."""

from dataclasses import replace

import pytest
import torch
from frozen_oracles import difference, thaw

PROBLEMS, CASES = thaw()
NAMED = {f"{c.whose.split()[0]} {c.method} {c.note}".strip(): c for c in CASES}


def update(name):
    """What an implementation added to the base."""
    case = NAMED[name]
    return {k: v - PROBLEMS[case.problem].base[k] for k, v in case.theirs.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ours_is_theirs(case):
    assert difference(case, PROBLEMS[case.problem]) <= case.tolerance


@pytest.mark.parametrize(
    "name, other",
    [
        ("mergekit ties 3 at 0.2", {"semantics": "authors"}),
        ("mergekit ties 3 at 0.2", {"semantics": "peft"}),
        ("mergekit ties weighted", {"semantics": "peft"}),
        ("peft ties weighted", {"semantics": "mergekit"}),
        ("fusion_bench ties mean of 3", {"semantics": "fusion_bench"}),
        ("fusion_bench ties sum of 3", {"semantics": "authors"}),
        ("mergekit dare", {"rescale": "keep"}),
        ("peft dare", {"rescale": "l1"}),
        ("mergekit della", {"rescale": "keep"}),
        ("mergekit breadcrumbs", {"outliers": 0.0}),
        ("fusion_bench wudi", {"steps": 0}),
        ("fusion_bench regmean", {"alpha": 1.0}),
        ("mergekit soup", {"weights": None}),
        ("mergekit task_arithmetic", {"scale": [0.5, 0.3, -0.2]}),
    ],
)
def test_another_option_is_another_method(name, other):
    """Every option named after what it does, or after whose it is, is needed to be that."""
    case = NAMED[name]
    assert difference(replace(case, options=case.options | other), PROBLEMS[case.problem]) > 1e-4


def test_ties_keep_a_number_of_entries_per_tensor_or_one_more_of_the_whole_model():
    """mergekit ⌊d/5⌋ of each tensor but at least one, peft none of three entries; the authors ⌊d/5⌋
    + 1 of all, none of a small update."""
    kept = {
        name: {k: int((v != 0).sum()) for k, v in update(name).items()}
        for name in ("mergekit ties 1 at 0.2", "peft ties 1 at 0.2", "fusion_bench ties sum of 1")
    }
    sizes = {k: v.numel() for k, v in PROBLEMS["tensors"].base.items()}
    assert kept["mergekit ties 1 at 0.2"] == {k: max(1, d // 5) for k, d in sizes.items()}
    assert kept["peft ties 1 at 0.2"] == {k: d // 5 for k, d in sizes.items()}
    assert sum(kept["fusion_bench ties sum of 1"].values()) == sum(sizes.values()) // 5 + 1
    assert kept["fusion_bench ties sum of 1"]["tall"] == 0 < kept["peft ties 1 at 0.2"]["tall"]


def test_entries_that_cancel_go_with_the_majority_or_up():
    """Of 3 against -3 and -2 against 2: the authors take the sign of most other entries, here
    minus, mergekit and peft plus."""
    cancelled = lambda name: update(name)["bias"][:2].tolist()
    assert cancelled("fusion_bench ties mean of 3") == pytest.approx([-0.9, -0.6])  # λ = 0.3
    assert (
        cancelled("mergekit ties 4 at 0.5")
        == cancelled("peft ties 4 at 0.5")
        == pytest.approx([3.0, 2.0])
    )


def test_weights_vote_in_mergekit_and_not_in_peft():
    """A negative weight turns its expert's vote in mergekit; in peft it turns only what the vote
    has admitted."""
    counted, uncounted = update("mergekit ties weighted"), update("peft ties weighted")
    assert any((counted[k] * uncounted[k] < 0).any() for k in counted)


def test_mean_and_sum_part_where_experts_agree():
    """A sum is the mean times the number of experts that agree: once, twice or three times as
    large."""
    mean, total = update("fusion_bench ties mean of 3"), update("fusion_bench ties sum of 3")
    ratios = torch.cat([(total[k] / mean[k])[mean[k] != 0] for k in mean])
    assert sorted(set(ratios.round(decimals=6).tolist())) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "name, experts",
    [("tsv_merge of 2", "ab"), ("tsv_merge of 4", "abcd"), ("iso_c", "abc"), ("wudi", "abc")],
)
def test_only_matrices_are_merged_as_such(name, experts):
    """Everything else is averaged, so that a position embedding is merged as a matrix if it has two
    axes and averaged if it has three."""
    vectors = PROBLEMS["tensors"].vectors(experts)
    for k, v in update(f"fusion_bench {name}").items():
        assert torch.allclose(v, sum(z[k] for z in vectors) / len(experts), atol=1e-12) == (
            v.dim() != 2
        )


def test_regmean_merges_the_weights_of_dense_layers_and_averages_the_rest():
    """Biases, norms, class token and position embedding; RegMean++ leaves the last norm to the base
    instead."""
    problem = PROBLEMS["transformer"]
    vectors = problem.vectors(problem.experts)
    dense = {
        f"{k}.weight" for k, m in problem.model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    for name in ("fusion_bench regmean", "fusion_bench regmean_plus_plus up to the last norm"):
        averaged = {
            k
            for k, v in update(name).items()
            if torch.allclose(v, sum(z[k] for z in vectors) / 3, atol=1e-12)
        }
        assert averaged == NAMED[name].theirs.keys() - dense
    assert problem.base.keys() - averaged - dense == {"norm.weight", "norm.bias"}
