"""Captured energy in sample and out of sample, and its spectral ceiling."""

from dataclasses import replace

import pytest
import torch
from asserts import assert_relative
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import FAMILIES, FREE, Layer, layers, make_layer, normal, outputs

from qpmerge_lite.bases import build
from qpmerge_lite.diagnostic import (
    OPTIMISM,
    RIDGES,
    captured_energy,
    cross_fitted,
    disjoint,
    optimism,
    spectral_capture,
)
from qpmerge_lite.errors import EmptyCalibration, MergeError
from qpmerge_lite.moments import Moments
from qpmerge_lite.programme import programme
from qpmerge_lite.solve import Factored, minimise


def part(layer, fold, keep) -> Layer:
    """The samples inside (``keep``) or outside one fold, as a layer of a single fold."""

    def take(samples):
        return tuple(z[(i == fold) == keep] for z, i in zip(samples, layer.fold))

    one = tuple(0 * f for f in take(layer.fold))
    return replace(layer, X=take(layer.X), R=take(layer.R), fold=one, folds=1)


@pytest.mark.parametrize("family", FAMILIES)
@given(layer=layers(), weights=st.sampled_from(["tokens", "energy"]))
def test_captured_energy_is_the_share_of_the_loss_removed(device, family, layer, weights):
    """``ρ = fᵀH⁺f / 2E = 1 - L(d*)/E`` with both losses measured on the samples, in [0, 1]."""
    layer = layer.to(device)
    pooled = layer.moments().pool(weights=weights)
    assume(pooled.energy > 0)
    prog = layer.programme(family, pooled)
    update = prog.basis.combine(minimise(prog).d)
    rho = captured_energy(prog)
    assert -1e-9 <= rho <= 1 + 1e-9
    left = layer.loss(update, weights) / layer.loss(0 * update, weights)
    assert_relative(rho, 1 - left, 1e-9, scale=1)
    assert_relative(rho, pooled.captured(update), 1e-9, scale=1)
    H, f = prog.dense()
    expected = 0.0
    if len(f):
        inverse = torch.linalg.pinv(H, rtol=1e-10, hermitian=True)
        expected = f @ inverse @ f / (2 * pooled.energy)
    assert_relative(rho, expected, 1e-7, scale=1)


@given(layer=layers(targets=("free", "noisy")), seed=st.integers(0, 99))
def test_eigenvectors_have_the_largest_spectral_capture(layer, seed):
    """Ky Fan: no p directions catch more of M than its leading p eigenvectors. Schur-Horn:
    coordinate axes least of all beat them. All directions catch everything."""
    pooled = layer.moments().pool()
    g, m = pooled.M.shape[:2]
    eigen = torch.linalg.eigh(pooled.M).eigenvectors.flip(-1)
    for p in range(1, m + 1):
        best = spectral_capture(pooled, eigen[..., :p])
        leading = float(torch.linalg.eigvalsh(pooled.M)[:, m - p :].sum())
        assert_relative(best, leading / (2 * pooled.energy), 1e-9)
        random = torch.linalg.qr(normal(seed, g, m, m)).Q[..., :p]
        heaviest = pooled.M.diagonal(dim1=-2, dim2=-1).argsort(descending=True)[:, :p]
        axes = torch.eye(m, dtype=torch.float64)[heaviest].mT
        for U in (random, axes):
            assert spectral_capture(pooled, U) <= best + 1e-12
    for U in (eigen, torch.eye(m, dtype=torch.float64)):
        assert_relative(spectral_capture(pooled, U), 1.0, 1e-12)


@given(layer=layers())
def test_spectral_capture_is_a_ceiling(layer):
    """ρ of a basis confined to span U is at most κ(U), for the p leading eigenvectors, any p."""
    pooled = layer.moments().pool()
    eigen = torch.linalg.eigh(pooled.M).eigenvectors.flip(-1)
    captured = []
    for p in range(1, pooled.M.shape[-1] + 1):
        basis = build("rotated_rows", layer.updates, pooled, keep=p)
        captured.append(captured_energy(programme(pooled, basis)))
        assert captured[-1] <= spectral_capture(pooled, eigen[..., :p]) + 1e-9
    assert all(a <= b + 1e-9 for a, b in zip(captured, captured[1:]))


def test_the_ceiling_is_reached_when_nothing_else_is_missing():
    """One expert, its own outputs on the same inputs: ρ = κ for every number of directions kept."""
    layer = make_layer(2, K=1, m=4, n=5, targets="propagated")
    pooled = layer.moments().pool()
    eigen = torch.linalg.eigh(pooled.M).eigenvectors.flip(-1)
    for p in range(1, 5):
        prog = programme(pooled, build("rotated_rows", layer.updates, pooled, keep=p))
        assert_relative(captured_energy(prog), spectral_capture(pooled, eigen[..., :p]), 1e-9)


@given(layer=layers(targets=("free", "noisy")))
def test_rotated_rows_are_rows_in_turned_coordinates(layer):
    """Outputs turned by the eigenvectors of M (M diagonal): the axes now capture what the rotated
    rows did, and tie with them."""
    U = torch.linalg.eigh(layer.moments().pool().M).eigenvectors
    residuals = tuple(torch.einsum("gmr,Ngm->Ngr", U, r) for r in layer.R)
    turned = replace(layer, updates=U.mT @ layer.updates, R=residuals)
    rotated = captured_energy(layer.programme("rotated_rows"))
    for family in ("rows", "rotated_rows"):
        assert_relative(captured_energy(turned.programme(family)), rotated, 1e-8, scale=1)
    for family in ("layer", "columns", "rotated_columns", "singular", "elements"):
        same = captured_energy(layer.programme(family))  # they do not look at output coordinates
        assert_relative(captured_energy(turned.programme(family)), same, 1e-8, scale=1)


def test_rotation_is_no_free_lunch():
    """Over random layers the rotated rows capture more than the plain rows in some and less in
    others: only κ is ordered."""
    gains = []
    for seed in range(20):
        layer = make_layer(seed, m=4)
        rotated = captured_energy(layer.programme("rotated_rows"))
        gains.append(rotated - captured_energy(layer.programme("rows")))
    assert min(gains) < -1e-3 < 1e-3 < max(gains)


@pytest.mark.parametrize("family", FREE)
@given(
    layer=layers(folds=3),
    weights=st.sampled_from(["tokens", "energy"]),
    ridge=st.sampled_from([0.0, 0.1]),
)
def test_disjoint_captured_energy_by_hand(family, layer, weights, ridge):
    """Solved on two folds, loss measured on the samples of the third, against the base there."""
    scores = disjoint(layer.moments(), layer.updates, family, (ridge,), weights=weights)
    assert scores.shape == (3, 1)
    for fold in range(3):
        fitted, held = part(layer, fold, False), part(layer, fold, True)
        pooled = fitted.moments().pool(weights=weights)
        energy = held.loss(0 * layer.updates[0], weights)
        least = min((r**2).sum() for r in held.R)
        if energy < 1e-12 or (weights == "energy" and least < 1e-12):
            continue
        prog = programme(pooled, build(family, layer.updates, pooled))
        update = prog.basis.combine(minimise(prog, ridge).d)
        share = held.loss(update, weights) / energy
        assert_relative(scores[fold, 0], 1 - share, 1e-6, scale=1 + share)


def test_overfitting_shows_as_a_negative_score():
    """Fewer samples than inputs and targets of pure noise: perfect in sample, worse than the base
    on the fold held out."""
    layer = make_layer(0, K=1, m=3, n=16, N=8, folds=2, targets="free")
    assert_relative(captured_energy(layer.programme("elements")), 1.0, 1e-9)
    scores = disjoint(layer.moments(), layer.updates, "elements")
    assert scores.max() < 0
    ridge, score = cross_fitted(layer.moments(), layer.updates, "elements")
    assert (ridge, score > scores.mean()) == (max(RIDGES), True)


@pytest.mark.parametrize("family", ["layer", "rows", "elements"])
@given(layer=layers(folds=3, targets=("noisy", "free")))
def test_cross_fitting_takes_the_best_mean(family, layer):
    """The chosen ridge has the largest average over folds, the smallest such one in a tie."""
    moments = layer.moments()
    mean = disjoint(moments, layer.updates, family, RIDGES).mean(0)
    ridge, score = cross_fitted(moments, layer.updates, family)
    assert score == float(mean.max())
    assert ridge == min(r for r, s in zip(RIDGES, mean.tolist()) if s == score)


def test_the_prior_and_the_groups_reach_every_fold():
    """A huge ridge returns the task arithmetic it pulls towards; labels of rows are passed on."""
    layer = make_layer(4, K=2, m=4, folds=2, N=20)
    moments = layer.moments()
    scores = disjoint(moments, layer.updates, "groups", (1e14,), prior=0.4, groups=layer.groups())
    expected = [moments.pool([f]).captured(0.4 * layer.updates.sum(0)) for f in range(2)]
    assert_relative(scores[:, 0], expected, 1e-8)


def test_bad_input_is_named():
    layer = make_layer(0)
    alone = "layer layer: 1 fold leaves none to hold out; collect the moments in at least 2 folds"
    with pytest.raises(EmptyCalibration, match=alone):
        disjoint(layer.moments(), layer.updates, "layer")
    moments = Moments.zeros(layer.tasks, 4, 3, folds=3)
    for task, x, r in zip(layer.tasks, layer.X, layer.R):
        moments.update(task, x, r, torch.arange(len(x)) % 2)
    empty = r"no calibration tokens for \['task0', 'task1'\] in folds \[2\] of 3"
    with pytest.raises(EmptyCalibration, match=empty):
        cross_fitted(moments, layer.updates, "layer")


SEQUENCES, TOKENS = 40, 4


def drawn(seed, common=0.8, sequences=SEQUENCES, folds=8) -> Layer:
    """Sequences drawn alike, of tokens that have a share of inputs and noise in ``common``; experts
    and truth are the same in every draw."""
    updates = normal(0, 2, 1, 3, 5)

    def tokens(purpose, width):
        own = normal(10_000 * purpose + seed, sequences, TOKENS, 1, width)
        same = normal(10_000 * (purpose + 1) + seed, sequences, 1, 1, width)
        return ((1 - common) ** 0.5 * own + common**0.5 * same).flatten(0, 1)

    X = [tokens(2 + 4 * t, 5) * torch.linspace(0.5, 1.5, 5).double() for t in (0, 1)]
    R = [outputs(u, x) + 0.7 * tokens(4 + 4 * t, 3) for t, (u, x) in enumerate(zip(updates, X))]
    fold = torch.arange(sequences).repeat_interleave(TOKENS) % folds
    return Layer(updates, tuple(X), tuple(R), (fold, fold), folds)


@pytest.mark.parametrize("family", FREE)
def test_optimism_is_the_gap_on_average(family):
    """Over draws of dependent tokens, the mean prediction is the mean of what the minimiser loses
    on sequences it has not seen."""
    held, found = drawn(9_999, sequences=4000, folds=1).moments().pool(), []
    basis = build(family, drawn(0).updates, held)
    truth = basis.combine(minimise(programme(held, basis), 0.01).d)  # has no optimism
    for seed in range(60):
        layer = drawn(seed)
        moments, pooled = layer.moments(), layer.moments().pool()
        prog = layer.programme(family, pooled)
        update = prog.basis.combine(minimise(prog, 0.01).d)
        gap = held.loss(update) - pooled.loss(update) - held.loss(truth) + pooled.loss(truth)
        row = [gap / pooled.energy]
        for by in ("refit", "gradients", "tokens"):
            row.append(optimism(moments, layer.updates, family, 0.01, by=by))
        found.append(row)
    gap, refit, gradients, tokens = torch.tensor(found).mean(0).tolist()
    error = float(torch.tensor(found)[:, 0].std()) / 60**0.5
    assert abs(refit - gap) < 0.1 * gap + 2 * error
    assert abs(gradients - gap) < 0.15 * gap + 2 * error
    assert tokens < 0.5 * refit  # which sees as many independent samples as there are tokens


def test_tokens_are_enough_where_they_are_independent():
    means = {}
    for by in OPTIMISM:
        layers_drawn = (drawn(seed, 0.0) for seed in range(30))
        scores = [optimism(z.moments(), z.updates, "elements", by=by) for z in layers_drawn]
        means[by] = sum(scores) / 30
    refit, gradients, tokens = (means[by] for by in ("refit", "gradients", "tokens"))
    assert_relative(tokens, refit, 0.15)
    assert_relative(gradients, refit, 0.15)


@pytest.mark.parametrize("by", OPTIMISM)
@pytest.mark.parametrize("family", FREE)
def test_there_is_no_optimism_where_nothing_is_fitted(by, family):
    """An endless ridge, and experts equal to the base; folds of equal size in any order agree."""
    layer = drawn(3)
    moments = layer.moments()
    assert abs(optimism(moments, layer.updates, family, 1e12, by=by, prior=0.5)) < 1e-9
    if family != "elements":
        assert optimism(moments, 0 * layer.updates, family, by=by) == 0.0
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    sums = {k: getattr(moments, k)[:, order] for k in ("C", "A", "M", "count")}
    turned = replace(moments, **sums)
    value = optimism(moments, layer.updates, family, 0.1, by=by)
    assert value > 0
    assert_relative(optimism(turned, layer.updates, family, 0.1, by=by), value, 1e-8)


@pytest.mark.parametrize("family", FAMILIES)
@given(layer=layers(folds=3), weights=st.sampled_from(["tokens", "energy"]))
def test_first_order_optimism_by_hand(family, layer, weights):
    """``tr((H + λΓ)⁻¹J)`` with dense matrices, gradients token by token."""
    moments, groups = layer.moments(), layer.groups() if family == "groups" else None
    pooled = moments.pool(weights=weights)
    assume(pooled.energy > 1e-9)
    basis = layer.basis(family, pooled)
    assume(basis.p)
    factored = Factored(programme(pooled, basis))
    solution = factored.solve(0.3)
    elements, J = basis.elements(), torch.zeros(basis.p, basis.p, dtype=torch.float64)
    for x, r, fold, omega in zip(layer.X, layer.R, layer.fold, layer.omega(weights)):
        error = outputs(basis.combine(solution.d), x) - r
        slope = omega * torch.stack([(outputs(B, x) * error).sum((1, 2)) for B in elements], 1)
        for f in range(3):
            e = slope[fold == f].sum(0) - (fold == f).sum() / len(x) * slope.sum(0)
            J += torch.outer(e, e) * 3 / 2
    gamma = factored.gamma[:, None].expand(basis.size).flatten()
    penalised = programme(pooled, basis).dense()[0] + 0.3 * torch.diag(gamma)
    expected = float(torch.linalg.solve(penalised, J).trace()) / pooled.energy
    options = {"by": "gradients", "weights": weights, "groups": groups}
    found = optimism(moments, layer.updates, family, 0.3, **options)
    if factored.significant.all():  # directions without an output are left out
        assert_relative(found, expected, 1e-6, scale=1)


def test_optimism_needs_folds_and_a_known_form():
    layer = drawn(0)
    unknown = "expected one of .*gradients.* and at least 2 folds, found 'bootstrap' and 8"
    with pytest.raises(MergeError, match=unknown):
        optimism(layer.moments(), layer.updates, "rows", by="bootstrap")
    with pytest.raises(MergeError, match="found 'refit' and 1"):
        optimism(drawn(0, folds=1).moments(), layer.updates, "rows")
