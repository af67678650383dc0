"""What base and experts may be, and how everything else is refused."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from small import METHODS, ON_THE_BASE, WITHOUT_BASE, buffered, changed, linear, tuned
from torch import nn

import qpmerge_lite.datafree as q
from qpmerge_lite.errors import MergeError, MissingLayer, NonFinite, ShapeMismatch
from qpmerge_lite.merge import Merge, check_experts


def test_other_mappings_are_read_once_and_nothing_is_copied():
    class Lazy(Mapping):
        def __init__(self, state):
            self.state, self.reads = state, []

        def __getitem__(self, name):
            self.reads.append(name)
            return self.state[name]

        def __iter__(self):
            return iter(self.state)

        def __len__(self):
            return len(self.state)

    base = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    state = Lazy(copy.deepcopy(base).state_dict())
    checked = check_experts(base, {"a": state})["a"]
    assert sorted(state.reads) == sorted(state.state)
    assert list(checked) == list(base.state_dict())
    for name, value in checked.items():
        assert value.data_ptr() == state.state[name].data_ptr() and not value.requires_grad


@pytest.mark.parametrize(
    "bad, message",
    [
        (nn.Linear(4, 4), "expert 'a': expected a state dict, found Linear; .*state_dict()"),
        (Merge({}), "expert 'a': expected a state dict, found Merge; .*state_dict"),
        ("model.safetensors", "expert 'a': expected a state dict, found str; load the checkpoint"),
        (Path("model.bin"), "expert 'a': expected a state dict, found .*Path; load the checkpoint"),
        ([1.0], "expert 'a': expected a state dict, found list"),
        (None, "expert 'a': expected a state dict, found NoneType"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_state_dict_is_named(method, bad, message):
    base = linear()
    with pytest.raises(MergeError, match=message):
        method(base, {"a": bad, "b": base.state_dict()})


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_are_no_mapping_are_named(method):
    base = linear()
    with pytest.raises(MergeError, match="experts: expected a mapping .* found list"):
        method(base, [base.state_dict()])
    with pytest.raises(MergeError, match="experts: expected at least one state dict, found none"):
        method(base, {})
    with pytest.raises(MergeError, match="base: expected a model .*, found OrderedDict"):
        method(base.state_dict(), {"a": base.state_dict(), "b": base.state_dict()})


def test_entries_that_do_not_fit_are_named():
    base = linear()
    state = base.state_dict()
    with pytest.raises(MissingLayer, match="expert 'a' lacks parameter 'bias'"):
        q.soup(base, {"a": {"weight": state["weight"]}})
    with pytest.raises(MissingLayer, match="expert 'a' has an unknown parameter 'more'"):
        q.soup(base, {"a": changed(state, "more", torch.ones(1))})
    with pytest.raises(ShapeMismatch, match=r"'weight': expected shape \(4, 4\), found \(4, 5\)"):
        q.soup(base, {"a": changed(state, "weight", torch.ones(4, 5))})
    with pytest.raises(MergeError, match="entry 'bias': expected a tensor, found list"):
        q.soup(base, {"a": changed(state, "bias", [0.0] * 4)})
    with pytest.raises(MergeError, match="'bias': expected a dtype like the base's torch.float32"):
        q.soup(base, {"a": changed(state, "bias", torch.ones(4, dtype=torch.int8))})
    with pytest.raises(MergeError, match="'weight': expected a dense tensor"):
        q.soup(base, {"a": changed(state, "weight", torch.ones(4, 4).to_sparse())})


@pytest.mark.parametrize(
    "name",
    [
        "q_proj.lora_A.default.weight", "lora_unet_down.lora_up.weight", "fc.lora_embedding_B",
        "k.hada_w1_a.default", "k.lokr_w2", "v.ia3_l.default", "o.oft_r.default",
        "x.vera_lambda_b.default", "x.lora_magnitude_vector.default.weight",
    ],
)  # fmt: skip
def test_factors_of_adapters_are_refused(name):
    base = nn.Linear(2, 2)
    adapted = changed(base.state_dict(), name, torch.ones(2, 2))
    with pytest.raises(MergeError, match="factor of an adapter .* fold the adapters"):
        q.soup(base, {"a": base.state_dict(), "b": adapted})
    wrapped = nn.Module()
    wrapped._parameters[name] = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(MergeError, match="factor of an adapter .* fold the adapters"):
        q.ties(wrapped, {"a": wrapped.state_dict()})


def test_names_that_only_sound_like_adapters_are_parameters():
    base = nn.Module()
    base.flora_layer, base.mission = nn.Linear(2, 2), nn.Linear(2, 2)
    assert set(q.soup(base, {"a": base.state_dict()}).state_dict) == set(base.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_meta_tensors_are_refused_by_name(method):
    base, off = linear(), linear().to("meta")
    experts = tuned(base)
    with pytest.raises(MergeError, match="base: parameter 'weight' is on the meta device.*load"):
        method(off, experts)
    with pytest.raises(MergeError, match="expert 'b': parameter 'weight' is on the meta device"):
        method(base, {**experts, "b": off.state_dict()})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_expert_is_named(method, value):
    base = linear()
    experts = tuned(base)
    experts["b"]["bias"][1] = value
    with pytest.raises(NonFinite, match="expert 'b', parameter 'bias': 1 of 4 values"):
        method(base, experts)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ON_THE_BASE)
def test_a_damaged_base_is_named_where_it_is_needed(method, value):
    base = linear()
    experts = tuned(base)
    base.weight.data[0, 0] = value
    with pytest.raises(NonFinite, match="the base, parameter 'weight': 1 of 16 values"):
        method(base, experts)


@pytest.mark.parametrize("method", WITHOUT_BASE)
def test_a_damaged_base_does_not_matter_where_it_is_not_needed(method):
    base = linear()
    experts = tuned(base)
    expected = method(base, experts).state_dict
    base.weight.data[0, 0] = math.nan
    found = method(base, experts).state_dict
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found["weight"].isfinite().all()


@pytest.mark.parametrize("as_parameter", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_entries_of_infinity_that_all_share_stay_as_they_are(method, as_parameter):
    causal = torch.full((4, 4), -math.inf).triu(1)
    base = buffered("causal", causal)
    if as_parameter:
        del base.causal
        base.causal = nn.Parameter(causal, requires_grad=False)
    experts = {task: base.state_dict() for task in "ab"}
    assert torch.equal(method(base, experts).state_dict["causal"], causal)
    experts["b"] = changed(base.state_dict(), "causal", -causal)
    with pytest.raises(NonFinite, match="expert 'b', parameter 'causal'"):
        method(base, experts)
