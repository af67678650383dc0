"""Which tokens are counted: padding of choices, labels of decoders, entries for all inputs."""

import pytest
import torch
from blocks import rows
from cases import (
    ELEMENTS,
    TASKS,
    assert_copies_come_back,
    assert_same_merge,
    beginnings,
    distance,
    tokens,
    tuned,
    under,
)
from tiny import PAIR, PLACED, SIZE, model
from torch import nn

import qpmerge_lite as q
from qpmerge_lite.errors import MergeError


def apart(make):
    """One batch of its own for each task."""
    return {task: [make()] for task in TASKS}


def with_padding(calibration, token, *keys):
    """The same texts with another token under the zeros of their masks."""
    found = {}
    for task, batches in calibration.items():
        found[task] = []
        for batch in batches:
            padded = {k: under(batch[k], batch["attention_mask"], token) for k in keys}
            found[task].append(batch | padded)
    return found


# ---------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("count", [2, 3, 7])  # 2, 7: as many as choices, as tokens
def test_padding_of_choices_is_not_counted(count):
    base = model("BertForMultipleChoice", PLACED)

    def batch():
        ids, mask = tokens(2 * count), beginnings(2 * count)
        return {"input_ids": ids.view(count, 2, 7), "attention_mask": mask.view(count, 2, 7)}

    texts = apart(batch)
    one, two = (with_padding(texts, token, "input_ids") for token in (1, 2))
    merge = assert_same_merge(base, one, two)
    assert not merge.averaged
    assert_copies_come_back(base, one)
    soup, experts = q.soup(base, tuned(base)).state_dict, tuned(base)
    audits = [q.audit(base, soup, experts, texts) for texts in (one, two)]
    assert audits[0]["output"] == pytest.approx(audits[1]["output"], abs=1e-9)
    assert audits[0]["layers"] == pytest.approx(audits[1]["layers"], abs=1e-9)


def test_choices_are_counted_as_the_same_texts_one_by_one():
    base = model("BertForMultipleChoice", PLACED)
    experts, ids, mask = tuned(base), tokens(6), beginnings(6)
    calibration = {
        task: [{"input_ids": ids.view(3, 2, 7), "attention_mask": mask.view(3, 2, 7)}]
        for task in TASKS
    }
    pairs = zip(ids.view(3, 1, 2, 7), mask.view(3, 1, 2, 7))
    batches = [{"input_ids": i, "attention_mask": m} for i, m in pairs]
    single = {task: batches for task in TASKS}
    merges = [
        q.qp(base, experts, batches, **ELEMENTS).state_dict for batches in (calibration, single)
    ]
    assert distance(*merges) < 1e-9


def test_a_mask_of_pairs_of_tokens_is_named_with_the_shapes_that_are_taken():
    base = model("BertModel", PLACED)
    batch = {"input_ids": tokens(3), "attention_mask": torch.ones(3, 7, 7, dtype=torch.long)}
    with pytest.raises(
        MergeError, match=r"'attention_mask': expected shape \(B, S\), or .*choices"
    ):
        q.qp(base, tuned(base), dict.fromkeys(TASKS, [batch]))


# ----------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("kind", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_padded_labels_are_not_counted_in_a_decoder(kind):
    small = {
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 40,
        "decoder_start_token_id": 0,
    }
    base = model(kind, PAIR | {"decoder_start_token_id": 2} if kind.startswith("Bart") else small)
    texts, longer = {}, {}
    for task in TASKS:
        labels = torch.where(beginnings(6, 5) == 1, tokens(6, 5), -100)
        ids = tokens(6)
        texts[task] = [{"input_ids": ids, "labels": labels}]
        more = torch.cat([labels, torch.full((6, 2), -100)], 1)
        longer[task] = [{"input_ids": ids, "labels": more}]
    merge = assert_same_merge(base, texts, longer)
    assert any("decoder" in row["layer"] for row in merge.table)
    experts = tuned(base)
    soup = q.soup(base, experts).state_dict
    audits = [q.audit(base, soup, experts, batches) for batches in (texts, longer)]
    assert audits[0]["layers"] == pytest.approx(audits[1]["layers"], abs=1e-9)


def test_labels_of_a_model_without_an_encoder_mask_nothing():
    base = model("LlamaForCausalLM", SIZE)
    texts = {task: tokens(6) for task in TASKS}
    with_labels = {
        t: [{"input_ids": i, "labels": torch.where(beginnings(6) == 1, -100, i)}]
        for t, i in texts.items()
    }
    without = {t: [{"input_ids": i}] for t, i in texts.items()}
    assert_same_merge(base, with_labels, without)


def test_labels_of_the_encoders_tokens_are_no_mask_of_a_decoder():
    """A classifier of tokens whose configuration is that of an encoder-decoder."""
    base = model(
        "T5ForTokenClassification",
        {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 40},
    )
    texts = {task: tokens(6) for task in TASKS}
    labels = {
        t: [{"input_ids": i, "labels": torch.where(beginnings(6) == 1, i % 2, -100)}]
        for t, i in texts.items()
    }
    without = {t: [{"input_ids": i}] for t, i in texts.items()}
    assert_same_merge(base, labels, without)


# ----------------------------------------------------------------- entries for all inputs


class Weighted(nn.Module):
    """Scales features by a vector for all inputs, and inputs by a number for each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, inputs, features=None, amount=None):
        if features is not None:
            inputs = inputs * features
        if amount is not None:
            inputs = inputs * amount.reshape(-1, 1)
        return self.second(self.first(inputs).tanh())


HEADS = dict.fromkeys(TASKS, lambda logits: logits)


def assert_like(calibration, other, method=q.fisher):
    base = Weighted().double()
    experts = tuned(base)
    merges = [method(base, experts, c, heads=HEADS).state_dict for c in (calibration, other)]
    assert distance(*merges) < 1e-12


@pytest.mark.parametrize("sizes", [(6, 6), (6, 4)], ids=["other inputs", "other sizes"])
def test_a_vector_for_all_inputs_that_is_as_long_as_the_batch_is_not_cut(sizes):
    features = torch.rand(6, dtype=torch.float64)
    inputs = {task: [rows(size) for size in sizes] for task in TASKS}
    as_vector = {t: [{"inputs": x, "features": features} for x in xs] for t, xs in inputs.items()}
    as_row = {
        t: [{"inputs": x, "features": features[None]} for x in xs] for t, xs in inputs.items()
    }
    assert_like(as_vector, as_row)
    base = Weighted().double()
    experts = tuned(base)
    merges = [q.qp(base, experts, c, **ELEMENTS) for c in (as_vector, as_row)]
    assert distance(*(merge.state_dict for merge in merges)) < 1e-12 and not merges[0].averaged


@pytest.mark.parametrize("sizes", [(6, 6), (6, 4)], ids=["other values", "other sizes"])
def test_a_number_for_every_input_is_cut(sizes):
    inputs = {
        t: [(rows(size), torch.rand(size, dtype=torch.float64)) for size in sizes] for t in TASKS
    }
    vectors = {t: [{"inputs": x, "amount": a} for x, a in parts] for t, parts in inputs.items()}
    columns = {
        t: [{"inputs": x, "amount": a[:, None]} for x, a in parts] for t, parts in inputs.items()
    }
    assert_like(vectors, columns)


@pytest.mark.parametrize(
    "features", [torch.rand(6, dtype=torch.float64), torch.arange(6)], ids=["floats", "integers"]
)
def test_numbers_of_which_nothing_can_be_told_are_named(features):
    base, x = Weighted().double(), rows(6)
    batches = dict.fromkeys(TASKS, [{"inputs": x, "features": features}])
    for merge in (
        lambda: q.qp(base, tuned(base), batches),
        lambda: q.fisher(base, tuned(base), batches, heads=HEADS),
    ):
        with pytest.raises(
            MergeError, match=r"task 'a', batch 0, key 'features': .*shape \(6, 1\)"
        ):
            merge()


def test_a_vector_that_is_all_there_is_holds_one_number_per_input():
    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 4)

        def forward(self, inputs):
            return self.layer(inputs[:, None])

    base = Numbers().double()
    batches = dict.fromkeys(TASKS, [{"inputs": torch.rand(6, dtype=torch.float64)}])
    assert len(q.qp(base, tuned(base), batches, **ELEMENTS).table) == 1


# ------------------------------------------------------------- rows that cannot be told from
# padding


def padded_inside(kind):
    """A model that pads its texts further, and what it is called with but for the padding."""
    config = {**PAIR, "max_encoder_position_embeddings": 16, "max_decoder_position_embeddings": 16}
    config |= {**PLACED, "pad_token_id": 1} if kind == "LongformerModel" else {}
    return model(kind, config | {"attention_window": 4})


@pytest.mark.parametrize("kind", ["LongformerModel", "LEDModel"])
@pytest.mark.filterwarnings("ignore")
def test_layers_of_texts_that_a_model_pads_further_are_told_whatever_they_are_padded_with(kind):
    base, ids, mask = padded_inside(kind), tokens(6), beginnings(6)
    answers = {"decoder_input_ids": tokens(6, 5)} if kind == "LEDModel" else {}
    experts, audits = tuned(base), []
    soup = q.soup(base, experts).state_dict
    for token in (1, 2):  # 1: what the model pads with
        batch = {"input_ids": under(ids, mask, token), "attention_mask": mask, **answers}
        calibration = dict.fromkeys(TASKS, [batch])
        with pytest.raises(MergeError, match=r"attention_mask': \(3, 7\)}, found \(3, 8, "):
            q.qp(base, experts, calibration, **ELEMENTS)
        audits.append(q.audit(base, soup, experts, calibration))
    one, two = audits
    assert one["layers"] and one["layers"].keys() == two["layers"].keys()
    assert not any(
        name.endswith(("query", "layernorm_embedding")) and "decoder" not in name
        for name in one["layers"]
    )
    for name, energy in one["layers"].items():
        assert energy == pytest.approx(two["layers"][name], abs=1e-9)
    assert one["drift"][:2] == two["drift"][:2] == [None, None]
    assert one["output"] == pytest.approx(two["output"], abs=1e-9)


def test_an_output_whose_rows_cannot_be_told_from_padding_has_no_energy():
    class Longer(nn.Module):
        """Returns one row more than the mask has."""

        def __init__(self):
            super().__init__()
            self.words, self.layer = nn.Embedding(40, 6), nn.Linear(6, 6)

        def forward(self, input_ids, attention_mask):
            x = self.layer(self.words(input_ids)).tanh()
            return torch.cat([x[:, :1], x], 1)

    base, ids = Longer().double(), tokens(5)
    experts = tuned(base)
    soup = q.soup(base, experts).state_dict
    padded, full = (
        {"input_ids": ids, "attention_mask": mask} for mask in (beginnings(5), torch.ones_like(ids))
    )
    audits = [
        q.audit(base, soup, experts, dict.fromkeys(TASKS, batches))
        for batches in ([padded], [full], [full, padded])
    ]
    assert [audit["output"] is None for audit in audits] == [True, False, True]
    assert all(None not in audit["layers"].values() for audit in audits)
