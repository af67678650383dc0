# ruff: noqa: F811 (fixtures come by import)
"""The suites of public checkpoints on tiny random ones in the public format: served by a Hub on
this machine, pinned, fetched, merged, judged."""

import io
import json
import shutil

import pytest
import torch
import toysets
from safetensors.torch import load_file, save_file
from test_sources import hub, place  # noqa: F401

from qpmerge_lite import methods
from qpmerge_lite.companion import data, suites
from qpmerge_lite.companion.book import published
from qpmerge_lite.companion.data import manifests
from qpmerge_lite.companion.data.hub import lock
from qpmerge_lite.companion.data.manifests import load_manifest
from qpmerge_lite.companion.experiments import benchmark
from qpmerge_lite.companion.records import Record
from qpmerge_lite.companion.suites import clip, flan_t5, gpt2, public
from qpmerge_lite.errors import MergeError, MissingLayer

transformers = pytest.importorskip("transformers", reason="the hub extra is not installed")
REAL = manifests.FOLDER
ROWS = {"train": 400, "test": 40}


def folder_of(model, path, tokenizer=None, **files):
    """Files of a repository: a model as transformers saves it, tokenizer and others beside it."""
    model.save_pretrained(path)
    if tokenizer:
        tokenizer.save_pretrained(path)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(json.dumps(content))
    return {p.name: p.read_bytes() for p in path.iterdir()}


def moved(model, seed):
    """The model with other weights near its own, as of an expert."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * p.std().nan_to_num(0.0) * torch.randn(p.shape, generator=draw)
    return model


def serve(hub, name, files, kind="model"):
    """Serve what the manifest of this name asks for, by checkpoint or, for data, all at once; copy
    it here and pin it."""
    shutil.copy(REAL / f"{name}.yaml", manifests.FOLDER)
    for source in load_manifest(name).sources:
        own = files(source.checkpoint) if callable(files) else files
        empty = {
            f.path: b"{}" for f in source.files if "*" not in f.path
        }  # files that nothing here reads
        hub.add(
            source.extra["repo"],
            {
                **hub.repositories.get((f"{kind}s", source.extra["repo"]), {"main": ("", {})})[
                    "main"
                ][1],
                **empty,
                **own,
            },
            kind=kind,
            revision=source.extra["revision"],
        )
    lock(name)


def alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture
def ready(place, hub, monkeypatch):
    """An empty Hub, no tables kept, results in a folder of their own, and nothing held from another
    test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "tables"))
    monkeypatch.setenv("QPMERGE_CACHE", str(place / "results"))
    suites.task_data.cache_clear()
    torch.manual_seed(0)
    yield place, hub
    suites.task_data.cache_clear()


# --- CLIP
#
#
# --------------------------------------------------------------------------------------------------


def images(task, n, seed):
    """Labels, and PNG files of random images as the set has them: digits of MNIST grey, house
    numbers in colour and of several sizes."""
    from PIL import Image

    draw = torch.Generator().manual_seed(seed)
    files = []
    for i in range(n):
        shape = (28, 28) if task == "mnist" else (32 + i % 5, 32, 3)
        stream = io.BytesIO()
        Image.fromarray(torch.randint(256, shape, generator=draw, dtype=torch.uint8).numpy()).save(
            stream, "PNG"
        )
        files.append({"bytes": stream.getvalue(), "path": None})
    return files, torch.randint(10, (n,), generator=draw).tolist()


def clip_config():
    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = small | {
        "vocab_size": 514,
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 513,
        "max_position_embeddings": 77,
    }
    return transformers.CLIPConfig(
        text_config=text,
        vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=12,
    )


@pytest.fixture
def clips(ready):
    """The tasks mnist and svhn, a base, and for every checkpoint of the manifest an expert."""
    from datasets import ClassLabel, Features, Image

    place, hub = ready
    vocabulary = [
        *alphabet(),
        *(c + "</w>" for c in alphabet()),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = transformers.CLIPTokenizer(
        vocab={c: i for i, c in enumerate(vocabulary)}, merges=[]
    )
    crop = {
        "do_resize": True,
        "size": {"shortest_edge": 32},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "do_convert_rgb": True,
        "image_mean": [0.48, 0.45, 0.40],
        "image_std": [0.26, 0.26, 0.27],
        "resample": 3,
        "image_processor_type": "CLIPImageProcessor",
    }
    model = transformers.CLIPModel(clip_config())

    def files(checkpoint):
        if checkpoint == "base":
            return folder_of(model, place / "base", tokenizer, preprocessor_config__json=crop)
        expert = transformers.CLIPVisionModel(clip_config().vision_config)
        expert.load_state_dict(model.vision_model.state_dict())
        found = folder_of(moved(expert, len(checkpoint)), place / checkpoint)
        weights = load_file(
            place / checkpoint / "model.safetensors"
        )  # the public files hold them under the name of the tower
        save_file(
            {f"vision_model.{k}": v for k, v in weights.items()},
            place / "named.safetensors",
            {"format": "pt"},
        )
        return found | {"model.safetensors": (place / "named.safetensors").read_bytes()}

    serve(hub, clip.FAMILY, files)
    features = Features(image=Image(), label=ClassLabel(names=[str(i) for i in range(10)]))
    for task, where in (("mnist", "mnist"), ("svhn", "cropped_digits")):
        parts = {split: images(task, n, seed) for seed, (split, n) in enumerate(ROWS.items())}
        serve(
            hub,
            f"clip-{task}",
            {
                f"{where}/{split}-00000-of-00001.parquet": toysets.parquet(
                    dict(zip(("image", "label"), p)), features
                )
                for split, p in parts.items()
            },
            kind="dataset",
        )
    return suites.load("clip", "paper", progress=False, tasks=["mnist", "svhn"])


def test_clip_scores_are_those_of_the_whole_model_of_transformers(clips):
    """Base and expert: images through the processor, prompts through text tower and pooler, cosine
    times e^(logit scale)."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    folder = data.checkpoint(clip.FAMILY)
    model, tokenizer, processor = (
        CLIPModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
        CLIPImageProcessorPil.from_pretrained(folder),
    )
    prompts = public.prompts("clip")["svhn"]
    assert prompts["templates"] == ['a photo of the number: "{}".']
    texts = tokenizer(
        [prompts["templates"][0].format(c) for c in prompts["classes"]],
        padding=True,
        return_tensors="pt",
    )
    pictures = [image.convert("RGB") for image in data.rows("clip-svhn")["test"]["image"]]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    inputs, labels = clips.tensors("svhn", "test")
    assert inputs["pixels"].dtype == torch.uint8 and inputs["pixels"].shape == (40, 3, 32, 32)
    for state in (clips.base.state_dict(), clips.experts["svhn"]):
        model.vision_model.load_state_dict({k.removeprefix("vision."): v for k, v in state.items()})
        with torch.no_grad():
            wanted = model(**texts, pixel_values=pixels).logits_per_image
            found = clips.classifiers()["svhn"](
                torch.func.functional_call(clips.base, state, (), inputs)
            )
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        assert (
            clips.evaluate(state, "test", ["svhn"])["svhn"]
            == (wanted.argmax(1) == labels).float().mean()
        )


def test_the_text_head_averages_templates_on_the_sphere(clips):
    """Eight templates, one by one and without padding."""
    from transformers import AutoTokenizer, CLIPModel

    folder, prompts = data.checkpoint(clip.FAMILY), public.prompts("clip")["dtd"]
    model, tokenizer = (
        CLIPModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    found = clip.head(folder, prompts["classes"][:2], prompts["templates"])
    with torch.no_grad():
        for row, name in zip(found["weight"], prompts["classes"]):
            each = [
                model.text_projection(
                    model.text_model(
                        **tokenizer(
                            t.format(name), truncation=True, max_length=77, return_tensors="pt"
                        )
                    ).pooler_output
                )[0]
                for t in prompts["templates"]
            ]
            mean = sum(e / e.norm() for e in each)
            torch.testing.assert_close(
                row, model.logit_scale.exp() * mean / mean.norm(), rtol=1e-3, atol=1e-4
            )


def test_clip_is_merged_judged_and_kept(clips):
    found = {
        r["method"]: r
        for r in [
            *benchmark.ceilings(clips),
            *(benchmark.result(clips, m, 8) for m in ("soup", "regmean", "qp_rows")),
        ]
    }
    assert set(found) == {"experts", "soup", "regmean", "qp_rows"}  # and no multi-task training
    soup = {
        k: torch.stack([e[k] for e in clips.experts.values()]).mean(0)
        for k in clips.base.state_dict()
    }
    assert found["soup"]["accuracy"] == clips.evaluate(soup)
    merge = methods.qp(
        clips.base, clips.experts, clips.calibration(8), basis="rows", progress=False
    )
    assert {
        f"vision.encoder.layers.{i}.{part}"
        for i in (0, 1)
        for part in ("self_attn.q_proj", "mlp.fc2", "layer_norm1")
    } <= {r["layer"] for r in merge.table}
    assert not any("projection" in name for name in merge.state_dict)


def test_validation_is_a_tenth_of_train_and_the_same_every_time(clips):
    rows = data.rows("clip-mnist")
    assert {s: len(p) for s, p in rows.items()} == {"train": 360, "validation": 40, "test": 40}
    assert clips.data["mnist"]["validation"]["label"] == rows["validation"]["label"]
    assert (
        suites.load("clip", "paper", seed=1, progress=False, tasks=["mnist"]).data["mnist"][
            "validation"
        ]["label"]
        == rows["validation"]["label"]
    )


def test_a_checkpoint_that_lacks_a_weight_is_refused(clips, tmp_path):
    from transformers import CLIPVisionModel

    folder = data.checkpoint(f"{clip.FAMILY}/mnist")
    shutil.copy(folder / "config.json", tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.1.mlp.fc1.bias" not in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        MissingLayer,
        match=(
            r"expected every weight of a CLIPVisionModel, found none that fits "
            r"\S*layers.1.mlp.fc1.bias \(1 in all\)"
        ),
    ):
        public.pretrained(CLIPVisionModel, tmp_path)


def test_public_experts_differ_in_all_layers():
    with pytest.raises(
        MergeError,
        match=(
            "expected no layer, as its experts are public checkpoints and differ in all, found 'x'"
        ),
    ):
        suites.load("clip", "paper", layer="x")


def test_prompts_are_as_many_as_the_protocol_has():
    counts = {
        task: (len(p["templates"]), len(p["classes"])) for task, p in public.prompts("clip").items()
    }
    assert counts == {
        "sun397": (2, 397),
        "stanford_cars": (8, 196),
        "resisc45": (18, 45),
        "eurosat": (3, 10),
        "svhn": (1, 10),
        "gtsrb": (3, 43),
        "mnist": (1, 10),
        "dtd": (8, 47),
    }
    assert all(t.count("{}") == 1 for p in public.prompts("clip").values() for t in p["templates"])


def test_published_figures_fit_the_suites_and_stand_beside_what_was_measured():
    every = published.read(REAL.parent / "book" / "published.yml")
    assert {family: part["tasks"] for family, part in every.items()} == {
        m.__name__.rpartition(".")[2]: m.TASKS for m in (clip, gpt2, flan_t5)
    }
    rows = [row for part in every.values() for row in part["rows"]]
    assert all(row["entry"] in {*benchmark.ENTRIES, "experts"} for row in rows if "entry" in row)
    means = {row["label"]: sum(row["values"]) / 8 for row in every["clip"]["rows"]}
    assert means["simple average"] == pytest.approx(66.5, abs=0.06) and means[
        "RegMean++"
    ] == pytest.approx(84.4, abs=0.06)  # as published
    part = {
        "tasks": ["a", "b"],
        "rows": [
            {"label": "soup", "entry": "soup", "values": [50.0, 60.0]},
            {"label": "other", "values": [1.0, 2.0]},
        ],
    }
    found = {f"x.soup.{t}.accuracy": Record("", v) for t, v in (("a", 0.52), ("b", 0.57))}
    assert published.table("x", part, {}).splitlines()[2:] == [
        "| soup | 50.0 | 60.0 | 55.0 |",
        "| other | 1.0 | 2.0 | 1.5 |",
    ]
    assert (
        published.table("x", part, found).splitlines()[2]
        == "| soup | 52.0 / 50.0 / +2.0 | 57.0 / 60.0 / -3.0 | 54.5 / 55.0 / -0.5 |"
    )


# --- GLUE
#
#
# --------------------------------------------------------------------------------------------------

WORDS = "a dog did not eat the old red hat and yes it was good or bad".split()


def sentences(n, seed):
    draw = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (2 + k % 7,), generator=draw))
        for k in range(n)
    ]


def glue(hub, task, kind, *names):
    """Serve a task of GLUE with random sentences and labels, under the columns of the public
    files."""
    from datasets import Features, Value

    columns = {}
    for seed, (split, n) in enumerate({"train": 200, "validation": 40}.items()):
        labels = torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
        table = {name: sentences(n, 10 * seed + i) for i, name in enumerate(names)} | {
            "label": [kind.cast(y) for y in labels]
        }
        features = Features({**dict.fromkeys(names, Value("string")), "label": kind.feature})
        columns[f"{task}/{split}-00000-of-00001.parquet"] = toysets.parquet(table, features)
    serve(hub, f"glue-{task}", columns, kind="dataset")


class Classes:
    """Labels that are numbers of named classes."""

    cast = int

    def __init__(self, task):
        import yaml
        from datasets import ClassLabel

        self.feature = ClassLabel(
            names=yaml.safe_load((REAL / f"glue-{task}.yaml").read_text())["labels"]
        )


@pytest.fixture
def gpts(ready):
    place, hub = ready
    vocabulary = [*alphabet(), gpt2.PAD]
    tokenizer = transformers.GPT2Tokenizer(
        vocab={c: i for i, c in enumerate(vocabulary)}, merges=[]
    )
    config = transformers.GPT2Config(
        vocab_size=257,
        n_positions=512,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    backbone = transformers.GPT2Model(config)

    def files(checkpoint):
        if checkpoint == "base":
            return folder_of(backbone, place / "base", tokenizer)
        expert = transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config.from_dict(
                {**config.to_dict(), "num_labels": gpt2.N_CLASSES[checkpoint]}
            )
        )
        expert.transformer.load_state_dict(backbone.state_dict())
        return folder_of(moved(expert, len(checkpoint)), place / checkpoint)

    serve(hub, gpt2.FAMILY, files)
    glue(hub, "cola", Classes("cola"), "sentence")
    glue(hub, "qnli", Classes("qnli"), "question", "sentence")
    return suites.load("gpt2", "paper", progress=False, tasks=["cola", "qnli"])


def test_gpt2_answers_are_those_of_transformers_own_classifier(gpts):
    from transformers import AutoTokenizer, GPT2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(data.checkpoint(gpt2.FAMILY), pad_token=gpt2.PAD)
    for task in gpts.tasks:
        model, rows = (
            GPT2ForSequenceClassification.from_pretrained(data.checkpoint(f"gpt2/{task}")).eval(),
            data.rows(f"glue-{task}")["test"],
        )
        texts = [list(rows[c]) for c in ("text", "pair") if c in rows.column_names]
        inputs = tokenizer(
            *texts,
            padding="max_length",
            max_length=gpt2.LENGTH,
            truncation=True,
            return_tensors="pt",
        )
        for name, value in gpts.tensors(task, "test")[0].items():
            assert torch.equal(value, inputs[name])
        with torch.no_grad():
            wanted = model(**inputs).logits
            found = gpts.classifiers()[task](
                torch.func.functional_call(gpts.base, gpts.experts[task], (), dict(inputs))
            )
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        right = (wanted.argmax(1) == torch.tensor(rows["label"])).float().mean()
        assert gpts.evaluate(gpts.experts[task], "test", [task])[task] == right


def test_gpt2_is_merged_and_judged(gpts):
    found = [
        *benchmark.ceilings(gpts),
        *(benchmark.result(gpts, m, 8) for m in ("soup", "regmean", "qp_rows")),
    ]
    assert all(set(r["accuracy"]) == {"cola", "qnli"} for r in found)
    assert set(gpts.calibration(8)["cola"][0]) == {"input_ids", "attention_mask"}


class Scores:
    """Labels that are numbers."""

    cast = float

    def __init__(self):
        from datasets import Value

        self.feature = Value("float32")


@pytest.fixture
def fives(ready):
    place, hub = ready
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        "▁yes",
        "▁no",
        "▁1.0",
        "▁2.5",
        "▁acceptable",
        "▁unacceptable",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    tokenizer = transformers.T5Tokenizer(
        vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0
    )
    config = transformers.T5Config(
        vocab_size=len(pieces),
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = transformers.T5ForConditionalGeneration(config)
    words = torch.randn(len(pieces), 16)
    words[10:] *= 0.1  # answers are mostly whole words
    model.lm_head.weight = torch.nn.Parameter(words)  # of its own, as in the public files

    def files(checkpoint):
        return folder_of(
            model if checkpoint == "base" else moved(model, len(checkpoint)),
            place / checkpoint,
            tokenizer if checkpoint == "base" else None,
        )

    serve(hub, flan_t5.FAMILY, files)
    glue(hub, "rte", Classes("rte"), "sentence1", "sentence2")
    glue(hub, "stsb", Scores(), "sentence1", "sentence2")
    return suites.load("flan_t5", "paper", progress=False, tasks=["rte", "stsb"])


def asked(task, split="test"):
    """Questions, written here once more, and labels."""
    rows = data.rows(f"glue-{task}")[split]
    form = {
        "rte": "Does the text: '{}' entail that '{}' is true? Provide 'yes' or 'no'.",
        "stsb": (
            "Consider the sentences '{}' and '{}'. On a scale from 1 (completely different) "
            "to 5 (completely similar), rate the similarity."
        ),
    }
    return [form[task].format(*pair) for pair in zip(rows["text"], rows["pair"])], rows["label"]


def test_flan_t5_answers_are_those_that_transformers_generates(fives):
    from scipy.stats import spearmanr
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(data.checkpoint(flan_t5.FAMILY))
    said = {}
    for task in fives.tasks:
        model, (texts, labels) = (
            T5ForConditionalGeneration.from_pretrained(
                data.checkpoint(f"{flan_t5.FAMILY}/{task}")
            ).eval(),
            asked(task),
        )
        assert fives.data[task]["test"]["text"][:] == texts
        inputs = tokenizer(
            texts, padding="max_length", max_length=512, truncation=True, return_tensors="pt"
        )
        tokens = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_length=10
        )
        said[task] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        if task == "rte":
            wanted = sum(s == ("yes", "no")[y] for s, y in zip(said[task], labels)) / len(labels)
        else:
            numbers = [float(s) if s.replace(".", "").isdigit() else 0.0 for s in said[task]]
            wanted = spearmanr(numbers, labels).statistic if len(set(numbers)) > 1 else 0.0
        assert fives.evaluate(fives.experts[task], "test", [task])[task] == pytest.approx(wanted)
    assert len({answer for answers in said.values() for answer in answers}) > 1


def test_right_answers_and_ranks_count(fives, monkeypatch):
    """With answers put in place of the generated ones: texts have to agree, numbers to rank alike,
    and what is no number is 0."""
    tokenizer = flan_t5._tokenizer(data.checkpoint(flan_t5.FAMILY))
    say = lambda *texts: monkeypatch.setattr(
        flan_t5,
        "generated",
        lambda *_: torch.tensor([[0, *tokenizer.encode(t).ids[:1], 1] for t in texts]),
    )
    state = fives.base.state_dict()
    say("yes", "no", "no", "acceptable")
    assert flan_t5.score("rte", fives.base, state, [{}], torch.tensor([0, 1, 0, 1])) == 0.5
    say("2.5", "1.0", "yes")
    assert flan_t5.score(
        "stsb", fives.base, state, [{}], torch.tensor([4.0, 2.0, 1.0])
    ) == pytest.approx(1.0)
    assert flan_t5.correlation([1.0, 1.0], [0.0, 2.0]) == 0.0


def test_calibration_reads_what_the_expert_answers_and_no_label(fives):
    (batch,) = fives.calibration(8)["rte"]
    tokens, mask = batch["decoder_input_ids"], batch["decoder_attention_mask"].bool()
    assert (
        set(batch) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
        and (tokens[:, 0] == 0).all()
        and mask[:, 0].all()
    )
    assert not (tokens[mask] == 1).any() and (mask.long().diff(dim=1) <= 0).all()
    with (
        torch.no_grad()
    ):  # greedy: under the expert every next token is the likeliest one behind those read
        states = torch.func.functional_call(
            fives.base, fives.experts["rte"], (), batch, tie_weights=False
        )
        likeliest = (states @ fives.experts["rte"]["t5.lm_head.weight"].T).argmax(-1)
    assert torch.equal(likeliest[:, :-1][mask[:, 1:]], tokens[:, 1:][mask[:, 1:]])


def test_flan_t5_is_merged_and_judged_without_what_needs_heads(fives, monkeypatch):
    calibration = fives.calibration(8)
    merge = methods.qp(fives.base, fives.experts, calibration, basis="rows", progress=False)
    for made in (merge, methods.regmean(fives.base, fives.experts, calibration, progress=False)):
        assert set(fives.evaluate(made.state_dict)) == {"rte", "stsb"}
    monkeypatch.setattr(benchmark, "load", lambda *a, **k: fives)
    monkeypatch.setattr(benchmark, "result", lambda suite, entry, size: entry)
    monkeypatch.setattr(benchmark, "ceilings", lambda suite: [])
    assert benchmark.comparison(
        "flan_t5", 0, "paper", size=8, entries=("soup", "fisher", "adamerging", "qp_rows")
    ) == ["soup", "qp_rows"]
    solved = {row["layer"] for row in merge.table}
    assert {
        "t5.encoder.block.0.layer.0.SelfAttention.q",
        "t5.decoder.block.1.layer.1.EncDecAttention.o",
    } <= solved
    assert "t5.lm_head.weight" in merge.averaged
