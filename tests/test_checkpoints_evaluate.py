# ruff: noqa: F811 (fixtures come by import)
"""`qpmerge evaluate`: its numbers are those of a loop over models of transformers, and what is no
label, no head and no such model is refused by name."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from checkpoint_families import EXPERTS, Family, bert, change, contents, run, texts, tokenizer
from test_checkpoints_adapters import factors, write_adapter
from test_checkpoints_diagnose import llama
from test_checkpoints_heads import LABELS, NAMES, adapted, body_in
from test_checkpoints_heads import Family as Headed
from test_checkpoints_hub import hub  # noqa: F401

from qpmerge_lite.checkpoints.evaluation import scoring
from qpmerge_lite.checkpoints.evaluation.evaluating import Evaluation, evaluate_folders

transformers = pytest.importorskip(
    "transformers", reason="the hub extra, which makes and runs checkpoints, is not here"
)
safetensors = pytest.importorskip("safetensors.torch")
statistics = pytest.importorskip("scipy.stats")
COUNT = 40


def labels_of(name):
    """Classes of the texts of a task, drawn."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.randint(len(LABELS[name]), (COUNT,), generator=generator).tolist()


def write_rows(path, rows, names, field="label"):
    lines = (json.dumps({"text": t, field: name}) for t, name in zip(rows, names, strict=True))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Bases and experts, and a soup of each by this package."""
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("evaluate")
    made = {}
    for kind in ("bert", "masked", "vit", "llama"):
        family = made[kind] = Headed(root / kind, kind)
        merge(family, root / kind / "merged")
    family = made["causal"] = Family(root / "causal", llama)
    merge(family, root / "causal" / "merged")
    for number, name in enumerate(NAMES):
        rows = texts(20 + number, COUNT)
        names = [LABELS[name][place] for place in labels_of(name)]
        for kind in ("bert", "masked", "llama"):
            write_rows(root / kind / f"{name}.jsonl", rows, names)
            write_rows(root / kind / f"{name}-numbers.jsonl", rows, labels_of(name), "class")
    return made


def merge(family, out):
    from qpmerge_lite.companion import cli

    assert cli.main(["merge", *family.folders, "--out", str(out), "--quiet"]) == 0


@pytest.fixture
def family(families, tmp_path):
    """A copy of the BERTs with heads, to be damaged."""
    shutil.copytree(families["bert"].root, tmp_path / "bert")
    return tmp_path / "bert"


def with_head(family, name, body):
    """An expert's model on another backbone, by hand."""
    expert = family.experts[name]
    model = type(expert)(expert.config)
    model.load_state_dict(expert.state_dict())
    model.base_model.load_state_dict(
        {k: v for k, v in body.items() if k in model.base_model.state_dict()}, strict=False
    )
    return model.eval()


@torch.no_grad()
def right_by_hand(model, name, number):
    """Whether each text of a task gets its class, one text at a time."""
    reads, found = tokenizer(), []
    for text, label in zip(texts(20 + number, COUNT), labels_of(name), strict=True):
        ids = reads(text, return_tensors="pt")["input_ids"]
        found.append(int(model(input_ids=ids).logits.argmax()) == label)
    return found


@pytest.mark.parametrize("kind", ["bert", "masked"])
def test_accuracies_are_those_of_a_loop_over_models(families, kind, capsys):
    family = families[kind]
    root, words = family.root, []
    for name in NAMES:
        words += ["--data", f"{name}={root / name}.jsonl", "--expert", f"{name}={root / name}"]
    status, out, err = run(
        capsys, "evaluate", root / "merged", *words, "--base", family.base, "--json"
    )
    assert (status, err) == (0, "")
    told = json.loads(out)
    for number, name in enumerate(NAMES):
        models = {
            "expert": family.experts[name],
            "merged": with_head(family, name, body_in(root / "merged", family)),
            "base": with_head(family, name, family.body.state_dict()),
        }
        found = told["tasks"][name]["models"]
        assert list(found) == list(models)
        right = {role: right_by_hand(model, name, number) for role, model in models.items()}
        for role, own in right.items():
            accuracy = found[role]["accuracy"]
            assert accuracy["value"] == sum(own) / COUNT
            interval = statistics.binomtest(sum(own), COUNT).proportion_ci(method="wilson")
            assert [accuracy["low"], accuracy["high"]] == pytest.approx(list(interval), abs=1e-12)
        expert = np.array(right["expert"])
        for role in ("merged", "base"):
            own = np.array(right[role])
            assert found[role]["ratio"]["value"] == pytest.approx(own.sum() / expert.sum())
            assert found[role]["difference"]["value"] == pytest.approx(own.mean() - expert.mean())
            low, high = found[role]["difference"]["low"], found[role]["difference"]["high"]
            spread = np.std(own - expert * 1.0) / math.sqrt(COUNT)
            assert (high - low) / spread == pytest.approx(2 * 1.96, rel=0.25)
        assert "ratio" not in found["expert"]


@pytest.mark.parametrize("padding", [0, 1, None])
def test_the_last_token_of_a_text_is_told_from_padding(families, padding, tmp_path, capsys):
    """A classifier on a decoder looks for it, by the token that its configuration pads with."""
    family, name = families["llama"], "topics"
    shutil.copytree(family.root / name, tmp_path / name)
    change(tmp_path / name, pad_token_id=padding)
    right = right_by_hand(family.experts[name], name, NAMES.index(name))
    words = ["evaluate", tmp_path / name, "--data", f"{name}={family.root / name}.jsonl", "--json"]
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    accuracy = json.loads(out)["tasks"][name]["models"][name]["accuracy"]["value"]
    assert accuracy == sum(right) / COUNT


def test_labels_may_be_numbers_in_another_field(families, capsys):
    root = families["bert"].root
    words = ["evaluate", root / "merged", "--json", "--data"]
    named = run(capsys, *words, f"topics={root}/topics.jsonl")
    numbered = run(capsys, *words, f"topics={root}/topics-numbers.jsonl", "--label", "topics=class")
    first, second = (json.loads(done[1])["tasks"]["topics"]["models"] for done in (named, numbered))
    assert first == second and first["merged"]["accuracy"]["value"] > 0


def test_pairs_and_labels_of_parquet_are_read(families, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    root, expert = families["bert"].root, families["bert"].experts["topics"]
    columns = {"first": texts(1, 12), "second": texts(2, 12), "label": labels_of("topics")[:12]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "pairs.parquet")
    right = []
    for first, second, label in zip(*columns.values(), strict=True):
        ids = tokenizer()(first, second, return_tensors="pt")
        with torch.no_grad():
            right.append(int(expert(**ids).logits.argmax()) == label)
    words = ["evaluate", root / "topics", "--data", f"topics={tmp_path / 'pairs.parquet'}"]
    found = json.loads(run(capsys, *words, "--column", "topics=first,second", "--json")[1])
    accuracy = found["tasks"]["topics"]["models"]["topics"]["accuracy"]["value"]
    assert accuracy == sum(right) / len(right)


def test_pictures_in_folders_have_the_names_of_these_as_labels(families, tmp_path, capsys):
    Image = pytest.importorskip("PIL.Image")
    family, name = families["vit"], "sentiment"
    draw, right = np.random.default_rng(0), []
    model = with_head(family, name, body_in(family.root / "merged", family))
    for label, words in enumerate(LABELS[name]):
        (tmp_path / "pictures" / words).mkdir(parents=True)
        for number in range(5):
            points = draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            picture = Image.fromarray(points)
            picture.save(tmp_path / "pictures" / words / f"{number}.png")
            with torch.no_grad():
                values = family.processor()(picture, return_tensors="pt")["pixel_values"]
                right.append(int(model(values).logits.argmax()) == label)
    words = ["evaluate", family.root / "merged", "--data", f"{name}={tmp_path / 'pictures'}"]
    status, out, err = run(capsys, *words, "--json", "--batch-size", 4)
    assert (status, err) == (0, "")
    found = json.loads(out)["tasks"][name]["models"]["merged"]["accuracy"]
    assert found["value"] == pytest.approx(sum(right) / len(right))
    status, _, err = run(capsys, *words, "--label", f"{name}=label")
    assert status == 1 and "--label: expected none for a folder of pictures" in err
    picture.save(tmp_path / "pictures" / "alone.png")
    status, _, err = run(capsys, *words)
    assert status == 1 and "alone.png: expected a picture in a folder of its label" in err


def test_perplexities_and_agreement_are_those_of_a_loop(families, tmp_path, capsys):
    family, name = families["causal"], EXPERTS[0]
    lines = texts(30, 12)
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    merged = type(family.model).from_pretrained(family.root / "merged")
    models = {"expert": family.experts[name], "merged": merged, "base": family.model}
    losses, equal, targets = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0), 0
    for line in lines:
        ids = tokenizer()(line, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = {role: model(ids).logits[0, :-1] for role, model in models.items()}
        targets += ids.shape[1] - 1
        for role, own in logits.items():
            losses[role] += float(torch.nn.functional.cross_entropy(own, ids[0, 1:])) * len(own)
            equal[role] += int((own.argmax(-1) == logits["expert"].argmax(-1)).sum())
    status, out, err = run(
        capsys, "evaluate", family.root / "merged", "--data", f"{name}={tmp_path / 'texts.txt'}",
        "--expert", f"{name}={family.root / name}", "--base", family.base, "--json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    found = json.loads(out)["tasks"][name]["models"]
    for role in models:
        perplexity = found[role]["perplexity"]
        expected = math.exp(losses[role] / targets)
        assert perplexity["value"] == pytest.approx(expected, rel=1e-5)
        assert perplexity["low"] < perplexity["value"] < perplexity["high"]
        if role != "expert":
            more = math.exp((losses[role] - losses["expert"]) / targets)
            assert found[role]["ratio"]["value"] == pytest.approx(more, rel=1e-5)
            assert found[role]["agreement"]["value"] == pytest.approx(equal[role] / targets)


def test_a_decoder_s_perplexity_is_its_target_s(tmp_path, capsys):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    pairs = list(zip(texts(1, 9), texts(2, 9)))
    rows = (json.dumps({"text": text, "target": target}) for text, target in pairs)
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    loss, count = 0.0, 0
    for text, target in pairs:
        ids, labels = (tokenizer()(t, return_tensors="pt")["input_ids"] for t in (text, target))
        with torch.no_grad():
            loss += float(model(input_ids=ids, labels=labels).loss) * labels.shape[1]
        count += labels.shape[1]
    words = ["evaluate", tmp_path / "t5", "--data", f"a={tmp_path / 'pairs.jsonl'}"]
    found = json.loads(run(capsys, *words, "--json", "--batch-size", 4)[1])
    perplexity = found["tasks"]["a"]["models"]["t5"]["perplexity"]["value"]
    assert perplexity == pytest.approx(math.exp(loss / count), rel=1e-5)


def test_batches_and_a_model_that_is_the_expert_change_nothing(families):
    root = families["bert"].root
    data = {"topics": root / "topics.jsonl"}
    experts = {"topics": root / "topics"}
    told = [
        evaluate_folders(
            Evaluation({"same": root / "topics"}, data, experts=experts, batch_size=size)
        )
        for size in (1, COUNT)
    ]
    assert told[0]["tasks"] == told[1]["tasks"]
    models = told[0]["tasks"]["topics"]["models"]
    assert models["same"]["accuracy"] == models["expert"]["accuracy"]
    assert models["same"]["ratio"]["value"] == 1 and models["same"]["difference"]["value"] == 0


def test_what_is_printed_names_its_intervals_and_what_was_cut(families, tmp_path, capsys):
    root = families["bert"].root
    words = ["evaluate", root / "merged", "--data", f"topics={root}/topics.jsonl"]
    status, out, err = run(capsys, *words, "--expert", f"topics={root}/topics", "--max-length", 3)
    assert (status, err) == (0, "")
    said = " ".join(out.split())
    assert "Wilson's 95 % interval" in said and "bootstrap over inputs" in said
    assert out.splitlines()[0].split()[:3] == ["task", "model", "inputs"]
    assert "note: topics: texts were cut" in out
    assert max(map(len, out.splitlines())) <= 100
    assert run(capsys, *words, "--quiet") == (0, "", "")
    told = json.loads(run(capsys, *words, "--json", "--samples", 10)[1])
    assert told["tasks"]["topics"]["data"] | {"sha256": ""} == {
        "file": "topics.jsonl", "sha256": "", "inputs": 10, "of": COUNT, "fields": ["text"],
    }  # fmt: skip
    assert [row["name"] for row in told["inputs"]] == ["merged", "merged, head of topics"]


def test_data_that_a_merge_was_made_on_are_a_warning(families, tmp_path, capsys):
    family = families["causal"]
    out = tmp_path / "out"
    words = ["merge", *family.folders, "--out", out, *family.given, "--method", "regmean"]
    assert run(capsys, *words)[0] == 0
    words = ["evaluate", out, "--data", f"first={family.files['first']}"]
    told = run(capsys, *words)[1]
    assert "warning: calibration of 'first', first.jsonl" in told and "flatter" in told


def test_wilson_is_sound_at_the_ends():
    for successes, count in ((0, 7), (7, 7), (1, 1), (3, 9)):
        found = scoring.wilson(successes, count)
        expected = statistics.binomtest(successes, count).proportion_ci(method="wilson")
        assert [found.low, found.high] == pytest.approx(list(expected), abs=1e-12)
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_a_merge_of_the_hub_comes_with_its_heads(families, hub, tmp_path, capsys):
    root = families["bert"].root
    hub.add("ours/merged", contents(root / "merged") | {"heads/topics/evil.py": b"run()"})
    words = ["--data", f"topics={root}/topics.jsonl", "--json"]
    here, there = (
        json.loads(run(capsys, "evaluate", place, *words)[1])
        for place in (root / "merged", "merged=hf:ours/merged")
    )
    assert here["tasks"] == there["tasks"]
    assert [row["files"] for row in here["inputs"]] == [row["files"] for row in there["inputs"]]
    assert not list(tmp_path.rglob("evil.py"))


def test_a_repository_is_looked_at_before_it_is_downloaded(families, hub, tmp_path, capsys):
    """Headers and small files show what cannot be evaluated; nothing is read to its end then."""
    root = families["bert"].root
    commit = hub.add("ours/merged", contents(root / "merged"))
    hub.add("ours/topics", contents(root / "topics"))
    weights = ("model.safetensors", "head.safetensors")
    words = ["evaluate", "mine=hf:ours/merged", "--expert", "topics=hf:ours/topics", "--data"]
    refused = {
        f"topics={root}/topics-numbers.jsonl": "expected a field 'label'",
        f"law={root}/topics.jsonl": f"hf:ours/merged@{commit}/heads: expected a head called 'law'",
    }
    for data, expected in refused.items():
        task = data.partition("=")[0]
        given = [word.replace("topics=hf:", f"{task}=hf:") for word in words]
        status, out, err = run(capsys, *given, data)
        assert (status, out) == (1, "") and expected in err, err
        asked = [(path, span) for verb, path, span in hub.requests if verb == "GET"]
        assert all(span for path, span in asked if path.endswith(weights))
    local = [word.replace("hf:ours", str(root)) for word in words]
    here = json.loads(run(capsys, *local, f"topics={root}/topics.jsonl", "--json")[1])
    there = json.loads(run(capsys, *words, f"topics={root}/topics.jsonl", "--json")[1])
    assert here["tasks"] == there["tasks"]
    assert [row["files"] for row in here["inputs"]] == [row["files"] for row in there["inputs"]]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_an_adapter_is_an_expert_with_its_head(families, kind, tmp_path, capsys):
    family = families[kind]
    folder, model = adapted(family, "topics", 3)
    rows = f"topics={write_rows(tmp_path / 'rows.jsonl', texts(21, COUNT), labels_of('topics'))}"
    given = ["--data", rows, "--expert", f"topics={folder}", "--base", family.base, "--json"]
    status, out, err = run(capsys, "evaluate", family.root / "merged", f"mine={folder}", *given)
    assert (status, err) == (0, "")
    told = json.loads(out)
    found = told["tasks"]["topics"]["models"]
    right = sum(right_by_hand(model, "topics", 1))
    assert found["expert"]["accuracy"]["value"] == right / COUNT
    assert found["mine"]["accuracy"] == found["expert"]["accuracy"]
    assert found["mine"]["difference"]["value"] == 0
    merged = sum(right_by_hand(with_head(family, "topics", body_in(family.root / "merged", family)),
                               "topics", 1))  # fmt: skip
    assert found["merged"]["accuracy"]["value"] == merged / COUNT
    rows = {row["name"]: row["files"] for row in told["inputs"]}
    assert list(rows) == ["topics: expert", "merged", "merged, head of topics", "base"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= rows["topics: expert"].keys()


def test_changes_of_a_base_are_models_beside_it(families, hub, tmp_path, capsys):
    """An adapter without a head, at the Hub too, and a task vector; each needs its base."""
    family, layer = families["causal"], "model.layers.0.self_attn.q_proj"
    folder = write_adapter(tmp_path / "adapter", factors(layer, 8, 8))
    hub.add("ours/adapter", contents(folder))
    vector, whole = tmp_path / "vector.safetensors", tmp_path / "whole"
    assert run(capsys, "delta", family.base, family.root / "first", "--out", vector)[0] == 0
    assert run(capsys, "merge", family.base, folder, "--out", whole)[0] == 0
    (tmp_path / "texts.txt").write_text("\n".join(texts(30, 12)), encoding="utf-8")
    models = {
        "adapter": folder, "there": "hf:ours/adapter", "whole": whole,
        "vector": f"delta:{vector}", "first": family.root / "first",
    }  # fmt: skip
    words = [f"{name}={place}" for name, place in models.items()]
    words += ["--data", f"t={tmp_path / 'texts.txt'}", "--expert", f"t={folder}", "--json"]
    status, out, err = run(capsys, "evaluate", *words, "--base", family.base)
    assert (status, err) == (0, "")
    found = {name: m["perplexity"] for name, m in json.loads(out)["tasks"]["t"]["models"].items()}
    assert found["adapter"] == found["there"] == found["expert"]
    assert found["adapter"]["value"] == pytest.approx(found["whole"]["value"], rel=1e-6)
    assert found["vector"]["value"] == pytest.approx(found["first"]["value"], rel=1e-6)
    assert len({round(found[name]["value"], 6) for name in ("whole", "first", "base")}) == 3
    for name, kind in (("adapter", "an adapter"), ("vector", "a task vector")):
        alone = ["evaluate", str(models[name]), *words[len(models) : len(models) + 2]]
        status, _, err = run(capsys, *alone)
        assert status == 1 and f"found {kind}; name its base: --base FOLDER" in err


def rows_of(root, *rows):
    path = root / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return ["--data", f"topics={path}"]


def other_model(root, make):
    shutil.rmtree(root / "topics")
    make().save_pretrained(root / "topics")
    return [str(root / "topics"), "--data", f"topics={root}/topics.jsonl"]


def masked():
    config = transformers.BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1,
                                     num_attention_heads=2, intermediate_size=12)  # fmt: skip
    return transformers.BertForMaskedLM(config)


def without_head(root):
    shutil.rmtree(root / "merged" / "heads" / "topics")
    return ["--data", f"topics={root}/topics.jsonl"]


def foreign_head(root):
    """One that lacks a tensor."""
    path = root / "merged" / "heads" / "topics" / "head.safetensors"
    state = safetensors.load_file(path)
    del state["classifier.bias"]
    safetensors.save_file(state, path)
    return ["--data", f"topics={root}/topics.jsonl"]


def regression(root):
    head = root / "merged" / "heads" / "topics"
    change(head, problem_type="regression")
    return ["--data", f"topics={root}/topics.jsonl"]


def cut_head(root):
    path = root / "merged" / "heads" / "topics" / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    return ["--data", f"topics={root}/topics.jsonl"]


REFUSED = {
    "no label": (
        lambda root: rows_of(root, {"text": "w1", "label": "law"}, {"text": "w2", "topic": 1}),
        ["rows.jsonl, line 2: expected a field 'label' with the label, found only 'text', 'topic'",
         "--label topics=FIELD"],
    ),
    "a number too large": (
        lambda root: rows_of(root, {"text": "w1", "label": 5}),
        ["line 1: expected a number below 5, or one of the labels 'sport', 'arts'", "found 5"],
    ),
    "a number below zero": (
        lambda root: rows_of(root, {"text": "w1", "label": -1}),
        ["line 1: expected a number below 5", "found -1"],
    ),
    "an unknown name": (
        lambda root: rows_of(root, {"text": "w1", "label": "Law"}),
        ["line 1: expected a number below 5", "found 'Law'"],
    ),
    "neither": (
        lambda root: rows_of(root, {"text": "w1", "label": True}),
        ["line 1: expected a number below 5", "found True"],
    ),
    "a fraction": (
        lambda root: rows_of(root, {"text": "w1", "label": 0.5}),
        ["line 1: expected a number below 5", "found 0.5"],
    ),
    "an empty file": (
        lambda root: rows_of(root), ["rows.jsonl: expected at least one text, found none"],
    ),
    "no text": (
        lambda root: rows_of(root, {"sentence": "w1", "label": 0}),
        ["expected a field 'text', found only 'label', 'sentence'", "--column topics=FIELD"],
    ),
    "no file": (
        lambda root: ["--data", f"topics={root}/none.jsonl"], ["none.jsonl: expected a"],
    ),
    "no data": (lambda root: [], ["--data: expected labelled inputs", "found none"]),
    "a head of another name": (
        lambda root: ["--data", f"weather={root}/topics.jsonl"],
        ["merged/heads: expected a head called 'weather', found 'sentiment', 'topics'"],
    ),
    "a head that is gone": (
        without_head, ["merged/heads: expected a head called 'topics', found 'sentiment'"],
    ),
    "a head of something else": (
        foreign_head, ["heads/topics: expected a head that completes", "'classifier.bias'"],
    ),
    "a head that is cut short": (cut_head, ["head.safetensors: expected a file of"]),
    "a head for numbers": (
        regression, ["config.json: expected two labels or more", "found regression"],
    ),
    "labels for nobody": (
        lambda root: ["--data", f"topics={root}/topics.jsonl", "--label", "law=label"],
        ["--label: expected one of the tasks of --data (topics), found 'law'"],
    ),
    "an expert for nobody": (
        lambda root: ["--data", f"topics={root}/topics.jsonl", "--expert", f"law={root}/topics"],
        ["--expert: expected one of the tasks of --data (topics), found 'law'"],
    ),
    "a backbone alone": (
        lambda root: other_model(root, bert),
        ["expected a classifier of texts or pictures", "found BertModel"],
    ),
    "a masked language model": (
        lambda root: other_model(root, masked),
        ["expected a classifier of texts or pictures", "found BertForMaskedLM"],
    ),
    "no samples": (
        lambda root: ["--data", f"topics={root}/topics.jsonl", "--samples", "0"],
        ["--samples: expected a whole number from 1 on"],
    ),
    "no model": (
        lambda root: [str(root / "none"), "--data", f"topics={root}/topics.jsonl"],
        ["none: expected a folder with a model, found nothing"],
    ),
    "a name that is taken": (
        lambda root: [f"base={root}/base", "--data", f"topics={root}/topics.jsonl"],
        ["MODEL: expected a name that is neither base nor expert"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_evaluated_is_refused_by_name(family, name, capsys):
    make, expected = REFUSED[name]
    words = make(family)
    status, out, err = run(capsys, "evaluate", family / "merged", *words)
    assert status == 1 and out == ""
    assert all(part in err for part in expected), err
    assert err.startswith("qpmerge: ") and len(err.splitlines()) == 1


def test_labels_for_texts_that_have_none_are_refused(families, capsys):
    family = families["causal"]
    words = ["evaluate", family.root / "merged", "--data", f"first={family.files['first']}"]
    status, _, err = run(capsys, *words, "--label", "first=label")
    assert status == 1 and "--label: expected none for a model that predicts tokens" in err


def test_models_that_predict_other_things_are_not_put_side_by_side(families, capsys):
    causal, headed = families["causal"].root, families["bert"].root
    words = ["evaluate", headed / "merged", "--data", f"topics={headed}/topics.jsonl"]
    status, _, err = run(capsys, *words, "--expert", f"topics={causal}/first")
    assert status == 1 and "expected a model that predicts tokens, found one that predicts" in err
