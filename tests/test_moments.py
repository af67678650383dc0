"""Moments are sums: an accumulator is a monoid, and what it pools to is the loss on the samples."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from asserts import assert_psd, assert_relative, assert_same_moments
from hypothesis import given
from hypothesis import strategies as st
from strategies import FREE, layers, make_layer, normal

import qpmerge_lite.moments
from qpmerge_lite.bases import build
from qpmerge_lite.diagnostic import captured_energy
from qpmerge_lite.errors import EmptyCalibration, MergeError, NonFinite, ShapeMismatch
from qpmerge_lite.moments import Moments
from qpmerge_lite.programme import programme
from qpmerge_lite.solve import minimise
from qpmerge_lite.solvers import shrink


def empty(layer):
    """No sample yet, for the same layer and tasks."""
    g, m, n = layer.updates.shape[1:]
    return Moments.zeros(layer.tasks, n, m, g=g, folds=layer.folds, layer="layer")


@given(layer=layers(folds=2))
def test_sums_equal_the_loops_over_samples(device, layer):
    """Oracle: ``C = Σ x xᵀ``, ``A = Σ r xᵀ``, ``M = Σ r rᵀ``, one sample, copy and fold at a
    time."""
    moments, slow = layer.to(device).moments(), empty(layer)
    for t, f in itertools.product(range(len(layer.X)), range(2)):
        for x, r in zip(layer.X[t][layer.fold[t] == f], layer.R[t][layer.fold[t] == f]):
            slow.count[t, f] += 1
            for c in range(layer.updates.shape[1]):
                slow.C[t, f, c] += torch.outer(x[c], x[c])
                slow.A[t, f, c] += torch.outer(r[c], x[c])
                slow.M[t, f, c] += torch.outer(r[c], r[c])
    assert_same_moments(moments, slow)
    pooled = moments.pool()
    assert_psd(pooled.C)
    assert_psd(pooled.M)


@given(
    layer=layers(folds=2), weights=st.sampled_from(["tokens", "energy"]), seed=st.integers(0, 99)
)
def test_pooled_loss_is_the_loss_on_the_samples(layer, weights, seed):
    """``½ tr(DCDᵀ) - tr(DAᵀ) + E = ½ Σ_t ω_t ‖R_t - D X_t‖²`` for any merge D, on all folds and on
    each one."""
    update, moments = normal(seed + 20_000, *layer.updates.shape[1:]), layer.moments()
    parts = [(None, layer)] + [
        (
            [f],
            replace(
                layer,
                X=tuple(x[i == f] for x, i in zip(layer.X, layer.fold)),
                R=tuple(r[i == f] for r, i in zip(layer.R, layer.fold)),
            ),
        )
        for f in range(2)
    ]
    for folds, part in parts:
        pooled = moments.pool(folds, weights)
        assert_relative(pooled.loss(update), part.loss(update, weights), 1e-10, pooled.energy)
        assert_relative(pooled.energy, part.loss(0 * update, weights), 1e-10)


@given(layer=layers(folds=2), seed=st.integers(0, 99))
def test_a_monoid(layer, seed):
    """Batches of one in any order, shards merged in any order, an empty shard, reading in between:
    always the same sums."""
    whole, ones, shards = layer.moments(), empty(layer), [empty(layer), empty(layer)]
    samples = [(t, i) for t, x in enumerate(layer.X) for i in range(len(x))]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    for t, i in (samples[j] for j in order):
        one = (layer.tasks[t], layer.X[t][i : i + 1], layer.R[t][i : i + 1], int(layer.fold[t][i]))
        ones.update(*one)
        shards[i % 2].update(*one)
        (ones + empty(layer)).C.sum()  # reading a result half-way leaves the accumulator alone
    before = [z.clone() for s in shards for z in (s.C, s.A, s.M, s.count)]
    for merged in (
        ones,
        shards[0] + shards[1],
        shards[1] + shards[0],
        whole + empty(layer),
        empty(layer) + whole,
    ):
        assert_same_moments(merged, whole)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (z for s in shards for z in (s.C, s.A, s.M, s.count)))
    )
    ones.update(layer.tasks[0], layer.X[0][:0], layer.R[0][:0])  # no sample changes nothing
    assert_same_moments(ones, whole)


def test_dense_layers_take_two_dimensional_samples():
    layer = make_layer(0)
    flat = empty(layer)
    for task, x, r in zip(layer.tasks, layer.X, layer.R):
        flat.update(task, x.squeeze(1), r.squeeze(1))
    assert_same_moments(flat, layer.moments(), 0)


@given(layer=layers(folds=3))
def test_folds_add_up_and_tasks_may_be_reordered(layer):
    moments = layer.moments()
    joint = replace(layer, folds=1, fold=tuple(0 * f for f in layer.fold)).moments()
    assert_same_moments(
        replace(
            moments,
            **{k: getattr(moments, k).sum(1, keepdim=True) for k in ("C", "A", "M", "count")},
        ),
        joint,
    )
    turned = replace(layer, X=layer.X[::-1], R=layer.R[::-1], fold=layer.fold[::-1]).moments()
    for weights in ("tokens", "energy"):
        a, b = moments.pool(weights=weights), turned.pool(weights=weights)
        assert_relative(
            torch.cat([a.C.flatten(), a.A.flatten()]), torch.cat([b.C.flatten(), b.A.flatten()])
        )
        assert_relative(a.energy, b.energy)


@given(layer=layers(folds=2), times=st.integers(2, 4), scale=st.floats(0.1, 10))
def test_what_the_task_weights_ignore(layer, times, scale):
    """Repeating a task's samples changes nothing under either weighting; rescaling its inputs and
    outputs nothing under ``energy``."""
    repeat = lambda zs: (zs[0].repeat(times, *[1] * (zs[0].dim() - 1)), *zs[1:])
    repeated = replace(layer, X=repeat(layer.X), R=repeat(layer.R), fold=repeat(layer.fold))
    louder = replace(
        layer, X=(scale * layer.X[0], *layer.X[1:]), R=(scale * layer.R[0], *layer.R[1:])
    )
    for other, weights in ((repeated, "tokens"), (repeated, "energy"), (louder, "energy")):
        a, b = other.moments().pool(weights=weights), layer.moments().pool(weights=weights)
        silent = (layer.R[0] ** 2).sum() == 0
        if not (silent and other is louder):
            for name in ("C", "A", "M"):
                assert_relative(getattr(a, name), getattr(b, name), 1e-10)
        assert_relative(a.energy, b.energy)


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)],
)
def test_half_and_single_precision_activations(device, dtype, unit):
    """Rounding the samples with unit roundoff u moves no entry of a sum by more than
    ``(2u + u²) Σ|x||y|``; the sums are float64."""
    layer = make_layer(3, K=3, m=6, n=8, N=200).to(device)
    exact = layer.moments()
    rounded = replace(
        layer, X=tuple(x.to(dtype) for x in layer.X), R=tuple(r.to(dtype) for r in layer.R)
    ).moments()
    bound = replace(
        layer, X=tuple(x.abs() for x in layer.X), R=tuple(r.abs() for r in layer.R)
    ).moments()
    for name in ("C", "A", "M"):
        error = (getattr(rounded, name) - getattr(exact, name)).abs()
        assert getattr(rounded, name).dtype == torch.float64
        assert (error <= 1.01 * (2 * unit + unit**2) * getattr(bound, name)).all()
        assert error.max() > 0
    for family in FREE:  # and the answer built on them moves as little
        a, b = (captured_energy(layer.programme(family, m.pool())) for m in (rounded, exact))
        assert abs(a - b) <= 8 * unit


@given(layer=layers(folds=2))
def test_saved_and_loaded_bit_for_bit(tmp_path_factory, layer):
    path = tmp_path_factory.mktemp("moments") / "layer.safetensors"
    moments = layer.moments("blocks.0.qkv")
    moments.save(path)
    assert_same_moments(Moments.load(path), moments, rtol=0)
    assert [p.name for p in path.parent.iterdir()] == ["layer.safetensors"]


def test_an_interrupted_save_leaves_the_old_file_or_none(tmp_path, monkeypatch):
    path, old = tmp_path / "layer.safetensors", make_layer(1).moments()

    def interrupted(tensors, filename, metadata):
        with open(filename, "wb") as f:
            f.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(qpmerge_lite.moments, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            old.save(path)
        assert not path.exists()
    old.save(path)
    monkeypatch.setattr(qpmerge_lite.moments, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_layer(2).moments().save(path)
    assert_same_moments(Moments.load(path), old, rtol=0)


def shard(layer, rank):
    """Every second sample, from ``rank`` on."""
    take = lambda zs: tuple(z[rank::2] for z in zs)
    return replace(layer, X=take(layer.X), R=take(layer.R), fold=take(layer.fold)).moments()


REDUCE = """
import sys, torch
from qpmerge_lite.moments import Moments
rank, folder = int(sys.argv[1]), sys.argv[2]
store = f"file://{folder}/store"
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
moments = Moments.load(f"{folder}/shard{rank}")
moments.all_reduce()
moments.save(f"{folder}/reduced{rank}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)
def test_all_reduce_over_two_processes(tmp_path):
    """Each process of a gloo group reads its shard; afterwards both hold the moments of all
    samples."""
    layer = make_layer(5, K=3, folds=2)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    workers = []
    for rank in range(2):
        shard(layer, rank).save(tmp_path / f"shard{rank}")
        workers.append(
            subprocess.Popen(
                [sys.executable, "-c", REDUCE, str(rank), str(tmp_path)], env=environment
            )
        )
    try:
        assert [w.wait(timeout=60) for w in workers] == [0, 0]
    finally:
        for w in workers:
            w.kill()
    for rank in range(2):
        assert_same_moments(Moments.load(tmp_path / f"reduced{rank}"), layer.moments())


@given(layer=layers(folds=2))
def test_moments_of_some_tasks_are_those_of_their_samples(layer):
    """In the order asked for, and with the tasks' names."""
    chosen = layer.tasks[::-1][:2]
    few = Moments.zeros(chosen, *layer.updates.shape[:1:-1], g=layer.updates.shape[1], folds=2)
    for task, *samples in zip(layer.tasks, layer.X, layer.R, layer.fold):
        if task in chosen:
            few.update(task, *samples)
    assert_same_moments(layer.moments().only(chosen), few, 0)


@given(layer=layers(targets=("propagated",), folds=2), alpha=st.floats(0, 1))
def test_shrink_keeps_the_diagonal_and_the_propagated_targets(layer, alpha):
    """``C' = αC + (1-α) diag C``, ``A' = Δ C'``, ``M' = Δ C' Δᵀ``; α = 1 is the identity on
    propagated targets."""
    moments = layer.moments()
    shrunk = shrink(moments, layer.updates, alpha)
    off = ~torch.eye(moments.C.shape[-1], dtype=torch.bool)
    assert_relative(
        shrunk.C.diagonal(dim1=-2, dim2=-1), moments.C.diagonal(dim1=-2, dim2=-1), 1e-14
    )
    assert_relative(shrunk.C[..., off], alpha * moments.C[..., off], 1e-12)
    assert_relative(shrunk.A, torch.einsum("tgmi,tfgij->tfgmj", layer.updates, shrunk.C))
    assert_relative(shrunk.M, torch.einsum("tfgmj,tgkj->tfgmk", shrunk.A, layer.updates))
    assert_same_moments(shrink(moments, layer.updates, 1.0), moments, 1e-10)


def test_bad_input_is_named():
    layer = make_layer(0, N=6, folds=2)
    moments, (x, r) = layer.moments("head"), (layer.X[0], layer.R[0])
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[0, 0, 1] = value
        with pytest.raises(
            NonFinite,
            match=(
                r"layer head, task task1, inputs: 1 of 24 values .* check this task's "
                r"calibration"
            ),
        ):
            moments.update("task1", bad, r)
        with pytest.raises(NonFinite, match="task task0, residuals: 1 of"):
            moments.update(
                "task0", x, torch.where(torch.arange(18).reshape(r.shape) == 4, value, r)
            )
    with pytest.raises(
        ShapeMismatch, match=r"task0, inputs: expected shape \(6, 1, 4\), found \(6, 1, 3\)"
    ):
        moments.update("task0", x[..., :3], r)
    with pytest.raises(
        ShapeMismatch, match=r"residuals: expected shape \(6, 1, 3\), found \(5, 1, 3\)"
    ):
        moments.update("task0", x, r[:5])
    with pytest.raises(MergeError, match=r"unknown task 'other'.*\['task0', 'task1'\]"):
        moments.update("other", x, r)
    for fold in (2, -1):
        with pytest.raises(MergeError, match="folds are 0 to 1, found"):
            moments.update("task0", x, r, fold)
    assert_same_moments(moments, layer.moments("head"), 0)  # a refused batch leaves no trace
    with pytest.raises(
        EmptyCalibration, match=r"layer layer: no calibration tokens for \['task0', 'task1'\]"
    ):
        empty(layer).pool()
    with pytest.raises(EmptyCalibration, match=r"no calibration tokens for .* in folds \[\]"):
        moments.pool([])
    lone = empty(layer)
    lone.update("task0", x, r, 0)
    lone.update("task1", x, r, 1)
    with pytest.raises(EmptyCalibration, match=r"\['task1'\] in folds \[0\] of 2"):
        lone.pool([0])
    with pytest.raises(MergeError, match="task weights: expected one of .* found 'loud'"):
        moments.pool(weights="loud")
    with pytest.raises(MergeError, match="moments of different things"):
        moments + layer.moments("other")
    with pytest.raises(ShapeMismatch, match="moments to add"):
        moments + make_layer(0, n=5, folds=2).moments("head")
    with pytest.raises(ShapeMismatch, match="merged update"):
        moments.pool().loss(torch.zeros(3, 4))


def test_nothing_to_capture_is_captured():
    """Zero residual: energy 0, captured 1 for the base itself and -inf for anything that moves; the
    programme returns the base."""
    layer = make_layer(4)
    silent = replace(layer, R=tuple(0 * r for r in layer.R)).moments()
    for weights in ("tokens", "energy"):
        pooled = silent.pool(weights=weights)
        assert pooled.energy == 0
        assert pooled.captured(0 * layer.updates[0]) == 1
    pooled = silent.pool()
    assert pooled.captured(layer.updates[0]) == float("-inf")
    for family in FREE:
        prog = programme(pooled, build(family, layer.updates, pooled))
        assert not prog.basis.combine(minimise(prog).d).any()
        assert captured_energy(prog) == 1
