"""Every ridge and every prior for the price of one: the scores are those of the merges."""

from dataclasses import replace

import pytest
import torch
from asserts import assert_relative
from hypothesis import given
from hypothesis import strategies as st
from operations import Operations
from strategies import FAMILIES, layers, make_layer, normal
from torch.utils.flop_counter import FlopCounterMode

from qpmerge_lite import held_out
from qpmerge_lite.bases import build
from qpmerge_lite.diagnostic import RIDGES, choose, cross_fitted, disjoint
from qpmerge_lite.errors import MergeError
from qpmerge_lite.held_out import Contest, losses_elsewhere
from qpmerge_lite.moments import Moments
from qpmerge_lite.programme import programme
from qpmerge_lite.solve import Factored, minimise

SPECTRA = ("flat", "root", "inverse", "exponential", "outlier", "low_rank", "short")
UNREAD = ("layer", "groups", "rows", "rotated_rows", "columns", "elements", "explicit")


def slow_disjoint(moments, updates, family, ridges, prior=0.0, groups=None, weights="tokens",
                  penalty="mean"):  # fmt: skip
    """The scores (F, R) by forming the merge of every ridge, and its loss on the fold held out."""
    scores = torch.empty(moments.folds, len(ridges), dtype=torch.float64)
    for out in range(moments.folds):
        fitted = moments.pool([f for f in range(moments.folds) if f != out], weights)
        held = moments.pool([out], weights)
        basis = build(family, updates, fitted, groups=groups)
        factored = Factored(programme(fitted, basis), penalty)
        for r, ridge in enumerate(ridges):
            d = factored.path((ridge,), basis.arithmetic(prior))[0]
            scores[out, r] = held.captured(basis.combine(d))
    return scores


def labels(layer, family):
    return layer.groups() if family == "groups" else None


def assert_scores(found, expected, rtol=1e-9):
    """Equal infinities, and finite scores equal relative to the loss they stand for."""
    assert found.dtype == torch.float64
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    assert torch.equal(found[~finite], expected[~finite])
    share = (1 - expected[finite]).abs()
    assert ((found[finite] - expected[finite]).abs() <= rtol * (1 + share)).all()


@pytest.mark.parametrize("penalty", ["mean", "diagonal"])
@pytest.mark.parametrize("family", FAMILIES)
@given(
    layer=layers(folds=3, enough=True),
    weights=st.sampled_from(["tokens", "energy"]),
    prior=st.sampled_from([0.0, 0.3, "each"]),
)
def test_scores_are_those_of_the_merges(device, family, penalty, layer, weights, prior):
    layer = layer.to(device)
    if prior == "each":
        prior = torch.linspace(-0.5, 1, len(layer.updates), dtype=torch.float64)
    options = {"groups": labels(layer, family), "weights": weights, "penalty": penalty}
    moments, ridges = layer.moments(), (0.0, 1e-3, 0.1, 3.0)
    found = disjoint(moments, layer.updates, family, ridges, prior=prior, **options)
    expected = slow_disjoint(moments, layer.updates, family, ridges, prior, **options)
    assert_scores(found.cpu(), expected)


@pytest.mark.parametrize("family", FAMILIES)
@given(layer=layers(folds=2), weights=st.sampled_from(["tokens", "energy"]))
def test_scores_of_a_layer_with_little_data(family, layer, weights):
    """Fewer samples than inputs, where the smallest ridge divides by next to nothing."""
    options = {"groups": labels(layer, family), "weights": weights}
    moments, ridges = layer.moments(), (1e-3, 0.1, 3.0)
    found = disjoint(moments, layer.updates, family, ridges, prior=0.5, **options)
    expected = slow_disjoint(moments, layer.updates, family, ridges, 0.5, **options)
    assert_scores(found, expected, 1e-7)


@pytest.mark.parametrize("penalty", ["mean", "diagonal"])
@pytest.mark.parametrize("family", FAMILIES)
@given(layer=layers(folds=3, enough=True))
def test_factors_of_the_prior(family, penalty, layer):
    """A factor scores what the scaled prior scores; a factor of 0 is the prior 0."""
    options = {"groups": labels(layer, family), "penalty": penalty}
    moments, ridges, priors = layer.moments(), (0.0, 0.01, 1.0), (0.0, 0.5, 1.0, -2.0)
    found = disjoint(moments, layer.updates, family, ridges, prior=0.7, priors=priors, **options)
    assert found.shape == (3, 4, 3)
    for p, factor in enumerate(priors):
        scaled = disjoint(moments, layer.updates, family, ridges, prior=factor * 0.7, **options)
        assert_scores(found[:, p], scaled)


@pytest.mark.parametrize("penalty", ["mean", "diagonal"])
@pytest.mark.parametrize("family", FAMILIES)
@given(layer=layers(enough=True), seed=st.integers(0, 99))
def test_at_home_the_loss_grows_with_the_ridge(family, penalty, layer, seed):
    """Under the moments solved for: least at ridge 0, never falling, the prior's in the end."""
    prog = layer.programme(family)
    if prog.basis.p == 0:
        return
    prior, ridges = normal(seed, *prog.f.shape), (0.0, 1e-3, 1e-2, 0.1, 1.0, 10.0, torch.inf)
    losses = losses_elsewhere(Factored(prog, penalty), prog, ridges, prior)[0]
    size = prog.energy + float(losses.abs().max())
    assert (losses.diff() >= -1e-10 * size).all()
    assert_relative(losses[0], minimise(prog).objective, 1e-8, size)
    assert_relative(losses[-1], prog.objective(prior), 1e-12, size)


def test_nothing_to_capture_in_the_fold_held_out():
    """1 if nothing is added there either, whatever the prior adds; else minus infinity."""
    updates = normal(0, 2, 1, 3, 4)
    moments = Moments.zeros(("a", "b"), 4, 3, folds=2)
    inputs = normal(1, 20, 4)
    for task in ("a", "b"):
        moments.update(task, inputs, torch.zeros(20, 3), torch.arange(20) % 2)
    scores = disjoint(moments, updates, "elements", (0.0, 1.0, 1e3), prior=0.5)
    expected = torch.tensor([[1.0, -torch.inf, -torch.inf]] * 2, dtype=torch.float64)
    assert torch.equal(scores, expected)
    assert torch.equal(slow_disjoint(moments, updates, "elements", (0.0, 1.0, 1e3), 0.5), expected)


@pytest.mark.parametrize("family", ["rows", "rotated_columns", "elements"])
@given(layer=layers(folds=3, enough=True, targets=("noisy", "free")))
def test_the_best_ridge_and_prior(family, layer):
    """Of the highest average, whatever the order in which ridges and factors are given."""
    moments, ridges, priors = layer.moments(), (1.0, 0.0, 0.1), (1.0, -0.5, 0.0)
    options = {"prior": 0.5, "priors": priors}
    mean = disjoint(moments, layer.updates, family, ridges, **options).mean(0)
    ridge, factor, score = cross_fitted(moments, layer.updates, family, ridges, **options)
    assert score == float(mean.max())
    assert float(mean[priors.index(factor), ridges.index(ridge)]) == score
    index, same = choose(moments, layer.updates, family, ridges, **options)
    assert index.tolist() == [priors.index(factor), ridges.index(ridge)]
    assert float(same) == score


def test_noiseless_targets_need_no_ridge():
    layer = make_layer(1, K=1, N=40, folds=4, targets="propagated")
    ridge, score = cross_fitted(layer.moments(), layer.updates, "rows")
    assert ridge == 0.0
    assert_relative(score, 1.0, 1e-9)


def test_ties_go_to_the_smaller_ridge_then_to_the_smaller_factor():
    """Experts equal to the base: nothing can be added, and all scores are equal."""
    layer = make_layer(0, folds=2, targets="free")
    moments, updates, ridges = layer.moments(), 0 * layer.updates, (1.0, 0.01, 0.1)
    assert cross_fitted(moments, updates, "rows", ridges)[0] == 0.01
    options = {"prior": 1.0, "priors": (2.0, -0.5, 1.0, 0.5)}
    assert cross_fitted(moments, updates, "rows", ridges, **options)[:2] == (0.01, -0.5)


def flops(*arguments, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        disjoint(*arguments, **options)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["layer", "rows", "elements", "columns"])
def test_ten_ridges_for_the_price_of_one(family):
    layer = make_layer(0, m=24, n=32, N=60, folds=2)
    arguments = layer.moments(), layer.updates, family
    ten = tuple(10.0**-k for k in range(9))
    one = flops(*arguments, (0.0,), prior=0.5)
    assert one > 0
    assert flops(*arguments, (0.0, *ten), prior=0.5) < 1.5 * one
    assert flops(*arguments, (0.0, *ten), prior=0.5, priors=(0.0, 0.5, 1.0, 1.5, 2.0)) < 2.5 * one


@pytest.mark.parametrize("ridges", [(0.1,), (1e-3, 0.1, 10.0)])
@pytest.mark.parametrize("prior", [0.0, 0.3])
def test_few_ridges_of_a_wide_layer_take_cholesky(ridges, prior):
    layer = make_layer(0, m=6, n=70, N=160, folds=2)
    arguments = layer.moments(), layer.updates, "elements", ridges
    with Operations() as operations:
        found = disjoint(*arguments, prior=prior)
    assert operations.precisions("aten::_linalg_eigh") == set()
    assert_scores(found, slow_disjoint(*arguments, prior))


@pytest.mark.parametrize("priors", [None, (0.5, 1.0)])
@pytest.mark.parametrize("family", UNREAD)
def test_choosing_reads_no_value(family, priors):
    layer = make_layer(0, m=4, n=6, N=40, folds=3)
    for weights in ("tokens", "energy"):
        options = {"groups": labels(layer, family), "weights": weights, "prior": 0.5}
        moments = layer.moments()
        with Operations() as operations:
            index, score = choose(moments, layer.updates, family, RIDGES, priors=priors, **options)
        assert operations.reads == 0
        assert (index.dtype, score.dtype) == (torch.int64, torch.float64)
        assert index.shape == (() if priors is None else (2,))


def single_precision(seed, spectrum, n, folds=4):
    """Moments by float32 products, and updates; the spectrum of what the layer reads is given."""
    samples = n // 2 if spectrum == "short" else 3 * n
    tasks, m, N = 2, max(2, n // 4), samples // folds
    place = torch.arange(1, n + 1, dtype=torch.float64)
    widths = {"root": place**-0.5, "inverse": 1 / place, "exponential": 10 ** (-4 * place / n),
              "low_rank": (place <= n // 3).double()}  # fmt: skip
    width = widths.get(spectrum, torch.ones_like(place))
    turn = torch.linalg.qr(normal(seed, n, n)).Q
    updates, noise = 0.05 * normal(seed + 1, tasks, 1, m, n), (0.01, 0.1, 1.0, 3.0)[seed % 4]
    moments = Moments.zeros(("a", "b"), n, m, folds=folds, full_energy=False)
    for t, fold in ((t, f) for t in range(tasks) for f in range(folds)):
        X = width * normal(1000 * seed + 10 * t + fold, N, n)
        if spectrum == "outlier":
            X[:, 0] += 100
        R = X @ turn @ updates[t, 0].mT
        R = R + noise * R.std() * normal(1000 * seed + 10 * t + fold + 500, *R.shape)
        x, r = (X @ turn).float(), R.float()
        moments.C[t, fold] = x.mT @ x
        moments.A[t, fold] = r.mT @ x
        moments.M[t, fold] = r.square().sum(0)
        moments.count[t, fold] = N
    return replace(moments, rtol=1e-6), updates


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_float32_chooses_what_float64_does(monkeypatch, spectrum):
    """Forty problems of each spectrum, among them singular ones and ones wider than their data."""
    monkeypatch.setattr(held_out, "WIDE", 24)
    chosen = set()
    for seed in range(40):
        moments, updates = single_precision(seed, spectrum, 24)
        options = {"prior": (0.0, 0.5)[seed % 2], "penalty": ("mean", "diagonal")[seed // 2 % 2]}
        with Operations() as operations:
            ridge, score = cross_fitted(moments, updates, "elements", **options)
        factors = ("aten::_linalg_eigh", "aten::linalg_cholesky_ex")
        assert set.union(*map(operations.precisions, factors)) == {torch.float32}
        mean = disjoint(moments, updates, "elements", RIDGES, **options).mean(0)
        assert ridge == RIDGES[int(mean.argmax())]
        assert_relative(score, mean.max(), 1e-4, 1.0)
        chosen.add(ridge)
    assert len(chosen) > 1


@pytest.mark.parametrize("spectrum", ["inverse", "outlier", "short"])
def test_wide_layers_choose_by_float32(spectrum):
    moments, updates = single_precision(1, spectrum, held_out.WIDE)
    ridge, score = cross_fitted(moments, updates, "elements", prior=0.5)
    mean = disjoint(moments, updates, "elements", RIDGES, prior=0.5).mean(0)
    assert ridge == RIDGES[int(mean.argmax())]
    assert score != float(mean.max())
    exact = replace(moments, rtol=1e-10)  # float64 products choose in float64
    mean = disjoint(exact, updates, "elements", RIDGES, prior=0.5).mean(0)
    assert cross_fitted(exact, updates, "elements", prior=0.5)[1] == float(mean.max())


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_units_do_not_matter_to_float32(monkeypatch, unit):
    monkeypatch.setattr(held_out, "WIDE", 24)
    moments, updates = single_precision(2, "root", 24)
    ridge, score = cross_fitted(moments, updates, "elements", prior=0.5)
    scaled = replace(moments, C=unit**2 * moments.C, A=unit**2 * moments.A, M=unit**2 * moments.M)
    found = cross_fitted(scaled, updates, "elements", prior=0.5)
    assert found[0] == ridge
    assert_relative(found[1], score, 1e-4)


def test_bad_input_is_named():
    layer = make_layer(0, folds=2)
    arguments = layer.moments(), layer.updates, "rows"
    for function in (disjoint, cross_fitted, choose):
        with pytest.raises(MergeError, match="ridges: expected at least one number ≥ 0"):
            function(*arguments, ())
        with pytest.raises(MergeError, match="ridge: expected a number ≥ 0, found -1"):
            function(*arguments, (0.0, -1.0))
        with pytest.raises(MergeError, match="priors: expected at least one factor of the prior"):
            function(*arguments, prior=1.0, priors=())
        with pytest.raises(MergeError, match="give prior=1 to scale"):
            function(*arguments, priors=(0.5, 1.0))
        with pytest.raises(MergeError, match="task weights: expected one of .*, found 'none'"):
            function(*arguments, weights="none")
    assert Contest(*arguments, RIDGES).scores().shape == (2, 1, len(RIDGES))
