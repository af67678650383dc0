"""Views: parameters to W and back, activations to samples, and y = W x."""
import pytest
import torch
from torch import nn
from toys import outputs

from qpmerge_lite.errors import MergeError
from qpmerge_lite.layers import view

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
    torch.testing.assert_close(torch.einsum("gmn,Ngn->Ngm", W, v.inputs(z)), outputs(v, z, module(z).detach()), rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("module", [nn.LayerNorm((4, 4)), nn.LayerNorm(4, elementwise_affine=False), nn.GELU(), nn.Dropout(0.1)])
def test_what_is_not_linear_in_parameters_has_no_view(module):
    assert view("x", module) is None


def test_an_unknown_scope_is_named():
    with pytest.raises(MergeError, match=r"scope: expected one of \('all', 'dense', 'weights'\), found 'norms'"):
        view("x", nn.Linear(4, 2), "norms")


def test_norms_that_normalise_differently_do_not_share_samples():
    norms = [nn.LayerNorm(4), nn.LayerNorm(4, bias=False), nn.RMSNorm(4), nn.LayerNorm(4, eps=1e-3)]
    assert len({view("x", norm).reads for norm in norms}) == len(norms)
