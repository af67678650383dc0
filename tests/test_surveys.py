"""What a few sequences have to show of a model: orders, routes and calls that depend on what the tokens hold."""

import pytest
import torch
from blocks import WIDTH, Blocks, block, rows
from cases import (
    assert_copies_come_back,
    assert_same_merge,
    both,
    tokens,
    under,
)
from torch import nn

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
    assert set(merge.averaged.values()) == {"what it reads of a sequence depends on the others of its batch"}


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
    """Features (count, 4, d) of which two tokens of every sequence, at places of their own, go to either expert."""
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
        merge = assert_copies_come_back(base, both({"inputs": make(count)}, {"inputs": make(count)}))
        for name in ("blocks.0.experts.0.weight", "blocks.0.experts.1.bias"):
            assert "depends on what they hold" in merge.averaged[name]
        assert [row["layer"] for row in merge.table] == ["blocks.1.0"]
