"""Weights in every precision, real and complex: computed in a wide one, stored in the base's."""

import copy
import math

import pytest
import torch
from small import DTYPES, F8, METHODS, ORDERING, linear, tuned
from torch import nn

import qpmerge_lite.datafree as q
from qpmerge_lite.errors import MergeError, NonFinite
from qpmerge_lite.merge import check_experts


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_of_an_expert_come_back_bit_for_bit(dtype, count):
    base = linear(dtype)
    state = tuned(base)["a"]
    merged = q.soup(base, {task: state for task in range(count)}).state_dict
    for name, value in state.items():
        assert merged[name].dtype == dtype and torch.equal(merged[name].double(), value.double())
        assert merged[name].data_ptr() != value.data_ptr()


def test_values_that_experts_share_come_back_bit_for_bit_beside_others():
    base = linear(torch.float64)
    experts = tuned(base, tasks="abc")
    shared = torch.tensor([0.1, 0.7, 1 / 3], dtype=torch.float64)
    for state in experts.values():
        state["bias"][:3] = shared
    merged = q.soup(base, experts, weights=[0.5, 0.3, 0.2]).state_dict["bias"]
    assert torch.equal(merged[:3], shared)
    assert merged[3] == sum(w * s["bias"][3] for w, s in zip([0.5, 0.3, 0.2], experts.values()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_method_works_in_every_precision(method, dtype):
    """Equal to the merge of the same weights in float64, to the base's precision."""
    base = linear(dtype)
    experts = tuned(base)
    exact = copy.deepcopy(base).double()
    doubled = {t: {k: v.double() for k, v in s.items()} for t, s in experts.items()}
    found, expected = method(base, experts).state_dict, method(exact, doubled).state_dict
    limits = torch.finfo(dtype)
    for name, value in expected.items():
        assert found[name].dtype == dtype
        error = (found[name].double() - value).abs()
        smallest = limits.smallest_normal * limits.eps
        # WUDI descends in float32, where Adam's steps are rounded
        assert (error <= limits.eps * value.abs() + smallest + 1e-6).all(), name


@pytest.mark.parametrize("method", METHODS)
def test_experts_of_another_precision(method):
    base = linear()
    narrow = {t: {k: v.bfloat16() for k, v in s.items()} for t, s in tuned(base).items()}
    same = {t: {k: v.float() for k, v in s.items()} for t, s in narrow.items()}
    found, expected = method(base, narrow).state_dict, method(base, same).state_dict
    for name, value in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value)


def test_experts_are_cast_on_demand():
    base = linear()
    state = {k: v.bfloat16() for k, v in base.state_dict().items()}
    assert check_experts(base, {"a": state})["a"]["weight"].dtype == torch.bfloat16
    checked = check_experts(base, {"a": state}, cast=True)["a"]
    assert {v.dtype for v in checked.values()} == {torch.float32}
    large = {"a": {k: v.double() + 1e300 for k, v in base.state_dict().items()}}
    message = "expert 'a', parameter 'weight' in torch.float32.*overflow"
    with pytest.raises(NonFinite, match=message):
        check_experts(base, large, cast=True)


@pytest.mark.parametrize("dtype", [torch.float16, *F8])
def test_overflow_is_an_error_that_names_parameter_and_dtype(dtype):
    base = linear(dtype)
    experts = tuned(base, 0.0)
    largest = torch.finfo(dtype).max
    base.weight.data[0, 0] = 0.75 * largest
    for state in experts.values():
        state["weight"][0, 0] = largest
    message = rf"parameter 'weight' in {dtype}: 1 of 16 .* overflow {dtype}.*wider.*scale"
    with pytest.raises(NonFinite, match=message):
        q.task_arithmetic(base, experts, scale=1.0)
    with pytest.raises(NonFinite, match=message):
        q.ties(base, experts, scale=2.0, density=1.0)


def test_an_infinite_result_is_named():
    base = linear(torch.float64)
    far = {task: {k: 1e200 * v for k, v in state.items()} for task, state in tuned(base).items()}
    with pytest.raises(NonFinite, match="parameter 'weight': 16 of 16"):
        q.task_arithmetic(base, far, scale=1e200)


def test_wudi_moves_half_precision_as_far_as_single():
    torch.manual_seed(0)
    base = nn.Linear(16, 16).bfloat16()
    experts = tuned(base, 0.02)
    single = copy.deepcopy(base).float()
    floats = {t: {k: v.float() for k, v in s.items()} for t, s in experts.items()}
    expected = q.wudi(single, floats).state_dict["weight"].bfloat16()
    found = q.wudi(base, experts).state_dict["weight"]
    start = q.task_arithmetic(base, experts, scale=1.0).state_dict["weight"]
    assert torch.equal(found, expected) and int((found != start).sum()) > 200
    halves = {t: {k: v.half() for k, v in s.items()} for t, s in floats.items()}
    assert q.wudi(single.half(), halves).state_dict["weight"].isfinite().all()


class Filter(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, 3, dtype=torch.cfloat))
        self.lin = nn.Linear(3, 3)


def test_complex_parameters_are_parameters():
    base = Filter()
    experts, origin = tuned(base), base.filter.detach()
    a, b = (state["filter"] for state in experts.values())
    soup, sum_of_both = q.soup(base, experts), q.task_arithmetic(base, experts, scale=1.0)
    torch.testing.assert_close(soup.state_dict["filter"], (a + b) / 2)
    torch.testing.assert_close(sum_of_both.state_dict["filter"], a + b - origin)
    assert "filter" in soup.averaged
    copies = q.soup(base, dict.fromkeys("abc", experts["a"])).state_dict
    assert torch.equal(copies["filter"], a)
    dense = q.dare(base, experts, drop=0.0, scale=1.0).state_dict["filter"]
    torch.testing.assert_close(dense, a + b - origin)
    experts["b"]["filter"][0, 0] = complex(0.0, math.nan)
    with pytest.raises(NonFinite, match="expert 'b', parameter 'filter'"):
        q.soup(base, experts)


@pytest.mark.parametrize("method", [q.slerp, q.model_stock])
def test_angles_of_complex_parameters_are_those_of_their_parts(method):
    base = Filter()
    experts = tuned(base)
    parts = nn.Module()
    parts.filter = nn.Parameter(torch.view_as_real(base.filter.detach()))
    split = {t: {"filter": torch.view_as_real(s["filter"])} for t, s in experts.items()}
    found = method(base, experts).state_dict["filter"]
    torch.testing.assert_close(torch.view_as_real(found), method(parts, split).state_dict["filter"])


@pytest.mark.parametrize("method", ORDERING)
def test_methods_that_need_an_order_refuse_complex_parameters(method):
    base = Filter()
    with pytest.raises(MergeError, match="'filter': expected real weights, found complex"):
        method(base, tuned(base))
