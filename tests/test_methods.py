"""Data-free methods against slow readable forms, and every method's certificate against a direct
measurement."""

import pytest
import torch
from asserts import assert_relative
from strategies import make_layer
from toys import TASKS, loaded, trace, vision

import qpmerge_lite as q
from qpmerge_lite.engine.layers import view
from qpmerge_lite.errors import MergeError
from qpmerge_lite.methods import QP, Sketched
from qpmerge_lite.solvers import shrink


@pytest.fixture(scope="module")
def problem():
    return vision()


def test_soup_and_task_arithmetic(problem):
    base, experts, _ = problem
    uniform, weighted = q.soup(base, experts), q.soup(base, experts, weights=[0.5, 0.3, 0.2])
    third, negated = (
        q.task_arithmetic(base, experts, scale=1 / 3),
        q.task_arithmetic(base, {"a": experts["a"]}, scale=-1.0),
    )
    for k, v in base.state_dict().items():
        torch.testing.assert_close(uniform.state_dict[k], sum(e[k] for e in experts.values()) / 3)
        torch.testing.assert_close(
            weighted.state_dict[k],
            0.5 * experts["a"][k] + 0.3 * experts["b"][k] + 0.2 * experts["c"][k],
        )
        torch.testing.assert_close(third.state_dict[k], uniform.state_dict[k])
        torch.testing.assert_close(negated.state_dict[k], 2 * v - experts["a"][k])


def test_soup_weights_must_sum_to_one(problem):
    with pytest.raises(MergeError, match="expected 3 numbers with sum 1"):
        q.soup(*problem[:2], weights=[1.0, 1.0, 1.0])


def slow_ties(vectors, density):
    """Entry by entry, in plain Python."""
    d = len(vectors[0])
    trimmed = []
    for v in vectors:
        cut = sorted(abs(x) for x in v)[d - int(d * density) - 1] if d > int(d * density) else 0
        trimmed.append([x if abs(x) >= cut else 0.0 for x in v])
    sign = lambda x: (x > 0) - (x < 0)
    signs = [sign(sum(column)) for column in zip(*trimmed)]
    majority = sign(sum(signs))
    merged = []
    for s, column in zip(signs, zip(*trimmed)):
        agreeing = [x for x in column if x and sign(x) == (s or majority)]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return merged


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_ties_is_the_authors(problem, density):
    base, experts, _ = problem
    names = sorted(base.state_dict())
    flat = lambda s: torch.cat([s[k].flatten() for k in names])
    origin = flat(base.state_dict())
    expected = slow_ties([(flat(experts[t]) - origin).tolist() for t in TASKS], density)
    merged = flat(q.ties(base, experts, density=density, scale=0.7).state_dict) - origin
    torch.testing.assert_close(
        merged, 0.7 * torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


def test_ties_elects_the_majority_where_signs_cancel():
    base, experts, _ = vision()
    one = {k: torch.zeros_like(v) for k, v in base.state_dict().items()}
    up, down = {k: v + 1 for k, v in one.items()}, {k: v.clone() for k, v in one.items()}
    base.load_state_dict(one)
    down["cls"] -= 1.0
    merged = q.ties(base, {"a": up, "b": down}, density=1.0).state_dict
    assert torch.equal(merged["cls"], torch.ones_like(merged["cls"])) and torch.equal(
        merged["position"], torch.ones_like(merged["position"])
    )


def test_dare_without_dropping_is_task_arithmetic_and_is_unbiased(problem):
    base, experts, _ = problem
    plain = q.task_arithmetic(base, experts, scale=0.4).state_dict
    for k, v in q.dare(base, experts, drop=0.0, scale=0.4).state_dict.items():
        torch.testing.assert_close(v, plain[k])
    draws = [
        q.dare(base, experts, drop=0.5, scale=0.4, seed=s).state_dict["blocks.0.up.weight"]
        for s in range(200)
    ]
    assert not torch.equal(draws[0], draws[1])
    error = (torch.stack(draws).mean(0) - plain["blocks.0.up.weight"]).abs()
    spread = torch.stack(draws).std(0) / len(draws) ** 0.5
    assert (error < 5 * spread + 1e-12).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda p: q.dare(*p[:2], drop=1.0),
        lambda p: q.ties(*p[:2], density=0.0),
        lambda p: q.regmean(*p, alpha=3.0),
    ],
)
def test_bad_fractions_are_refused(problem, call):
    with pytest.raises(MergeError, match="expected a (probability|fraction|number) in"):
        call(problem)


@pytest.mark.parametrize(
    "method, options",
    [
        (q.soup, {}),
        (q.task_arithmetic, {"scale": 0.8}),
        (q.ties, {}),
        (q.dare, {"drop": 0.9}),
        (q.regmean, {}),
    ],
)
def test_certificate_of_any_merge_is_the_measured_loss_difference(problem, method, options):
    """L(W) - L(W_full), measured on outputs of expert streams, against the certificate from
    moments: 1e-9 relative."""
    base, experts, calibration = problem
    merge = method(base, experts, calibration, **options)
    layer = "blocks.1.up"
    v = view(layer, base.get_submodule(layer))
    W0, W = v.matrix(base.state_dict()), v.matrix(merge.state_dict)
    samples = {t: trace(loaded(base, experts[t]), calibration[t])[layer] for t in TASKS}
    n, m = W0.shape[2], W0.shape[1]
    moments = q.Moments.zeros(TASKS, n, m)
    for t, (X, Y) in samples.items():
        moments.update(t, X, Y - torch.einsum("gmn,Ngn->Ngm", W0, X))
    pooled = moments.pool()
    full = (
        torch.cat([X[:, 0] / len(X) ** 0.5 for X, _ in samples.values()]),
        torch.cat([Y[:, 0] / len(Y) ** 0.5 for _, Y in samples.values()]),
    )
    best = torch.linalg.lstsq(*full, driver="gelsd").solution.mT
    loss = lambda W: float((full[1] - full[0] @ W.mT).square().sum()) / 2
    assert q.gap(pooled, W - W0) == pytest.approx(loss(W[0]) - loss(best), rel=1e-9)
    D = W[0] - best
    assert q.gap(pooled, W - W0) == pytest.approx(float((D @ pooled.C[0] * D).sum()) / 2, rel=1e-9)


def test_tune_takes_the_highest_score_and_the_earlier_of_equals(problem):
    base, experts, _ = problem
    origin = base.state_dict()["cls"]
    distance = lambda state: float((state["cls"] - origin).norm())
    grid = [{"scale": s} for s in (0.1, 0.9, 0.9, 0.2)]
    merge, options, scores = q.tune(q.task_arithmetic, grid, distance, base, experts)
    with pytest.raises(MergeError, match="grid: expected at least one set of options, found none"):
        q.tune(q.task_arithmetic, [], distance, base, experts)
    assert options is grid[1] and len(scores) == 4 and distance(merge.state_dict) == max(scores)


def test_tune_in_two_rounds_scores_the_better_half_only(problem):
    """Of equals in the first round the later ones go; what it dropped has no score, even where the
    second round would have liked it."""
    base, experts, _ = problem
    scales = (0.1, 0.9, 0.9, 0.2, 0.5)
    asked, noted = [], []

    def scale(state):
        update = state["cls"] - base.state_dict()["cls"]
        whole = sum(expert["cls"] - base.state_dict()["cls"] for expert in experts.values())
        return round(float(update.norm() / whole.norm()), 6)

    def against(state):
        asked.append(scale(state))
        return -asked[-1]

    merge, options, scores = q.tune(
        q.task_arithmetic,
        [{"scale": s} for s in scales],
        against,
        base,
        experts,
        note=noted.append,
        first=scale,
    )
    assert len(noted) == 5 and asked == [0.9, 0.9, 0.5] and options == {"scale": 0.5}
    assert scores == [None, -0.9, -0.9, None, -0.5] and scale(merge.state_dict) == 0.5


@pytest.mark.parametrize("g", [1, 3])
def test_a_sketch_of_full_rank_is_the_ridge_solution(g):
    """Also where fewer samples than inputs leave C singular."""
    for N in (40, 5):
        layer = make_layer(1, K=3, g=g, m=4, n=8, N=N)
        moments = layer.moments()
        exact, row = QP("elements", ridge=0.05)(moments, layer.updates)
        update, found = Sketched(rank=8, ridge=0.05)(moments, layer.updates)
        assert_relative(update, exact, 1e-8)
        assert_relative(found["captured"], row["captured"], 1e-7)


def test_a_sketch_never_beats_the_optimum_and_improves_with_rank():
    """Loss plus ridge never falls below its minimum, at full rank it is there; what is left falls
    with rank on average over sketches."""
    layer = make_layer(2, K=2, m=4, n=16, N=60)
    moments, ridge = layer.moments(), 0.02
    pooled, prior = moments.pool(), layer.updates.mean(0)
    mu = ridge * float(pooled.C.diagonal(dim1=-2, dim2=-1).mean())
    penalised = lambda update: pooled.loss(update) + mu / 2 * float((update - prior).square().sum())
    best = penalised(QP("elements", ridge=ridge)(moments, layer.updates)[0])
    left = []
    for rank in (0, 2, 4, 8, 12, 16):
        values = [
            penalised(Sketched(rank, ridge, seed=s)(moments, layer.updates)[0]) - best
            for s in range(20)
        ]
        assert min(values) >= -1e-9 * best
        left.append(sum(values))
    assert all(a > b for a, b in zip(left, left[1:])) and left[-1] < 1e-9 * best


def test_a_sketched_merge_of_full_rank_is_the_programme(problem):
    exact, sketch = (
        q.qp(*problem, basis="elements", ridge=0.1, folds=1),
        q.methods.sketched(*problem, rank=10_000, ridge=0.1),
    )
    for k, v in exact.state_dict.items():
        torch.testing.assert_close(sketch.state_dict[k], v, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{"rank": -1}, {"ridge": 0.0}])
def test_a_bad_sketch_is_refused(options):
    with pytest.raises(MergeError, match="expected a rank ≥ 0 and a ridge > 0"):
        Sketched(**options)


@pytest.mark.parametrize("method, grid", [
    (q.qp, [{"basis": b, "targets": t} for b in ("rows", "elements")
            for t in ("own", "propagated", 0.3)]),
    (q.regmean, [{"alpha": a} for a in (0.5, 0.9, 1.0)]),
    (q.featcal, [{}, {"anchor": 1.2}]),
    (q.ties, [{}, {"density": 0.5}]),
], ids=lambda v: getattr(v, "__name__", None))  # fmt: skip
def test_a_grid_in_one_pass_is_its_merges_one_by_one(method, grid):
    base, experts, calibration = vision()
    together = list(q.many(method, grid, base, experts, calibration))
    assert len(together) == len(grid)
    for options, merge in zip(grid, together):
        alone = method(base, experts, calibration, **options)
        assert all(torch.equal(merge.state_dict[k], v) for k, v in alone.state_dict.items()), (
            options
        )
    noted = []
    best, options, scores = q.tune(
        method,
        grid,
        lambda state: float(state["norm.weight"].sum()),
        base,
        experts,
        calibration,
        note=noted.append,
    )
    assert options == grid[scores.index(max(scores))] and len(noted) == len(grid)
    assert torch.equal(
        best.state_dict["norm.weight"],
        together[scores.index(max(scores))].state_dict["norm.weight"],
    )


@pytest.mark.parametrize(
    "solver",
    [
        QP("elements", ridge=0.1),
        QP("elements", ridge=0.1, penalty="diagonal", prior=0.0),
        q.RegMean(0.9),
        q.RegMean(0.0),
    ],
)
def test_the_captured_energy_of_a_wide_layer_is_that_of_its_update(solver):
    """Wide layers take it from the equation that their update solves, not from another product."""
    layer = make_layer(1, K=3, g=1, m=4, n=80, N=200)
    moments = layer.moments()
    if isinstance(solver, q.RegMean):
        moments = shrink(moments, layer.updates, 1.0)  # of propagated targets
    update, row = solver(moments, layer.updates)
    assert_relative(row["captured"], moments.pool().captured(update), 1e-9)
