"""The standard language suite: a real tokenizer and encoder where the checkpoint is at hand, a tiny
random one elsewhere."""

import pytest
import torch

from qpmerge_lite import gradient, qp
from qpmerge_lite.companion import data, suites
from qpmerge_lite.companion.data.manifests import ManifestError
from qpmerge_lite.companion.suites import prefixes, sentences, training

transformers = pytest.importorskip("transformers", reason="the hub extra is not installed")
TEXTS = ("what is a word", "who wrote this play and when was it first shown", "how far")


@pytest.fixture
def encoder(tmp_path):
    """Two layers of random weights, of the architecture of the checkpoint, from a configuration
    with dropout as it has."""
    transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    ).save_pretrained(tmp_path)
    return sentences.build(tmp_path).eval().requires_grad_(False)


def written(n, length=12, seed=0):
    """Word pieces of n random sentences, padded to twice the length of the longest."""
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.arange(2 * length) < torch.randint(3, length + 1, (n, 1), generator=draw)).long()
    return {
        "input_ids": torch.randint(5, 60, (n, 2 * length), generator=draw) * mask,
        "attention_mask": mask,
    }


def test_padding_does_not_reach_the_features(encoder):
    batch = written(6)
    noisy = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)}
    alone = {k: v[:1, : batch["attention_mask"][0].sum()] for k, v in batch.items()}
    torch.testing.assert_close(encoder(**batch), encoder(**noisy))
    torch.testing.assert_close(encoder(**batch)[:1], encoder(**alone), rtol=1e-4, atol=1e-5)


def test_sentences_that_pass_in_groups_get_the_same_features_and_gradients(encoder):
    batch, together = written(2 * sentences.ALIKE + 3), encoder._mean
    encoder.requires_grad_(True)
    grouped, whole = (
        torch.autograd.grad(f(**batch).square().sum(), list(encoder.parameters()))
        for f in (encoder, together)
    )
    torch.testing.assert_close(encoder(**batch), together(**batch))
    torch.testing.assert_close(grouped, whole, rtol=1e-4, atol=1e-5)


def test_batches_are_cut_to_their_longest_sentence():
    batch = written(6)
    longest = int(batch["attention_mask"].sum(1).max())
    assert {v.shape for v in training.trim(batch).values()} == {(6, longest)}
    assert training.trim({"pixels": batch["input_ids"]})["pixels"] is batch["input_ids"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_expert_learns_its_task_and_a_seed_decides_it(encoder, tmp_path, precision):
    inputs = training.trim(written(96))
    labels = (inputs["input_ids"][:, 0] > 32).long()
    recipe = training.Recipe(steps=30, batch=32, rate=1e-2, precision=precision, chunk=40)
    facts = {"task": "t", "classes": 2, "seed": 0, "progress": False}
    (state, head), (again, _) = (
        training.expert(
            encoder, "sha", (inputs, labels), recipe=recipe, folder=tmp_path / str(i), **facts
        )
        for i in (0, 1)
    )
    assert all(torch.equal(v, again[k]) for k, v in state.items()) and {
        v.dtype for v in state.values()
    } == {torch.float32}
    found = torch.func.functional_call(encoder, state, (), inputs) @ head["weight"].T + head["bias"]
    assert (found.argmax(1) == labels).float().mean() > 0.9
    (kept,) = (tmp_path / "0").glob("*.safetensors")
    other = training.Recipe(steps=30, batch=32, rate=1e-2, chunk=41)
    training.expert(encoder, "sha", (inputs, labels), recipe=other, folder=tmp_path / "0", **facts)
    assert len(list(kept.parent.glob("*.safetensors"))) == 2


def test_keys_of_experts_kept_before_precision_was_a_field_still_hold():
    assert (
        training._recipe(training.Recipe()).keys()
        == training.Recipe.__dataclass_fields__.keys() - training.LATER.keys()
    )
    assert training._recipe(training.Recipe(precision="bfloat16"))["precision"] == "bfloat16"


def test_its_blocks_are_found_and_merged(encoder):
    state = encoder.state_dict()
    experts = {t: {k: v + 0.05 * torch.randn(v.shape) for k, v in state.items()} for t in "ab"}
    calibration = {t: [training.trim(written(24, seed=i))] for i, t in enumerate("ab")}
    merge = qp(encoder, experts, calibration, basis="rows")
    solved = {row["layer"] for row in merge.table}
    for layer in range(2):
        for part in (
            "attention.self.query",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ):
            assert f"bert.encoder.layer.{layer}.{part}" in solved


def checkpoint():
    try:
        return data.checkpoint(sentences.CHECKPOINT)
    except ManifestError as error:
        pytest.skip(f"no checkpoint: {error}")


def test_the_base_is_the_checkpoint_and_reads_its_own_word_pieces():
    folder = checkpoint()
    base, sha256 = sentences.base()
    (weights,) = (
        file
        for source in data.load_manifest(sentences.CHECKPOINT).sources
        for file in source.files
        if source.id == "package" and file.path.endswith("model.safetensors")
    )
    assert sha256 == weights.sha256
    before = prefixes.blocks_before(base, "bert.encoder.layer.2.output.dense")
    assert before == list(base.bert.encoder.layer[:2])
    batch = sentences.collate({"text": TEXTS})
    plain = transformers.AutoTokenizer.from_pretrained(folder)(
        list(TEXTS), padding="max_length", max_length=sentences.LENGTH
    )
    assert torch.equal(batch["input_ids"], torch.tensor(plain["input_ids"]))
    assert torch.equal(batch["attention_mask"], torch.tensor(plain["attention_mask"]))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        states = model(**batch).last_hidden_state * mask
        torch.testing.assert_close(
            base.eval()(**batch), states.sum(1) / mask.sum(1), rtol=1e-3, atol=1e-4
        )


def test_two_tasks_are_trained_merged_and_judged(monkeypatch, tmp_path):
    checkpoint()
    try:
        data.fetch("trec")
    except ManifestError as error:
        pytest.skip(f"no data: {error}")
    monkeypatch.setenv("QPMERGE_CACHE", str(tmp_path))
    monkeypatch.setattr(sentences, "SPLITS", {"train": 60, "validation": 30, "test": 40})
    monkeypatch.setattr(
        sentences, "RECIPE", training.Recipe(steps=4, batch=16, rate=1e-4, chunk=16)
    )
    suites.task_data.cache_clear()
    suite = suites.load("language", "standard", tasks=["trec", "snips"], progress=False)
    suites.task_data.cache_clear()
    assert suite.data["trec"].num_rows == sentences.SPLITS
    for split in sentences.SPLITS:
        lengths = [len(text) for text in suite.data["trec"][split]["text"]]
        assert lengths == sorted(lengths)
    drawn = suite.calibration(20)["trec"]
    assert [b["input_ids"].shape[0] for b in drawn] == [8, 8, 4] and all(
        b["attention_mask"].any(0).all() for b in drawn
    )
    lengths = torch.cat([b["attention_mask"].sum(1) for b in drawn])
    assert torch.equal(lengths, lengths.sort().values)
    assert suite.normalised(
        gradient.fisher(
            suite.base, suite.experts, suite.calibration(20), heads=suite.classifiers()
        ).state_dict
    )
    merge = qp(
        suite.base,
        suite.experts,
        suite.calibration(8),
        basis="layer",
        ridge=0.1,
        folds=1,
        layers=["bert.encoder.layer.0.intermediate.dense"],
    )
    assert set(suite.normalised(merge.state_dict)) == {"trec", "snips", "mean"}
