"""Forwards side by side on one model: what one of them sets, keeps or overwrites is not another's
business."""

import copy

import pytest
import torch
from torch import nn

import qpmerge_lite as q

ELEMENTS = {"basis": "elements", "ridge": 0.01, "folds": 1}


class Layers(nn.Module):
    """Three dense layers of width six, called as subclasses say."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))


class Plain(Layers):
    def forward(self, inputs):
        kept = self.a(inputs)
        return self.c(self.b(kept.tanh()).tanh() + kept)


class Keeping(Layers):
    """Keeps a value on itself from one layer to the next but one."""

    def forward(self, inputs):
        self.kept = self.a(inputs)
        return self.c(self.b(self.kept.tanh()).tanh() + self.kept)


class InAttributes(Layers):
    """The same through a module that remembers."""

    def __init__(self):
        super().__init__()
        self.memory = nn.Identity()

    def forward(self, inputs):
        self.memory.value = self.a(inputs)
        middle = self.b(self.memory.value.tanh()).tanh()
        value, self.memory.value = self.memory.value, None
        return self.c(middle + value)


class Doubling(Layers):
    """Works in place on what it is given."""

    def forward(self, inputs):
        inputs.mul_(2.0)
        return self.b(self.a(inputs).tanh())


class Doubled(Layers):
    def forward(self, inputs):
        inputs = inputs * 2.0
        return self.b(self.a(inputs).tanh())


class Counting(Layers):
    """Writes to buffers, in place and by putting others there, and reads them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("passing", torch.zeros(6), persistent=False)

    def forward(self, inputs):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0)
        self.passing.copy_(inputs[0])
        return self.b(self.a(inputs).tanh() + self.calls)


class HalfInside(Layers):
    def forward(self, inputs):
        hidden = self.a(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.b(hidden)
        return self.c(hidden.float())


def problem(model, size=8):
    """Two experts near a model, and two batches for each."""
    torch.manual_seed(0)
    experts = {
        t: {
            k: v + 0.3 * torch.randn_like(v) if v.dim() > 0 else v.clone()
            for k, v in model.state_dict().items()
        }
        for t in "ab"
    }
    return experts, {t: [{"inputs": torch.randn(size, 6)} for _ in range(2)] for t in "ab"}


def fresh(calibration):
    return {
        t: [{k: v.clone() for k, v in b.items()} for b in batches]
        for t, batches in calibration.items()
    }


@pytest.mark.parametrize(
    "kind, twin", [(Keeping, Plain), (InAttributes, Plain), (Doubling, Doubled)]
)
@pytest.mark.parametrize(
    "options", [{}, {"activations": 1}, {"targets": "propagated"}, {"inputs": "block"}], ids=str
)
def test_a_model_that_leaves_traces_is_merged_like_its_twin_that_leaves_none(kind, twin, options):
    torch.manual_seed(1)
    model, other = kind(), twin()
    other.load_state_dict(model.state_dict())
    experts, calibration = problem(other)
    given = fresh(calibration)
    merges = [
        q.qp(m, experts, c, **ELEMENTS, **options)
        for m, c in ((model, given), (other, calibration))
    ]
    assert len(merges[0].table) == len(merges[1].table) >= 2
    for name, value in merges[1].state_dict.items():
        assert torch.equal(merges[0].state_dict[name], value), name
    for task, batches in calibration.items():
        assert all(
            torch.equal(one["inputs"], two["inputs"]) for one, two in zip(batches, given[task])
        )
    soup = q.soup(other, experts).state_dict
    audits = [q.audit(m, soup, experts, fresh(calibration)) for m in (model, other)]
    assert audits[0]["output"] == audits[1]["output"] and audits[0]["layers"] == audits[1]["layers"]


def test_buffers_that_forwards_write_to_are_as_they_were():
    model = Counting()
    before = copy.deepcopy(model)
    experts, calibration = problem(model)
    states = copy.deepcopy(experts)
    merges = [
        q.qp(model, experts, {t: c[::step] for t, c in calibration.items()}, **ELEMENTS)
        for step in (1, -1)
    ]
    q.audit(model, merges[0].state_dict, experts, calibration)
    for (name, one), (_, two) in zip(model.named_buffers(), before.named_buffers()):
        assert torch.equal(one, two), name
    assert all(
        torch.equal(experts[t][k], v) for t, state in states.items() for k, v in state.items()
    )
    for name, value in merges[0].state_dict.items():
        torch.testing.assert_close(merges[1].state_dict[name], value)


def test_modes_that_a_forward_sets_are_its_own():
    model = HalfInside()
    experts, calibration = problem(model)
    merge = q.qp(model, dict.fromkeys("ab", experts["a"]), calibration, **ELEMENTS)
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert len(merge.table) == 3
    for name, value in experts["a"].items():
        torch.testing.assert_close(merge.state_dict[name], value, rtol=1e-4, atol=1e-4)


class Text(nn.Module):
    """Ignores the mask that it is given."""

    def __init__(self):
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(40, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, input_ids, attention_mask):
        return self.b(self.a(self.e(input_ids)).tanh())


def difference(one, other):
    return max(float((one[k] - v).abs().max()) for k, v in other.items())


def test_a_batch_of_single_tokens_hides_no_mask():
    model = Text().double()
    torch.manual_seed(0)
    experts = {
        t: {k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()} for t in "ab"
    }
    ids, mask = (
        torch.randint(3, 40, (4, 7)),
        (torch.arange(7) < torch.tensor([[2], [4], [5], [7]])).long(),
    )
    short = {
        "input_ids": torch.randint(3, 40, (4, 1)),
        "attention_mask": torch.ones(4, 1, dtype=torch.long),
    }
    padded = [
        {"input_ids": torch.where(mask == 1, ids, pad), "attention_mask": mask} for pad in (1, 2)
    ]
    one, two = (
        q.qp(model, experts, dict.fromkeys("ab", [short, p]), **ELEMENTS).state_dict for p in padded
    )
    assert difference(one, two) == 0


def test_inputs_that_are_features_already_are_masked_as_well():
    class Features(Layers):
        def forward(self, inputs, attention_mask=None):
            return self.b(self.a(inputs).tanh())

    model = Features().double()
    experts, _ = problem(model)
    x, mask = (
        torch.randn(3, 5, 6, dtype=torch.float64),
        (torch.arange(5) < torch.tensor([[2], [4], [5]])).long(),
    )
    padded = [
        {"inputs": torch.where(mask[..., None] == 1, x, pad), "attention_mask": mask}
        for pad in (0.0, 3.0)
    ]
    one, two = (
        q.qp(model, experts, dict.fromkeys("ab", [p]), **ELEMENTS).state_dict for p in padded
    )
    assert difference(one, two) == 0
    soup = q.soup(model, experts).state_dict
    one, two = (q.audit(model, soup, experts, dict.fromkeys("ab", [p]))["output"] for p in padded)
    assert one == two


class Deep(nn.Module):
    """Calls its second block only for batches with a flag."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))

    def forward(self, inputs, deep=False):
        hidden = self.blocks[0](inputs)
        return self.blocks[1](hidden) if deep else hidden


def test_a_flag_of_the_last_batch_is_seen_and_borders_nobody_came_to_are_no_obstacle():
    model = Deep()
    torch.manual_seed(0)
    experts = {
        t: {k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()} for t in "ab"
    }
    batches = [{"inputs": torch.randn(4, 6), "deep": deep} for deep in [False] * 6 + [True]]
    for order in (batches, batches[::-1]):
        calibration = dict.fromkeys("ab", order)
        assert len(q.qp(model, experts, calibration, **ELEMENTS).table) == 2
        assert len(q.regmean_plus_plus(model, experts, calibration).table) == 2
    shallow = dict.fromkeys("ab", batches[:2])
    assert len(q.regmean_plus_plus(model, experts, shallow).table) == 1


class Stack(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))


class WithCache(Stack):
    """Blocks pass on an object that they change."""

    def forward(self, inputs):
        class State:
            total = 0.0

        state = State()
        for block in self.blocks:
            state.total = state.total + block.a(inputs).tanh()
            inputs = block(inputs, state)
        return inputs


class Cached(Layers):
    def forward(self, inputs, state):
        state.total = state.total + self.b(inputs).tanh()
        return self.c(state.total)


class Outside(Stack):
    """A layer of a block is called from outside of it."""

    def forward(self, inputs):
        for block in self.blocks:
            inputs = block.b(block(inputs))
        return inputs


class Inner(Layers):
    def forward(self, inputs):
        return self.a(inputs).tanh()


@pytest.mark.parametrize(
    "model, layers", [(WithCache(Cached), 6), (Outside(Inner), 4)], ids=["cache", "outside"]
)
def test_blocks_that_cannot_be_run_again_are_merged_alike_under_any_budget(model, layers):
    experts, calibration = problem(model)
    free, tight = (q.qp(model, experts, calibration, activations=a, **ELEMENTS) for a in (None, 0))
    assert len(free.table) == len(tight.table) == layers
    for name, value in free.state_dict.items():
        assert torch.equal(tight.state_dict[name], value), name


class InferenceWhole(Layers):
    """Its whole forward runs in inference mode, as those of deployed models do."""

    @torch.inference_mode()
    def forward(self, inputs):
        kept = self.a(inputs)
        return self.c(self.b(kept.tanh()).tanh() + kept)


class InferenceInside(Layers):
    def forward(self, inputs):
        kept = self.a(inputs)
        with torch.inference_mode():
            hidden = self.b(kept.tanh()).tanh()
        return self.c(hidden + kept)


class InferenceInPlace(Layers):
    """Writes to what two layers read, between them; torch does not count that in inference mode."""

    @torch.inference_mode()
    def forward(self, inputs):
        hidden = inputs * 1.0
        one = self.a(hidden)
        hidden *= 2.0
        return self.c(one + self.b(hidden))


class InPlaceBetween(Layers):
    def forward(self, inputs):
        return self.c(self.a(inputs * 1.0) + self.b(inputs * 2.0))


@pytest.mark.parametrize(
    "kind, twin",
    [(InferenceWhole, Plain), (InferenceInside, Plain), (InferenceInPlace, InPlaceBetween)],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"targets": "propagated"}, {"inputs": "block"}, {"inputs": "expert"}, {"folds": 2}],
    ids=str,
)
@pytest.mark.parametrize("around", [False, True], ids=["", "all in inference mode"])
def test_forwards_in_inference_mode_are_merged_and_audited_as_others_are(
    kind, twin, options, around
):
    torch.manual_seed(1)
    model, other = kind(), twin()
    other.load_state_dict(model.state_dict())
    experts, calibration = problem(other)
    soup = q.soup(other, experts).state_dict
    with torch.inference_mode(around):
        merges = [q.qp(m, experts, calibration, **ELEMENTS | options) for m in (model, other)]
        audits = [q.audit(m, soup, experts, calibration) for m in (model, other)]
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert len(merges[0].table) == len(merges[1].table) == 3
    for name, value in merges[1].state_dict.items():
        torch.testing.assert_close(merges[0].state_dict[name], value)
        assert around or not merges[0].state_dict[name].is_inference()
    assert audits[0]["output"] == audits[1]["output"] and audits[0]["layers"] == audits[1]["layers"]
