"""Bases: every family's blocks against its listed elements, and what follows from one span lying in
another."""

import itertools
from dataclasses import replace

import pytest
import torch
from asserts import assert_in_range, assert_psd, assert_relative
from hypothesis import given
from hypothesis import strategies as st
from strategies import FAMILIES, FREE, layers, make_layer, normal

from qpmerge_lite.bases import build
from qpmerge_lite.diagnostic import captured_energy
from qpmerge_lite.errors import MergeError, NonFinite, ShapeMismatch
from qpmerge_lite.programme import programme
from qpmerge_lite.solve import minimise

INCLUSIONS = [
    ("layer", "groups"),
    ("groups", "rows"),
    ("rows", "elements"),
    ("layer", "rotated_rows"),
    ("layer", "columns"),
    ("layer", "rotated_columns"),
    ("rotated_rows", "elements"),
    ("columns", "elements"),
    ("rotated_columns", "elements"),
    ("layer", "singular"),
    ("singular", "elements"),
    ("layer", "explicit"),
]
PROGRAMMES = [*FAMILIES, "truncated"]  # rotated_rows that keep one direction


def basis_of(layer, family, pooled):
    return (
        build("rotated_rows", layer.updates, pooled, keep=1)
        if family == "truncated"
        else layer.basis(family, pooled)
    )


def listed(layer, family, pooled):
    """The elements of a family written out from its definition, one by one: list of (g, m, n)."""
    D, (g, m, n) = layer.updates, layer.updates.shape[1:]

    def inner(
        copy, width, matrix
    ):  # block diagonal over copies: ``matrix`` in one, zero in the others
        out = torch.zeros(g, width, width, dtype=torch.float64)
        out[copy] = matrix
        return out

    axes = lambda width: [
        (c, torch.outer(e, e)) for c in range(g) for e in torch.eye(width, dtype=torch.float64)
    ]
    eigen = lambda S: [
        (c, torch.outer(v, v))
        for c in range(g)
        for v in torch.linalg.eigh(S[c]).eigenvectors.mT.flip(0)
    ]
    if family in ("layer", "explicit"):
        return list(D)
    if family == "groups":
        labels = [layer.groups() == label for label in layer.groups().unique()]
        return [label.reshape(g, m, 1) * d for label in labels for d in D]
    if family in ("rows", "rotated_rows", "truncated"):
        directions = axes(m) if family == "rows" else eigen(pooled.M)
        directions = directions[::m] if family == "truncated" else directions
        return [inner(c, m, uu) @ d for c, uu in directions for d in D]
    if family == "columns":
        return [d @ inner(c, n, ee) for c in range(g) for d in D for cc, ee in axes(n) if cc == c]
    if family == "rotated_columns":
        return [d @ inner(c, n, vv) for c, vv in eigen(pooled.C) for d in D]
    if family == "elements":
        return list(torch.eye(g * m * n, dtype=torch.float64).reshape(-1, g, m, n))
    if family == "singular":
        out = []
        for c, d in itertools.product(range(g), D):
            rank = max(int(torch.linalg.matrix_rank(d[k], rtol=1e-10)) for k in range(g))
            U, _, Vh = torch.linalg.svd(d[c], full_matrices=False)
            out += [
                inner(c, m, torch.eye(m, dtype=torch.float64)) @ torch.outer(U[:, i], Vh[i])
                for i in range(rank)
            ]
        return out
    raise AssertionError(family)


@pytest.mark.parametrize("family", PROGRAMMES)
@given(layer=layers(), seed=st.integers(0, 99))
def test_blocks_equal_the_dense_formula(device, family, layer, seed):
    """Oracle: the elements are the listed ones, ``H_ij = tr(B_i C B_jᵀ)`` and ``f_j = -tr(B_j Aᵀ)``
    entry by entry, H is PSD, f in its range, and ``combine`` is the weighted sum of the
    elements."""
    here, pooled = layer.to(device), layer.moments().pool()
    B = listed(layer, family, pooled)
    prog = programme(here.moments().pool(), basis_of(here, family, here.moments().pool()))
    assert prog.basis.p == len(B) == prog.f.numel()
    if not B:
        return
    if device.type == "cpu":  # eigenvectors of repeated eigenvalues may differ between devices
        assert_relative(prog.basis.elements(), torch.stack(B), 1e-9)
    B = list(prog.basis.elements().cpu())
    H, f = prog.dense()
    assert_relative(
        H, [[float(((Bi @ pooled.C) * Bj).sum()) for Bj in B] for Bi in B], 1e-9, scale=1e-12
    )
    assert_relative(
        f, [-float((Bj * pooled.A).sum()) for Bj in B], 1e-9, scale=float(pooled.A.abs().max())
    )
    assert_psd(H)
    assert_psd(prog.H)
    assert_in_range(prog.H, prog.f)
    d = normal(seed, *prog.basis.size).to(device)
    assert_relative(
        prog.basis.combine(d), sum(float(w) * Bj for w, Bj in zip(d.flatten(), B)), 1e-9
    )


@pytest.mark.parametrize("family", FAMILIES)
@given(layer=layers(), scale=st.floats(-2, 2))
def test_task_arithmetic_lies_in_every_basis(family, layer, scale):
    """``combine(arithmetic(s)) = s Σ_k Δ_k``."""
    basis = layer.basis(family)
    total = layer.updates.sum(0)
    update = basis.combine(basis.arithmetic(scale))
    assert_relative(update, scale * total, 1e-9, scale=float(layer.updates.abs().max()))


@pytest.mark.parametrize(("inner", "outer"), INCLUSIONS)
@given(layer=layers(), weights=st.sampled_from(["tokens", "energy"]))
def test_a_larger_span_captures_no_less(inner, outer, layer, weights):
    """span B ⊂ span B' ⇒ 0 ≤ ρ(B) ≤ ρ(B') ≤ 1."""
    pooled = layer.moments().pool(weights=weights)
    small, large = (captured_energy(layer.programme(f, pooled)) for f in (inner, outer))
    assert -1e-9 <= small <= large + 1e-9 <= 1 + 2e-9


@given(layer=layers(experts=("random", "duplicate", "zero")), seed=st.integers(0, 99))
def test_equal_spans_capture_equally(layer, seed):
    """Other elements of one span, other groupings of one partition, doubled and scaled experts: the
    same energy and merge outputs."""
    pooled, K = layer.moments().pool(), len(layer.updates)
    energy = lambda family, updates=layer.updates, **kw: captured_energy(
        programme(pooled, build(family, updates, pooled, **kw))
    )
    mix = torch.eye(K, dtype=torch.float64) + 0.3 * torch.linalg.qr(normal(seed, K, K)).Q
    mixed = torch.einsum("kl,lgmn->kgmn", mix, layer.updates)
    directions = torch.arange(layer.updates[0, ..., 0].numel())
    for family in ("layer", "rows", "rotated_rows", "columns", "rotated_columns"):
        reference = energy(family)
        for same in (
            mixed,
            layer.updates.flip(0),
            3 * layer.updates,
            torch.cat([layer.updates, 2 * layer.updates]),
        ):
            assert_relative(energy(family, same), reference, 1e-8, scale=1)
    assert_relative(energy("groups", groups=directions.flip(0)), energy("rows"), 1e-9, scale=1)
    assert_relative(energy("groups", groups=0 * directions), energy("layer"), 1e-9, scale=1)
    if layer.updates.shape[2] == 1:
        assert_relative(energy("rotated_rows"), energy("rows"), 1e-9, scale=1)


@pytest.mark.parametrize("family", [f for f in FREE if f != "singular"])
@given(layer=layers(experts=("random", "duplicate"), enough=True), seed=st.integers(0, 99))
def test_experts_in_any_order(family, layer, seed):
    """Permuting the experts permutes their coefficients and leaves the merge alone."""
    order = torch.randperm(len(layer.updates), generator=torch.Generator().manual_seed(seed))
    pooled = layer.moments().pool()
    a, b = (
        programme(pooled, build(family, u, pooled)) for u in (layer.updates, layer.updates[order])
    )
    x, y = minimise(a), minimise(b)
    assert_relative(b.basis.combine(y.d), a.basis.combine(x.d), 1e-6)
    if a.basis.by_expert:
        assert_relative(y.d, x.d[..., order], 1e-6)


@pytest.mark.parametrize("family", FREE)
@given(layer=layers(), scale=st.floats(1e-3, 1e3))
def test_units_do_not_matter(family, layer, scale):
    """Outputs in other units, or inputs in other units with weights to match: ρ stays; with the
    updates rescaled, so does d."""
    reference = captured_energy(layer.programme(family))
    outputs = replace(layer, updates=scale * layer.updates, R=tuple(scale * r for r in layer.R))
    inputs = replace(layer, updates=layer.updates / scale, X=tuple(scale * x for x in layer.X))
    for other in (outputs, inputs):
        assert_relative(captured_energy(other.programme(family)), reference, 1e-8, scale=1)
        if family in ("layer", "rows"):
            assert_relative(
                minimise(other.programme(family)).d, minimise(layer.programme(family)).d, 1e-5
            )


def test_singular_pairs_are_orthonormal_and_rebuild_their_expert():
    layer = make_layer(7, K=2, m=3, n=5)
    B = layer.basis("singular").elements().flatten(1)
    assert_relative(B[:3] @ B[:3].mT, torch.eye(3))
    assert layer.basis("singular").p == 6
    low = replace(layer, updates=make_layer(7, K=2, m=3, n=5, experts="low_rank").updates)
    assert low.basis("singular").p == 2  # one pair per rank-one expert


def test_one_block_serves_all_outputs_of_elements():
    """m right-hand sides share C: nothing of size (mn)² is formed."""
    prog = make_layer(0, m=5, n=4).programme("elements")
    assert (prog.H.shape, prog.f.shape) == ((1, 4, 4), (1, 5, 4))


def test_experts_equal_to_the_base():
    """No update at all: every family returns the base and captures nothing, without an error."""
    layer = make_layer(0, targets="free")
    pooled, none = layer.moments().pool(), 0 * layer.updates
    for family in set(FREE) - {"elements"}:
        prog = programme(pooled, build(family, none, pooled))
        solution = minimise(prog)
        assert solution.rank == 0
        assert not prog.basis.combine(solution.d).any()
        assert captured_energy(prog) == 0


def test_identical_experts():
    """K copies of Δ with their own outputs as targets: any Σ d = 1 is optimal, H has rank 1, the
    least-norm answer is the soup."""
    layer = make_layer(3, K=3, targets="propagated")
    same = replace(layer, updates=layer.updates[:1].repeat(3, 1, 1, 1))
    same = replace(same, R=tuple(torch.einsum("gmi,ngi->ngm", same.updates[0], x) for x in layer.X))
    prog = same.programme("layer")
    solution = minimise(prog)
    assert solution.rank == 1
    assert "H singular (rank 1 of 3)" in solution.status
    assert_relative(solution.d, torch.full((1, 1, 3), 1 / 3, dtype=torch.float64), 1e-9)
    for d in ([1.0, 0, 0], [5.0, -2, -2], [0.2, 0.3, 0.5]):
        assert abs(prog.objective(torch.tensor([[d]], dtype=torch.float64))) <= 1e-10 * prog.energy


def test_bad_input_is_named():
    layer = make_layer(0)
    pooled = layer.moments().pool()
    with pytest.raises(
        MergeError, match=r"basis family: expected one of \['columns', .* found 'diagonal'"
    ):
        build("diagonal", layer.updates, pooled)
    with pytest.raises(MergeError, match="group labels are required"):
        build("groups", layer.updates, pooled)
    with pytest.raises(MergeError, match="group labels are only used by groups"):
        build("rows", layer.updates, pooled, groups=torch.arange(3))
    with pytest.raises(
        ShapeMismatch, match="group labels: expected shape .* one label per output row"
    ):
        build("groups", layer.updates, pooled, groups=torch.arange(2))
    with pytest.raises(MergeError, match="only rotated_rows takes keep, found keep=2"):
        build("rows", layer.updates, pooled, keep=2)
    with pytest.raises(
        ShapeMismatch,
        match=r"basis layer, residual updates: expected shape \(1, 3, 4\), found \(1, 3, 3\)",
    ):
        build("layer", layer.updates[..., :3], pooled)
    with pytest.raises(
        MergeError, match="keeps 1 of 3 directions: task arithmetic is outside its span"
    ):
        build("rotated_rows", layer.updates, pooled, keep=1).arithmetic(1.0)
    with pytest.raises(MergeError, match="rotated for other moments"):
        programme(make_layer(1).moments().pool(), build("rotated_columns", layer.updates, pooled))
    for keep in (0, -1, 4):
        with pytest.raises(MergeError, match=f"expected to keep 1 to 3 directions, found {keep}"):
            build("rotated_rows", layer.updates, pooled, keep=keep)
    spoilt = torch.full_like(layer.updates, float("nan"))
    with pytest.raises(
        NonFinite, match="basis layer, residual updates: .* check the checkpoints they come from"
    ):
        build("layer", spoilt, pooled)
