"""What becomes of parameters, buffers, codes, counters and ties; options of data-free methods."""

import copy
import math

import pytest
import torch
from small import METHODS, ON_THE_BASE, Tied, buffered, changed, greedy, linear, tuned
from torch import nn

import qpmerge_lite
import qpmerge_lite.datafree as q
from qpmerge_lite.aliases import sharing
from qpmerge_lite.errors import MergeError, NonFinite
from qpmerge_lite.merge import add_update, average, check_experts, parameters_of, tied


@pytest.mark.parametrize("method", METHODS)
def test_buffers_are_averaged_and_variances_stay_positive(method):
    """Variances that shrink in every expert: added up like weights, they would be negative."""
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    experts = tuned(base)
    for state, share in zip(experts.values(), (0.1, 0.2)):
        state["1.running_var"] = share * base[1].running_var
        state["1.running_mean"] = torch.full((4,), share)
    merge = method(base, experts)
    if method is not greedy:  # which keeps one expert here
        torch.testing.assert_close(merge.state_dict["1.running_var"], torch.full((4,), 0.15))
        torch.testing.assert_close(merge.state_dict["1.running_mean"], torch.full((4,), 0.15))
    assert {"1.running_var", "1.running_mean"} <= merge.averaged.keys()
    assert all(isinstance(reason, str) and reason for reason in merge.averaged.values())
    assert merge.model(base)(torch.randn(8, 4)).isfinite().all()


def test_buffers_are_averaged_evenly_whatever_the_weights():
    base = nn.BatchNorm1d(1)
    experts = {}
    for task, variance in {"a": 1.0, "b": 3.0}.items():
        experts[task] = changed(base.state_dict(), "running_var", torch.tensor([variance]))
    merged = q.soup(base, experts, weights=[2.0, -1.0]).state_dict
    assert merged["running_var"].item() == 2.0


def test_what_is_averaged_is_listed():
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    buffers = {"1.running_mean", "1.running_var"}
    experts = tuned(base)
    assert q.soup(base, experts).averaged.keys() == parameters_of(base) | buffers
    assert q.ties(base, experts).averaged.keys() == buffers
    vectors = parameters_of(base) - {"0.weight"}
    assert q.iso_c(base, experts).averaged.keys() == buffers | vectors
    assert q.iso_c(base, experts, scale=0.5).averaged.keys() == buffers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("codes", [torch.tensor([3, -4]).char(), torch.tensor([True, False])])
def test_codes_are_the_experts_or_an_error(method, codes):
    base = buffered("codes", torch.zeros_like(codes))
    experts = {task: changed(state, "codes", codes) for task, state in tuned(base).items()}
    merge = method(base, experts)
    assert torch.equal(merge.state_dict["codes"], codes) and "codes" not in merge.averaged
    assert merge.state_dict["codes"].dtype == codes.dtype
    experts["b"]["codes"] = codes.flip(0)
    with pytest.raises(MergeError, match="parameter 'codes': expected the same .* dequantise"):
        method(base, experts)


@pytest.mark.parametrize("method", [q.soup, q.slerp, *ON_THE_BASE])
def test_of_counters_the_largest_is_taken(method):
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    experts = tuned(base)
    for state, count in zip(experts.values(), (5, 7)):
        state["1.num_batches_tracked"] = torch.tensor(count)
    merged = method(base, experts).state_dict["1.num_batches_tracked"]
    assert merged.item() == 7 and merged.dtype == torch.int64


def test_switches_without_axes_have_to_agree():
    base = buffered("ready", torch.tensor(False))
    experts = tuned(base)
    experts["a"]["ready"] = torch.tensor(True)
    with pytest.raises(MergeError, match="parameter 'ready': expected the same torch.bool values"):
        q.soup(base, experts)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.scale, self.nothing = nn.Parameter(torch.tensor(2.5)), nn.Parameter(torch.empty(0, 3))


@pytest.mark.parametrize("method", METHODS)
def test_parameters_without_axes_and_without_entries(method):
    base = Scaled()
    experts = tuned(base)
    merged = method(base, experts).state_dict
    assert merged["scale"].shape == () and merged["scale"].isfinite()
    assert merged["nothing"].shape == (0, 3)
    values = [float(state["scale"]) for state in experts.values()]
    expected = {q.soup: sum(values) / 2, q.task_arithmetic: 2.5 + 0.3 * (sum(values) - 5.0)}
    if method in expected:
        assert float(merged["scale"]) == pytest.approx(expected[method], rel=1e-6)


def test_a_parameter_without_axes_is_a_vector_of_one_entry():
    class Vector(Scaled):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(self.scale.detach().reshape(1))

    torch.manual_seed(0)
    base = Scaled()
    experts = tuned(base)
    other = Vector()
    other.load_state_dict(changed(base.state_dict(), "scale", base.scale.detach().reshape(1)))
    reshaped = {t: changed(s, "scale", s["scale"].reshape(1)) for t, s in experts.items()}
    for method in METHODS:
        found, expected = method(base, experts), method(other, reshaped)
        assert found.state_dict["scale"] == expected.state_dict["scale"][0], method


@pytest.mark.parametrize("method", METHODS)
def test_tied_parameters_stay_tied(method):
    base = Tied()
    assert tied(base)["head.weight"] == ["table.weight", "head.weight"]
    merged = method(base, tuned(base)).state_dict
    assert torch.equal(merged["head.weight"], merged["table.weight"])


class Views(nn.Module):
    """A decoder that is the transpose of an encoder, and a head that is a few rows of it."""

    def __init__(self, encoder=None):
        super().__init__()
        self.encoder, self.decoder, self.head = nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 2)
        if encoder is not None:
            self.encoder.weight = nn.Parameter(encoder)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().T)
        self.head.weight = nn.Parameter(self.encoder.weight.detach()[1:3])

    def forward(self, x):
        hidden = self.decoder(torch.tanh(self.encoder(x)))
        return hidden + self.head(x).sum(-1, keepdim=True)


def views(seed=0):
    """(base, experts) of parameters that see one memory."""
    torch.manual_seed(seed)
    base = Views()
    return base, {
        t: Views(base.encoder.weight.detach() + 0.1 * torch.randn(4, 6)).state_dict() for t in "ab"
    }


def assert_one_memory(state):
    assert torch.equal(state["decoder.weight"], state["encoder.weight"].T)
    assert torch.equal(state["head.weight"], state["encoder.weight"][1:3])


@pytest.mark.parametrize("method", METHODS)
def test_views_of_one_memory_get_one_value(method):
    base, experts = views()
    merged = method(base, experts)
    assert_one_memory(merged.state_dict)
    base.load_state_dict(merged.state_dict)
    assert all(
        torch.equal(value, merged.state_dict[name]) for name, value in base.state_dict().items()
    )


@pytest.mark.parametrize("solver", ["qp", "regmean"])
def test_views_of_one_memory_are_averaged_by_solvers(solver):
    base, experts = views()
    merged = getattr(qpmerge_lite, solver)(
        base, experts, {t: [{"x": torch.randn(9, 6)}] for t in experts}
    )
    assert_one_memory(merged.state_dict)
    assert not merged.table
    assert "tied to decoder.weight, head.weight" in merged.averaged["encoder.weight"]
    torch.testing.assert_close(
        merged.state_dict["encoder.weight"], sum(e["encoder.weight"] for e in experts.values()) / 2
    )


def test_parameters_that_lie_side_by_side_in_memory_are_not_tied():
    memory = torch.randn(40)
    base = Views()
    base.encoder.weight, base.decoder.weight, base.head.weight = (
        nn.Parameter(memory[:24].view(4, 6)),
        nn.Parameter(memory[24:36].view(6, 2)),
        nn.Parameter(memory[36:].view(2, 2)),
    )
    assert sharing(base) == []


def test_experts_that_disagree_about_one_memory_are_refused():
    base, experts = views()
    experts["b"]["decoder.weight"] = experts["b"]["decoder.weight"] + 1
    with pytest.raises(
        MergeError, match="'b': entry 'decoder.weight' is not what other entries say"
    ):
        q.soup(base, experts)


def test_a_tied_name_that_a_checkpoint_leaves_out_is_filled_in():
    base = Tied()
    state = {k: v for k, v in tuned(base)["a"].items() if k != "head.weight"}
    merged = q.soup(base, {"a": state}).state_dict
    assert torch.equal(merged["head.weight"], state["table.weight"])


def test_experts_that_are_not_tied_as_the_base_are_refused():
    base = Tied()
    experts = tuned(base)
    experts["b"]["head.weight"] = experts["b"]["head.weight"] + 1
    with pytest.raises(MergeError, match="'b': entries 'table.weight' and 'head.weight' differ"):
        q.soup(base, experts)


def test_ties_trims_a_tied_parameter_once():
    """The same merge as of a model that has the matrix under one name only."""
    torch.manual_seed(0)
    base = Tied()
    experts = tuned(base)
    once = nn.Module()
    once.table, once.head = nn.Embedding(9, 4), nn.Module()
    once.table.weight, once.head.bias = base.table.weight, base.head.bias
    fewer = {t: {k: v for k, v in s.items() if k != "head.weight"} for t, s in experts.items()}
    found, expected = q.ties(base, experts).state_dict, q.ties(once, fewer).state_dict
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, e: q.soup(m, e, weights={"a": 0.3, "b": 0.7}), "soup weights: .* found dict"),
        (lambda m, e: q.soup(m, e, weights=torch.tensor([0.3, 0.7])), "soup weights: .* Tensor"),
        (lambda m, e: q.soup(m, e, weights=[1.0]), "soup weights: expected 2 numbers"),
        (lambda m, e: q.soup(m, e, weights=["a", "b"]), "soup weights: expected a number"),
        (lambda m, e: q.soup(m, e, weights=[1.0, 1.0]), "expected 2 numbers with sum 1"),
        (lambda m, e: q.task_arithmetic(m, e, scale={"a": 0.3}), "scale: .* found dict"),
        (lambda m, e: q.task_arithmetic(m, e, scale=torch.tensor(0.3)), "scale: .* found Tensor"),
        (lambda m, e: q.task_arithmetic(m, e, scale=[0.3]), "scale: expected 2 numbers"),
        (lambda m, e: q.task_arithmetic(m, e, scale="all"), "scale: expected 2 numbers"),
        (lambda m, e: q.slerp(m, e, t=[0.5]), "t: expected a number, found list"),
        (lambda m, e: q.ties(m, e, weights=[1.0, 1.0]), "ties weights: .* mergekit and peft"),
        (lambda m, e: q.ties(m, e, weights=[1.0], semantics="peft"), "ties weights: expected 2"),
        (lambda m, e: q.ties(m, e, semantics="mine"), "semantics: expected one of authors"),
        (lambda m, e: q.ties(m, e, density="0.2"), "density: expected a number, found str"),
        (lambda m, e: q.dare(m, e, drop=1.0), r"drop: expected a fraction in \[0, 1\), found 1"),
        (lambda m, e: q.dare(m, e, rescale="l2"), "rescale: expected one of keep, l1"),
        (lambda m, e: q.della(m, e, spread=0.6), "della: expected density ± spread"),
        (lambda m, e: q.della(m, e, spread=None), "spread: expected a number, found NoneType"),
    ],
)
def test_bad_options_are_named(call, message):
    base = linear()
    with pytest.raises(MergeError, match=message):
        call(base, tuned(base))


@pytest.mark.parametrize(
    "method", [q.dare, q.breadcrumbs, q.ties, q.della, q.tsv_merge, q.iso_c, q.wudi]
)
def test_scales_that_are_no_numbers_are_named(method):
    base = linear()
    for bad in ({"a": 0.3, "b": 0.7}, torch.tensor(0.3), [0.3, 0.7]):
        with pytest.raises(MergeError, match="scale: expected a number, found"):
            method(base, tuned(base), scale=bad)


def test_a_score_that_is_no_number_names_the_expert():
    base = linear()
    experts = tuned(base)

    def of_b_unknown(state):
        return math.nan if torch.equal(state["weight"], experts["b"]["weight"]) else 1.0

    def of_soups_unknown(state):
        known = any(torch.equal(state["weight"], s["weight"]) for s in experts.values())
        return 1.0 if known else math.nan

    with pytest.raises(NonFinite, match="score of expert 'b'"):
        q.greedy_soup(base, experts, score=of_b_unknown)
    with pytest.raises(NonFinite, match="score of the soup with expert 'b'"):
        q.greedy_soup(base, experts, score=of_soups_unknown)


def test_a_greedy_soup_grows_from_the_best_expert_to_the_worst():
    """Scored by the distance to an aim: b is nearest, then c; a takes the soup away from it."""
    base = linear()
    experts = {}
    for task, value in {"a": 9.0, "b": 1.0, "c": -2.0}.items():
        experts[task] = {k: torch.full_like(v, value) for k, v in base.state_dict().items()}
    seen = []

    def score(state):
        seen.append(float(state["bias"][0]))
        return -abs(seen[-1])

    merge = q.greedy_soup(base, experts, score=score)
    assert seen == [9.0, 1.0, -2.0, -0.5, pytest.approx(8 / 3)]
    assert torch.equal(merge.state_dict["bias"], torch.full((4,), -0.5))


def test_a_merge_leaves_base_and_experts_alone_and_shares_no_memory():
    for method in METHODS:
        base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        experts = tuned(base)
        states = [base.state_dict(), *experts.values()]
        before = copy.deepcopy(states)
        for value in method(base, experts).state_dict.values():
            value.fill_(5)
        for state, old in zip(states, before):
            assert all(torch.equal(state[name], old[name]) for name in old), method


def test_an_update_of_some_parameters_leaves_the_others_the_bases():
    base = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    experts = check_experts(base, tuned(base))
    update = {"0.weight": torch.ones(2, 2, dtype=torch.float64)}
    merge, origin = add_update(base, experts, update, scale=2.0), base.state_dict()
    torch.testing.assert_close(merge.state_dict["0.weight"], origin["0.weight"] + 2)
    assert torch.equal(merge.state_dict["0.bias"], origin["0.bias"])
    assert torch.equal(merge.state_dict["1.running_var"], average(base, experts)["1.running_var"])
    assert merge.model(base)[0].weight.data_ptr() != base[0].weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_average_is_the_same_in_pieces_of_any_size(dtype, monkeypatch):
    base = nn.Linear(70, 40).to(dtype)
    experts = tuned(base)
    for state in experts.values():
        state["weight"][:3] = 0.5  # which all have in common
    experts = check_experts(base, experts)
    whole = average(base, experts)
    for piece in (1, 7, 1000):
        monkeypatch.setattr(qpmerge_lite.merge, "PIECE", piece)
        found = average(base, experts)
        assert all(torch.equal(found[name], value) for name, value in whole.items())
    turned = {
        task: changed(s, "weight", s["weight"].T.contiguous().T) for task, s in experts.items()
    }
    assert all(torch.equal(average(base, turned)[name], value) for name, value in whole.items())


def test_updates_that_are_computed_when_they_are_asked_for_are_those_of_all():
    base = Tied()
    experts = check_experts(base, tuned(base))
    one_by_one = qpmerge_lite.merge.differences_one_by_one(base, experts)
    every = qpmerge_lite.merge.differences(base, experts)
    assert list(one_by_one) == list(every) and len(one_by_one) == len(every)
    assert all(torch.equal(one_by_one[name], value) for name, value in every.items())
    assert "nonesuch" not in one_by_one
    with pytest.raises(KeyError):
        one_by_one["nonesuch"]
