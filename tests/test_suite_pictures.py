"""The standard vision suite: its base, its pre-training, and, where the sets can be had, its rows
and experts."""

import json

import pytest
import torch
from safetensors import safe_open

from qpmerge_lite.companion import suites
from qpmerge_lite.companion.data import rows
from qpmerge_lite.companion.data.manifests import load_manifest, verify
from qpmerge_lite.companion.suites import augment, pictures, pretrain, training, vision
from qpmerge_lite.errors import MergeError


@pytest.fixture(scope="session")
def sets():
    """Rows of every set, by task."""
    try:
        return {task: rows(task) for task in pictures.TASKS}
    except MergeError as error:
        pytest.skip(f"the public sets cannot be had here: {error}")


def digests(images):
    """Content of every picture as the encoder may see it."""
    return {
        training.digest(picture)
        for picture in (255 * pictures.pixels(images)).round().to(torch.uint8)
    }


def test_the_encoder_reads_grey_and_colour_alike():
    encoder = pictures.build()
    grey = torch.randint(256, (2, 28, 28), dtype=torch.uint8)
    colour = torch.nn.functional.pad(grey, (2, 2, 2, 2))[..., None].expand(-1, -1, -1, 3)
    one, other = (pictures.collate({"image": images.numpy()}) for images in (grey, colour))
    assert one["pixels"].shape == (2, 3, 32, 32) and torch.allclose(
        one["pixels"], other["pixels"], atol=1e-6
    )
    assert one["pixels"].mean((1, 2, 3)).abs().max() < 1e-5 and encoder(**one).shape == (2, 128)
    assert sum(p.numel() for p in encoder.parameters()) < 1.5e6


def test_the_shipped_base_is_half_precision_of_the_declared_encoder():
    manifest = load_manifest(pictures.MANIFEST)
    assert pictures.WEIGHTS in verify(manifest) and pictures.WEIGHTS.stat().st_size < 4e6
    with safe_open(pictures.WEIGHTS, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
        made = manifest.source("base").extra["made"]
        assert file.metadata() == {k: v for k, v in made.items() if k != "command"}
    assert {k: v.shape for k, v in stored.items()} == {
        k: v.shape for k, v in pictures.build().state_dict().items()
    }
    assert {v.dtype for v in stored.values()} == {torch.float16}
    assert manifest.source("base").files[0].sha256 == pictures.base()[1]


def test_variations_stay_pictures_and_follow_their_generator():
    masters = vision.pretraining_data()[0][:16]
    shown = torch.rand(16, 3, 32, 32)
    for vary, given in ((augment.drawn, masters), (augment.view, shown)):
        first, again, other = (
            vary(given, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        )
        assert first.shape == (16, 3, 32, 32) and 0 <= first.min() and first.max() <= 1
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_pretraining_scores_name_the_glyph_and_the_other_view(monkeypatch):
    """An encoder that sees through every variation makes no mistake among views, and no view is
    compared with itself."""
    masters, classes = vision.pretraining_data()
    codes = torch.eye(96)[:8]
    monkeypatch.setattr(
        pictures,
        "pretraining_data",
        lambda: (masters, classes, torch.zeros(8, 32, 32, 3, dtype=torch.uint8)),
    )
    head = pictures.Heads(96, 400)
    head.project = torch.nn.Identity()
    encoder = lambda pixels: torch.cat([torch.zeros(24, 96), codes, codes])
    scores, right = pictures.pretraining_batch(encoder, head, torch.Generator().manual_seed(0), 32)
    assert scores.shape == (40, 400) and right[:24].max() < 400
    assert torch.equal(scores[24:].argmax(1), right[24:]) and not scores[24:, 16:].isfinite().any()
    assert (scores[24:, :16].diagonal() == -torch.inf).all()
    assert torch.nn.functional.cross_entropy(scores, right).isfinite()


def test_every_task_has_the_declared_classes(sets):
    assert {
        t: s["train"].features["label"].num_classes for t, s in sets.items()
    } == pictures.N_CLASSES


@pytest.mark.parametrize("task", ["cifar10", "omniglot_alphabets"])
def test_rows_are_the_declared_ones(task, sets):
    """As many as declared, from their own split; those for training follow the seed."""
    one, other = (pictures.data(task, seed) for seed in (0, 1))
    for split, most in pictures.SPLITS.items():
        assert len(one[split]) == min(most, len(sets[task][split]))
        first, second, every = (
            [i.tobytes() for i in d[split].with_format("numpy")[:]["image"]]
            for d in (one, other, sets[task])
        )
        assert (first == second) == (split != "train") and set(first) <= set(every)


def test_the_base_saw_no_picture_of_any_validation_or_test_split(sets):
    seen = {training.digest(picture) for picture in pictures.pretraining_data()[2]}
    assert len(seen) > 10_000
    for task, splits in sets.items():
        for split in ("validation", "test"):
            assert not seen & digests(splits[split].with_format("numpy")[:]["image"]), (
                f"{task}/{split}"
            )


def test_experts_and_their_heads_are_trained_from_the_base(sets, tmp_path, monkeypatch):
    monkeypatch.setenv("QPMERGE_CACHE", str(tmp_path))
    monkeypatch.setattr(pictures, "SPLITS", {"train": 512, "validation": 128, "test": 64})
    monkeypatch.setattr(pictures, "RECIPE", training.Recipe(steps=5, batch=32, probe_iterations=20))
    monkeypatch.setattr(suites, "task_data", suites.task_data.__wrapped__)
    suite = suites.load(
        "vision", "standard", progress=False, tasks=["kannada_mnist", "omniglot_alphabets"]
    )
    assert (
        suite.n_classes == {"kannada_mnist": 10, "omniglot_alphabets": 8}
        and len(list(tmp_path.rglob("*.safetensors"))) == 2
    )
    found = suite.evaluate(suite.experts["kannada_mnist"], "validation")
    assert found["kannada_mnist"] > 0.5 and list(found) == suite.tasks


@pytest.mark.slow
def test_pretraining_starts_again_as_the_shipped_base_did(sets):
    """The first steps of the schedule give the loss that the file's header tells; images may differ
    by a grey level."""
    made = load_manifest(pictures.MANIFEST).source("base").extra["made"]
    _, losses, accuracies = pretrain.pretrain(
        pictures, steps=int(made["steps"]), stop=pretrain.EARLY, progress=False
    )
    again = pretrain.header(pictures, 0, int(made["steps"]), losses, accuracies)
    assert again["data_sha256"] == made["data_sha256"]
    assert float(again["early_loss"]) == pytest.approx(float(made["early_loss"]), rel=0.05), (
        json.dumps(again)
    )
