"""Experts with heads of their own: backbones are merged as the Python function merges them, and
every head is kept as it is, for transformers alone to load."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_families import (
    SIZE,
    assert_same,
    change,
    contents,
    reshape,
    run,
    state_of,
    texts,
    tokenizer,
    tuned,
)
from test_checkpoints_adapters import write_adapter

import qpmerge_lite as q
from qpmerge_lite.checkpoints import merging, tensors
from qpmerge_lite.checkpoints.compatibility import check
from qpmerge_lite.checkpoints.evaluation.subjects import loaded, model_of, subject_of
from qpmerge_lite.checkpoints.findings import INFO, WARNING
from qpmerge_lite.checkpoints.folders import Checkpoint
from qpmerge_lite.checkpoints.headers import Entry, Header
from qpmerge_lite.checkpoints.heads import running, telling
from qpmerge_lite.checkpoints.output import number_of

transformers = pytest.importorskip(
    "transformers", reason="the hub extra, which makes and runs checkpoints, is not here"
)
safetensors = pytest.importorskip("safetensors.torch")

PLACED = {"max_position_embeddings": 16, **SIZE}
PICTURES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
LABELS = {"sentiment": ["bad", "so so", "good"], "topics": ["sport", "arts", "law", "food", "war"]}
NAMES = tuple(LABELS)


def llama(**fields):
    return {"num_key_value_heads": 1, "pad_token_id": 0, **PLACED, **fields}


# kind -> class of the base, fields of its configuration, classes of the experts
KINDS = {
    "bert": ("BertModel", PLACED, ["BertForSequenceClassification"] * 2),
    "masked": ("BertForMaskedLM", PLACED, ["BertForSequenceClassification"] * 2),
    "tokens": (
        "BertModel",
        PLACED,
        ["BertForSequenceClassification", "BertForTokenClassification"],
    ),
    "classifier": (
        "BertForSequenceClassification",
        PLACED | {"num_labels": 4},
        ["BertForSequenceClassification"] * 2,
    ),
    "roberta": (
        "RobertaForMaskedLM",
        PLACED | {"max_position_embeddings": 20, "pad_token_id": 0},
        ["RobertaForSequenceClassification"] * 2,
    ),
    "vit": ("ViTModel", PICTURES, ["ViTForImageClassification"] * 2),
    "llama": (
        "LlamaForCausalLM",
        llama(tie_word_embeddings=False),
        ["LlamaForSequenceClassification"] * 2,
    ),
    "tied llama": (
        "LlamaForCausalLM",
        llama(tie_word_embeddings=True),
        ["LlamaForSequenceClassification"] * 2,
    ),
}


def expert_of(base, kind, name, seed):
    """A classifier on the base's backbone, with noise on every parameter."""
    config = copy.deepcopy(base.config)
    config.id2label = dict(enumerate(LABELS[name]))
    config.label2id = {label: number for number, label in config.id2label.items()}
    torch.manual_seed(10 + seed)
    model = with_gain(getattr(transformers, kind)(config))
    model.base_model.load_state_dict(base.base_model.state_dict(), strict=False)
    return tuned(model.eval(), seed)


@torch.no_grad()
def with_gain(model):
    """Matrices that do not make all inputs alike."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    return model


class Family:
    """A base and two experts with heads of their own, on disk and in memory."""

    def __init__(self, root, kind):
        torch.manual_seed(0)
        made, fields, classes = KINDS[kind]
        made = getattr(transformers, made)
        self.root, self.base, self.kind = root, root / "base", kind
        self.model = with_gain(made(made.config_class(**fields)).eval())
        self.experts = {}
        for seed, (name, own) in enumerate(zip(NAMES, classes), 1):
            self.experts[name] = expert_of(self.model, own, name, seed)
        for name, model in {"base": self.model, **self.experts}.items():
            model.save_pretrained(root / name)
            if kind == "vit":
                self.processor().save_pretrained(root / name)
            else:
                tokenizer().save_pretrained(root / name)

    def processor(self):
        return transformers.ViTImageProcessor(size={"height": 16, "width": 16})

    @property
    def folders(self):
        return [str(self.root / name) for name in ("base", *NAMES)]

    @property
    def body(self):
        """The base's backbone."""
        return self.model.base_model

    @property
    def bodies(self):
        """The experts' backbones, the base's where they have a part less or more."""
        own = self.body.state_dict()
        found = {}
        for name, model in self.experts.items():
            state = model.base_model.state_dict()
            found[name] = {key: state.get(key, value) for key, value in own.items()}
        return found

    def files(self):
        """Calibration of both."""
        made = {}
        for seed, name in enumerate(NAMES, 5):
            made[name] = self.root / f"{name}.txt"
            made[name].write_text("\n".join(texts(seed)), encoding="utf-8")
        return made


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("heads")
    return {kind: Family(root / kind, kind) for kind in KINDS}


@pytest.fixture
def family(families, tmp_path):
    """A copy of the BERTs, to be damaged."""
    shutil.copytree(families["bert"].root, tmp_path / "bert")
    copied = copy.copy(families["bert"])
    copied.root, copied.base = tmp_path / "bert", tmp_path / "bert" / "base"
    return copied


def body_in(folder, family):
    """Tensors of a merge that are the backbone's, under the names that it has by itself."""
    made = type(family.model).from_pretrained(folder)
    return made.base_model.state_dict()


def assert_heads(out, family):
    for name, model in family.experts.items():
        head = safetensors.load_file(out / "heads" / name / "head.safetensors")
        own = model.state_dict()
        assert head and all(torch.equal(value, own[key]) for key, value in head.items())
        missing = own.keys() - head.keys()
        prefix = model.base_model_prefix + "."
        assert all(key.startswith(prefix) for key in missing)
        before = (family.root / name / "config.json").read_bytes()
        assert (out / "heads" / name / "config.json").read_bytes() == before


def padded(lines):
    """Texts in one batch, as a tokenizer makes it."""
    batch = tokenizer()(lines, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def calibration_by_hand():
    """What the files of a family say."""
    made = {}
    for seed, name in enumerate(NAMES, 5):
        lines = texts(seed)
        made[name] = [padded(lines[start : start + 8]) for start in range(0, len(lines), 8)]
    return made


# names in files of vision transformers, which random methods go by, are not those in the model
MERGES = [(kind, method) for kind in KINDS for method in ("soup", "ties", "dare")]
MERGES.remove(("vit", "dare"))


@pytest.mark.parametrize(("kind", "method"), MERGES)
def test_backbones_are_merged_as_the_function_merges_them_and_heads_kept(
    families, kind, method, tmp_path, capsys
):
    family, out = families[kind], tmp_path / "out"
    done = run(capsys, "merge", *family.folders, "--out", out, "--method", method)
    assert (done[0], done[2]) == (0, "")
    shared = family.body.state_dict().keys()
    for model in family.experts.values():
        shared &= model.base_model.state_dict().keys()
    body = copy.deepcopy(family.body)
    if "pooler.dense.weight" not in shared and hasattr(body, "pooler"):
        body.pooler = None  # no part of what all have
    states = {n: {k: s[k] for k in body.state_dict()} for n, s in family.bodies.items()}
    expected = getattr(q, method)(body, states).state_dict
    found = body_in(out, family)
    assert all(torch.equal(found[name], expected[name]) for name in shared)
    assert_heads(out, family)
    kept = set(json.loads((out / "merge.json").read_text())["kept"])
    before, after = state_of(family.base), state_of(out)
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (name in kept), name
    told = f"not merged: {number_of(len(kept), 'tensor')}, as the base has them\n"
    assert (told in done[1]) == bool(kept)
    assert "head kept: heads/topics/head.safetensors" in done[1]


KEPT = {
    "bert": set(),
    "masked": {"cls"},
    "tokens": {"pooler"},
    "classifier": {"classifier"},
    "roberta": {"lm_head"},
    "vit": {"pooler"},
    "llama": {"lm_head"},
    "tied llama": set(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_check_says_what_stays_as_it_is(families, kind, capsys):
    status, told, _ = run(capsys, "check", *families[kind].folders, "--json")
    report = json.loads(told)
    assert status == 0
    of_heads = [f for f in report["findings"] if "kept as they are, in heads/" in f["cure"]]
    assert [finding["level"] for finding in of_heads] == [INFO] * 2
    of_base = [f for f in report["findings"] if "the base's, as they are" in f["cure"]]
    assert bool(of_base) == bool(KEPT[kind])
    for finding in of_base:
        (part,) = KEPT[kind]
        assert part in finding["found"]
        assert finding["level"] == (WARNING if part == "pooler" else INFO)


@pytest.mark.parametrize(("kind", "method"), [
    ("bert", "qp"), ("masked", "regmean"), ("tokens", "regmean"), ("llama", "regmean"),
])  # fmt: skip
def test_methods_that_run_models_run_the_backbone(families, kind, method, tmp_path, capsys):
    family, out = families[kind], tmp_path / "out"
    given = [w for n, f in family.files().items() for w in ("--calibration", f"{n}={f}")]
    options = {"basis": "rows", "folds": 2} if method == "qp" else {}
    words = [word for k, v in options.items() for word in ("--option", f"{k}={v}")]
    done = run(capsys, "merge", *family.folders, "--out", out, "--method", method, *words, *given)
    assert (done[0], done[2]) == (0, "")
    calibration = calibration_by_hand()
    expected = getattr(q, method)(family.body, family.bodies, calibration, **options)
    found = body_in(out, family)
    for name, value in expected.state_dict.items():
        if not (kind == "tokens" and name.startswith("pooler")):
            assert torch.equal(found[name], value), name
    assert_heads(out, family)


@pytest.mark.parametrize("kind", ["bert", "masked", "tokens", "llama"])
@torch.no_grad()
def test_heads_make_of_a_backbone_s_output_what_the_expert_does(families, kind):
    family = families[kind]
    report = check(family.base, {name: family.root / name for name in NAMES})
    functions = running.functions_of(report.heads, family.body)
    for name, expert in family.experts.items():
        body, batch = copy.deepcopy(expert.base_model), padded(texts(3))
        with running.noting_arguments(body):
            found = functions[name](body(**batch))
        expected = expert(**batch).logits
        if "Token" in type(expert).__name__:
            expected = expected[batch["attention_mask"] != 0]
        assert torch.equal(found, expected)
    others = report.heads | {"topics": Checkpoint("topics", Path(), {})}
    assert running.functions_of(others, family.body) is None


@pytest.mark.parametrize("padding", [0, 5, None])
@torch.no_grad()
def test_heads_of_decoders_tell_the_last_token_by_the_mask(families, padding, tmp_path):
    family, name = families["llama"], "topics"
    shutil.copytree(family.root / name, tmp_path / name)
    change(tmp_path / name, pad_token_id=padding)
    report = check(family.base, {name: tmp_path / name})
    function = running.functions_of(report.heads, family.body)[name]
    expert, lines = family.experts[name], ["w7 w8 w9 w10", "w11 w12"]
    body = copy.deepcopy(expert.base_model)
    with running.noting_arguments(body):
        together = function(body(**padded(lines)))
    alone = torch.cat([expert(**padded([line])).logits for line in lines])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_what_a_configuration_names_is_no_code_of_a_card(family, tmp_path, capsys):
    code = "BertForSequenceClassification; print(1)"
    change(family.root / "topics", architectures=[code])
    done = run(capsys, "merge", *family.folders, "--out", tmp_path / "out")
    assert done[0] == 1 and "topics/config.json: expected a head of a task" in done[2]


def test_auto_chooses_by_the_predictions_of_the_heads(families, tmp_path, capsys):
    family, out = families["bert"], tmp_path / "out"
    given = [w for n, f in family.files().items() for w in ("--calibration", f"{n}={f}")]
    assert run(capsys, "merge", *family.folders, "--out", out, *given)[0] == 0
    heads = {n: lambda output, n=n: family.experts[n].classifier(output[1]) for n in NAMES}
    expected = q.auto(family.body, family.bodies, calibration_by_hand(), heads=heads)
    choice = json.loads((out / "merge.json").read_text())["choice"]
    assert choice["criterion"] == "captured divergence" == expected.criterion
    assert choice["chosen"] == expected.chosen
    found = body_in(out, family)
    for name, value in expected.state_dict.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


LOADED = """
import sys, torch, transformers
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
texts = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
pictures = {"pixel_values": torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)}
with open(sys.argv[1]) as file:
    recipes = file.read().split("---")
found = []
for recipe in recipes:
    exec(recipe)
    with torch.no_grad():
        found.append(model(**pictures if "ViT" in recipe else texts).logits)
torch.save(found, sys.argv[2])
assert "qpmerge_lite" not in sys.modules
"""


def test_the_lines_of_the_card_load_a_head_where_this_package_is_not_known(
    families, tmp_path, capsys
):
    recipes, expected = [], []
    for kind in ("bert", "masked", "classifier", "vit", "llama"):
        family, out = families[kind], tmp_path / kind
        assert run(capsys, "merge", *family.folders, "--out", out)[0] == 0
        card = (out / "README.md").read_text(encoding="utf-8")
        assert all(label in card for label in LABELS["topics"])
        (recipe,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
        recipes.append(recipe.replace("path/to/this/folder", str(out)))
        expected.append(logits_by_hand(family, out))
    (tmp_path / "recipes").write_text("---".join(recipes))
    done = subprocess.run(
        [sys.executable, "-c", LOADED, "recipes", "saved"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "saved", weights_only=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def logits_by_hand(family, out):
    """What the first expert's head makes of the merged backbone."""
    model, own = copy.deepcopy(family.experts["sentiment"]), dict(body_in(out, family))
    if family.kind == "masked":  # a class without a pooler: it is the head's
        own = {name: value for name, value in own.items() if not name.startswith("pooler")}
    model.base_model.load_state_dict(own, strict=False)
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    if family.kind == "vit":
        inputs = {"pixel_values": torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)}
    with torch.no_grad():
        return model(**inputs).logits


def test_the_folder_loads_as_the_base_does_and_a_head_is_no_model(families, tmp_path, capsys):
    family, out = families["masked"], tmp_path / "out"
    assert run(capsys, "merge", *family.folders, "--out", out)[0] == 0
    _, told = transformers.BertForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModel.from_pretrained(out / "heads" / "topics")
    after = contents(out).keys()
    assert {name for name in after if "/" in name} == {
        f"heads/{name}/{file}" for name in NAMES for file in ("config.json", "head.safetensors")
    }


def test_an_expert_s_own_tokenizer_goes_with_its_head(family, tmp_path, capsys):
    change(family.root / "topics", "tokenizer_config.json", model_max_length=9)
    out = tmp_path / "out"
    assert run(capsys, "merge", *family.folders, "--out", out)[0] == 0
    own = transformers.AutoTokenizer.from_pretrained(out / "heads" / "topics")
    assert own.model_max_length == 9
    assert not (out / "heads" / "sentiment" / "tokenizer.json").exists()


def alike(root, labels=True):
    """A base and experts whose heads have one shape, and one set of labels or two."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**PLACED, num_labels=3)
    base = transformers.BertForSequenceClassification(config).eval()
    models = {"base": base, **{name: tuned(base, seed) for seed, name in enumerate(NAMES, 1)}}
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    if not labels:
        change(root / "topics", id2label={"0": "a", "1": "b", "2": "c"})
    return models, [str(root / name) for name in models]


def test_heads_like_the_base_s_are_merged_like_everything_else(tmp_path, capsys):
    models, folders = alike(tmp_path / "models")
    states = {name: models[name].state_dict() for name in NAMES}
    status, told, _ = run(capsys, "check", *folders)
    assert status == 0 and "--heads own keeps every expert's as it is" in told
    out = tmp_path / "out"
    assert run(capsys, "merge", *folders, "--out", out)[0] == 0
    assert_same(out, q.soup(models["base"], states).state_dict)
    assert not (out / "heads").exists()
    own = tmp_path / "own"
    assert run(capsys, "merge", *folders, "--out", own, "--heads", "own")[0] == 0
    found = safetensors.load_file(own / "heads" / "topics" / "head.safetensors")
    assert found.keys() == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(value, states["topics"][name]) for name, value in found.items())
    assert torch.equal(state_of(own)["classifier.bias"], models["base"].classifier.bias)


def test_heads_of_other_labels_are_kept_unless_told_otherwise(tmp_path, capsys):
    models, folders = alike(tmp_path / "models", labels=False)
    states = {name: models[name].state_dict() for name in NAMES}
    assert run(capsys, "merge", *folders, "--out", tmp_path / "own")[0] == 0
    assert (tmp_path / "own" / "heads" / "topics").is_dir()
    out = tmp_path / "merged"
    assert run(capsys, "merge", *folders, "--out", out, "--heads", "merged")[0] == 0
    assert_same(out, q.soup(models["base"], states).state_dict)


CLASSES = {
    "BertForSequenceClassification": PLACED,
    "RobertaForTokenClassification": PLACED,
    "DistilBertForSequenceClassification": {"vocab_size": 40, "dim": 8, "n_layers": 1, "n_heads": 2,
                                            "hidden_dim": 12, "max_position_embeddings": 16},
    "ElectraForSequenceClassification": PLACED | {"embedding_size": 8},
    "AlbertForSequenceClassification": PLACED | {"embedding_size": 8},
    "MPNetForSequenceClassification": PLACED,
    "DebertaV2ForSequenceClassification": PLACED,
    "GPT2ForSequenceClassification": {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2,
                                      "n_positions": 16, "pad_token_id": 0},
    "LlamaForSequenceClassification": llama(),
    "BartForSequenceClassification": {
        "vocab_size": 40, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
        "decoder_ffn_dim": 12, "max_position_embeddings": 16, "pad_token_id": 0,
        "eos_token_id": 2,
    },
    "ViTForImageClassification": PICTURES,
    "BeitForImageClassification": PICTURES,
    "ResNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [8, 16],
                                     "depths": [1, 1], "layer_type": "basic"},
    "SwinForImageClassification": {"image_size": 16, "patch_size": 4, "embed_dim": 8,
                                   "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
}  # fmt: skip


def described(name, model):
    """A checkpoint as far as its header would say."""
    entries, place = {}, 0
    for key, value in model.state_dict().items():
        stop = place + value.numel() * value.element_size()
        entries[key] = Entry(key, "F32", tuple(value.shape), place, stop)
        place = stop
    header = Header(Path(name), b"", entries, {}, place)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    return Checkpoint(name, Path(name), config, {"model.safetensors": header})


@pytest.mark.parametrize("kind", CLASSES)
def test_names_alone_show_what_transformers_calls_the_base_model_prefix(kind):
    made = getattr(transformers, kind)
    models = {}
    with torch.device("meta"):
        for name, count in zip(("base", *NAMES), (4, 3, 5)):
            models[name] = made(made.config_class(**CLASSES[kind], num_labels=count))
    checkpoints = {name: described(name, model) for name, model in models.items()}
    experts = [checkpoints[name] for name in NAMES]
    whole, told = telling.split(checkpoints["base"], experts, telling.AUTO)
    prefix = made.base_model_prefix + "."
    assert {finding.level for finding in told} == {INFO}
    body = {name for name in models["base"].state_dict() if name.startswith(prefix)}
    assert whole.backbone.prefix == prefix and set(whole.backbone.entries) == body
    alone = described("base", models["base"].base_model)
    bare, _ = telling.split(alone, experts, telling.AUTO)
    assert set(bare.backbone.entries) == {name.removeprefix(prefix) for name in body}
    for found in (whole, bare):
        for name, head in found.heads.items():
            assert set(head.entries) == models[name].state_dict().keys() - body


def rewrite(folder, change_names):
    """Write a folder's tensors under other names, or fewer of them."""
    path = folder / "model.safetensors"
    state = change_names(safetensors.load_file(path))
    safetensors.save_file(state, path, metadata={"format": "pt"})


def without(part):
    return lambda state: {name: value for name, value in state.items() if part not in name}


def flattened(state):
    return {name.replace(".", "_"): value for name, value in state.items()}


def swapped(folder, kind):
    """A model of another class in place of an expert."""
    shutil.rmtree(folder)
    made = getattr(transformers, kind)
    made(transformers.BertConfig(**PLACED)).save_pretrained(folder)


def with_table(state):
    """The embeddings once more, as a head that is tied to them."""
    table = state["embeddings.word_embeddings.weight"]
    return state | {"cls.predictions.decoder.weight": table.clone()}


def one_layer_less(folder):
    rewrite(folder, without("encoder.layer.0.output"))


DAMAGES = {
    "a part of the backbone is missing": (
        lambda root: one_layer_less(root / "topics"),
        ["topics: expected every tensor of the base, found none for 'encoder.layer.0.output"],
    ),
    "a whole part of the backbone is missing": (
        lambda root: rewrite(root / "topics", without("bert.embeddings")),
        ["topics: expected every tensor of the base, found none for 'embeddings."],
    ),
    "an unknown part of the backbone": (
        lambda root: rewrite(root / "topics", lambda s: s | {"bert.more.weight": torch.ones(2)}),
        ["topics: expected tensors of the base alone, found 'more.weight'"],
    ),
    "another shape in the backbone": (
        lambda root: reshape(root / "topics", "bert.pooler.dense.bias", lambda v: v[:4]),
        ["tensor 'pooler.dense.bias': expected shape (8,), found shape (4,)"],
    ),
    "no prefix": (
        lambda root: rewrite(root / "topics", flattened),
        ["topics: expected a backbone under names of the base's"],
    ),
    "no head among heads": (
        lambda root: swapped(root / "topics", "BertModel"),
        ["topics/config.json: expected a head of a task, as 'sentiment' has one, found BertModel"],
    ),
    "a language model's head among heads": (
        lambda root: swapped(root / "topics", "BertForMaskedLM"),
        ["expected a head of a task, as 'sentiment' has one, found BertForMaskedLM"],
    ),
    "another kind of model": (
        lambda root: change(root / "topics", model_type="roberta"),
        ["config.json, model_type: expected bert, found roberta"],
    ),
    "another width": (
        lambda root: change(root / "topics", num_attention_heads=4),
        ["num_attention_heads: expected 2, found 4"],
    ),
    "a head tied to what is merged": (
        lambda root: (
            rewrite(root / "base", with_table),
            change(root / "base", tie_word_embeddings=True),
        ),
        ["base: expected a base that files a tied tensor once", "cls.predictions.decoder.weight"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_split_is_refused_before_a_weight_is_read(
    family, name, tmp_path, capsys, monkeypatch
):
    damage, expected = DAMAGES[name]
    damage(family.root)
    monkeypatch.setattr(tensors, "read_tensor", None)
    before = contents(family.root)
    status, told, _ = run(capsys, "check", *family.folders)
    assert status == 1 and all(part in told for part in expected), told
    status, _, err = run(capsys, "merge", *family.folders, "--out", tmp_path / "out")
    assert status == 1 and all(part in err for part in expected), err
    assert contents(family.root) == before and [p.name for p in tmp_path.iterdir()] == ["bert"]


def test_what_looks_like_a_head_and_is_half_of_the_model_is_refused(tmp_path, capsys):
    """T5 for questions has no prefix before its encoder and decoder."""
    size = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    for name in ("base", *NAMES):
        config = transformers.T5Config(decoder_start_token_id=0, **size)
        kind = "T5ForConditionalGeneration" if name == "base" else "T5ForQuestionAnswering"
        getattr(transformers, kind)(config).save_pretrained(tmp_path / name)
    status, told, _ = run(capsys, "check", *(tmp_path / name for name in ("base", *NAMES)))
    assert status == 1 and "expected a backbone whose names all begin with" in told


USAGE = {
    "heads of language models": (
        lambda f: [str(f.base)] * 2 + ["--heads", "own"],
        "--heads: expected experts with heads of tasks, found 'BertModel'",
    ),
    "a name that is no folder": (
        lambda f: [str(f.base), f"..={f.root / 'topics'}"],
        "expert '..': expected a name for a folder",
    ),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_refused(families, name, tmp_path, capsys):
    words, expected = USAGE[name]
    done = run(capsys, "merge", *words(families["bert"]), "--out", tmp_path / "out")
    assert done[0] == 1 and expected in done[2], done[2]
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_is_not_finite_is_refused_and_nothing_is_left(family, tmp_path, capsys):
    reshape(family.root / "topics", "classifier.bias", lambda value: value.fill_(torch.nan))
    status, _, err = run(capsys, "merge", *family.folders, "--out", tmp_path / "out")
    assert status == 1 and "tensor 'classifier.bias'" in err and "NaN" in err
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


def test_an_encoder_with_a_decoder_has_no_backbone_that_is_run(tmp_path, capsys):
    made, fields = (
        transformers.BartForConditionalGeneration,
        CLASSES["BartForSequenceClassification"],
    )
    torch.manual_seed(0)
    base = made(transformers.BartConfig(decoder_start_token_id=2, **fields))
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(NAMES):
        expert_of(base, "BartForSequenceClassification", name, seed).save_pretrained(
            tmp_path / name
        )
        (tmp_path / f"{name}.txt").write_text("w1 w2\nw3 w4")
    folders = [tmp_path / name for name in ("base", *NAMES)]
    given = [w for n in NAMES for w in ("--calibration", f"{n}={tmp_path / n}.txt")]
    assert run(capsys, "merge", *folders, "--out", tmp_path / "soup")[0] == 0
    status, _, err = run(capsys, "merge", *folders, "--out", tmp_path / "out", *given)
    assert status == 1 and "expected a base that reads texts or pictures alone" in err


def test_older_names_of_norms_are_the_backbone_s_too(family, tmp_path, capsys):
    plain = tmp_path / "plain"
    assert run(capsys, "merge", *family.folders, "--out", plain)[0] == 0

    def older(state):
        return {name.replace("LayerNorm.weight", "LayerNorm.gamma"): v for name, v in state.items()}

    rewrite(family.root / "topics", older)
    assert run(capsys, "merge", *family.folders, "--out", tmp_path / "older")[0] == 0
    assert_same(tmp_path / "older", state_of(plain))


def test_a_merge_that_is_stopped_at_its_heads_goes_on(families, tmp_path, capsys, monkeypatch):
    words = ["merge", *families["masked"].folders, "--out"]
    assert run(capsys, *words, tmp_path / "plain")[0] == 0
    write = merging.write_heads

    def stopped(report, folder):
        write(report, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "write_heads", stopped)
    status, _, err = run(capsys, *words, tmp_path / "out")
    assert status == 130 and "1 finished file(s) of weights are kept" in err
    monkeypatch.undo()
    assert run(capsys, *words, tmp_path / "out")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_the_same_command_writes_the_same_bytes(families, tmp_path, capsys):
    for name in ("a", "b"):
        assert run(capsys, "merge", *families["masked"].folders, "--out", tmp_path / name)[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def adapted(family, name, seed):
    """An adapter with a head, as peft files it, and the model that it makes."""
    own = family.experts[name]
    config = copy.deepcopy(family.model.config)
    config.num_labels = len(LABELS[name])
    torch.manual_seed(seed)
    model = with_gain(type(own)(config)).eval()
    model.base_model.load_state_dict(family.body.state_dict(), strict=False)
    layers = ["query", "value"] if family.kind == "bert" else ["q_proj", "v_proj"]
    state = {}
    for key, module in model.named_modules():
        if key.rpartition(".")[2] in layers:
            outputs, inputs = module.weight.shape
            down, up = torch.randn(2, inputs), torch.randn(outputs, 2)
            module.weight.data += 0.5 * up @ down
            state |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    prefix = model.base_model_prefix + "."
    state |= {key: v for key, v in model.state_dict().items() if not key.startswith(prefix)}
    settings = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    fields = {"target_modules": layers, "r": 2, "lora_alpha": 1}
    folder = family.root / f"{name}-adapter"
    return write_adapter(folder, state, **settings, **fields), model


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_adapters_keep_their_heads_too(families, kind, tmp_path, capsys):
    family, out = families[kind], tmp_path / "out"
    made = {name: adapted(family, name, seed) for seed, name in enumerate(NAMES, 3)}
    folders = [f"{name}={folder}" for name, (folder, _) in made.items()]
    assert run(capsys, "merge", family.base, *folders, "--out", out)[0] == 0
    states = {name: model.base_model.state_dict() for name, (_, model) in made.items()}
    found, expected = body_in(out, family), q.soup(family.body, states).state_dict
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    for name, (_, model) in made.items():
        head = safetensors.load_file(out / "heads" / name / "head.safetensors")
        own = model.state_dict()
        assert head and all(torch.equal(value, own[key]) for key, value in head.items())
        config = transformers.AutoConfig.from_pretrained(out / "heads" / name)
        assert config.num_labels == len(LABELS[name])
        assert config.architectures == [type(model).__name__]
    alone = tmp_path / "alone"
    assert run(capsys, "merge", family.base, folders[0], "--out", alone)[0] == 0
    name, (_, model) = next(iter(made.items()))
    rebuilt = subject_of("merged", model_of("merged", alone, None), name)
    batch = padded(texts(3)[:1])
    with torch.no_grad():
        found, expected = loaded(rebuilt)(**batch).logits, model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_adapters_and_whole_models_with_heads_are_merged_together(families, tmp_path, capsys):
    family, out = families["bert"], tmp_path / "out"
    folder, model = adapted(family, "topics", 4)
    words = [family.base, f"sentiment={family.root / 'sentiment'}", f"topics={folder}"]
    assert run(capsys, "merge", *words, "--out", out)[0] == 0
    states = {"a": family.bodies["sentiment"], "b": model.base_model.state_dict()}
    found, expected = body_in(out, family), q.soup(family.body, states).state_dict
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    (folder / "adapter_config.json").write_text(
        (folder / "adapter_config.json").read_text().replace('"SEQ_CLS"', '"CAUSAL_LM"')
    )
    status, _, err = run(capsys, "merge", *words, "--out", tmp_path / "no")
    assert status == 1 and "adapter_config.json: expected a head of a task" in err
    assert "found an adapter without one" in err


def test_a_difference_is_of_all_tensors_and_not_of_a_backbone(families, tmp_path, capsys):
    family, out = families["bert"], tmp_path / "difference.safetensors"
    status, _, err = run(capsys, "delta", family.base, family.root / "sentiment", "--out", out)
    assert status == 1 and "reasons not to merge these" in err and not list(tmp_path.iterdir())
