"""Views: parameters to W and back, activations to samples, and y = W x."""

import pytest
import torch
from torch import nn
from toys import outputs

from qpmerge_lite.calibration import Batch
from qpmerge_lite.engine.layers import view
from qpmerge_lite.engine.survey import survey
from qpmerge_lite.errors import MergeError

MODULES = {
    "linear": nn.Linear(5, 3),
    "linear without bias": nn.Linear(5, 3, bias=False),
    "layer norm": nn.LayerNorm(5),
    "layer norm without bias": nn.LayerNorm(5, bias=False),
    "rms norm": nn.RMSNorm(5, eps=1e-6),
}


def randomised(name):
    module = MODULES[name].double()
    for p in module.parameters():
        nn.init.normal_(p)
    return module


@pytest.mark.parametrize("name", MODULES)
def test_the_module_is_its_matrix_times_its_samples(name):
    module = randomised(name)
    v = view("x", module)
    state = {f"x.{k}": p.detach() for k, p in module.named_parameters()}
    W, z = v.matrix(state), torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(
        torch.einsum("gmn,Ngn->Ngm", W, v.inputs(z)),
        outputs(v, z, module(z).detach()),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", MODULES)
def test_parts_invert_matrix_and_keep_module_shapes(name):
    module = randomised(name)
    state = {f"x.{k}": p.detach() for k, p in module.named_parameters()}
    parts = view("x", module).parts(view("x", module).matrix(state))
    assert parts.keys() == state.keys()
    for k, p in parts.items():
        assert torch.equal(p, state[k])


def test_scope_weights_leaves_bias_and_norms_out():
    assert view("x", nn.LayerNorm(4), "weights") is None
    assert view("x", nn.Linear(4, 2), "weights").parameters == ("x.weight",)
    assert view("x", nn.Linear(4, 2)).parameters == ("x.weight", "x.bias")


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm((4, 4)), nn.LayerNorm(4, elementwise_affine=False), nn.GELU(), nn.Dropout(0.1)],
)
def test_what_is_not_linear_in_parameters_has_no_view(module):
    assert view("x", module) is None


def test_an_unknown_scope_is_named():
    with pytest.raises(
        MergeError, match=r"scope: expected one of \('all', 'dense', 'weights'\), found 'norms'"
    ):
        view("x", nn.Linear(4, 2), "norms")


def test_norms_that_normalise_differently_do_not_share_samples():
    norms = [nn.LayerNorm(4), nn.LayerNorm(4, bias=False), nn.RMSNorm(4), nn.LayerNorm(4, eps=1e-3)]
    assert len({view("x", norm).reads for norm in norms}) == len(norms)


class AnyLayerNorm(nn.Module):
    """A norm whose name says nothing of the mean, of what the gain counts from or of the
    epsilon."""

    def __init__(self, subtracts_mean, offset, gain=1.0):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(gain + 0.1 * torch.randn(5)),
            nn.Parameter(0.1 * torch.randn(5)),
        )
        self.subtracts_mean, self.offset = subtracts_mean, offset

    def forward(self, x):
        norm = nn.functional.layer_norm if self.subtracts_mean else nn.functional.rms_norm
        return norm(x, (5,), eps=1e-6) * (self.weight + self.offset) + self.bias


def surveyed(model, x):
    """What a survey finds of a model that is given x."""
    return survey(model.eval(), [Batch("a", 0, {"input": x}, len(x), 0)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain", [0.0, 1.0, 60.0])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("subtracts_mean", [True, False])
def test_a_norm_is_read_as_what_it_computes(subtracts_mean, offset, gain, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), AnyLayerNorm(subtracts_mean, offset, gain)).to(dtype)
    found = surveyed(model, torch.randn(9, 5).to(dtype) + 1)
    assert not found.left_out
    assert (found.views["1"].subtracts_mean, found.views["1"].offset) == (subtracts_mean, offset)


def test_of_readings_that_agree_on_what_is_seen_the_name_decides():
    model = nn.Sequential(
        nn.LayerNorm(5, elementwise_affine=False),
        nn.RMSNorm(5),
        nn.LayerNorm(5, elementwise_affine=False),
        nn.LayerNorm(5),
    )
    found = surveyed(model, torch.randn(9, 5))
    assert {name: v.subtracts_mean for name, v in found.views.items()} == {"1": False, "3": True}


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm1d(5), nn.GroupNorm(1, 5), nn.InstanceNorm1d(5, affine=True), nn.SyncBatchNorm(5)],
)
def test_norms_over_other_axes_have_no_view(module):
    assert view("x", module) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_table_may_multiply_what_it_looks_up_by_one_number_only(dtype):
    torch.manual_seed(0)
    module, ids = nn.Embedding(7, 4).to(dtype), torch.randint(0, 7, (3, 5))
    v, rows = view("x", module), module(ids).detach()
    state = {"x.weight": module.weight.detach()}
    assert {
        v.misfit(state, ids, scale * rows)
        for scale in (1, -0.1, *torch.linspace(0.3, 60, 500).tolist())
    } == {0}
    shifted, by_column, by_token = (
        rows + 0.1,
        rows * torch.tensor([1, 1, 1, 1.1], dtype=dtype),
        rows * (1 + (ids == 2).to(dtype))[..., None],
    )
    for y in (shifted, by_column, by_token, 0 * rows, rows.flip(0), torch.nan * rows):
        assert v.misfit(state, ids, y) == float("inf")


CONVOLUTIONS = {
    "along time": (nn.Conv1d(3, 4, 5, stride=2, padding=3, dilation=2), (6, 3, 17)),
    "along time, without bias": (nn.Conv1d(3, 4, 2, padding="valid", bias=False), (6, 3, 9)),
    "along time, one sequence": (nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    "of pictures": (
        nn.Conv2d(3, 4, (2, 3), stride=(2, 1), padding=(0, 1), dilation=2),
        (6, 3, 9, 8),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_a_dense_layer_of_patches(name):
    module, shape = CONVOLUTIONS[name]
    module, x = module.double(), torch.randn(shape, dtype=torch.float64)
    v, state = view("x", module), {f"x.{k}": p.detach() for k, p in module.named_parameters()}
    assert v.misfit(state, x, module(x).detach()) < 1e-12
    assert v.misfit(state, x, module(2 * x).detach()) > 0.1
    assert all(torch.equal(part, state[key]) for key, part in v.parts(v.matrix(state)).items())


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 4, 3, groups=4),
        nn.Conv1d(4, 4, 3, padding_mode="circular", padding=1),
        nn.Conv1d(4, 4, 2, padding="same"),
    ],
)
def test_other_convolutions_along_time_have_no_view(module):
    assert view("x", module) is None
