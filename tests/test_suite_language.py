"""The embedded language suite: words that stay in their split, styles that the base never saw,
texts that fit."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from qpmerge_lite.companion.suites import esm, language

pytest.importorskip("wordfreq", reason="the suites extra is not installed on bare GPU hosts")


def test_a_word_has_one_split_whatever_the_language():
    pools = {}
    for task in language.TASKS:
        for split, lists in language.lexicon(task).items():
            pools.setdefault(split, set()).update(itertools.chain(*lists.values()))
    for one, other in itertools.combinations(pools.values(), 2):
        assert not one & other
    assert {split: {language.split_of(w) for w in words} for split, words in pools.items()} == {
        s: {s} for s in language.SPLITS
    }


def test_the_base_read_training_words_only():
    ids, languages = language.pretraining_data()
    letters = {i: c for c, i in language.alphabet().items()}
    read = {"".join(letters[i] for i in row if i != language.PAD) for row in ids.tolist()}
    assert {language.split_of(word) for word in read} == {
        "train"
    } and languages.unique().numel() == len(language.LANGUAGES)


@pytest.mark.parametrize("task", language.TASKS)
def test_no_word_answers_for_two_languages_and_none_is_english(task):
    english = set(language.words("en"))
    for lists in language.lexicon(task).values():
        assert all(len(words) > 200 for words in lists.values())
        for one, other in itertools.combinations(lists.values(), 2):
            assert not set(one) & set(other)
        assert not english & set(itertools.chain(*lists.values()))


@pytest.mark.parametrize(
    "name, written",
    [
        ("backwards", "fed cba"),
        ("words backwards", "cba fed"),
        ("inside out", "bca efd"),
        ("odd letters first", "acb dfe"),
        ("vowels shifted", "ebc dif"),
        ("consonants shifted", "apc tev"),
    ],
)
def test_styles_are_what_they_are_called(name, written):
    assert language.STYLES[name]("abc def") == written


def test_styles_lose_no_letter():
    for task in language.DEFINITIONS.values():
        for style in task.styles:
            if "shifted" not in style:
                assert sorted(language.STYLES[style]("čtyři malé kočky")) == sorted(
                    "čtyři malé kočky"
                )


@pytest.mark.parametrize("task", language.TASKS)
def test_texts_fit_and_training_texts_follow_the_seed(task, monkeypatch):
    monkeypatch.setattr(language, "SPLITS", {"train": 30, "validation": 20, "test": 20})
    first, again, other = (language.data(task, seed) for seed in (0, 0, 1))
    for split, varies in (("train", True), ("validation", False), ("test", False)):
        assert (
            first[split]["text"] == again[split]["text"]
            and (first[split]["text"] == other[split]["text"]) != varies
        )
    assert (
        first["test"].features["label"].num_classes
        == language.N_CLASSES[task]
        == len(set(first["test"]["label"]))
    )
    batch = language.collate(first["train"][:])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (30, language.LENGTH)
    assert torch.equal(
        batch["attention_mask"].sum(1), torch.tensor([len(t) for t in first["train"]["text"]])
    )


def test_padding_does_not_reach_the_features():
    base, _ = language.base()
    ids = language.encode(["ano ne snad", "ja"])
    mask = (ids != language.PAD).long()
    whole = base.eval()(ids, mask)
    alone = base(ids[1:, :2], mask[1:, :2])
    noisy = base(ids.masked_fill(mask == 0, 7), mask)
    torch.testing.assert_close(whole[1:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole, noisy)


def test_a_pretraining_batch_asks_for_masked_characters_and_languages():
    torch.manual_seed(0)
    encoder = language.build()
    head = language.pretraining_head(encoder)
    scores, targets = language.pretraining_batch(
        encoder, head, torch.Generator().manual_seed(0), 16
    )
    characters = encoder.embed.num_embeddings
    assert scores.shape == (len(targets), characters + len(language.LANGUAGES))
    assert (
        (targets >= characters).sum() == 16
        and targets[:-16].max() < characters
        and targets.min() > language.MASK
    )


def test_the_public_format_has_the_same_outputs_and_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    encoder, _ = language.base()
    esm.save(tmp_path / "base", encoder.state_dict())
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    texts = ["nup le euq", "ab c"]
    rows = language.collate({"text": texts})
    read = tokenizer(texts, padding="max_length", max_length=language.LENGTH, return_tensors="pt")
    assert torch.equal(read["input_ids"], rows["input_ids"])
    assert torch.equal(read["attention_mask"], rows["attention_mask"])
    with torch.no_grad():
        states = model(**rows).last_hidden_state
        wanted = encoder(**rows)
    torch.testing.assert_close(encoder.pool(states, rows["attention_mask"]), wanted)
    back = esm.read(tmp_path / "base")
    assert all(torch.equal(back[name], value) for name, value in encoder.state_dict().items())


def test_names_of_the_public_format_lead_back():
    state = language.build().state_dict()
    back = esm.suite_state(esm.esm_state(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_an_adapter_of_full_rank_is_the_expert_but_for_gains_and_tables(tmp_path):
    torch.manual_seed(0)
    base, expert = language.build().state_dict(), language.build().state_dict()
    esm.save_adapter(tmp_path / "adapter", base, expert, rank=64)
    entries = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    wanted, origin = esm.esm_state(expert), esm.esm_state(base)
    for layer in said["target_modules"]:
        place = f"base_model.model.{layer}"
        update = entries[f"{place}.lora_B.weight"] @ entries[f"{place}.lora_A.weight"]
        name = f"{layer}.weight"
        torch.testing.assert_close(update, wanted[name] - origin[name], atol=1e-5, rtol=0)
    assert len(said["target_modules"]) == 6 * len(language.build().blocks)
    biases = {name for name in wanted if name.endswith(".bias")}
    assert {f"base_model.model.{name}" for name in biases} <= entries.keys()
