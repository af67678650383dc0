"""The benchmark counts the work it should, and says what it measured."""

import os
from collections import Counter

import pytest
import torch

from qpmerge_lite import merge_together
from qpmerge_lite.companion.experiments import costs, timing
from qpmerge_lite.companion.experiments.costs import DOUBLE, SINGLE, Stage, Work

TINY = timing.Size(width=8, depth=1, experts=2, images=8)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_exponents_are_slopes_of_logarithms(power):
    seconds = [0.3 * factor**power for factor in timing.FACTORS]
    assert timing.exponent(timing.FACTORS, seconds) == pytest.approx(power, abs=1e-12)


def test_layers_that_read_one_tensor_are_a_stage():
    problem = timing.Problem(timing.Size(width=8, depth=1, experts=1, images=70), timing.Run())
    patches, tokens = 70 * 16, 70 * 17
    assert problem.stages() == [
        Stage(50, (8,), patches),
        Stage(9, (8, 8, 8), tokens),
        Stage(9, (8,), tokens),
        Stage(9, (16,), tokens),
        Stage(17, (8,), tokens),
    ]


def test_a_convolution_is_a_stage_of_its_patches():
    model = torch.nn.Conv2d(3, 5, 4, stride=4, bias=False)
    batches = [{"input": torch.zeros(2, 3, 8, 8)}, {"input": torch.zeros(1, 3, 8, 8)}]
    assert costs.stages_of(model, batches) == [Stage(48, (5,), 12)]


@pytest.mark.parametrize("folds", [1, 4])
def test_products_of_activations_cost_the_same_in_folds(folds):
    n, m, rows, tasks = 9, 24, 1200, 3
    work = costs.sums(Stage(n, (8, 16), rows), tasks, folds)
    single = sum(count * w.operations for w, count in work.items() if w.dtype == SINGLE)
    double = sum(count * w.operations for w, count in work.items() if w.dtype == DOUBLE)
    assert single == tasks * rows * (n**2 + 2 * n * m + 2 * n * m)
    assert double == tasks * folds * 2 * m * n**2


@pytest.mark.parametrize("basis", timing.BASES)
def test_every_layer_is_factored_once_per_fold(basis):
    stage = Stage(9, (8, 8), 100)

    def wide(folds):
        work = costs.work_of([stage], basis, 2, folds, ridges=7)
        factored = {"rows": (8, 2), "rotated_columns": (1, 9), "elements": (1, 9)}[basis]
        return work[Work("eigen", factored, DOUBLE)]

    alone = 0 if basis == "elements" else 2  # which takes a Cholesky factorisation instead
    assert (wide(1), wide(4)) == (alone, alone + 2 * 4)


def test_work_is_what_it_says():
    left = costs.prepared(Work("product", (3, 2, 5, 4), SINGLE))()
    assert left.shape == (3, 2, 4) and left.dtype == SINGLE
    assert costs.prepared(Work("triangle", (10, 4), DOUBLE))().shape == (4, 4)
    assert costs.prepared(Work("cholesky", (6, 2), DOUBLE))().shape == (6, 2)
    values, vectors = costs.prepared(Work("eigen", (3, 4), DOUBLE))()
    assert values.shape == (3, 4) and vectors.shape == (3, 4, 4)


def test_quick_work_is_repeated_and_a_triangle_is_half_a_product(monkeypatch):
    runs = []
    monkeypatch.setattr(costs, "prepared", lambda work, device: lambda: runs.append(work))

    def clock(run, device):
        before = len(runs)
        run()
        return 0.001 * (len(runs) - before)

    monkeypatch.setattr(costs, "clock", clock)
    product, triangle = Work("product", (1, 4, 4, 4), SINGLE), Work("triangle", (4, 4), SINGLE)
    assert costs.seconds_of(product) == pytest.approx(0.001)
    assert len(runs) == 1 + 4 + 16 + 64
    assert costs.seconds_of(triangle) == pytest.approx(0.0005)
    assert costs.price(Counter({product: 3, triangle: 2})) == pytest.approx(0.004)


def test_ratios_are_taken_repeat_by_repeat(monkeypatch):
    times, peaks = iter([6.0, 2.0, 1.0, 1.0, 4.0, 2.0]), iter([100.0, 130.0])
    monkeypatch.setattr(costs, "clock", lambda run, device: next(times))
    monkeypatch.setattr(costs, "peak", lambda device: next(peaks))
    found = costs.measured(None, None, 3)
    assert found == costs.Measured(seconds=4.0, unit=2.0, ratio=2.0, added=30.0)


def raised() -> float:
    """MiB by which 64 MiB raise the peak of this process."""
    before, held = costs.peak(), torch.ones(2**24)
    return costs.peak() - before if held.all() else 0.0


def test_rows_have_processes_and_peaks_of_their_own():
    assert timing.apart(os.getpid) != os.getpid()
    assert 60 <= timing.apart(raised) <= 200


def test_a_grid_is_its_merges():
    """Which are eight, and the one that they are measured by is among them."""
    problem = timing.Problem(TINY, timing.Run())
    for kind in ("alphas", "programmes"):
        recipes, one = timing.grid_of(kind)
        assert len(recipes) == 8 and one.items() <= recipes.items()
        merges = merge_together(problem.base, problem.experts, problem.calibration, recipes)
        states = [merge.state_dict["blocks.0.up.weight"] for merge in merges.values()]
        for number, state in enumerate(states):
            assert not any(torch.equal(state, other) for other in states[:number])


def test_verdicts_mark_what_exceeds_its_bound():
    assert timing.verdict(4.0, 4.0) == "≤ 4"
    assert timing.verdict(4.1, 4.0) == "≤ 4 !"
    assert timing.verdict(4.1, None) == ""


def test_all_tables_are_printed_and_the_plot_is_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(timing, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(costs, "LEAST", 0.0)
    timing.main(["--device", "cpu", "--repeats", "1", "--plot", str(tmp_path / "time.png")], TINY)
    lines = capsys.readouterr().out.splitlines()
    starts = Counter(line.split()[0] for line in lines if line)
    assert all(starts[basis] == 2 for basis in timing.BASES)
    assert all(starts[axis] == 2 for axis in ("depth", "experts", "images"))
    assert starts["alphas"] == starts["programmes"] == 1
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")
