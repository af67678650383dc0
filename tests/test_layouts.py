"""Layouts and calls of plain PyTorch that a merge has to cope with: where rows are, and how."""

from dataclasses import dataclass

import pytest
import torch
from blocks import WIDTH, Blocks, block, rows
from cases import (
    ELEMENTS,
    TASKS,
    apart,
    assert_batches_do_not_matter,
    assert_copies_come_back,
    assert_same_merge,
    assert_stationary,
    beginnings,
    both,
    distance,
    masked,
    tokens,
    tuned,
)
from torch import nn

import qpmerge_lite as q
from qpmerge_lite.errors import MergeError

# ------------------------------------------------------------------------------ where the rows are


class Texts(nn.Module):
    """Embedded tokens, moved to another layout, through two layers, and back."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def there(self, x):
        return x

    def back(self, x, count):
        return x

    def forward(self, input_ids, attention_mask=None):
        x = self.there(self.words(input_ids))
        for layer in self.layers:
            x = layer(x).tanh()
        return self.back(x, len(input_ids))


class SequenceFirst(Texts):
    """Rows (S, B, d)."""

    def there(self, x):
        return x.transpose(0, 1)

    def back(self, x, count):
        return x.transpose(0, 1)


class Flat(Texts):
    """Rows (B·S, d)."""

    def there(self, x):
        return x.flatten(0, 1)

    def back(self, x, count):
        return x.unflatten(0, (count, -1))


class FlatSequenceFirst(Texts):
    """Rows (S·B, d)."""

    def there(self, x):
        return x.transpose(0, 1).flatten(0, 1)

    def back(self, x, count):
        return x.unflatten(0, (-1, count)).transpose(0, 1)


class HeadsFirst(Texts):
    """Rows (B, H, S, d), as norms and layers of single heads read them."""

    def there(self, x):
        return torch.stack([x, 2 * x, -x], 1)

    def back(self, x, count):
        return x.sum(1)


class OneMoreAxis(Texts):
    """Rows (B, 1, S, d), as compressed keys."""

    def there(self, x):
        return x.unsqueeze(1)

    def back(self, x, count):
        return x.squeeze(1)


class HeadsLast(Texts):
    """Rows (B, S, H, d)."""

    def there(self, x):
        return torch.stack([x, 2 * x, -x], 2)

    def back(self, x, count):
        return x.sum(2)


class ClassToken(Texts):
    """Rows (B, 1 + S, d): one more than the mask has."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 1, WIDTH))

    def there(self, x):
        return torch.cat([self.start.expand(len(x), -1, -1), x], 1)

    def back(self, x, count):
        return x[:, 1:]


LAYOUTS = [Texts, SequenceFirst, Flat, FlatSequenceFirst, HeadsFirst, HeadsLast, OneMoreAxis]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


@every_layout
@pytest.mark.parametrize("count", [1, 5, 7])  # 7: as many sequences as tokens
def test_padding_is_not_counted_whatever_the_layout(layout, count):
    base, ids, mask = layout().double(), tokens(count), beginnings(count)
    one, two = (both(masked(base, ids, mask, pad)) for pad in (1, 2))
    assert_same_merge(base, one, two)
    assert_copies_come_back(base, one)


@every_layout
def test_one_function_in_another_layout_is_merged_alike(layout):
    plain, other = Texts().double(), layout().double()
    other.load_state_dict(plain.state_dict())
    for batches in ([tokens(7)], [tokens(5)], [tokens(5), tokens(3, 4)]):
        calibration = both(*({"input_ids": ids} for ids in batches))
        experts = tuned(plain)
        merges = [q.qp(model, experts, calibration, basis="elements") for model in (plain, other)]
        repeats = layout in (HeadsFirst, HeadsLast)  # another function: rows count three times
        if not repeats:
            assert distance(*(merge.state_dict for merge in merges)) < 1e-8
            for one, two in zip(*(merge.table for merge in merges)):
                assert one["ridge"] == two["ridge"], one["layer"]
                assert one["cross_fitted"] == pytest.approx(two["cross_fitted"], abs=1e-8)
        assert [row["layer"] for row in merges[1].table] == ["words", "layers.0", "layers.1"]


@every_layout
def test_batches_do_not_matter_whatever_the_layout(layout):
    batches = both({"input_ids": tokens(5)}, {"input_ids": tokens(3, 4)})
    assert_batches_do_not_matter(layout().double(), batches)


def test_rows_that_the_mask_does_not_name_are_averaged_or_an_error_names_the_mask():
    base, ids = ClassToken().double(), tokens(5)
    assert_copies_come_back(base, both({"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    with pytest.raises(MergeError, match="attention_mask"):
        q.qp(base, tuned(base), both(masked(base, ids, beginnings(5))))


class Transformer(nn.Module):
    """torch's own encoder in either layout, with or without its nested tensors."""

    def __init__(self, batch_first=True, nested=False):
        super().__init__()
        self.first, self.words = batch_first, nn.Embedding(40, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def forward(self, input_ids, attention_mask):
        x, nothing = self.words(input_ids), attention_mask == 0
        if self.first:
            return self.encoder(x, src_key_padding_mask=nothing)
        return self.encoder(x.transpose(0, 1), src_key_padding_mask=nothing).transpose(0, 1)


@pytest.mark.parametrize("count", [6, 7])
def test_torchs_encoder_is_merged_alike_in_both_layouts_and_with_nested_tensors(count):
    models = [
        Transformer(**kind).double().eval()
        for kind in ({}, {"nested": True}, {"batch_first": False})
    ]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    ids, mask = tokens(count), beginnings(count)
    one, two = (both(masked(models[0], ids, mask, pad)) for pad in (1, 2))
    experts = tuned(models[0])
    merges = [q.qp(model, experts, one, **ELEMENTS) for model in models]
    for model, merge in zip(models, merges):
        assert distance(merge.state_dict, merges[0].state_dict) < 1e-9
        assert distance(merge.state_dict, q.qp(model, experts, two, **ELEMENTS).state_dict) < 1e-9
        assert len(merge.table) > 0


# --------------------------------------------------------------------- how models are put together


def test_blocks_may_sit_in_anything_or_in_nothing():
    class InDict(Blocks):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleDict({"one": block(), "two": block()})

        def forward(self, inputs):
            return self.blocks["two"](self.blocks["one"](inputs))

    class InSequence(Blocks):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(block(), block())

        def forward(self, inputs):
            return self.blocks(inputs)

    class InAttributes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = block(), block()

        def forward(self, inputs):
            return self.second(self.first(inputs))

    made, weights = [], [p.double() for b in Blocks().blocks for p in b.parameters()]
    for kind in (Blocks, InDict, InSequence, InAttributes):
        model = kind().double()
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights):
                parameter.copy_(weight)
        made.append(model)
    batches, merges = both({"inputs": rows()}, {"inputs": rows(4)}), []
    for model in made:
        torch.manual_seed(0)
        merge = q.qp(model, tuned(model), batches, basis="elements")
        assert len(merge.table) == 2 and not merge.averaged
        merges.append(list(merge.state_dict.values()))
    for values in merges[1:]:
        assert all(torch.equal(one, two) for one, two in zip(values, merges[0]))


@pytest.mark.parametrize("name", ["linear", "sequential", "convolution"])
def test_models_without_any_blocks(name):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, inputs):
            return self.layer(inputs)

    class Picture(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, inputs):
            return self.layer(inputs).flatten(1)

    made = {
        "linear": Layer(),
        "sequential": nn.Sequential(nn.Linear(WIDTH, WIDTH)),
        "convolution": Picture(),
    }
    base, key = made[name].double(), "input" if name == "sequential" else "inputs"
    batch = {key: torch.randn(8, 3, 6, 6).double() if name == "convolution" else rows()}
    merge = assert_copies_come_back(base, both(batch))
    assert len(merge.table) == 1
    assert_batches_do_not_matter(base, both(batch))


class UNet(nn.Module):
    """Blocks that read what blocks before the last one put out."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([block(), block(), nn.Linear(2 * WIDTH, WIDTH), block()])

    def forward(self, inputs):
        outer = self.blocks[0](inputs)
        inner = self.blocks[1](outer)
        joined = self.blocks[2](torch.cat([outer, inner], -1))
        return self.blocks[3](joined) + outer


def test_skips_across_blocks_are_followed():
    base, batches = UNet().double(), apart(lambda n: {"inputs": rows(n)}, (20,), (12,))
    assert_stationary(base, batches)
    merge = assert_batches_do_not_matter(base, batches)
    assert len(merge.table) == 4 and not merge.averaged


class Twice(Blocks):
    """A block that is used again behind the others."""

    def forward(self, inputs):
        return self.blocks[0](super().forward(inputs))


def test_a_block_that_is_used_twice_is_solved_on_both_uses_or_listed():
    base, batches = Twice().double(), both({"inputs": rows(20)})
    merge = assert_copies_come_back(base, batches)
    assert "blocks.1.0" in {row["layer"] for row in merge.table}
    assert_batches_do_not_matter(base, batches)


# ----------------------------------------------------------------------------- how they are called


class ByKeyword(Blocks):
    """A block and a layer that take their input under a name of their own."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, *, features, scale=1.0):
            return self.layer(input=features).tanh() * scale

    def __init__(self):
        super().__init__(self.Named(), self.Named())

    def call(self, block, x):
        return block(scale=2.0, features=x)


def test_keyword_calls_of_blocks_and_layers():
    base, batches = ByKeyword().double(), both({"inputs": rows()})
    merge = assert_copies_come_back(base, batches)
    assert [row["layer"] for row in merge.table] == ["blocks.0.layer", "blocks.1.layer"]
    assert_stationary(base, apart(lambda n: {"inputs": rows(n)}, (20,)))


@dataclass
class Output:
    """What a block or a model may return."""

    hidden: torch.Tensor
    score: float = 0.0


PUT = {
    "tuple": lambda x: (x, None),
    "list": lambda x: [x],
    "dict": lambda x: {"hidden": x},
    "nested": lambda x: {"all": [(x,)]},
    "dataclass": lambda x: Output(x),
}
GET = {
    "tuple": lambda y: y[0],
    "list": lambda y: y[0],
    "dict": lambda y: y["hidden"],
    "nested": lambda y: y["all"][0][0],
    "dataclass": lambda y: y.hidden,
}


def returning(kind, whole):
    """A model whose blocks, or which itself, return their tensor in a container."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = block()

        def forward(self, x):
            return x if whole else PUT[kind](x)

    class Block(Wrapped):
        def forward(self, x):
            return super().forward(self.inner(x))

    class Model(Blocks):
        def call(self, block, x):
            return block(x) if whole else GET[kind](block(x))

        def put(self, x):
            return PUT[kind](x) if whole else x

    return Model(Block(), Block()).double()


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "model"])
@pytest.mark.parametrize("kind", PUT)
def test_outputs_may_be_in_a_container(kind, whole):
    base, batches = returning(kind, whole), both({"inputs": rows(20)})
    merge = assert_copies_come_back(base, batches)
    assert [row["layer"] for row in merge.table] == ["blocks.0.inner.0", "blocks.1.inner.0"]


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        *((kind, False) for kind in PUT),
        *((kind, True) for kind in ("tuple", "list", "dict")),
    ],
)
def test_the_energy_of_an_output_in_a_container_is_that_of_its_tensor(kind, whole):
    base, bare, batches = returning(kind, whole), Blocks().double(), both({"inputs": rows(20)})
    experts = tuned(base)
    states = {"base": base.state_dict(), "soup": q.soup(base, experts).state_dict, **experts}
    bared = {}
    for name, state in states.items():
        bared[name] = {key.replace(".inner", ""): value for key, value in state.items()}
    bare.load_state_dict(bared["base"])
    found = q.audit(base, states["soup"], experts, batches)
    wanted = q.audit(bare, bared["soup"], {task: bared[task] for task in TASKS}, batches)
    assert found["output"] == pytest.approx(wanted["output"], abs=1e-12)
    assert list(found["layers"].values()) == pytest.approx(
        list(wanted["layers"].values()), abs=1e-12
    )


@pytest.mark.parametrize("kind", ["nested", "dataclass"])
def test_an_output_without_a_tensor_on_top_is_an_error_of_audit_that_names_its_type(kind):
    base, batches = returning(kind, True), both({"inputs": rows(20)})
    with pytest.raises(MergeError, match="dict|Output"):
        q.audit(base, base.state_dict(), tuned(base), batches)


class InPlace(nn.Module):
    """A block that overwrites what its layers read and put out, as published code does."""

    def __init__(self, in_place):
        super().__init__()
        self.norm, self.first = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second, self.in_place = nn.Linear(WIDTH, WIDTH), in_place

    def forward(self, x):
        h = nn.functional.relu(self.first(self.norm(x)), inplace=self.in_place)
        y = self.second(h)
        if not self.in_place:
            return x + y / 2
        y /= 2
        h.zero_()
        x += y
        return x


class Stem(Blocks):
    """Blocks behind something that makes a tensor of its own."""

    def forward(self, inputs):
        return super().forward(inputs * 1.5)


def test_modules_that_work_in_place_are_merged_and_audited_as_others_are():
    models = [Stem(InPlace(kind), InPlace(kind)).double() for kind in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    experts, batches = tuned(models[0]), apart(lambda n: {"inputs": rows(n)}, (12,), (8,))
    merges = [q.qp(model, experts, batches, **ELEMENTS) for model in models]
    assert [row["layer"] for row in merges[1].table] == [row["layer"] for row in merges[0].table]
    assert distance(*(merge.state_dict for merge in merges)) < 1e-12
    soup = q.soup(models[0], experts).state_dict
    plain, overwriting = (q.audit(model, soup, experts, batches) for model in models)
    assert overwriting["output"] == pytest.approx(plain["output"], abs=1e-12)
    assert overwriting["layers"] == pytest.approx(plain["layers"], abs=1e-12)
