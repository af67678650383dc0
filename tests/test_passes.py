"""A pass: its precision, what it holds, what it reads of the device, and what it leaves behind."""

import copy
import math

import pytest
import torch
from operations import Operations
from torch import nn
from toys import TASKS, experts_of, tokens, vision

import qpmerge_lite as q
from qpmerge_lite import solvers
from qpmerge_lite.engine import gather, rerun
from qpmerge_lite.engine.products import add_gram, mirror
from qpmerge_lite.engine.rows import Samples
from qpmerge_lite.engine.sums import Buffers, Sums
from qpmerge_lite.engine.views import Dense
from qpmerge_lite.errors import MergeError, NonFinite

PROBLEMS = {"vision": vision, "tokens": tokens}
OPTIONS = [
    {},
    {"targets": "propagated"},
    {"inputs": "expert"},
    {"basis": "elements", "ridge": 0.01, "folds": 1},
]


def single(problem):
    """A problem in single precision."""
    base, experts, calibration = problem
    experts = {t: {k: v.float() for k, v in e.items()} for t, e in experts.items()}

    def cast(value):
        return value.float() if value.is_floating_point() else value

    return (
        base.float(),
        experts,
        {t: [{k: cast(v) for k, v in b.items()} for b in c] for t, c in calibration.items()},
    )


def sums_of(Z, r):
    """C and B of samples of a layer, by the engine's sums."""
    sums = Sums(
        ["a"], (1, r.shape[1], Z.shape[1]), Buffers("cpu"), folds=1, drift=True, full_energy=True
    )
    sums.add(Dense("layer", nn.Linear(1, 1), False), "a", Samples(Z, r, [len(Z)]))
    mirror(sums.C)
    return sums


@pytest.mark.parametrize("n", [40, 700])
def test_products_in_single_precision_are_right_to_1e_6_and_in_double_to_1e_14(n):
    """The errors that the documentation states, over a thousand samples with a mean far from
    zero."""
    torch.manual_seed(0)
    Z, r = torch.randn(1000, n) + 3, torch.randn(1000, 5)
    exact = Z.double().mT @ Z.double(), r.double().mT @ Z.double(), r.double().mT @ r.double()
    for samples, answers, bound, noise in (
        (Z, r, 1e-6, 1e-6),
        (Z.double(), r.double(), 1e-14, 1e-10),
    ):
        sums = sums_of(samples, answers)
        for found, wanted in zip((sums.C, *sums.drift), exact):
            assert found.dtype == torch.float64
            assert (found[0, 0, 0] - wanted).norm() <= bound * wanted.norm()
        assert sums.rtol == noise and sums.counts == [[1000]]


def test_a_gram_matrix_in_blocks_is_symmetric_and_the_product_itself():
    Z = torch.randn(50, 700, dtype=torch.float64)
    C = torch.empty(700, 700, dtype=torch.float64)
    add_gram(C, Z, fresh=True)
    mirror(C)
    assert torch.equal(C, C.mT)
    torch.testing.assert_close(C, Z.mT @ Z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_merges_in_single_precision_are_near_those_of_double_products(problem):
    base, experts, calibration = single(PROBLEMS[problem]())
    for basis in ("rows", "elements"):
        options = {"basis": basis, "ridge": 1e-2, "folds": 1}
        quick, exact = (
            q.qp(base, experts, calibration, products=p, **options).state_dict
            for p in ("activations", "float64")
        )
        for name, value in exact.items():
            assert (quick[name] - value).norm() <= 1e-4 * value.norm(), (basis, name)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("allowed", [1, 5000])
def test_a_budget_of_memory_changes_no_bit(problem, options, allowed):
    """Forwards that wait in front of blocks and run them again, all or some of them."""
    base, experts, calibration = PROBLEMS[problem]()
    free = q.qp(base, experts, calibration, **options)
    tight = q.qp(base, experts, calibration, activations=allowed, **options)
    assert [r["layer"] for r in tight.table] == [r["layer"] for r in free.table]
    for name, value in free.state_dict.items():
        assert torch.equal(tight.state_dict[name], value), name


def test_a_budget_of_memory_is_kept_by_running_blocks_again(monkeypatch):
    base, experts, calibration = vision()
    made = []
    plain = rerun.Room.forward

    def noting(self, *args):
        made.append(plain(self, *args))
        return made[-1]

    monkeypatch.setattr(rerun.Room, "forward", noting)
    calls = []
    hook = base.blocks[1].down.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for allowed, most in ((None, math.inf), (1, math.inf), (None, 1), (10**9, 1), (None, math.inf)):
        made.clear()
        calls.clear()
        with rerun.holding(most):
            q.qp(base, experts, calibration, activations=allowed)
        counts.append((len(calls), {type(forward) for forward in made}))
    hook.remove()
    kinds = [kind for _, kind in counts]
    assert kinds == [{rerun.Forward}, *3 * [{rerun.Rerun}], {rerun.Forward}]
    # the last layer of the last block runs in the final run alone
    assert len({calls for calls, _ in counts}) == 1


def test_a_block_that_works_in_place_may_be_run_again():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x += self.outer(self.inner(x).relu_())
            return x

    torch.manual_seed(0)
    base = nn.Sequential(InPlace(), InPlace()).double()
    experts = experts_of(base)
    calibration = {t: [{"input": torch.randn(12, 4, dtype=torch.float64)}] for t in TASKS}
    inputs = {t: c[0]["input"].clone() for t, c in calibration.items()}
    for options in ({"activations": 1}, {}):
        given = {t: [{"input": x.clone()}] for t, x in inputs.items()}
        merge = q.qp(
            base, dict.fromkeys(TASKS, experts["a"]), given, basis="elements", ridge=0.0, **options
        )
        assert len(merge.table) == 4
        for name, value in experts["a"].items():
            torch.testing.assert_close(merge.state_dict[name], value, rtol=1e-9, atol=1e-9)


SOLVERS = {
    "elements": q.QP("elements"),
    "rows": q.QP("rows", ridge=0.1),
    "regmean": q.RegMean(),
    "featcal": q.FeatCal(),
    "sketched": q.Sketched(rank=4),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_host_waits_for_no_value_between_the_first_layer_and_the_last(solver, monkeypatch):
    """As on a device: nothing is looked at before all layers are solved, and what was not looked at
    is checked then."""
    base, experts, calibration = vision()
    recipe = q.Recipe(SOLVERS[solver], inputs="expert" if solver == "regmean" else "merged")
    expected = q.merge_together(base, experts, calibration, {"merge": recipe})["merge"]
    monkeypatch.setattr(gather, "looks_at", lambda device: False)
    monkeypatch.setattr(solvers, "looks_at", lambda device: False)
    reads = []
    visit = q.sequential.Pass._visit

    def counting(self, *args):
        with Operations() as operations:
            visit(self, *args)
        reads.append(operations.reads)

    monkeypatch.setattr(q.sequential.Pass, "_visit", counting)
    merge = q.merge_together(base, experts, calibration, {"merge": recipe})["merge"]
    assert reads and set(reads) == {0}
    for name, value in expected.state_dict.items():
        torch.testing.assert_close(merge.state_dict[name], value, rtol=1e-9, atol=1e-9)
    for row, other in zip(merge.table, expected.table):
        assert {k: type(v) for k, v in row.items()} == {k: type(v) for k, v in other.items()}
        assert row["captured"] == pytest.approx(other["captured"], rel=1e-7)
    calibration["a"] = [{"pixels": torch.full((9, 1, 8, 8), float("nan"), dtype=torch.float64)}]
    with pytest.raises(NonFinite, match="layer embed, task a, inputs"):
        q.merge_together(base, experts, calibration, {"merge": recipe})


def test_unknown_precisions_are_named():
    with pytest.raises(
        MergeError, match="products: expected one of activations, float64, found 'float16'"
    ):
        q.qp(*vision(), products="float16")


def test_recurrent_layers_run_under_the_weights_they_are_given():
    """They keep a list of their weights beside the parameters; a dense layer behind tells which
    ones they used."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, inputs):
            return self.head(self.lstm(inputs)[0])

    torch.manual_seed(0)
    base = Recurrent().double()
    experts = experts_of(base)
    calibration = {t: [{"inputs": torch.randn(10, 6, 4, dtype=torch.float64)}] for t in TASKS}
    moments = q.layer_moments(base, experts, calibration, ["head"], folds=1)["head"][1]
    before = copy.deepcopy(base)
    for t, task in enumerate(TASKS):
        model = copy.deepcopy(base)
        model.load_state_dict(experts[task])
        read = model.lstm(calibration[task][0]["inputs"])[0].detach().flatten(0, 1)
        read = torch.cat([read, torch.ones(60, 1)], 1)
        torch.testing.assert_close(moments.C[t, 0, 0], read.mT @ read)
    x = calibration["a"][0]["inputs"]
    assert torch.equal(base(x), before(x))


def test_what_forwards_may_hold_is_as_before_after_a_failure():
    with pytest.raises(KeyError), rerun.holding(5):
        assert rerun._most.get() == 5
        raise KeyError
    assert rerun._most.get() == math.inf
