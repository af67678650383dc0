"""A minimiser is judged by its optimality conditions, and by what it must return in the limits."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from asserts import assert_kkt, assert_relative
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls
from strategies import FAMILIES, FREE, layers, make_layer, normal, outputs

from qpmerge_lite import solve
from qpmerge_lite.bases import build
from qpmerge_lite.errors import Infeasible, MergeError
from qpmerge_lite.programme import Programme, programme
from qpmerge_lite.solve import Factored, minimise, minimise_constrained
from qpmerge_lite.solvers import shrink

CONSTRAINTS = [
    {"nonnegative": True},
    {"sum_to_one": True},
    {"nonnegative": True, "sum_to_one": True},
]


def gamma_by_hand(prog, penalty):
    """Γ as its diagonal (b, q), 0 for elements without any output."""
    diagonal = prog.H.diagonal(dim1=-2, dim2=-1)
    if penalty == "diagonal" or diagonal.numel() == 0:
        return diagonal
    return torch.full_like(diagonal, float(diagonal.mean()))


def kernel_of(prog, rtol):
    """Eigenvectors of H (b, q, q), 0 for eigenvalues above ``rtol`` times the largest."""
    values, vectors = torch.linalg.eigh(prog.H)
    largest = values.max().clamp(min=0) if values.numel() else 0.0
    return vectors * (values <= rtol * largest)[:, None, :]


@pytest.mark.parametrize("family", FAMILIES)
@given(layer=layers(), seed=st.integers(0, 99))
def test_a_minimiser_is_stationary_and_unbeaten(device, family, layer, seed):
    """``Hd + f = 0``, and no perturbation of any size lowers the loss on the samples."""
    layer = layer.to(device)
    prog = layer.programme(family)
    solution = minimise(prog)
    assert_kkt(prog, solution.d)
    assert solution.residual <= 1e-6
    assert (solution.p, solution.rank <= solution.p) == (prog.f.numel(), True)
    least = layer.loss(prog.basis.combine(solution.d))
    for scale in (1e-3, 1.0, 100.0):
        other = solution.d + scale * normal(seed, *prog.f.shape).to(device)
        assert layer.loss(prog.basis.combine(other)) >= least - 1e-10 * prog.energy


@pytest.mark.parametrize("family", FREE)
@given(layer=layers(experts=("duplicate", "zero", "low_rank")), seed=st.integers(0, 99))
def test_singular_programmes(family, layer, seed):
    """The minimisers are ``-H⁺f + ker H``: same calibration outputs, ``-H⁺f`` the shortest."""
    prog = layer.programme(family)
    solution = minimise(prog)
    if not solution.p:
        return
    values = torch.linalg.eigvalsh(prog.H)
    kept = values > solve.RTOL * values.max().clamp(min=0)
    assert solution.rank == int(kept.sum()) * prog.f.shape[1]
    assert ("singular" in solution.status) == (solution.rank < solution.p)
    w = normal(seed, *prog.f.shape) @ kernel_of(prog, 1e-13).mT
    silent = replace(layer, R=tuple(0 * r for r in layer.R)).loss(prog.basis.combine(w))
    assert silent <= 1e-12 * prog.H.abs().max() * (1 + (w**2).sum())  # ½ wᵀHw, on the samples
    size = max(prog.energy, 1e-9)
    assert_relative(prog.objective(solution.d + w), solution.objective, 1e-6, size)
    assert solution.d.norm() <= (solution.d + w).norm() + 1e-9
    assert_relative((solution.d * w).sum(), 0.0, 1e-6, 1 + float(solution.d.norm() * w.norm()))


def test_fewer_samples_than_inputs():
    """N < n: the full span fits the samples exactly, with the least change of the weights."""
    layer = make_layer(1, K=1, m=2, n=6, N=3, targets="free")
    prog = layer.programme("elements")
    solution = minimise(prog)
    X, R = layer.X[0][:, 0], layer.R[0][:, 0]
    assert solution.rank == 2 * 3
    assert solution.objective <= 1e-12 * prog.energy
    least = torch.linalg.lstsq(X, R, driver="gelsd").solution.mT
    assert_relative(prog.basis.combine(solution.d)[0], least, 1e-8)


@pytest.mark.parametrize("penalty", ["mean", "diagonal"])
@pytest.mark.parametrize("family", FREE)
@given(layer=layers(), ridge=st.sampled_from([1e-3, 0.1, 10.0]), seed=st.integers(0, 99))
def test_ridge_is_stationary_and_shrinks(family, penalty, layer, ridge, seed):
    """``(H + λΓ)(d - d0) + H d0 + f = 0``; more ridge means more loss and a nearer prior."""
    prog = layer.programme(family)
    factored, prior = Factored(prog, penalty), normal(seed, *prog.f.shape)
    gamma = gamma_by_hand(prog, penalty)
    solution, more = factored.solve(ridge, prior), factored.solve(10 * ridge, prior)
    assert_kkt(prog, solution.d, ridge=ridge, gamma=gamma, prior=prior)
    size = prog.H.norm() * prior.norm() / prog.f.norm().clamp(min=1e-9)
    assert solution.residual <= 1e-6 * (1 + float(size))
    assert solution.objective <= more.objective + 1e-9 * (prog.energy + more.objective)
    near, far = (((s.d - prior) ** 2 * gamma.unsqueeze(1)).sum().sqrt() for s in (more, solution))
    assert near <= far + 1e-9


@pytest.mark.parametrize("penalty", ["mean", "diagonal"])
@pytest.mark.parametrize("family", FREE)
@given(layer=layers(), seed=st.integers(0, 99))
def test_ridge_in_the_limits(family, penalty, layer, seed):
    """λ → ∞ returns the prior; λ → 0 the minimiser nearest the prior, as λ = 0 does."""
    prog = layer.programme(family)
    factored, prior = Factored(prog, penalty), normal(seed, *prog.f.shape)
    size = 1 + float(prior.norm())
    exact = factored.solve(0.0, prior)
    assert_relative(factored.solve(1e16, prior).d, prior, 1e-9, size)
    assert_relative(factored.solve(1e-13, prior).d, exact.d, 1e-2, size)
    assert_relative(factored.solve(1e-13, prior).objective, exact.objective, 1e-8, prog.energy)
    assert_kkt(prog, exact.d, tol=1e-7)
    if penalty == "mean":  # the plain Euclidean distance: d - prior has no part in ker H
        silent = (exact.d - prior) @ kernel_of(prog, 1e-10)
        assert_relative(silent, torch.zeros_like(prior), 1e-6, size)


@given(
    layer=layers(experts=("random",)),
    ridge=st.sampled_from([1e-3, 0.1, 1.0]),
    seed=st.integers(0, 99),
)
def test_what_each_penalty_ignores(layer, ridge, seed):
    """The merged update stays when elements change: by ``mean`` orthonormally, by ``diagonal``
    in their scales."""
    pooled = layer.moments().pool()
    units = torch.eye(layer.updates[0].numel(), dtype=torch.float64)

    def merged(elements, penalty):
        elements = elements.reshape(-1, *layer.updates.shape[1:])
        basis = build("explicit", elements, pooled)
        return basis.combine(minimise(programme(pooled, basis), ridge, penalty=penalty).d)

    turned = torch.linalg.qr(normal(seed, *units.shape)).Q
    assert_relative(merged(turned, "mean"), merged(units, "mean"), 1e-7)
    prog = layer.programme("elements", pooled)
    assert_relative(prog.basis.combine(minimise(prog, ridge).d), merged(units, "mean"), 1e-8)
    scales = 10 ** torch.linspace(-1, 1, len(layer.updates)).double().reshape(-1, 1, 1, 1)
    scaled = merged(scales * layer.updates, "diagonal")
    assert_relative(scaled, merged(layer.updates, "diagonal"), 1e-7)


@given(layer=layers(targets=("propagated",), enough=True), alpha=st.sampled_from([0.95, 0.7, 0.3]))
def test_the_alpha_of_regmean_is_a_diagonal_ridge(layer, alpha):
    """Shrinking C by α = the element programme with Γ = diag H, λ = (1-α)/α and the diagonal
    (Fisher) average as prior."""
    moments = layer.moments()
    shrunk = layer.programme("elements", shrink(moments, layer.updates, alpha).pool())
    diagonal = layer.programme("elements", shrink(moments, layer.updates, 0.0).pool())
    fisher = minimise(diagonal).d
    prog = layer.programme("elements", moments.pool())
    found = minimise(prog, (1 - alpha) / alpha, fisher, "diagonal").d
    assert_relative(found, minimise(shrunk).d, 1e-8)


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids="-".join)
@pytest.mark.parametrize("family", ["layer", "rows", "rotated_columns", "groups", "explicit"])
@given(layer=layers())
def test_constrained_minimisers_satisfy_kkt(family, constraints, layer):
    """Stationarity, feasibility and complementarity; never below the free minimum."""
    prog = layer.programme(family)
    solution = minimise_constrained(prog, **constraints)
    assert_kkt(prog, solution.d, **constraints, tol=1e-6)
    assert solution.residual <= 1e-6
    assert "Solved" in solution.status
    assert solution.objective >= minimise(prog).objective - 1e-9 * max(prog.energy, 1e-3)


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids="-".join)
@given(layer=layers(enough=True, targets=("noisy",)), seed=st.integers(0, 99))
def test_constraints_that_do_not_bind(constraints, layer, seed):
    """The answer drawn first: targets ``Σ d_k Δ_k X`` from inside the simplex give d back."""
    K = len(layer.updates)
    d = torch.softmax(normal(seed, K), 0)
    update = torch.einsum("k,kgmn->gmn", d, layer.updates)
    exact = replace(layer, R=tuple(outputs(update, x) for x in layer.X))
    prog = exact.programme("layer")
    solution = minimise_constrained(prog, **constraints)
    assert solution.objective <= 1e-7 * max(prog.energy, 1e-5)
    if layer.updates[0].numel() > 2 * K and torch.linalg.cond(prog.H[0]) < 1e4:
        assert_relative(solution.d.flatten(), d, 1e-3)


@pytest.mark.parametrize("K", [2, 3])
def test_simplex_by_brute_force(K):
    """No point of a fine grid of the simplex is better, and the best one is near."""
    for seed in range(6):
        prog = make_layer(seed, K=K, m=4, n=4, N=30, noise=3.0).programme("layer")
        solution = minimise_constrained(prog, nonnegative=True, sum_to_one=True)
        ticks, steps = range(201), 200
        points = [p for p in itertools.product(ticks, repeat=K - 1) if sum(p) <= steps]
        grid = torch.tensor([[*p, steps - sum(p)] for p in points], dtype=torch.float64) / steps
        values = ((grid @ prog.H[0]) * grid).sum(1) / 2 + grid @ prog.f[0, 0] + prog.energy
        assert solution.objective <= values.min() + 1e-9 * prog.energy
        assert (grid[values.argmin()] - solution.d.flatten()).abs().max() <= 2 / steps


@pytest.mark.parametrize("family", ["layer", "rows", "singular", "columns", "elements"])
@given(layer=layers(experts=("random",), enough=True))
def test_nonnegative_against_nnls(family, layer):
    """Oracle: SciPy's non-negative least squares on the samples stacked into one dense system."""
    prog = layer.programme(family)
    Z, y = layer.stacked(prog.basis.elements())
    _, distance = nnls(Z.numpy(), y.numpy(), maxiter=100 * Z.shape[1])
    found = minimise_constrained(prog, nonnegative=True).objective
    assert_relative(found, distance**2 / 2, 1e-8, max(prog.energy, 1e-6))


def test_large_and_small_units_reach_the_constrained_solver():
    """The programme is scaled before it is handed over: activations of 1e±6 change nothing."""
    layer = make_layer(3, K=3, m=4, N=30)
    both = {"nonnegative": True, "sum_to_one": True}
    reference = minimise_constrained(layer.programme("layer"), **both).d
    for scale in (1e-6, 1e6):
        X, R = ([scale * z for z in samples] for samples in (layer.X, layer.R))
        scaled = replace(layer, X=tuple(X), R=tuple(R))
        found = minimise_constrained(scaled.programme("layer"), **both).d
        assert_relative(found, reference, 1e-7)


def test_eigenvalues_below_the_noise_are_not_inverted():
    """A direction weaker than RTOL is left at the prior instead of being blown up."""
    layer = make_layer(0, K=2, targets="free", N=40)
    scales = torch.tensor([1.0, 1e-7], dtype=torch.float64).reshape(2, 1, 1, 1)
    faint = replace(layer, updates=layer.updates * scales)
    assert (1e-7) ** 2 < solve.RTOL
    solution = minimise(faint.programme("layer"))
    assert solution.rank == 1
    assert abs(float(solution.d[0, 0, 1])) < 1e-3
    by_diagonal = Factored(faint.programme("layer"), "diagonal")
    assert by_diagonal.rank == 2  # which does not look at the scale of single elements


def test_bad_input_is_named(monkeypatch):
    prog = make_layer(0).programme("layer")
    with pytest.raises(MergeError, match="ridge: expected a number ≥ 0, found -1"):
        minimise(prog, -1)
    unknown = "ridge penalty: expected 'mean' or 'diagonal', found 'none'"
    with pytest.raises(MergeError, match=unknown):
        minimise(prog, penalty="none")
    neither = "constraints: expected nonnegative and/or sum_to_one, found neither"
    with pytest.raises(MergeError, match=neither):
        minimise_constrained(prog)
    for family in ("columns", "singular", "elements"):
        unindexed = f"basis {family}: its blocks are not indexed by experts"
        with pytest.raises(MergeError, match=unindexed):
            minimise_constrained(make_layer(0).programme(family), sum_to_one=True)
    unbounded = replace(prog, H=0 * prog.H, f=-torch.ones_like(prog.f))
    with pytest.raises(Infeasible, match="over basis layer: Clarabel reports DualInfeasible"):
        minimise_constrained(unbounded, nonnegative=True)
    assert np.isfinite(minimise_constrained(replace(prog, f=0 * prog.f), nonnegative=True).residual)


def test_a_path_is_its_solutions_one_by_one():
    H = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    f = torch.tensor([[[1.0, 0.0], [0.5, -1.0]]], dtype=torch.float64)
    prog = Programme(type("B", (), {"p": 4, "name": "b", "own_noise": True})(), H, f, 1.0)
    prior = torch.full((1, 2, 2), 0.3, dtype=torch.float64)
    factored = Factored(prog)
    path = factored.path((0.0, 0.1, 10.0), prior)
    for d, ridge in zip(path, (0.0, 0.1, 10.0)):
        torch.testing.assert_close(d, factored.solve(ridge, prior).d)
        assert_kkt(prog, d, ridge=ridge, gamma=factored.gamma.unsqueeze(1), prior=prior)
    with pytest.raises(MergeError, match="ridge: expected a number ≥ 0, found -1"):
        factored.path((0.1, -1.0))
