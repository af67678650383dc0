"""Fisher averaging and AdaMerging on inputs, models and heads of every kind that merges meet."""

import copy
import math

import pytest
import torch
from small import Tied, tuned
from torch import nn

import qpmerge_lite.datafree as datafree
from qpmerge_lite.calibration import check_calibration
from qpmerge_lite.errors import EmptyCalibration, MergeError, NonFinite
from qpmerge_lite.gradient import adamerging, fisher, fisher_weights, information
from qpmerge_lite.inputs import draw, joined, take

METHODS = [fisher, adamerging]


def same(output):
    return output


def last(output):
    return output[:, -1]


def both(head=same):
    return dict.fromkeys("ab", head)


def calibration(*batches):
    return {task: list(batches) for task in "ab"}


def tokens(count, length):
    return torch.randint(3, 11, (count, length))


def distance(one, other):
    """Largest difference between two merges."""
    pairs = [(one.state_dict[name], value) for name, value in other.state_dict.items()]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def assert_same_merge(method, base, one, other, head=same):
    """Two calibration sets give one merge, to rounding, and not that of the base."""
    experts = tuned(base)
    merges = [method(base, experts, batches, heads=both(head)) for batches in (one, other)]
    assert distance(*merges) < 1e-9
    assert any((merges[0].state_dict[k] != v).any() for k, v in base.state_dict().items())


class Texts(nn.Module):
    """Attention over what the mask leaves, positions added where they are given; float64."""

    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(11, 6), nn.Embedding(16, 6)
        self.mix, self.out = nn.Linear(6, 6), nn.Linear(6, 4)
        self.double()

    def forward(self, input_ids, attention_mask=None, position_ids=None, scale=1.0):
        hidden = self.table(input_ids) * scale
        if position_ids is not None:
            hidden = hidden + self.places(position_ids)
        scores = hidden @ self.mix(hidden).mT
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -math.inf)
        return self.out(torch.tanh(scores.softmax(-1) @ hidden))


def padded_left(ids, width):
    """Texts with padding before them, and with masks and positions that say so."""
    padding = torch.zeros(len(ids), width - ids.shape[1], dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = torch.cat([padding, ids], 1)
    return {"input_ids": padded, "attention_mask": mask, "position_ids": positions}


# ---------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("method", METHODS)
def test_padding_does_not_matter(method):
    base, short, long = Texts(), tokens(4, 3), tokens(4, 9)
    narrow = calibration(padded_left(short, 4), padded_left(long, 10))
    wide = calibration(padded_left(short, 10), padded_left(long, 10))
    assert_same_merge(method, base, narrow, wide, last)


@pytest.mark.parametrize("method", METHODS)
def test_batches_without_masks_are_not_padded(method):
    """Texts of two lengths, one by one and in batches of one length."""
    base, short, long = Texts(), tokens(2, 3), tokens(3, 9)
    bare = calibration({"input_ids": short}, {"input_ids": long})
    rows = [{"input_ids": text[None]} for text in (*short, *long)]
    assert_same_merge(method, base, bare, calibration(*rows), last)


@pytest.mark.parametrize("method", METHODS)
def test_entries_for_all_inputs_are_not_cut(method):
    base, ids, places = Texts(), tokens(4, 5), torch.arange(5)[None]
    once = calibration({"position_ids": places, "input_ids": ids})
    each = calibration({"position_ids": places.expand(4, 5), "input_ids": ids})
    assert_same_merge(method, base, once, each, last)


@pytest.mark.parametrize("method", METHODS)
def test_entries_that_only_later_batches_have_count(method):
    base, ids = Texts(), tokens(4, 5)
    some = (torch.arange(5) > 1).long().expand(4, 5)
    later = calibration({"input_ids": ids}, {"input_ids": ids, "attention_mask": some})
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    always = calibration(full, {"input_ids": ids, "attention_mask": some})
    assert_same_merge(method, base, later, always, last)


@pytest.mark.parametrize("method", METHODS)
def test_an_entry_that_later_batches_lack_is_named(method):
    base, ids = Texts(), tokens(4, 5)
    batches = calibration({"input_ids": ids, "attention_mask": ids * 0 + 1}, {"input_ids": ids})
    with pytest.raises(MergeError, match="task 'a', batch 1: lacks 'attention_mask'"):
        method(base, tuned(base), batches, heads=both(last))


@pytest.mark.parametrize("method", METHODS)
def test_plain_values_and_generators_are_taken(method):
    base, ids = Texts(), tokens(4, 5)
    plain = {"input_ids": ids, "attention_mask": None, "scale": 0.5}
    tensors = {"input_ids": ids, "scale": torch.tensor(0.5).double()}
    experts = tuned(base)
    streams = {task: (batch for batch in [plain]) for task in "ab"}
    found = method(base, experts, streams, heads=both(last))
    expected = method(base, experts, calibration(tensors), heads=both(last))
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_calibration_is_named(method):
    base = Texts()
    experts = tuned(base)
    with pytest.raises(MergeError, match="task 'a', batch 0, key 'input_ids': .* found list"):
        method(base, experts, calibration({"input_ids": [[1]]}), heads=both())
    with pytest.raises(EmptyCalibration, match="no calibration batches for"):
        method(base, experts, {"a": [{"input_ids": tokens(2, 3)}]}, heads=both())
    with pytest.raises(MergeError, match="calibration: expected a mapping"):
        method(base, experts, None, heads=both())


def parts(*arguments):
    return check_calibration({"a": arguments}, ["a"], "cpu")["a"]


def test_batches_are_joined_only_where_nothing_changes():
    ids = tokens(4, 5)
    one, two = parts({"input_ids": ids, "scale": 0.5}, {"input_ids": ids[:2], "scale": 0.5})
    whole = joined([one, two])
    assert whole.size == 6 and torch.equal(whole.arguments["input_ids"], torch.cat([ids, ids[:2]]))
    assert whole.arguments["scale"] == 0.5
    for other in (
        {"input_ids": tokens(4, 6), "scale": 0.5},
        {"input_ids": ids, "scale": 1.0},
        {"input_ids": ids, "scale": None},
        {"input_ids": ids},
        {"input_ids": ids.int(), "scale": 0.5},
        {"input_ids": ids, "scale": torch.tensor(0.5)},
    ):
        assert joined([one, parts(other)[0]]) is None


def test_an_entry_for_all_inputs_is_not_joined_with_that_of_a_single_input():
    places = torch.arange(5)[None]
    one = parts({"input_ids": tokens(1, 5), "position_ids": places})[0]
    four = parts({"input_ids": tokens(4, 5), "position_ids": places})[0]
    assert joined([one, four]) is None and joined([four, one]) is None
    assert torch.equal(joined([four, four]).arguments["position_ids"], places)


def test_drawn_inputs_stay_with_their_batches():
    short, long = parts({"input_ids": tokens(3, 4)}, {"input_ids": tokens(5, 6)})
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(8, (20,), generator=torch.Generator().manual_seed(0))
    one, two = draw([short, long], 20, generator)
    rows = places[places < 3], places[places >= 3] - 3
    assert torch.equal(one.arguments["input_ids"], short.arguments["input_ids"][rows[0]])
    assert torch.equal(two.arguments["input_ids"], long.arguments["input_ids"][rows[1]])
    assert (one.size, two.size) == (len(rows[0]), len(rows[1])) and one.size + two.size == 20
    (only,) = draw([take(short, torch.tensor([1]))], 3, generator)
    assert torch.equal(only.arguments["input_ids"], short.arguments["input_ids"][[1, 1, 1]])


# ------------------------------------------------------------------------- models and heads


class Head(Tied):
    """A bag of tokens under a tied head."""

    def forward(self, input_ids):
        return self.head(torch.tanh(self.table(input_ids)).mean(1))


class Untied(Head):
    def __init__(self):
        super().__init__()
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())


def test_fisher_information_of_tied_parameters_is_that_of_both_uses():
    """The gradient with respect to one matrix is the sum of those to its two uses."""
    base = Head().double()
    experts, ids = tuned(base), torch.randint(9, (5, 4))
    batches = calibration({"input_ids": ids})
    (found, _) = information(base, experts, batches, heads=both())
    assert set(found) == {"table.weight", "head.bias"}
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(0)
    model.load_state_dict(experts["a"])
    total = torch.zeros_like(model.table.weight)
    for text in ids:
        scores = model(text[None]).log_softmax(-1)
        label = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        (gradient,) = torch.autograd.grad(scores[0, label.item()], model.table.weight)
        total += gradient.square() / len(ids)
    torch.testing.assert_close(found["table.weight"], total)


@pytest.mark.parametrize("method", METHODS)
def test_tied_parameters_stay_tied_and_copies_come_back(method):
    base = Head()
    experts, batches = tuned(base), calibration({"input_ids": torch.randint(9, (5, 4))})
    options = {"scale": 0.5, "steps": 0} if method is adamerging else {}
    merged = method(base, experts, batches, heads=both()).state_dict
    assert torch.equal(merged["table.weight"], merged["head.weight"])
    alike = dict.fromkeys("ab", experts["a"])
    back = method(base, alike, batches, heads=both(), **options).state_dict
    for name, value in experts["a"].items():
        torch.testing.assert_close(back[name], value, rtol=1e-6, atol=1e-7)


def test_adamerging_moves_a_tied_parameter_under_both_its_names():
    """One coefficient for the matrix, as on a model that puts the two uses together itself."""
    base = Head().double()
    experts, batches = tuned(base), calibration({"input_ids": torch.randint(9, (5, 4))})

    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.bias = base.table, base.head.bias

        def forward(self, input_ids):
            hidden = torch.tanh(self.table(input_ids)).mean(1)
            return hidden @ self.table.weight.mT + self.bias

    names = {"table.weight": "table.weight", "bias": "head.bias"}
    once = {t: {k: s[n] for k, n in names.items()} for t, s in experts.items()}
    found = adamerging(base, experts, batches, heads=both())
    expected = adamerging(Once(), once, batches, heads=both()).state_dict
    assert [row["layer"] for row in found.table] == ["table.weight", "head.bias"]
    for k, n in names.items():
        torch.testing.assert_close(found.state_dict[n], expected[k])


class Wrapped(Texts):
    """As transformers put it out: a mapping, a loss first."""

    def forward(self, **arguments):
        logits = super().forward(**arguments)
        return {"loss": logits.sum(), "logits": logits}


class Transposed(Texts):
    """Tokens first."""

    def forward(self, **arguments):
        return super().forward(**arguments).transpose(0, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kind, head", [(Wrapped, lambda z: z["logits"][:, -1]), (Transposed, lambda z: z[-1])]
)
def test_heads_take_what_the_model_returns(method, kind, head):
    torch.manual_seed(0)
    base, plain = kind(), Texts()
    plain.load_state_dict(base.state_dict())
    experts, batches = tuned(base), calibration({"input_ids": tokens(5, 4)})
    found = method(base, experts, batches, heads=both(head))
    assert distance(found, method(plain, experts, batches, heads=both(last))) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_heads_that_are_none_are_named(method):
    base, batches = Texts(), calibration({"input_ids": tokens(5, 4)})
    experts = tuned(base)
    with pytest.raises(MergeError, match="heads: expected one for every .*, found none for 'b'"):
        method(base, experts, batches, heads={"a": last, "b": None})
    with pytest.raises(MergeError, match="heads: expected a mapping .* found function"):
        method(base, experts, batches, heads=last)
    with pytest.raises(MergeError, match=r"task 'a', batch 0: expected the head .* shape \(\)"):
        method(base, experts, batches, heads=both(torch.sum))
    with pytest.raises(NonFinite, match="task 'a', batch 0: logits"):
        method(base, experts, batches, heads=both(lambda z: z[:, -1] * math.inf))


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, inputs):
        return self.norm(self.lin(inputs))


@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_are_averaged_and_take_no_part(method):
    base, inputs = Normalised(), torch.randn(8, 6)
    experts = {}
    for task in "ab":
        expert = copy.deepcopy(base).train()
        for _ in range(30):
            expert(0.3 * torch.randn(64, 6))
        experts[task] = expert.state_dict()
        experts[task]["lin.weight"] += 0.1 * torch.randn(5, 6)
    merge = method(base, experts, calibration({"inputs": inputs}), heads=both())
    soup = datafree.soup(base, experts).state_dict
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(merge.state_dict[name], soup[name]) and name in merge.averaged
    assert merge.model(base).eval()(inputs).isfinite().all()
    assert base.training and int(base.norm.num_batches_tracked) == 0


@pytest.mark.parametrize("method", METHODS)
def test_experts_of_another_precision(method):
    base, batches = Texts().float(), calibration({"input_ids": tokens(5, 4)})
    narrow = {t: {k: v.bfloat16() for k, v in s.items()} for t, s in tuned(base).items()}
    alike = {t: {k: v.float() for k, v in s.items()} for t, s in narrow.items()}
    found = method(base, narrow, batches, heads=both(last))
    assert distance(found, method(base, alike, batches, heads=both(last))) == 0


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_taken_also_where_they_are_off(method):
    base, batches = Texts().requires_grad_(False), calibration({"input_ids": tokens(5, 4)})
    experts = tuned(base)
    expected = method(base, experts, batches, heads=both(last))
    with torch.no_grad():
        assert distance(method(base, experts, batches, heads=both(last)), expected) == 0


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_equal_the_base_give_the_base(method):
    base, batches = Texts(), calibration({"input_ids": tokens(5, 4)})
    merge = method(base, dict.fromkeys("ab", base.state_dict()), batches, heads=both(last))
    assert all(torch.equal(merge.state_dict[k], v) for k, v in base.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_models_that_cannot_run_are_refused(method):
    base, batches = nn.Sequential(nn.Linear(2, 2)), calibration({"input": torch.ones(2, 2)})
    experts = tuned(base)
    base.compile(backend="eager")
    with pytest.raises(MergeError, match="the model .* is compiled"):
        method(base, experts, batches, heads=both())


def test_complex_parameters_have_the_information_of_their_parts_together():
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter = nn.Parameter(torch.randn(6, dtype=torch.cdouble))

        def forward(self, inputs):
            return (torch.fft.fft(inputs) * self.filter).real

    class Parts(nn.Module):
        def __init__(self, waves):
            super().__init__()
            self.filter = nn.Parameter(torch.view_as_real(waves.filter.detach()))

        def forward(self, inputs):
            return (torch.fft.fft(inputs) * torch.view_as_complex(self.filter)).real

    base, batches = Waves(), calibration({"inputs": torch.randn(5, 6).double()})
    experts = tuned(base)
    split = {t: {"filter": torch.view_as_real(s["filter"])} for t, s in experts.items()}
    found = fisher_weights(base, experts, batches, heads=both(), floor=0.0)["filter"]
    expected = fisher_weights(Parts(base), split, batches, heads=both(), floor=0.0)["filter"]
    torch.testing.assert_close(found, expected.sum(-1))
    merged = fisher(base, experts, batches, heads=both()).state_dict["filter"]
    weights = fisher_weights(base, experts, batches, heads=both())["filter"]
    mean = sum(w * s["filter"] for w, s in zip(weights, experts.values())) / weights.sum(0)
    torch.testing.assert_close(merged, mean)
