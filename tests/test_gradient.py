"""Fisher averaging and AdaMerging against slow readable forms; FeatCal, LOT and WUDI as
programmes."""

import pytest
import torch
from toys import TASKS, loaded, vision

import qpmerge_lite as q
from qpmerge_lite.engine.layers import view
from qpmerge_lite.errors import EmptyCalibration, MergeError


@pytest.fixture(scope="module")
def problem():
    base, experts, calibration = vision()
    generator = torch.Generator().manual_seed(3)
    weights = {t: torch.randn(5, 8, generator=generator, dtype=torch.float64) for t in TASKS}
    return base, experts, calibration, {t: (lambda h, W=W: h @ W.T) for t, W in weights.items()}


def exact_fisher(model, batches, head, name):
    """Σ_y p(y|x) (∂ log p(y|x))² over all classes, mean over inputs, of one parameter."""
    total, parameter = 0, dict(model.named_parameters())[name]
    inputs = torch.cat([b["pixels"] for b in batches])
    for x in inputs:
        scores = head(model(x[None])).log_softmax(-1)[0]
        for score in scores:
            total = (
                total
                + score.exp().detach()
                * torch.autograd.grad(score, parameter, retain_graph=True)[0].square()
            )
    return total / len(inputs)


def test_fisher_weights_are_unbiased(problem):
    """The mean over many draws of labels is the exact diagonal, within five standard errors."""
    base, experts, calibration, heads = problem
    name = "blocks.1.down.weight"
    draws = torch.stack(
        [
            q.gradient.fisher_weights(base, experts, calibration, heads=heads, floor=0.0, seed=s)[
                name
            ]
            for s in range(40)
        ]
    )
    exact = torch.stack(
        [
            exact_fisher(
                loaded(base, experts[t]).requires_grad_(True), calibration[t], heads[t], name
            )
            for t in TASKS
        ]
    )
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all()


def test_fisher_averages_entry_by_entry(problem):
    base, experts, calibration, heads = problem
    F = q.gradient.fisher_weights(base, experts, calibration, heads=heads, normalise=True)
    merge = q.fisher(base, experts, calibration, heads=heads, normalise=True)
    for k, v in merge.state_dict.items():
        expected = sum(f * e[k] for f, e in zip(F[k], experts.values())) / F[k].sum(0)
        torch.testing.assert_close(v, expected)
    norms = torch.stack(
        [sum(f[i].square().sum() for f in F.values()).sqrt() for i in range(len(TASKS))]
    )
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0.05, atol=0)


@torch.no_grad()
def entropy(base, state, calibration, heads):
    total = 0
    for t in TASKS:
        p = heads[t](loaded(base, state)(torch.cat([b["pixels"] for b in calibration[t]]))).softmax(
            -1
        )
        total += float(-(p * p.log()).sum(-1).mean())
    return total


def test_adamerging_lowers_the_entropy_with_one_coefficient_per_expert_and_tensor(problem):
    base, experts, calibration, heads = problem
    start = q.adamerging(base, experts, calibration, heads=heads, steps=0)
    merge = q.adamerging(base, experts, calibration, heads=heads)
    assert entropy(base, merge.state_dict, calibration, heads) < entropy(
        base, start.state_dict, calibration, heads
    )
    origin = base.state_dict()
    for k, v in q.task_arithmetic(base, experts, scale=0.3).state_dict.items():
        torch.testing.assert_close(start.state_dict[k], v, rtol=1e-6, atol=1e-7)
    for row in merge.table:
        k = row["layer"]
        torch.testing.assert_close(
            merge.state_dict[k],
            origin[k]
            + sum(c * (e[k] - origin[k]) for c, e in zip(row["lambda"], experts.values())),
        )


@pytest.mark.parametrize("method", [q.fisher, q.adamerging])
def test_missing_heads_and_inputs_are_named(problem, method):
    base, experts, calibration, heads = problem
    with pytest.raises(MergeError, match="expected one for every expert, found none for 'c'"):
        method(base, experts, calibration, heads={t: heads[t] for t in "ab"})
    with pytest.raises(EmptyCalibration, match=r"no calibration batches for \['b'\]"):
        method(base, experts, calibration | {"b": []}, heads=heads)


def test_lot_is_the_least_squares_of_every_layer_on_the_experts_inputs(problem):
    base, experts, calibration, _ = problem
    merge = q.lot(base, experts, calibration)
    for name, found in q.certify(
        q.layer_moments(base, experts, calibration, folds=1), base, merge.state_dict
    ).items():
        assert found["gap"] < 1e-9, name


def test_featcal_solves_the_authors_normal_equations(problem):
    """``W (Σ C_t/‖C_t‖ + (λ + 1e-8) I) = Σ Y_t X_tᵀ/‖C_t‖ + λ W_anchor``, in the first layer, where
    every stream is still the same."""
    base, experts, calibration, _ = problem
    merge, v = (
        q.featcal(base, experts, calibration, ridge=0.1, anchor=0.5),
        view("embed", base.embed),
    )
    W0, W = v.matrix(base.state_dict())[0], v.matrix(merge.state_dict)[0]
    H, G = 0, 0
    for t in TASKS:
        patches = torch.nn.functional.unfold(
            torch.cat([b["pixels"] for b in calibration[t]]), 4, stride=4
        ).mT.flatten(0, 1)
        X = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
        C = X.T @ X
        H, G = H + C / C.norm(), G + v.matrix(experts[t])[0] @ C / C.norm()
    anchor = W0 + 0.5 * sum(v.matrix(e)[0] - W0 for e in experts.values())
    eye = torch.eye(len(H), dtype=H.dtype)
    torch.testing.assert_close(W @ (H + (0.1 + 1e-8) * eye), G + 0.1 * anchor, rtol=1e-6, atol=1e-8)


def test_wudi_runs_into_the_optimum_over_single_entries(problem):
    """With the updates' own Gram matrices as moments; the optimum is reached when it is not stopped
    early."""
    base, experts, *_ = problem
    k, vectors = "blocks.0.up.weight", q.datafree.task_vectors(base, experts)["blocks.0.up.weight"]
    moments = q.Moments.zeros(TASKS, *reversed(vectors.shape[1:]))
    for t, tau in zip(TASKS, vectors):
        moments.update(t, tau / tau.norm(), tau / tau.norm() @ tau.T)
    pooled = moments.pool(weights="tokens")
    loss = lambda merge: (
        pooled.loss((merge.state_dict[k] - base.state_dict()[k])[None]) / pooled.energy
    )
    optimum = (
        q.minimise(q.programme(pooled, q.build("elements", vectors[:, None], pooled))).objective
        / pooled.energy
    )
    start, early, late = (loss(q.wudi(base, experts, rate=1e-3, steps=s)) for s in (0, 30, 3000))
    assert start > early > late and late == pytest.approx(optimum, abs=1e-4 * start)


@pytest.mark.parametrize(
    "basis", ["elements", "rows", "rotated_rows", "columns", "rotated_columns", "singular"]
)
def test_a_ridge_runs_from_its_anchor_to_the_programme(problem, basis):
    """λ → ∞ returns another merge whole; at λ = 0 the basis contains it, so no layer captures less
    than it does."""
    base, experts, calibration, _ = problem
    anchor = q.ties(base, experts, density=0.3, scale=0.8).state_dict
    back = q.qp(base, experts, calibration, basis=basis, ridge=1e12, anchor=anchor, folds=1)
    for k, v in back.state_dict.items():
        torch.testing.assert_close(v, anchor[k], rtol=1e-6, atol=1e-7)
    free = q.qp(
        base, experts, calibration, basis=basis, ridge=0.0, anchor=anchor, folds=1, inputs="expert"
    )
    layers = q.layer_moments(base, experts, calibration, folds=1)
    theirs, ours = (q.certify(layers, base, state) for state in (anchor, free.state_dict))
    assert all(ours[k]["captured"] >= theirs[k]["captured"] - 1e-9 for k in layers)
    assert not free.averaged


def test_certificates_along_a_merge_agree_with_its_audit(problem):
    base, experts, calibration, _ = problem
    merge = q.soup(base, experts)
    audited = q.audit(base, merge.state_dict, experts, calibration)["layers"]
    along = q.certify(
        q.layer_moments(base, experts, calibration, along=merge.state_dict, folds=1),
        base,
        merge.state_dict,
    )
    for name, found in along.items():
        assert (
            found["captured"] == pytest.approx(audited[name], rel=1e-8) and found["gap"] >= -1e-12
        )
