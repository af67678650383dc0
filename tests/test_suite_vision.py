"""The embedded vision suite: what it promises about data, base, experts, calibration and cache."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from qpmerge_lite import methods
from qpmerge_lite.companion import suites
from qpmerge_lite.companion.data.manifests import load_manifest
from qpmerge_lite.companion.suites import (
    SuiteSpec,
    glyphs,
    language,
    prefixes,
    pretrain,
    training,
    vision,
    vit,
)
from qpmerge_lite.companion.suites.suite import IN_CACHE
from qpmerge_lite.errors import MergeError, MissingLayer, ShapeMismatch

QUICK = training.Recipe(steps=2, batch=16, probe_iterations=3)
PAIR = ["greek", "digits"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(vision, "RECIPE", QUICK)
        yield suites.load("vision", progress=False, tasks=PAIR)


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Names of the tasks that are trained, in an empty cache and with a short recipe."""
    monkeypatch.setenv("QPMERGE_CACHE", str(tmp_path))
    monkeypatch.setattr(vision, "RECIPE", QUICK)
    monkeypatch.setattr(vision, "SPLITS", {"train": 64, "validation": 24, "test": 24})
    monkeypatch.setattr(suites, "task_data", suites.task_data.__wrapped__)
    trained, original = [], training.train

    def train(*args, **options):
        trained.append(", ".join(args[2]))
        return original(*args, **options)

    monkeypatch.setattr(training, "train", train)
    return trained


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("task", vision.SCRIPTS)
def test_typefaces_of_splits_are_disjoint_and_cover_every_class(task):
    script = vision.SCRIPTS[task]
    for one, other in itertools.combinations(script.faces.values(), 2):
        assert not set(one) & set(other)
    for faces in script.faces.values():
        _, labels = vision.masters(script.characters, faces)
        assert set(labels.tolist()) == set(range(vision.N_CLASSES[task]))


@pytest.mark.parametrize("task", vision.SCRIPTS)
def test_no_two_classes_look_the_same_in_a_typeface(task):
    script = vision.SCRIPTS[task]
    able = [
        f
        for f in itertools.chain(*script.faces.values())
        if ord(script.characters[0]) in glyphs.characters(f)
    ]
    for face in able:
        images, _ = vision.masters(script.characters, [face])
        looks = torch.stack([torch.from_numpy(glyphs.signature(image)) for image in images.numpy()])
        assert len(looks) > 20 and (looks @ looks.T).triu(1).max() < 0.99, face


@pytest.mark.parametrize("task", vision.SCRIPTS)
def test_no_image_serves_two_splits(task):
    script = vision.SCRIPTS[task]
    looks = {}
    for split, faces in script.faces.items():
        images, labels = vision.masters(script.characters, faces)
        looks[split] = (
            torch.stack([torch.from_numpy(glyphs.signature(image)) for image in images.numpy()]),
            labels,
        )
    for one, other in itertools.combinations(looks, 2):
        (x, a), (y, b) = looks[one], looks[other]
        alike = (x @ y.T)[a[:, None] == b[None, :]]
        assert alike.max() < 0.999


def test_the_base_never_saw_a_task():
    characters = vision.base_characters()
    assert len(set(characters)) == len(characters) == 400
    assert not set(characters) & set(
        "".join(script.characters for script in vision.SCRIPTS.values())
    )
    media = {vision.DIGITS_MEDIUM, *(script.medium for script in vision.SCRIPTS.values())}
    assert len(media) == len(vision.TASKS) and not media & {*vision.BASE_MEDIA, glyphs.plain}


def test_splits_have_the_declared_schema(quick):
    from datasets import DatasetDict

    for task in PAIR:
        data = quick.data[task]
        assert isinstance(data, DatasetDict) and list(data) == list(vision.SPLITS)
        assert (
            data["train"].features["label"].num_classes
            == quick.n_classes[task]
            == vision.N_CLASSES[task]
        )
        assert data["test"].with_format("numpy")[:2]["image"].shape == (2, 28, 28)
    assert [len(quick.data["greek"][split]) for split in vision.SPLITS] == list(
        vision.SPLITS.values()
    )
    assert [len(quick.data["digits"][split]) for split in ("validation", "test")] == [200, 597]


def test_training_images_follow_the_seed_and_the_others_do_not():
    for split, varies in (("train", True), ("validation", False), ("test", False)):
        first, again, other = (vision.draw("hebrew", split, seed)["image"] for seed in (0, 0, 1))
        assert torch.equal(first, again) and torch.equal(first, other) != varies


def test_classes_and_examples_have_equal_shares():
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    chosen = vision.balanced(labels, 18, torch.Generator().manual_seed(0))
    assert labels[chosen].bincount().tolist() == [6, 6, 6]
    assert chosen.bincount().tolist() == [3, 3, 2, 2, 2, 6]


def test_encoder_offers_blocks_and_class_features(quick):
    assert isinstance(quick.base.blocks, torch.nn.ModuleList) and not quick.base.training
    batch = quick.calibration(5)["greek"][0]
    assert quick.base(**batch).shape == (5, quick.heads["greek"]["weight"].shape[1])
    assert all(value.dtype == torch.float32 for value in quick.base.state_dict().values())


def test_calibration_is_drawn_once_each_and_repeats(quick):
    drawn = quick.calibration(100, batch_size=32)
    assert [len(batch["pixels"]) for batch in drawn["greek"]] == [32, 32, 32, 4]
    assert list(drawn["greek"][0]) == ["pixels"]
    images = torch.cat([batch["pixels"] for batch in drawn["greek"]])
    assert images.shape == (100, 1, 28, 28) and len(images.unique(dim=0)) == 100
    again = torch.cat([batch["pixels"] for batch in quick.calibration(200)["greek"]])
    assert torch.equal(images, again[:100])
    other = torch.cat([batch["pixels"] for batch in quick.calibration(100, seed=1)["greek"]])
    assert not torch.equal(images, other)


def test_calibration_that_skips_is_disjoint(quick):
    first, second = (
        torch.cat([b["pixels"] for b in quick.calibration(60, skip=skip)["greek"]])
        for skip in (0, 60)
    )
    both = torch.cat([b["pixels"] for b in quick.calibration(120)["greek"]])
    assert torch.equal(torch.cat([first, second]), both) and len(both.unique(dim=0)) == 120
    with pytest.raises(
        MergeError, match="digits/validation: expected 1 to 150 calibration examples, found 151"
    ):
        quick.calibration(151, split="validation", tasks=["digits"], skip=50)


def test_calibration_can_use_up_a_split_and_no_more(quick):
    everything = quick.calibration(200, split="validation", tasks=["digits"])
    assert (
        list(everything) == ["digits"]
        and sum(len(b["pixels"]) for b in everything["digits"]) == 200
    )
    with pytest.raises(
        MergeError, match="digits/validation: expected 1 to 200 calibration examples, found 201"
    ):
        quick.calibration(201, split="validation", tasks=["digits"])
    with pytest.raises(
        MergeError, match="greek: expected a split among train, validation, test, found 'dev'"
    ):
        quick.calibration(1, split="dev", tasks=["greek"])


def test_evaluation_counts_right_answers(quick):
    rows = quick.data["digits"]["test"].with_format("numpy")[:]
    head = quick.heads["digits"]
    scores = quick.base(**vision.collate(rows)) @ head["weight"].T + head["bias"]
    right = int((scores.argmax(1).numpy() == rows["label"]).sum())
    assert quick.evaluate(quick.base.state_dict(), tasks=["digits"]) == {"digits": right / 597}


def test_normalised_accuracy_of_an_expert_is_one_on_its_own_task(quick):
    result = quick.normalised(quick.experts["greek"], "validation")
    assert list(result) == [*PAIR, "mean"] and result["greek"] == 1.0
    assert result["mean"] == sum(result[task] for task in PAIR) / 2


def test_a_state_that_does_not_fit_is_refused(quick):
    state = quick.base.state_dict()
    with pytest.raises(MissingLayer, match="blocks.0.up.bias"):
        quick.evaluate({k: v for k, v in state.items() if k != "blocks.0.up.bias"})
    with pytest.raises(ShapeMismatch, match="norm.bias"):
        quick.evaluate({**state, "norm.bias": torch.zeros(3)})


def test_unknown_names_are_refused_with_the_known_ones(quick):
    with pytest.raises(
        MergeError, match=r"expected one of vision \(smoke\).*, found vision \(large\)"
    ):
        suites.load("vision", tier="large")
    with pytest.raises(MergeError, match="expected tasks among latin, .*, found 'klingon'"):
        suites.load("vision", tasks=["klingon"])
    with pytest.raises(MergeError, match="expected tasks among greek, digits, found 'latin'"):
        quick.calibration(1, tasks=["latin"])


def test_a_cache_hit_trains_nothing(counted):
    first = suites.load("vision", progress=False, tasks=PAIR)
    again = suites.load("vision", progress=False, tasks=PAIR)
    assert counted == PAIR
    for task in PAIR:
        assert same(first.experts[task], again.experts[task]) and same(
            first.heads[task], again.heads[task]
        )


def test_seed_and_recipe_have_experts_of_their_own(counted, monkeypatch):
    one = suites.load("vision", progress=False, tasks=["digits"])
    two = suites.load("vision", seed=1, progress=False, tasks=["digits"])
    monkeypatch.setattr(vision, "RECIPE", training.Recipe(steps=1, batch=16, probe_iterations=3))
    three = suites.load("vision", progress=False, tasks=["digits"])
    assert counted == ["digits"] * 3
    assert not same(one.experts["digits"], two.experts["digits"])
    assert not same(one.experts["digits"], three.experts["digits"])


LAYER = "blocks.1.up"


@pytest.fixture
def single(counted, monkeypatch):
    monkeypatch.setattr(vision, "LAYER_RECIPE", QUICK)
    return suites.load("vision", progress=False, tasks=PAIR, layer=LAYER)


def test_experts_of_one_layer_are_the_base_elsewhere(single, counted):
    assert counted == PAIR and single.layer == LAYER
    for expert in single.experts.values():
        changed = {k for k, v in single.base.state_dict().items() if not torch.equal(v, expert[k])}
        assert changed == {f"{LAYER}.weight", f"{LAYER}.bias"}


def test_one_encoder_is_trained_on_all_tasks_and_kept(counted):
    suite = suites.load("vision", progress=False, tasks=PAIR)
    joint, state = suites.multitask(suite)
    assert counted == [*PAIR, ", ".join(PAIR)] and set(joint.heads) == set(PAIR)
    again, kept = suites.multitask(suite)
    assert (
        len(counted) == 3
        and same(state, kept)
        and all(same(joint.heads[t], again.heads[t]) for t in PAIR)
    )
    assert joint.evaluate(state).keys() == suite.evaluate(state).keys() and not same(
        joint.heads["greek"], suite.heads["greek"]
    )


@pytest.mark.parametrize(
    "said, lacking",
    [
        ({}, "TASKS, N_CLASSES, MANIFEST, RECIPE, base, data, collate, CHUNK, experts"),
        (vars(vision) | {"RECIPE": None}, "CHUNK, experts"),
        ({k: v for k, v in vars(vision).items() if k != "LAYER_RECIPE"}, "LAYER_RECIPE"),
    ],
)
def test_a_definition_that_lacks_something_is_refused(said, lacking):
    module = ModuleType("odd")
    vars(module).update(said, __name__="odd")
    with pytest.raises(MergeError, match=f"odd: expected a suite that defines .* no {lacking}; "):
        SuiteSpec.of(module)


def test_an_expert_that_is_never_right_is_named(quick):
    classes, width = quick.heads["greek"]["weight"].shape
    bias = torch.nn.functional.one_hot(torch.tensor(classes)).float()  # a class that no row has
    never = {"weight": torch.zeros(classes + 1, width), "bias": bias}
    suite = quick.with_heads({**quick.heads, "greek": never})
    with pytest.raises(
        MergeError,
        match=(
            "greek/test: expected an expert that is right at times, found a score of 0; its "
            "weights or its head"
        ),
    ):
        suite.normalised(suite.base.state_dict())


def test_evaluation_from_the_changed_block_on_is_evaluation(single, monkeypatch):
    """With a cached prefix or from the start, for states that differ in the layer, and for one that
    differs elsewhere too."""
    runs, original = [], prefixes.last_output

    def counted_output(*args):
        runs.append(args)
        return original(*args)

    monkeypatch.setattr(prefixes, "last_output", counted_output)
    elsewhere = {
        **single.experts["greek"],
        "blocks.0.up.bias": torch.ones_like(single.base.blocks[0].up.bias),
    }
    states = [single.base.state_dict(), *single.experts.values(), elsewhere]
    quickly = [single.evaluate(state) for state in states]
    sizes = [len(single.tensors(task, "test")[1]) for task in PAIR]
    assert len(runs) == sum(-(-size // IN_CACHE) for size in sizes)
    features = single._features(states[1], "greek", "test")
    monkeypatch.setattr(single, "layer", None)
    torch.testing.assert_close(single._features(states[1], "greek", "test"), features)
    assert [single.evaluate(state) for state in states] == quickly


def test_an_expert_that_two_ask_for_is_trained_by_one(tmp_path):
    """Threads stand for chapters that run side by side: one finds the lock held and waits."""
    trained = []

    def train():
        trained.append(1)
        time.sleep(0.2)
        return {"w": torch.ones(2)}, {"w": torch.zeros(2)}

    with ThreadPoolExecutor(2) as pool:
        ask = [pool.submit(training.cached_expert, tmp_path, "key", "a", train) for _ in range(2)]
    (encoder, head), (same, _) = (future.result() for future in ask)
    assert len(trained) == 1 and torch.equal(encoder["w"], same["w"]) and head["w"].sum() == 0


def test_training_is_deterministic(counted, monkeypatch, tmp_path):
    first = suites.load("vision", progress=False, tasks=["greek"])
    monkeypatch.setenv("QPMERGE_CACHE", str(tmp_path / "other"))
    again = suites.load("vision", progress=False, tasks=["greek"])
    assert counted == ["greek"] * 2 and same(first.experts["greek"], again.experts["greek"])


def test_interrupted_training_keeps_the_experts_that_were_ready(counted, monkeypatch):
    working = training.train

    def interrupted(*args, **options):
        if "digits" in args[2]:
            raise KeyboardInterrupt
        return working(*args, **options)

    monkeypatch.setattr(training, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        suites.load("vision", progress=False, tasks=PAIR)
    monkeypatch.setattr(training, "train", working)
    suites.load("vision", progress=False, tasks=PAIR)
    assert counted == PAIR


def test_a_cached_file_under_a_false_name_is_refused(counted, tmp_path):
    suites.load("vision", progress=False, tasks=["digits"])
    (path,) = tmp_path.rglob("digits-*.safetensors")
    training.write_weights({"x": torch.zeros(1)}, path, {"key": "other"})
    with pytest.raises(
        MergeError,
        match=r"digits-\w+.safetensors: expected cache key .* found other; delete the file",
    ):
        suites.load("vision", progress=False, tasks=["digits"])


@pytest.mark.parametrize("suite", [vision, language], ids=["vision", "language"])
def test_shipped_base_is_half_precision_of_the_declared_encoder(suite):
    with safe_open(suite.WEIGHTS, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
        made = load_manifest(suite.MANIFEST).source("base").extra["made"]
        assert file.metadata() == {k: v for k, v in made.items() if k != "command"}
    assert {name: value.shape for name, value in stored.items()} == {
        name: value.shape for name, value in suite.build().state_dict().items()
    }
    assert {value.dtype for value in stored.values()} == {torch.float16}


@pytest.mark.slow
@pytest.mark.parametrize("suite", [vision, language], ids=["vision", "language"])
def test_pretraining_starts_again_as_the_shipped_base_did(suite):
    """The first steps of the schedule give the loss that the file's header tells; images may differ
    by a grey level."""
    made = load_manifest(suite.MANIFEST).source("base").extra["made"]
    _, losses, accuracies = pretrain.pretrain(
        suite, steps=int(made["steps"]), stop=pretrain.EARLY, progress=False
    )
    again = pretrain.header(suite, 0, int(made["steps"]), losses, accuracies)
    assert again["data_sha256"] == made["data_sha256"]
    assert float(again["early_loss"]) == pytest.approx(float(made["early_loss"]), rel=0.05), (
        json.dumps(again)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name, worth", [("vision", 0.02), ("language", 0.01)])
def test_experts_are_good_and_merging_is_worth_it(name, worth):
    suite = suites.load(name, progress=False)
    raw = [suite.evaluate(suite.experts[task], tasks=[task])[task] for task in suite.tasks]
    mean = {
        k: sum(suite.experts[t][k] for t in suite.tasks) / len(suite.tasks)
        for k in suite.base.state_dict()
    }
    average, base = (
        suite.normalised(mean)["mean"],
        suite.normalised(suite.base.state_dict())["mean"],
    )
    regmean = suite.normalised(
        methods.regmean(suite.base, suite.experts, suite.calibration(256)).state_dict
    )["mean"]
    assert (
        sum(raw) / len(raw) >= 0.88
        and base < average - worth
        and average <= 0.945
        and average < regmean
    )


def test_the_public_format_has_the_same_logits_of_pictures_in_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    image = pytest.importorskip("PIL.Image")
    transformers.utils.logging.disable_progress_bar()
    encoder, generator = vision.base()[0], torch.Generator().manual_seed(0)
    state, labels = encoder.state_dict(), ["a", "b", "c"]
    head = {"weight": torch.randn(3, 96, generator=generator), "bias": torch.ones(3)}
    pictures = torch.randint(256, (3, glyphs.SIDE, glyphs.SIDE), generator=generator)
    vit.save(tmp_path / "base", state)
    vit.save(tmp_path / "expert", state, head, labels)
    vit.save_pictures(tmp_path / "pictures", pictures.tolist(), labels)
    base = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    expert = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "expert")
    assert expert.config.id2label == dict(enumerate(labels))
    reads = transformers.AutoImageProcessor.from_pretrained(tmp_path / "expert", backend="pil")
    files = [tmp_path / "pictures" / label / f"{n:04}.png" for n, label in enumerate(labels)]
    shown = [image.open(file).convert("RGB") for file in files]
    values = reads(images=shown, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = encoder(**vision.collate({"image": pictures}))
        found, logits = base(values).last_hidden_state[:, 0], expert.eval()(values).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    expected = wanted @ head["weight"].mT + head["bias"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
