"""What a few sequences have to show of a model: orders, routes and calls that depend on what the
tokens hold."""

import pytest
import torch
from blocks import WIDTH, Blocks, block, rows
from cases import (
    ELEMENTS,
    TASKS,
    assert_copies_come_back,
    assert_same_merge,
    beginnings,
    both,
    distance,
    tokens,
    tuned,
    under,
)
from torch import nn

import qpmerge_lite as q

# ----------------------------------------------------------------------------- orders inside


class Sorting(nn.Module):
    """Puts its texts in the order of their lengths, as for packed sequences, and back."""

    def __init__(self):
        super().__init__()
        self.words, self.layer = nn.Embedding(40, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, attention_mask):
        order = attention_mask.sum(1).argsort(descending=True, stable=True)
        x = self.layer(self.words(input_ids[order])).tanh()
        return x[order.argsort()]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_texts_that_are_sorted_inside_are_averaged_also_where_a_batch_is_sorted_already(count):
    base, ids = Sorting().double(), tokens(count)
    mask = (torch.arange(7) < torch.linspace(7, 2, count).long()[:, None]).long()

    def calibration(token):
        first = {"input_ids": under(ids, mask, token), "attention_mask": mask}
        return both(first, {key: value.flip(0) for key, value in first.items()})

    merge = assert_same_merge(base, calibration(1), calibration(2))
    assert merge.table == []
    assert set(merge.averaged.values()) == {
        "what it reads of a sequence depends on the others of its batch"
    }


# ------------------------------------------------------------------------------ routes by content


class Mixture(nn.Module):
    """Tokens whose first number is positive through one layer, the others through another."""

    def __init__(self, flat):
        super().__init__()
        self.flat, self.experts = flat, nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        chosen, out = x[..., 0] > 0, torch.zeros_like(x)
        for places, expert in zip((chosen, ~chosen), self.experts):
            read = x[places]
            if not self.flat:
                read = read.unflatten(0, (len(x), -1))
            out[places] = expert(read).flatten(0, -2)
        return x + out


def half_positive(count):
    """Features (count, 4, d) of which two tokens of every sequence, at places of their own, go to
    either expert."""
    x = rows(count, 4)
    places = torch.stack([torch.randperm(4)[:2] for _ in range(count)])
    x[..., 0] = -x[..., 0].abs()
    x[..., 0].scatter_(1, places, 1.0)
    return x


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("count", [1, 6])
def test_experts_whose_rows_happen_to_agree_in_number_are_averaged(flat, count):
    base = Blocks(Mixture(flat), block()).double()
    for make in (half_positive,) * 3:
        merge = assert_copies_come_back(
            base, both({"inputs": make(count)}, {"inputs": make(count)})
        )
        for name in ("blocks.0.experts.0.weight", "blocks.0.experts.1.bias"):
            assert "depends on what they hold" in merge.averaged[name]
        assert [row["layer"] for row in merge.table] == ["blocks.1.0"]


# ------------------------------------------------------------- tables that are called several times


class Pair(nn.Module):
    """An encoder and a decoder with one table; subclasses say how."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def decoded(self, decoder_input_ids):
        return self.words(decoder_input_ids)

    def forward(
        self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None
    ):
        x = self.first(self.words(input_ids)).tanh()
        return self.second(self.decoded(decoder_input_ids)).tanh() + x.mean(1, keepdim=True)


class TwoModules(Pair):
    """Two modules with the same weights, as T5 has them."""

    def __init__(self):
        super().__init__()
        self.words_of_decoder = nn.Embedding(40, WIDTH)
        self.words_of_decoder.weight = self.words.weight

    def decoded(self, decoder_input_ids):
        return self.words_of_decoder(decoder_input_ids)


class Shifted(Pair):
    """Makes the decoder's tokens itself."""

    def decoded(self, decoder_input_ids):
        return self.words(decoder_input_ids.roll(1, 1))


def pairs(token=1):
    """Padded texts and padded answers, of each task its own; padded with a token."""
    torch.manual_seed(3)
    found = {}
    for task in TASKS:
        masks, ids = (beginnings(6), beginnings(6, 5)), (tokens(6), tokens(6, 5))
        texts, answers = (under(i, mask, token) for i, mask in zip(ids, masks))
        found[task] = [
            {
                "input_ids": texts,
                "attention_mask": masks[0],
                "decoder_input_ids": answers,
                "decoder_attention_mask": masks[1],
            }
        ]
    return found


@pytest.mark.parametrize("kind", [Pair, TwoModules])
@pytest.mark.parametrize("folds", [1, 3])
def test_a_table_counts_the_tokens_of_all_its_calls(kind, folds):
    base, calibration = kind().double(), pairs()
    merge = assert_same_merge(base, calibration, pairs(2), ridge=0.0, folds=folds)
    assert [row["layer"] for row in merge.table] == [
        "words",
        "first",
        "second",
    ] and not merge.averaged
    experts = tuned(base)
    counts = torch.zeros(len(TASKS), 40, dtype=torch.float64)
    for row, task in zip(counts, TASKS):
        (batch,) = calibration[task]
        for side in ("", "decoder_"):
            kept = batch[f"{side}input_ids"][batch[f"{side}attention_mask"] == 1]
            row += kept.bincount(minlength=40)
    found = q.qp(base, experts, calibration, basis="elements", ridge=0.0, folds=1).state_dict[
        "words.weight"
    ]
    share = torch.where(counts.sum(0) > 0, counts / counts.sum(1, keepdim=True), 0.5)
    wanted = sum(
        (s / share.sum(0))[:, None] * experts[t]["words.weight"] for s, t in zip(share, TASKS)
    )
    torch.testing.assert_close(found, wanted)


def test_a_table_of_tokens_that_a_model_makes_itself_is_averaged():
    base, calibration = Shifted().double(), pairs()
    merge = q.qp(base, tuned(base), calibration, **ELEMENTS)
    assert merge.averaged == {
        "words.weight": (
            "called more than once in a forward, on tokens that no argument of the model holds"
        )
    }


def test_tables_that_are_called_first_by_some_batches_only_are_averaged():
    class Either(TwoModules):
        def forward(self, input_ids=None, decoder_input_ids=None):
            read = (
                self.words(input_ids)
                if input_ids is not None
                else self.words_of_decoder(decoder_input_ids)
            )
            return self.second(self.first(read).tanh())

    base = Either().double()
    experts = tuned(base)
    batches = [{"input_ids": tokens(6)}, {"decoder_input_ids": tokens(6)}]
    one, two = (
        q.qp(base, experts, dict.fromkeys(TASKS, order), **ELEMENTS)
        for order in (batches, batches[::-1])
    )
    assert distance(one.state_dict, two.state_dict) < 1e-12
    assert set(one.averaged) == set(two.averaged) == {"words.weight", "words_of_decoder.weight"}


# ------------------------------------------------------------------------- layers in other orders


class Swapped(Blocks):
    """Its blocks in the order that the batch's mean says, and a layer behind them."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs):
        one, two = self.blocks if inputs.mean() > 0 else reversed(self.blocks)
        return self.last(two(one(inputs)))


class Inside(nn.Module):
    """The same within a block."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for layer in (self.one, self.two) if x.mean() > 0 else (self.two, self.one):
            x = layer(x).tanh()
        return x


class Rotated(Blocks):
    """Three layers of which every batch calls two: the first and the second, the second and the
    third, the third and the first."""

    def __init__(self):
        super().__init__(block(), block(), block(), block())

    def forward(self, inputs):
        first = int(inputs[0, 0].abs())
        for number in (first, (first + 1) % 3, 3):
            inputs = self.blocks[number](inputs)
        return inputs


def starting(*numbers):
    """Batches whose first number says what a model does with them."""
    found = []
    for number in numbers:
        x = rows(6).abs() + 0.1
        x[:, 0] = number
        found.append({"inputs": x if number >= 0 else -x})
    return found


@pytest.mark.parametrize("activations", [None, 1])
@pytest.mark.parametrize(
    ("base", "batches", "disputed"),
    [
        (Swapped(), starting(1, -1), ["blocks.0.0", "blocks.1.0"]),
        (Swapped(), starting(1, 1, -1, 1), ["blocks.0.0", "blocks.1.0"]),
        (Blocks(Inside(), block()), starting(1, -1), ["blocks.0.one", "blocks.0.two"]),
        (Rotated(), starting(0, 1, 2), ["blocks.0.0", "blocks.1.0", "blocks.2.0"]),
        (Rotated(), starting(2, 1), []),
    ],
    ids=["swapped", "one of many", "inside a block", "in a circle", "in one order"],
)
def test_layers_to_which_batches_come_in_different_orders_are_averaged_in_whatever_order_these_are(
    base, batches, disputed, activations
):
    base = base.double()
    experts, merges = tuned(base), []
    for order in (batches, batches[::-1], [*batches[1:], batches[0]]):
        merges.append(q.qp(base, experts, both(*order), activations=activations, **ELEMENTS))
    reasons = {
        f"{layer}.{p}": "batches come to it in different orders"
        for layer in disputed
        for p in ("weight", "bias")
    }
    for merge in merges:
        assert distance(merge.state_dict, merges[0].state_dict) < 1e-9
        assert {name: why for name, why in merge.averaged.items() if name in reasons} == reasons
        assert disputed or not merge.averaged
        assert merge.table[-1]["layer"] not in disputed


def test_layers_that_a_survey_puts_the_wrong_way_round_are_visited_as_batches_come_to_them():
    class Skipping(Blocks):
        def __init__(self):
            super().__init__(block(), block(), block())

        def forward(self, inputs):
            for number, called in ((1, inputs[0, 0] != 1), (0, inputs[0, 0] != 2), (2, True)):
                inputs = self.blocks[number](inputs) if called else inputs
            return inputs

    base = Skipping().double()
    experts, batches = tuned(base), starting(2, 1, 3)
    merges = [q.qp(base, experts, both(*order), **ELEMENTS) for order in (batches, batches[::-1])]
    assert distance(*(merge.state_dict for merge in merges)) < 1e-9
    assert not merges[0].averaged and len(merges[0].table) == len(merges[1].table) == 3
