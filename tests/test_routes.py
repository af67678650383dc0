"""Layers that are not always called, weights that are no plain matrices, and what batches hold."""

import copy

import pytest
import torch
from blocks import WIDTH, Blocks, block, rows
from cases import (
    ELEMENTS,
    TASKS,
    assert_batches_do_not_matter,
    assert_copies_come_back,
    assert_every_parameter_is_solved_or_listed,
    assert_same_merge,
    both,
    copies,
    distance,
    tuned,
)
from torch import nn
from torch.nn.utils import parametrizations

import qpmerge_lite as q
from qpmerge_lite.errors import MergeError

# ----------------------------------------------------------------------------------- who is called


class Routed(nn.Module):
    """One of two layers, by the sign of the batch's mean."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x):
        return self.experts[int(x.mean() > 0)](x)


def test_a_layer_that_some_batches_never_reach():
    base, x = Blocks(Routed(), block()).double(), rows().abs()
    one, two = both({"inputs": x}, {"inputs": -x}), both({"inputs": -x}, {"inputs": x})
    merge = assert_same_merge(base, one, two)
    assert_every_parameter_is_solved_or_listed(base, merge)
    assert_copies_come_back(base, one)
    layers = {row["layer"] for row in merge.table}
    assert "blocks.1.0" in layers


def test_a_layer_that_some_tasks_never_reach():
    base, x = Blocks(Routed(), block()).double(), rows().abs()
    calibration = {"a": [{"inputs": x}], "b": [{"inputs": -x}]}
    assert_copies_come_back(base, calibration)
    merge = q.qp(base, tuned(base), calibration, **ELEMENTS)
    assert_every_parameter_is_solved_or_listed(base, merge)


def test_a_layer_that_nobody_reaches_is_averaged_for_a_reason():
    base = Blocks(Routed(), block()).double()
    experts, calibration = tuned(base), both({"inputs": rows().abs()})
    merge = q.qp(base, experts, calibration, **ELEMENTS)
    assert {f"blocks.0.experts.0.{p}" for p in ("weight", "bias")} == set(merge.averaged)
    for name in merge.averaged:
        mean = (experts["a"][name] + experts["b"][name]) / 2
        torch.testing.assert_close(merge.state_dict[name], mean)


class Mixture(nn.Module):
    """Each token through the expert its gate prefers; experts see other tokens in every model."""

    def __init__(self, flat):
        super().__init__()
        self.gate, self.flat = nn.Linear(WIDTH, 3, bias=False), flat
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        z = x.flatten(0, 1) if self.flat else x
        chosen, out = self.gate(z).argmax(-1), torch.zeros_like(z)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                out[chosen == number] = expert(z[chosen == number])
        return x + out.view_as(x)


@pytest.mark.parametrize("flat", [False, True])
def test_experts_that_see_other_tokens_in_every_model(flat):
    base = Blocks(Mixture(flat), Mixture(flat)).double()
    batches = both({"inputs": rows(8, 7)}, {"inputs": rows(5, 4)})
    assert_copies_come_back(base, batches)
    merge = q.qp(base, tuned(base, 0.3), batches, **ELEMENTS)
    assert_every_parameter_is_solved_or_listed(base, merge)
    assert "blocks.0.gate" in {row["layer"] for row in merge.table}
    assert_batches_do_not_matter(base, batches)


# ------------------------------------------------------------- weights that are not plain matrices


def normed(wrap):
    return (
        Blocks(*(nn.Sequential(wrap(nn.Linear(WIDTH, WIDTH)), nn.GELU()) for _ in range(2)))
        .double()
        .eval()
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm"],
)
def test_layers_whose_weight_is_computed_are_averaged_for_a_reason(wrap):
    base, batches = normed(wrap), both({"inputs": rows()})
    state = {name: value.clone() for name, value in base.state_dict().items()}
    experts = {t: {k: v + 0.1 * torch.rand_like(v) for k, v in state.items()} for t in TASKS}
    merge = q.qp(base, experts, batches, **ELEMENTS)
    assert merge.table == []
    assert_every_parameter_is_solved_or_listed(base, merge)
    assert distance(q.qp(base, copies(experts), batches).state_dict, experts["a"]) < 1e-12
    assert distance(base.state_dict(), state) == 0
    with torch.no_grad():
        one, two = base(rows(8)), base.eval()(rows(8))
    assert one.isfinite().all() and two.isfinite().all()


class Filter(nn.Module):
    """A complex filter in front of a layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.filter = nn.Parameter(torch.randn(WIDTH, dtype=torch.cdouble))

    def forward(self, x):
        return self.layer((torch.fft.fft(x) * self.filter).real).tanh()


def test_complex_parameters_are_averaged_for_a_reason():
    base, batches = Blocks(Filter(), Filter()), both({"inputs": rows()})
    for each in base.blocks:
        each.layer.double()
    experts = tuned(base)
    merge = q.qp(base, experts, batches, **ELEMENTS)
    assert set(merge.averaged) == {"blocks.0.filter", "blocks.1.filter"}
    for name in merge.averaged:
        torch.testing.assert_close(
            merge.state_dict[name], (experts["a"][name] + experts["b"][name]) / 2
        )
    found = q.qp(base, copies(experts), batches, **ELEMENTS).state_dict
    assert all(torch.equal(found[name], experts["a"][name]) for name in merge.averaged)


def dead_unit():
    """Two layers with a rectifier between, one of whose units is never on."""
    base = Blocks(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8))
    ).double()
    with torch.no_grad():
        base.blocks[0][0].bias[3] = -100.0
    return base


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (q.qp, {"basis": "elements"}),
        (q.regmean, {}),
        (q.regmean_plus_plus, {}),
    ],
)
def test_columns_that_no_input_reaches_are_averaged_not_the_bases(method, options):
    base, batches = dead_unit(), both({"inputs": torch.randn(64, 8, dtype=torch.float64)})
    experts = tuned(base)
    found = method(base, copies(experts), batches, **options).state_dict
    assert distance(found, experts["a"]) < 1e-8
    mean = (experts["a"]["blocks.1.0.weight"] + experts["b"]["blocks.1.0.weight"]) / 2
    merged = method(base, experts, batches, **options).state_dict["blocks.1.0.weight"]
    torch.testing.assert_close(merged[:, 3], mean[:, 3])


# ------------------------------------------------------------------------------- what batches hold


@pytest.mark.parametrize(
    "more",
    [
        {"mask": None},
        {"mask": True},
        {"step": 3},
        {"step": "three"},
        {"step": torch.tensor(3)},
    ],
)
def test_entries_that_are_no_inputs_pass_through(more):
    base, x = Blocks().double(), rows()
    assert_same_merge(base, both({"inputs": x}), both({**more, "inputs": x}))
    assert_same_merge(base, both({"inputs": x}), both({"inputs": x, **more}))


@pytest.mark.parametrize(
    "batch",
    [
        {"inputs": rows().tolist()},
        (rows(), rows()),
        rows(),
        "text",
        {"inputs": None},
        {},
        {"other": rows()},
        {"inputs": rows()[:0]},
        None,
        3,
    ],
    ids=[
        "lists",
        "tuple",
        "tensor",
        "string",
        "nothing",
        "empty",
        "another name",
        "no rows",
        "None",
        "number",
    ],
)
def test_a_batch_that_cannot_be_run_is_one_error_that_names_its_task(batch):
    base = Blocks().double()
    with pytest.raises(MergeError, match="'b'"):
        q.qp(base, tuned(base), {"a": [{"inputs": rows()}], "b": [batch]})
    with pytest.raises(MergeError, match="'b'"):
        q.audit(base, base.state_dict(), tuned(base), {"a": [{"inputs": rows()}], "b": [batch]})


def test_arrays_are_an_error_that_names_task_and_key_or_are_taken():
    base, x = Blocks().double(), rows()
    try:
        found = q.qp(base, tuned(base), both({"inputs": x.numpy()}))
    except MergeError as error:
        assert "'a'" in str(error) and "inputs" in str(error)
    else:
        assert found.table


def test_a_generator_is_used_once_or_refused():
    base, x = Blocks().double(), rows()
    experts = tuned(base)
    stream = {task: ({"inputs": x} for _ in range(2)) for task in TASKS}
    try:
        found = q.qp(base, experts, stream, **ELEMENTS).state_dict
    except MergeError as error:
        assert "'a'" in str(error)
    else:
        listed = q.qp(base, experts, both({"inputs": x}, {"inputs": x}), **ELEMENTS).state_dict
        assert distance(found, listed) == 0


@pytest.mark.parametrize(
    "calibration",
    [
        {"a": {"inputs": rows()}, "b": {"inputs": rows()}},
        [{"inputs": rows()}],
        None,
        {"a": [], "b": []},
        {"a": [{"inputs": rows()}]},
        {"a": 3, "b": 4},
    ],
    ids=["a batch", "a list", "nothing", "empty", "a task lacks", "numbers"],
)
def test_calibration_that_is_no_batches_of_every_task(calibration):
    base = Blocks().double()
    with pytest.raises(MergeError, match="(?i)calibration|batches"):
        q.qp(base, tuned(base), calibration)


def test_models_and_modes_are_as_they_were():
    base, batches = (
        Blocks(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)), block()).double(),
        rows(),
    )
    base.train()
    before = copy.deepcopy(base.state_dict())
    parameters = dict(base.named_parameters())
    experts = tuned(base)
    one, two = (q.qp(base, experts, both({"inputs": batches})).state_dict for _ in range(2))
    assert distance(one, two) == 0
    assert base.training and all(module.training for module in base.modules())
    assert distance(base.state_dict(), before) == 0
    assert all(parameters[name] is parameter for name, parameter in base.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
