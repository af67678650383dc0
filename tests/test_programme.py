"""The programme is the loss on the samples, restricted to a basis."""

import json
from fractions import Fraction

import frozen_core
import pytest
import torch
from asserts import assert_kkt, assert_relative
from hypothesis import given
from hypothesis import strategies as st
from strategies import FAMILIES, FREE, Layer, layers, make_layer, normal, outputs

from qpmerge_lite.diagnostic import captured_energy, gap
from qpmerge_lite.programme import programme
from qpmerge_lite.solve import minimise
from qpmerge_lite.solvers import shrink


@pytest.mark.parametrize("family", FAMILIES)
@given(layer=layers(), seed=st.integers(0, 99), weights=st.sampled_from(["tokens", "energy"]))
def test_objective_is_the_loss_of_the_merge(device, family, layer, seed, weights):
    """``L(d)`` = the pooled loss of ``Σ d_j B_j`` = half the weighted squared error, sample by
    sample."""
    layer = layer.to(device)
    pooled = layer.moments().pool(weights=weights)
    prog = layer.programme(family, pooled)
    d = normal(seed + 20_000, *prog.f.shape).to(device)
    update = prog.basis.combine(d)
    assert_relative(prog.objective(d), pooled.loss(update), 1e-10, pooled.energy)
    assert_relative(prog.objective(d), layer.loss(update, weights), 1e-10, pooled.energy)


@pytest.mark.parametrize("family", FAMILIES)
@given(layer=layers(), seed=st.integers(0, 99))
def test_gradient_is_the_derivative(family, layer, seed):
    """``Hd + f`` against automatic differentiation of the error on the samples."""
    prog = layer.programme(family)
    d = normal(seed + 20_000, *prog.f.shape).requires_grad_()
    update = prog.basis.combine(d)
    loss = sum(
        w / 2 * ((r - outputs(update, x)) ** 2).sum()
        for w, x, r in zip(layer.omega(), layer.X, layer.R)
    )
    (slope,) = torch.autograd.grad(loss, d)
    assert_relative(prog.gradient(d.detach()), slope, 1e-9, float(prog.f.abs().sum()))


@pytest.mark.parametrize("family", FAMILIES)
@given(layer=layers(), seed=st.integers(0, 99))
def test_certificate_of_any_coefficients(family, layer, seed):
    """``L(d) - L(d*) = ½ (d - d*)ᵀ H (d - d*)``, both losses measured on the samples."""
    prog = layer.programme(family)
    best = minimise(prog).d
    d = normal(seed + 20_000, *prog.f.shape)
    measured = layer.loss(prog.basis.combine(d)) - layer.loss(prog.basis.combine(best))
    assert_relative(
        measured,
        ((d - best) @ prog.H * (d - best)).sum() / 2,
        1e-9,
        layer.loss(prog.basis.combine(d)) + prog.energy,
    )


@given(layer=layers(), seed=st.integers(0, 99))
def test_certificate_of_any_merge(layer, seed):
    """``L(W) - L(W_full) = ½ tr((W - W_full) C (W - W_full)ᵀ)``, measured on the samples;
    :func:`gap` returns it, for a smaller basis too when the merge lies in it."""
    pooled = layer.moments().pool()
    full = layer.programme("elements", pooled)
    best = full.basis.combine(minimise(full).d)
    for merge in (normal(seed + 20_000, *best.shape), layer.updates.mean(0), 0 * best):
        measured, size = layer.loss(merge) - layer.loss(best), layer.loss(merge) + pooled.energy
        step = merge - best
        assert_relative(measured, ((step @ pooled.C) * step).sum() / 2, 1e-9, size)
        assert_relative(gap(pooled, merge), measured, 1e-9, size)
        assert gap(pooled, merge) >= -1e-9 * size
    soup = layer.updates.mean(0)
    inside = layer.programme("layer", pooled)
    assert_relative(
        gap(pooled, soup, "layer", layer.updates),
        layer.loss(soup) - layer.loss(inside.basis.combine(minimise(inside).d)),
        1e-9,
        layer.loss(soup) + pooled.energy,
    )
    assert abs(gap(pooled, best)) <= 1e-9 * pooled.energy


@pytest.mark.parametrize(
    "family", sorted(set(FAMILIES) - {"rotated_rows"})
)  # whose elements depend on the answer
@given(
    layer=layers(experts=("random",), enough=True),
    seed=st.integers(0, 99),
    noise=st.sampled_from([0.0, 1.0]),
)
def test_the_answer_drawn_first(family, layer, seed, noise):
    """Targets ``Σ d_j B_j X + e`` with e orthogonal to every output of the basis: d is recovered
    where H has full rank, its merge wherever it has not, and the loss is the energy of e."""
    basis = layer.basis(family)
    d = normal(seed + 20_000, *basis.size)
    Z, _ = layer.stacked(basis.elements())
    Q, S, _ = torch.linalg.svd(Z, full_matrices=False)
    Q = Q[:, S > 1e-9 * S[0]]
    e = noise * normal(seed + 1, len(Z))
    e = e - Q @ (Q.mT @ e)
    parts = (Z @ d.flatten() + e).split([r.numel() for r in layer.R])
    drawn = Layer(
        layer.updates,
        layer.X,
        tuple(y.reshape(r.shape) / w**0.5 for y, r, w in zip(parts, layer.R, layer.omega())),
        layer.fold,
    )
    prog = programme(drawn.moments().pool(), basis)
    solution = minimise(prog)
    assert_relative(solution.objective, (e**2).sum() / 2, 1e-9, prog.energy)
    assert_relative(prog.dense()[0], Z.mT @ Z, 1e-9)
    for x in layer.X:
        assert_relative(outputs(basis.combine(solution.d), x), outputs(basis.combine(d), x), 1e-6)
    if solution.rank == basis.p and torch.linalg.cond(Z) < 1e3:
        assert_relative(solution.d, d, 1e-7)


@given(layer=layers(targets=("propagated",)), alpha=st.sampled_from([1.0, 0.95, 0.5]))
def test_regmean_is_the_element_basis_with_propagated_targets(layer, alpha):
    """``W = (Σ_t C'_t / N_t)⁻¹ Σ_t C'_t W_t / N_t`` with ``C' = αC + (1-α) diag C``, in RegMean's
    own (n, m) convention."""
    layer = Layer(
        layer.updates, tuple(torch.cat([x, normal(3, 9, *x.shape[1:])]) for x in layer.X), (), ()
    )
    R = tuple(outputs(D, x) for D, x in zip(layer.updates, layer.X))
    layer = Layer(
        layer.updates, layer.X, R, tuple(torch.zeros(len(x), dtype=torch.long) for x in layer.X)
    )
    g, m, n = layer.updates.shape[1:]
    base = normal(9, g, m, n)
    grams = [torch.einsum("Ngi,Ngj->gij", x, x) / len(x) for x in layer.X]
    grams = [
        alpha * C + (1 - alpha) * torch.diag_embed(C.diagonal(dim1=-2, dim2=-1)) for C in grams
    ]
    closed = torch.linalg.solve(
        sum(grams), sum(C @ (base + D).mT for C, D in zip(grams, layer.updates))
    ).mT
    pooled = shrink(layer.moments(), layer.updates, alpha).pool()
    prog = layer.programme("elements", pooled)
    assert_relative(base + prog.basis.combine(minimise(prog).d), closed, 1e-8)


def test_fisher_averaging_is_the_diagonal_case():
    """α = 0 leaves ``W = Σ_t (diag C_t / N_t) W_t / Σ_t diag C_t / N_t``: a per-entry weighted mean
    of the experts."""
    layer = make_layer(2, K=3, targets="propagated")
    pooled = shrink(layer.moments(), layer.updates, 0.0).pool()
    prog = layer.programme("elements", pooled)
    F = torch.stack([(x[:, 0] ** 2).mean(0) for x in layer.X])[:, None, None]
    assert_relative(
        prog.basis.combine(minimise(prog).d), (F * layer.updates).sum(0) / F.sum(0), 1e-9
    )


@pytest.mark.parametrize("weights", ["tokens", "energy"])
@pytest.mark.parametrize("family", ["layer", "rows", "columns", "elements"])
def test_frozen_values(device, family, weights):
    """Coefficients, captured energy and residual energy of a small integer problem, solved in
    rational arithmetic (frozen_core.py)."""
    frozen = json.loads(frozen_core.TABLE.read_text())
    assert frozen == frozen_core.table(), "frozen_core.json is not what frozen_core.py computes"
    tensor = lambda z: torch.tensor(z, dtype=torch.float64).unsqueeze(1)
    X, R = (tuple(tensor(z) for z in zs) for zs in (frozen_core.X, frozen_core.R))
    layer = Layer(
        tensor(frozen_core.UPDATES), X, R, tuple(torch.zeros(len(x), dtype=torch.long) for x in X)
    ).to(device)
    prog = layer.programme(family, layer.moments().pool(weights=weights))
    expected = frozen[weights][family]
    assert_relative(minimise(prog).d.flatten(), [float(Fraction(v)) for v in expected["d"]], 1e-9)
    assert_relative(captured_energy(prog), float(Fraction(expected["captured"])), 1e-12)
    assert_relative(prog.energy, float(Fraction(expected["energy"])), 1e-14)


@pytest.mark.parametrize("family", FREE)
def test_dense_form_solves_the_same_programme(family):
    """The blocks laid out as one matrix: the minimiser of ½dᵀHd + fᵀd is stationary for both."""
    prog = make_layer(6, K=3, m=3, n=3, N=20).programme(family)
    H, f = prog.dense()
    d = (-torch.linalg.pinv(H, rtol=1e-12) @ f).reshape(prog.f.shape)
    assert_kkt(prog, d)
    assert_relative(prog.objective(d), minimise(prog).objective, 1e-9, prog.energy)
