"""ESM and DC-Merge against literal, slow forms of what their authors' code does, and properties."""

import copy

import pytest
import torch
from asserts import assert_relative
from small import tuned
from torch import nn
from toys import TASKS, loaded, trace, vision

import qpmerge_lite as q
from qpmerge_lite.errors import MergeError
from qpmerge_lite.spectral.essential import merge_subspaces
from qpmerge_lite.spectral.triplets import merge_triplets, polar

# the layers of ``toys.vision`` that are the same but for the number of their block
KINDS = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "up",
    "down",
)


@pytest.fixture(scope="module")
def problem():
    return vision()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------ slow forms


def slow_polar(matrix):
    """Orthogonal factor of the polar decomposition times the mean singular value."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vh * S.mean()


def slow_subspaces(shifts, updates):
    """ESM of one layer from the rows ``X_t Δ_tᵀ`` (N_t, m) and the updates (m, n) of its tasks."""
    left, right, norms = [], [], []
    rank = len(updates[0]) // len(updates)
    for rows, update in zip(shifts, updates):
        _, S, Vh = torch.linalg.svd(rows, full_matrices=True)
        eigenvalues = (S**2 / (len(rows) - 1))[:rank]
        s = (eigenvalues / eigenvalues.mean()) ** 0.15
        s = s / s.mean()
        coordinates = Vh @ update
        norms.append(coordinates.norm())
        for i in range(rank):
            left.append(Vh[i] * s[i])
            right.append(coordinates[i] * s[i] * norms[-1] ** 2)
    U, V = torch.stack(left, 1), torch.stack(right)
    V = V / torch.stack(norms).mean() ** 2
    lengths = torch.stack([column.norm() for column in V.T])
    for column in range(V.shape[1]):
        V[:, column] *= (lengths[column] / lengths.mean()) ** 2
    return slow_polar(U) @ slow_polar(V) * 2


def slow_tsv(vectors):
    left, values, right = [], [], []
    for vector in vectors:
        U, S, Vh = torch.linalg.svd(vector, full_matrices=False)
        keep = len(S) // len(vectors)
        left.append(U[:, :keep])
        values.append(S[:keep])
        right.append(Vh[:keep])
    (P, _, Qh), (X, _, Yh) = (
        torch.linalg.svd(torch.cat(parts, axis), full_matrices=False)
        for parts, axis in ((left, 1), (right, 0))
    )
    return P @ Qh @ torch.diag(torch.cat(values)) @ X @ Yh


def slow_esm(base, experts, calibration):
    """Updates by parameter, one after another."""
    origin, update = base.state_dict(), {}
    layers = {t: trace(loaded(base, experts[t]), calibration[t]) for t in TASKS}
    for name, value in origin.items():
        vectors = [experts[t][name] - value for t in TASKS]
        layer = name.removesuffix(".weight")
        if value.dim() != 2:
            update[name] = sum(vectors) / len(vectors)
        elif layer in layers["a"] and not layer.endswith("attention.output"):
            inputs = [layers[t][layer][0][:, 0, : value.shape[1]] for t in TASKS]
            shifts = [X @ vector.T for X, vector in zip(inputs, vectors)]
            update[name] = slow_subspaces(shifts, vectors)
        else:
            update[name] = slow_tsv(vectors)
    for kind in KINDS:
        alike = [f"blocks.{block}.{kind}.weight" for block in range(2)]
        norms = {name: update[name].norm() for name in alike}
        mean = sum(norms.values()) / len(alike)
        for name in alike:
            update[name] = update[name] * (norms[name] / mean) ** 2
    return update


def slow_dc(vectors, density):
    """DC-Merge of one matrix, entry by entry in the common basis."""
    tasks, r = len(vectors), min(vectors[0].shape)
    keep, cut, left, right = r // tasks, [], [], []
    for vector in vectors:
        U, S, Vh = torch.linalg.svd(vector, full_matrices=False)
        left.append(U[:, :keep])
        right.append(Vh[:keep])
        cut.append(U[:, :keep] @ torch.diag(S[:keep]) @ Vh[:keep])
    P, Q = (slow_factor(torch.cat(parts, axis)) for parts, axis in ((left, 1), (right, 0)))
    inside = []
    for matrix in cut:
        core = P.T @ matrix @ Q.T
        sizes = sorted(core.abs().flatten().tolist(), reverse=True)
        least = sizes[: max(1, int(density * r * r))][-1]
        inside.append([[x if abs(x) >= least else 0.0 for x in row] for row in core.tolist()])
    merged = torch.zeros(tasks * keep, tasks * keep, dtype=torch.float64)
    for i in range(tasks * keep):
        for j in range(tasks * keep):
            entries = [core[i][j] for core in inside]
            agreeing = [x for x in entries if x * sum(entries) > 0]
            if i // keep == j // keep and agreeing:
                merged[i, j] = sum(agreeing) / len(agreeing)
    return P @ merged @ Q


def slow_factor(matrix):
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vh


# ------------------------------------------------------------------------------------- ESM


def test_esm_is_the_authors(problem):
    base, experts, calibration = problem
    expected = slow_esm(base, experts, calibration)
    merge = q.esm(base, experts, calibration, scale=0.7)
    for name, value in base.state_dict().items():
        found = merge.state_dict[name] - value
        torch.testing.assert_close(found, 0.7 * expected[name], rtol=1e-7, atol=1e-9)


def test_what_esm_averages_is_what_is_no_matrix(problem):
    base = problem[0]
    averaged = set(q.esm(*problem).averaged)
    assert averaged == {name for name, value in base.state_dict().items() if value.dim() != 2}


def test_without_exceptions_the_projection_behind_attention_is_decomposed_too(problem):
    plain, all_layers = q.esm(*problem), q.esm(*problem, by_weights=())
    changed = {
        name
        for name, value in plain.state_dict.items()
        if not torch.equal(value, all_layers.state_dict[name])
    }
    assert changed == {f"blocks.{block}.attention.output.weight" for block in range(2)}


def test_the_end_of_a_name_is_the_end_of_a_path(problem):
    """``put`` is the end of ``output``, but not of ``attention.output`` as a path."""
    every, none = q.esm(*problem, by_weights=["put"]), q.esm(*problem, by_weights=[])
    assert all(torch.equal(every.state_dict[k], v) for k, v in none.state_dict.items())


def test_a_grid_of_scales_is_its_merges_one_by_one(problem):
    grid = [{"scale": 0.5}, {}, {"scale": 1.5}]
    for options, merge in zip(grid, q.many(q.esm, grid, *problem), strict=True):
        alone = q.esm(*problem, **options)
        assert all(torch.equal(alone.state_dict[k], v) for k, v in merge.state_dict.items())
    mixed = [{"scale": 0.5}, {"by_weights": ()}]
    for options, merge in zip(mixed, q.many(q.esm, mixed, *problem), strict=True):
        alone = q.esm(*problem, **options)
        assert all(torch.equal(alone.state_dict[k], v) for k, v in merge.state_dict.items())


def test_esm_turns_with_the_outputs():
    """Rotated outputs have rotated eigenvectors, and norms stay what they are."""
    updates, X = drawn(3, 9, 7), drawn(3, 7, 40, seed=1)
    rotation = torch.linalg.qr(drawn(9, 9, seed=2)).Q

    C = X @ X.mT
    turned = merge_subspaces(C, rotation @ updates)
    assert_relative(turned, rotation @ merge_subspaces(C, updates), 1e-9)


def test_esm_looks_at_the_shape_of_inputs_and_not_at_their_size():
    updates, X = drawn(3, 9, 7), drawn(3, 7, 40, seed=1)
    C = X @ X.mT
    factors = torch.tensor([1e-6, 1.0, 1e4], dtype=torch.float64)[:, None, None]
    assert_relative(merge_subspaces(factors * C, updates), merge_subspaces(C, updates), 1e-9)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_copies_of_an_expert_in_closed_form(count):
    """U_t side by side K times has the singular values √K s, so the mean 1/√K over as many as
    there are columns, and the polar factor [U_t … U_t]/√K; the like for V_t."""
    update, X = drawn(8, 12), drawn(12, 50, seed=1)
    shift = update @ X
    found = merge_subspaces((X @ X.T).expand(count, 12, 12), update.expand(count, 8, 12))
    rank = 8 // count
    S, Vh = torch.linalg.svd(shift.T, full_matrices=False)[1:]
    s = (S[:rank] ** 2 / (S[:rank] ** 2).mean()) ** 0.15
    s = s / s.mean()
    U, V = Vh[:rank].T, s[:, None] * (Vh[:rank] @ update)
    columns = V.norm(dim=0)
    left, values, right = torch.linalg.svd(V * (columns / columns.mean()) ** 2, full_matrices=False)
    assert_relative(found, 2 / count * values.mean() * U @ left @ right, 1e-9)


def test_an_expert_that_is_the_base_adds_nothing_but_its_share():
    """Its subspace has no directions, so that the others' are cut to ⌊m/K⌋ and nothing is made up
    for it; norms are compared with a mean over all three."""
    update, X = drawn(2, 9, 7), drawn(2, 7, 40, seed=1)
    C = torch.cat([X @ X.mT, torch.eye(7, dtype=torch.float64)[None]])
    found = merge_subspaces(C, torch.cat([update, torch.zeros(1, 9, 7).double()]))
    assert torch.linalg.matrix_rank(found) == 6
    energies = update @ C[:2] @ update.mT
    leading = torch.cat([torch.linalg.eigh(energy)[1][:, -3:] for energy in energies], 1)
    outside = found - leading @ torch.linalg.lstsq(leading, found).solution
    assert float(outside.norm()) < 1e-9 * float(found.norm())


def test_few_inputs_leave_few_directions():
    """One input per task shifts outputs along one direction, and no other is made up."""
    updates, X = drawn(2, 8, 6), drawn(2, 6, 1, seed=1)
    found = merge_subspaces(X @ X.mT, updates)
    assert torch.linalg.matrix_rank(found, rtol=1e-6) == 2


@pytest.mark.parametrize("size", [1e-170, 1e200])
def test_updates_whose_squares_are_no_numbers(size):
    updates, X = drawn(3, 9, 7), drawn(3, 7, 40, seed=1)
    C = X @ X.mT
    assert_relative(merge_subspaces(C, size * updates) / size, merge_subspaces(C, updates), 1e-9)


def test_experts_that_are_the_base_are_the_base(problem):
    base, experts, calibration = problem
    same = dict.fromkeys(experts, base.state_dict())
    for merge in (q.esm(base, same, calibration), q.dc_merge(base, same)):
        assert all(torch.equal(merge.state_dict[k], v) for k, v in base.state_dict().items())


def test_a_layer_with_fewer_rows_than_experts_stays_the_base():
    base = nn.Linear(6, 2)
    experts = tuned(base, tasks="abc")
    calibration = {task: [{"input": torch.randn(20, 6)}] for task in "abc"}
    for merge in (q.esm(base, experts, calibration), q.dc_merge(base, experts)):
        assert torch.equal(merge.state_dict["weight"], base.weight)


def test_blocks_that_no_expert_has_changed_do_not_count_in_the_mean_over_depth(problem):
    """Experts that differ in one layer are merged there as if the model had no other."""
    base, experts, calibration = problem
    layer, origin = "blocks.1.up.weight", base.state_dict()
    one = {t: {**origin, layer: state[layer]} for t, state in experts.items()}
    found = q.esm(base, one, calibration).state_dict
    X = [trace(loaded(base, one[t]), calibration[t])["blocks.1.up"][0][:, 0, :-1] for t in TASKS]
    C = torch.stack([x.T @ x / len(x) for x in X])
    expected = merge_subspaces(C, torch.stack([one[t][layer] - origin[layer] for t in TASKS]))
    torch.testing.assert_close(found[layer] - origin[layer], expected, rtol=1e-7, atol=1e-9)
    assert all(torch.equal(found[name], value) for name, value in origin.items() if name != layer)


class Conv1D(nn.Module):
    """GPT-2's dense layer: its weight is stored (in, out)."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        return x @ self.weight + self.bias


def test_a_weight_that_is_stored_transposed_is_the_same_layer():
    plain = nn.Linear(5, 7).double()
    turned = Conv1D(plain.weight.detach().T.clone(), plain.bias.detach().clone())
    experts = tuned(plain)
    other = {t: {k: v.t().clone() for k, v in state.items()} for t, state in experts.items()}
    X = {task: drawn(30, 5, seed=seed) for seed, task in enumerate("ab")}
    expected = q.esm(plain, experts, {t: [{"input": x}] for t, x in X.items()}).state_dict
    found = q.esm(turned, other, {t: [{"x": x}] for t, x in X.items()}).state_dict
    torch.testing.assert_close(found["weight"].T, expected["weight"], rtol=1e-9, atol=1e-12)


def test_single_precision_is_that_of_the_weights(problem):
    """Moments and decompositions are double where the model is single."""
    base, experts, calibration = problem
    single = copy.deepcopy(base).float()
    floats = {t: {k: v.float() for k, v in state.items()} for t, state in experts.items()}
    inputs = {
        t: [{"pixels": b["pixels"].float()} for b in batches] for t, batches in calibration.items()
    }
    merge = q.esm(single, floats, inputs)
    expected = q.esm(base, experts, calibration).state_dict
    for name, value in expected.items():
        assert merge.state_dict[name].dtype == torch.float32
        torch.testing.assert_close(merge.state_dict[name].double(), value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": float("nan")}, "scale: expected a finite number"),
        ({"scale": "1"}, "scale: expected a number"),
        ({"by_weights": 3}, "by_weights: expected names"),
        ({"blocks": "nowhere"}, "nowhere"),
    ],
)
def test_options_that_esm_refuses(problem, options, message):
    with pytest.raises(MergeError, match=message):
        q.esm(*problem, **options)


def test_esm_needs_inputs_of_every_task(problem):
    base, experts, calibration = problem
    with pytest.raises(MergeError, match="'c'"):
        q.esm(base, experts, {t: calibration[t] for t in "ab"})


# -------------------------------------------------------------------------------- DC-Merge


@pytest.mark.parametrize("density", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("tasks", ["ab", "abc"])
def test_dc_merge_is_the_authors(problem, density, tasks):
    base, experts, _ = problem
    chosen = {t: experts[t] for t in tasks}
    merge = q.dc_merge(base, chosen, density=density, scale=0.6)
    for name, value in base.state_dict().items():
        vectors = [state[name] - value for state in chosen.values()]
        slow = slow_dc(vectors, density) if value.dim() == 2 else sum(vectors) / len(vectors)
        found = merge.state_dict[name] - value
        torch.testing.assert_close(found, 0.6 * slow, rtol=1e-8, atol=1e-10)


def test_of_one_expert_dc_merge_keeps_the_largest_singular_values():
    base = nn.Linear(6, 6).double()
    experts = {"a": tuned(base)["a"]}
    vector = experts["a"]["weight"] - base.weight.detach()
    U, S, Vh = torch.linalg.svd(vector)
    for kept in (1, 3, 6):
        found = q.dc_merge(base, experts, density=kept / 36).state_dict["weight"] - base.weight
        torch.testing.assert_close(found.detach(), U[:, :kept] * S[:kept] @ Vh[:kept])


def test_experts_in_different_directions_are_added_up_by_dc_merge():
    """Subspaces that are orthogonal to each other have nothing to agree on: the sum."""
    first, second = torch.zeros(2, 4, 4, dtype=torch.float64)
    first[0, 0], first[1, 1] = 3.0, 2.0
    second[2, 2], second[3, 3] = 5.0, 1.0
    base = nn.Linear(4, 4, bias=False).double()
    experts = {"a": {"weight": base.weight + first}, "b": {"weight": base.weight + second}}
    merge = q.dc_merge(base, experts, density=1.0)
    torch.testing.assert_close(merge.state_dict["weight"] - base.weight, first + second)


@pytest.mark.parametrize("density", [0.0, 1.1, "0.1", None])
def test_densities_that_dc_merge_refuses(problem, density):
    with pytest.raises(MergeError, match="density: expected"):
        q.dc_merge(*problem[:2], density=density)


# ------------------------------------------------------------------------------------ parts


def test_a_polar_factor_keeps_range_and_kernel():
    left, right = drawn(6, 2), drawn(2, 5, seed=1)
    factor, mean = polar(left @ right)
    S = torch.linalg.svdvals(left @ right)
    torch.testing.assert_close(torch.linalg.svdvals(factor)[:2], torch.ones(2).double())
    assert torch.linalg.matrix_rank(torch.cat([factor, left], 1)) == 2
    assert torch.linalg.matrix_rank(torch.cat([factor, right])) == 2
    assert mean == pytest.approx(float(S.sum()) / 5)
    assert float(polar(torch.zeros(3, 2))[0].norm()) == 0


def test_tsv_of_experts_that_agree_makes_nothing_up():
    """Two copies: [U U]/√2 on one side, the same of V on the other, half of the leading triplets
    each, which are there twice."""
    vector = drawn(6, 4)
    U, S, Vh = torch.linalg.svd(vector, full_matrices=False)
    found = merge_triplets(vector.expand(2, 6, 4))
    torch.testing.assert_close(found, U[:, :2] * S[:2] @ Vh[:2])
