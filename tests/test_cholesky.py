"""One ridge by one Cholesky factorisation; nothing is computed, or read from a device, unasked."""

from dataclasses import replace

import pytest
import torch
from asserts import assert_relative
from operations import Operations
from strategies import make_layer, normal

from qpmerge_lite.programme import Programme
from qpmerge_lite.solve import Factored, minimise

EIGENVECTORS, CHOLESKY = "aten::_linalg_eigh", "aten::linalg_cholesky_ex"


def wide(seed, rank=200, q=80, s=5, decay=0.5, offset=0.0):
    """A programme of q coefficients and s right-hand sides, from ``rank`` samples."""
    X = normal(seed, rank, q) * torch.arange(1, q + 1, dtype=torch.float64) ** -decay
    X[:, 0] += offset
    H = (X.mT @ X / rank)[None]
    basis = type("B", (), {"p": s * q, "name": "b", "own_noise": True})()
    return Programme(basis, H, -normal(seed + 1, 1, s, q) @ H, 1.0)


@pytest.mark.parametrize("penalty", ["mean", "diagonal"])
@pytest.mark.parametrize("shape", [{}, {"rank": 30}, {"decay": 2.0}, {"offset": 100.0}], ids=str)
@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0, 1e3])
def test_cholesky_finds_what_eigenvectors_find(shape, ridge, penalty):
    """As stationary as by eigenvectors, in directions without any output as well."""
    for seed in range(5):
        prog = wide(seed, **shape)
        prior = normal(seed + 2, *prog.f.shape) if seed else None
        with Operations() as operations:
            solution = minimise(prog, ridge, prior, penalty)
        assert operations.precisions(CHOLESKY) == {torch.float64}
        assert operations.precisions(EIGENVECTORS) == set()
        by_eigenvectors = Factored(prog, penalty).solve(ridge, prior)
        assert_relative(solution.d, by_eigenvectors.d, 1e-8)
        assert solution.residual <= max(1e-14, 2 * by_eigenvectors.residual)
        assert solution.objective == pytest.approx(by_eigenvectors.objective, rel=1e-9, abs=1e-12)
        assert (solution.rank, solution.status) == (by_eigenvectors.rank, by_eigenvectors.status)


@pytest.mark.parametrize("ridge", [0.0, 1e-9, torch.inf, torch.tensor(0.1, dtype=torch.float64)])
def test_eigenvectors_where_cholesky_might_fail(ridge):
    """No ridge, one within the noise of H, an endless one, and one that is not to be read."""
    prog, prior = wide(0, rank=30), normal(3, 1, 5, 80)
    with Operations() as operations:
        solution = minimise(prog, ridge, prior)
    assert operations.precisions(EIGENVECTORS) == {torch.float64}
    assert operations.precisions(CHOLESKY) == set()
    assert torch.equal(solution.d, Factored(prog).solve(ridge, prior).d)
    noisy, ridge = replace(wide(0), rtol=1e-6), 1e-4  # of float32 products, which may be indefinite
    assert torch.equal(minimise(noisy, ridge).d, Factored(noisy).solve(ridge).d)


def test_moments_of_no_data_are_not_solved_silently():
    prog = wide(0)
    assert minimise(replace(prog, H=prog.H - 10 * torch.eye(80)), 0.1).d.isnan().all()


def test_reading_a_value_is_noticed():
    with Operations() as operations:
        float(torch.ones(1))
    assert operations.reads == 1


@pytest.mark.parametrize("penalty", ["mean", "diagonal"])
@pytest.mark.parametrize("family", ["rows", "columns", "elements"])
def test_solving_reads_no_value(family, penalty):
    """A ridge that stays on its device gives what the same number gives."""
    prog = make_layer(0, m=4, n=6, N=40).programme(family)
    ridge, prior = torch.tensor(0.3, dtype=torch.float64), normal(1, *prog.f.shape)
    with Operations() as operations:
        solution = minimise(prog, ridge, prior, penalty)
        path = Factored(prog, penalty).path((0.0, ridge), prior)
        minimise(prog, 0.3, prior, penalty)
    with Operations() as cholesky:
        minimise(wide(0), 0.3)
    assert (operations.reads, cholesky.reads) == (0, 0)
    assert torch.equal(path[1], solution.d)
    number = minimise(prog, 0.3, prior, penalty)
    assert torch.equal(solution.d, number.d)
    assert (solution.residual, solution.objective) == (number.residual, number.objective)
    assert (solution.status, solution.rank) == (number.status, number.rank)


def test_a_float32_factorisation_knows_its_noise():
    prog = wide(0, rank=30)
    factored = Factored(prog, dtype=torch.float32)
    assert (factored.vectors.dtype, factored.rank) == (torch.float32, 5 * 30)
    exact = Factored(prog).path((0.01, 1.0))
    assert_relative(factored.path((0.01, 1.0)), exact, 1e-3)
    assert not torch.equal(factored.path((0.01, 1.0)), exact)
