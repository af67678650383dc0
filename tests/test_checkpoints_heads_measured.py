"""Experts with heads of their own, diagnosed and merged by moments: numbers are those of models of
transformers, and moments of a model with a head are those of its backbone."""

import json
import shutil

import pytest
import torch
from checkpoint_families import change, contents, reshape, run, safetensors, texts, tokenizer
from test_checkpoints_evaluate import with_head
from test_checkpoints_heads import (
    LABELS,
    NAMES,
    Family,
    adapted,
    alike,
    assert_heads,
    body_in,
    calibration_by_hand,
)
from test_checkpoints_hub import hub  # noqa: F401

import qpmerge_lite as q
from qpmerge_lite.checkpoints.diagnosis import page, summary
from qpmerge_lite.checkpoints.diagnosis.comparing import ROLES
from qpmerge_lite.checkpoints.diagnosis.diagnosing import Question, diagnose_folders
from qpmerge_lite.checkpoints.moments.files import read_moments

transformers = pytest.importorskip(
    "transformers", reason="the hub extra, which makes and runs checkpoints, is not here"
)
KINDS = ("bert", "masked", "tokens", "llama")


def merge(folders, out, *words):
    from qpmerge_lite.companion import cli

    given = [str(word) for word in (*folders, "--out", out, *words)]
    assert cli.main(["merge", *given, "--quiet"]) == 0


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Bases and experts, and a soup of each by this package."""
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("measured")
    made = {}
    for kind in KINDS:
        family = made[kind] = Family(root / kind, kind)
        family.calibration = family.files()
        merge(family.folders, root / kind / "merged")
    return made


@pytest.fixture
def family(families, tmp_path):
    """A copy of the BERTs, to be damaged."""
    shutil.copytree(families["bert"].root, tmp_path / "bert")
    return tmp_path / "bert"


def diagnosed(root, merged="merged", experts=None, **sizes):
    folders = experts or {name: root / name for name in NAMES}
    calibration = {name: root / f"{name}.txt" for name in folders}
    return diagnose_folders(Question(root / merged, root / "base", folders, calibration, **sizes))


def models_of(family, name):
    """Merge, expert and base with one expert's head, by hand."""
    bodies = {"merged": body_in(family.root / "merged", family), "base": family.body.state_dict()}
    if family.kind == "tokens":  # a pooler is no part of what all have: it is the head's
        for role, body in bodies.items():
            bodies[role] = {key: v for key, v in body.items() if not key.startswith("pooler")}
    made = {role: with_head(family, name, body) for role, body in bodies.items()}
    return made | {"expert": family.experts[name]}


@torch.no_grad()
def by_hand(family, name, seed):
    """Sums over texts, one at a time: divergences and squared distances of merge and base from the
    expert, and at how many places they predict what it does."""
    sums = {role: {"divergence": 0.0, "distance": 0.0, "equal": 0} for role in ROLES}
    models, positions = models_of(family, name), 0
    for text in texts(seed):
        ids = tokenizer()(text, return_tensors="pt")["input_ids"]
        logits = {role: model(ids).logits.flatten(0, -2).double() for role, model in models.items()}
        hidden = {role: model.base_model(ids)[0].double() for role, model in models.items()}
        positions += len(logits["expert"])
        for role, own in logits.items():
            target, log = logits["expert"].log_softmax(-1), own.log_softmax(-1)
            sums[role]["divergence"] += float((target.exp() * (target - log)).sum())
            sums[role]["distance"] += float((hidden[role] - hidden["expert"]).square().sum())
            sums[role]["equal"] += int((own.argmax(-1) == logits["expert"].argmax(-1)).sum())
    return sums, positions


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_of_a_merge_by_an_expert_s_head_are_held_against_the_expert_s(families, kind):
    family = families[kind]
    told = diagnosed(family.root)
    assert told["compared"]["kind"] == "predictions" and told["compared"]["by_heads"]
    for seed, name in enumerate(NAMES, 5):
        sums, positions = by_hand(family, name, seed)
        found = told["experts"][name]
        assert found["positions"] == positions
        for number, kept in (("captured", "divergence"), ("energy", "distance")):
            expected = 1 - sums["merged"][kept] / sums["base"][kept]
            assert found[number]["value"] == pytest.approx(expected, abs=1e-4), number
            assert found[number]["low"] < found[number]["value"] < found[number]["high"]
        for number, role in (("agreement", "merged"), ("agreement_of_base", "base")):
            assert found[number]["value"] == pytest.approx(sums[role]["equal"] / positions)
        body = dict(family.body.named_parameters())
        assert [row["layer"] for row in told["layers"]]
        assert all(f"{row['layer']}.weight" in body for row in told["layers"])


@pytest.mark.parametrize("kind", KINDS)
def test_certificates_are_those_of_the_backbone(families, kind):
    family = families[kind]
    state = body_in(family.root / "merged", family)
    options = {"along": state, "folds": 1, "full_energy": False}
    bodies = family.bodies
    if kind == "tokens":  # which the merge has as the base does
        own = {key: v for key, v in family.body.state_dict().items() if key.startswith("pooler")}
        bodies = {name: body | own for name, body in bodies.items()}
    moments = q.layer_moments(family.body, bodies, calibration_by_hand(), **options)
    expected = q.certify(moments, family.body, state)
    found = {row["layer"]: row["certificate"] for row in diagnosed(family.root)["layers"]}
    assert {name for name, told in found.items() if told} == expected.keys()
    for layer, certificate in expected.items():
        assert found[layer] == pytest.approx(certificate, abs=1e-6), layer


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_is_at_one_and_the_base_at_zero(families, kind, tmp_path):
    root = families[kind].root
    shutil.copytree(root, tmp_path / kind)
    alone = {"topics": root / "topics"}
    merge([root / "base", root / "topics"], tmp_path / kind / "alone")
    own = diagnosed(tmp_path / kind, "alone", alone)["experts"]["topics"]
    for number in ("captured", "agreement", "energy"):
        assert own[number]["value"] == 1, number
    told = diagnosed(root, "base")
    for found in told["experts"].values():
        assert found["captured"]["value"] == 0 and found["energy"]["value"] == 0
        assert found["agreement"] == found["agreement_of_base"]
    backbone = {name for name in told["untouched"] if not name.startswith(("cls", "lm_head"))}
    assert backbone and backbone == set(told["untouched"])
    assert not diagnosed(root)["untouched"]


def test_batches_and_padding_change_nothing(families):
    for kind in ("bert", "tokens"):
        one, other = (diagnosed(families[kind].root, batch_size=size) for size in (1, 10))
        for name in NAMES:
            for number in ("captured", "agreement", "energy"):
                first, second = (told["experts"][name][number] for told in (one, other))
                assert list(first.values()) == pytest.approx(list(second.values()), abs=1e-4)


def test_what_is_told_names_heads_and_outputs(families):
    told = diagnosed(families["bert"].root)
    said = " ".join(summary.as_text(told).split())
    assert "predictions of BertModel with the head of every expert (logits)" in said
    assert "energy of outputs: share of the squared difference" in said
    assert "energy of outputs" in page.as_page(told)
    assert max(map(len, summary.as_text(told).splitlines())) <= summary.WIDTH


def test_pictures_are_read_by_heads_too(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    family, generator = Family(tmp_path / "vit", "vit"), torch.Generator().manual_seed(0)
    given, root = [], tmp_path / "vit"
    merge(family.folders, root / "merged")
    lost, energy = 0.0, 0.0
    models = {role: model.base_model for role, model in models_of(family, "topics").items()}
    for name in NAMES:
        (tmp_path / name).mkdir()
        for number in range(9):
            points = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
            picture = image.fromarray(points.numpy())
            picture.save(tmp_path / name / f"{number}.png")
            values = family.processor()(picture, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                hidden = {role: model(values)[0].double() for role, model in models.items()}
            if name == "topics":
                lost += float((hidden["merged"] - hidden["expert"]).square().sum())
                energy += float((hidden["base"] - hidden["expert"]).square().sum())
        given += ["--calibration", f"{name}={tmp_path / name}"]
    status, out, err = run(capsys, "diagnose", root / "merged", *family.folders, *given, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)["experts"]["topics"]
    assert found["energy"]["value"] == pytest.approx(1 - lost / energy, abs=1e-4)
    assert found["positions"] == 9 and found["agreement"]["value"] <= 1
    shutil.rmtree(root / "merged" / "heads")
    (root / "merged" / "merge.json").unlink()
    words = ["diagnose", root / "merged", *family.folders, *given, "--quiet"]
    assert run(capsys, *words) == (0, "", "")
    words = ["merge", *family.folders, "--out", tmp_path / "chosen", *given, "--quiet"]
    assert run(capsys, *words) == (0, "", "")
    choice = json.loads((tmp_path / "chosen" / "merge.json").read_text())["choice"]
    assert choice["criterion"] == "captured divergence"


def test_heads_that_predict_no_classes_leave_outputs_to_compare(family):
    change(family / "topics", problem_type="regression")
    told = diagnosed(family)
    assert told["compared"]["kind"] == "outputs" and not told["compared"]["by_heads"]
    assert all("energy" not in own for own in told["experts"].values())


def test_a_merge_says_whether_heads_are_its_own(tmp_path):
    _, folders = alike(tmp_path)
    for name in NAMES:
        (tmp_path / f"{name}.txt").write_text("\n".join(texts(5)), encoding="utf-8")
    for wish, is_own in (("own", True), ("merged", False)):
        merge(folders, tmp_path / wish, "--heads", wish)
        told = diagnosed(tmp_path, wish)
        assert told["compared"]["by_heads"] == is_own
        model = "BertModel" if is_own else "BertForSequenceClassification"
        assert told["compared"]["model"] == model


def test_experts_without_the_heads_that_a_merge_keeps_are_refused(family, capsys):
    words, given = ["diagnose", family / "merged", family / "base"], []
    for name in NAMES:
        expert = transformers.AutoModel.from_pretrained(family / name)
        expert.save_pretrained(family / f"{name}-body")
        words.append(f"{name}={family / name}-body")
        given += ["--calibration", f"{name}={family / name}.txt"]
    status, _, err = run(capsys, *words, *given)
    assert status == 1 and "--heads" not in err
    assert f"experts: expected experts with the heads that the merge keeps, {NAMES[0]!r}" in err
    assert "found 'BertModel'; give the experts as they were merged, with their heads" in err
    whole = [str(word).replace("-body", "") for word in words]
    assert run(capsys, *whole, *given)[0] == 0


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_adapters_bring_their_heads(families, kind, tmp_path):
    family, root = families[kind], tmp_path
    made = {name: adapted(family, name, seed)[0] for seed, name in enumerate(NAMES, 3)}
    shutil.copytree(family.base, root / "base")
    for name in NAMES:
        shutil.copyfile(family.root / f"{name}.txt", root / f"{name}.txt")
    merge([root / "base", f"topics={made['topics']}"], root / "alone")
    told = diagnosed(root, "alone", made)["experts"]
    assert told["topics"]["captured"]["value"] == pytest.approx(1, abs=1e-6)
    assert told["topics"]["agreement"]["value"] == 1
    assert told["sentiment"]["captured"]["value"] < 1
    folders = [root / "base", *(f"{name}={folder}" for name, folder in made.items())]
    given = [w for name in NAMES for w in ("--calibration", f"{name}={root / name}.txt")]
    merge(folders, root / "merged", *given)
    choice = json.loads((root / "merged" / "merge.json").read_text())["choice"]
    assert choice["criterion"] == "captured divergence"


def test_a_merge_of_the_hub_says_how_it_was_made(families, hub, capsys):  # noqa: F811
    family = families["bert"]
    hub.add("ours/merged", contents(family.root / "merged"))
    given = [w for n, f in family.calibration.items() for w in ("--calibration", f"{n}={f}")]
    here, there = (
        json.loads(run(capsys, "diagnose", place, *family.folders, *given, "--json")[1])
        for place in (family.root / "merged", "hf:ours/merged")
    )
    assert here["recipe"] == there["recipe"] and here["experts"] == there["experts"]
    asked = {path.rpartition("/")[2] for _, path, _ in hub.requests}
    assert "merge.json" in asked and "head.safetensors" not in asked


def measured(capsys, family, root, names=NAMES):
    """--moments for every expert."""
    words = []
    for name in names:
        out = root / f"{name}.safetensors"
        given = ["--calibration", family.calibration[name], "--out", out]
        status, _, err = run(capsys, "moments", family.root / name, *given)
        assert (status, err) == (0, "")
        words += ["--moments", f"{name}={out}"]
    return words


@pytest.mark.parametrize("kind", KINDS)
def test_moments_give_the_backbone_that_the_data_give_and_heads_are_kept(
    families, kind, tmp_path, capsys
):
    family, out = families[kind], tmp_path / "out"
    words = measured(capsys, family, tmp_path)
    shared = family.body.state_dict().keys()
    if kind == "tokens":
        shared = {name for name in shared if not name.startswith("pooler")}
    for number, (method, options) in enumerate((("qp", {"basis": "rows"}), ("regmean", {}))):
        given = [word for k, v in options.items() for word in ("--option", f"{k}={v}")]
        place = out.with_name(f"out{number}")
        done = run(capsys, "merge", *family.folders, "--out", place, *words, "--method", method,
                   *given)  # fmt: skip
        assert (done[0], done[2]) == (0, "")
        assert_heads(place, family)
        own = {"inputs": "expert"} if method == "qp" else {}
        data = calibration_by_hand()
        expected = getattr(q, method)(family.body, family.bodies, data, **options, **own)
        found, before = body_in(place, family), family.body.state_dict()
        for name in shared:
            moved = (expected.state_dict[name] - before[name]).norm()
            assert (found[name] - expected.state_dict[name]).norm() <= 1e-5 * moved, name
        told = json.loads((place / "merge.json").read_text(encoding="utf-8"))
        layers = [row["layer"] for row in expected.table if f"{row['layer']}.weight" in shared]
        assert [row["layer"] for row in told["table"]] == layers


def test_one_file_serves_heads_that_are_kept_and_heads_that_are_merged(tmp_path, capsys):
    models, folders = alike(tmp_path)
    family = Family.__new__(Family)
    family.root, family.calibration = tmp_path, {}
    for seed, name in enumerate(NAMES, 5):
        family.calibration[name] = tmp_path / f"{name}.txt"
        family.calibration[name].write_text("\n".join(texts(seed)), encoding="utf-8")
    words = measured(capsys, family, tmp_path)
    base, states = models["base"], {name: models[name].state_dict() for name in NAMES}
    options = {"basis": "elements", "inputs": "expert"}
    for wish in ("own", "merged"):
        out = tmp_path / wish
        done = run(capsys, "merge", *folders, "--out", out, *words, "--heads", wish)
        assert (done[0], done[2]) == (0, "")
        found = safetensors.load_file(out / "model.safetensors")
        whole = q.qp(base, states, calibration_by_hand(), **options).state_dict
        for name, value in found.items():
            expected = whole[name]
            if name.startswith("classifier") and wish == "own":
                expected = base.state_dict()[name]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    rows = json.loads((tmp_path / "own" / "merge.json").read_text())["table"]
    assert rows and all("classifier" not in row["layer"] for row in rows)


def test_moments_of_a_head_that_was_trained_on_are_refused(family, tmp_path, capsys):
    made = Family.__new__(Family)
    made.root = family
    made.calibration = {name: family / f"{name}.txt" for name in NAMES}
    words = measured(capsys, made, tmp_path)
    reshape(family / "topics", "classifier.bias", lambda value: value + 1)
    folders = [family / name for name in ("base", *NAMES)]
    status, _, err = run(capsys, "merge", *folders, "--out", tmp_path / "out", *words)
    assert status == 1 and "topics.safetensors, weights of the model: expected those of" in err
    assert not (tmp_path / "out").exists()


def test_a_classifier_that_has_no_token_for_padding_is_measured(families, tmp_path, capsys):
    family = families["llama"]
    shutil.copytree(family.root / "topics", tmp_path / "topics")
    change(tmp_path / "topics", pad_token_id=None)
    grams = []
    for number, folder in enumerate((family.root, tmp_path)):
        out = tmp_path / f"{number}.safetensors"
        given = ["--calibration", family.calibration["topics"], "--out", out]
        assert run(capsys, "moments", folder / "topics", *given)[0] == 0
        name = "model.layers.0.mlp.down_proj.gram"
        assert read_moments(out).layers.keys() >= {"model.layers.0.mlp.down_proj", "score"}
        grams.append(safetensors.load_file(out)[name])
    torch.testing.assert_close(*grams)


def test_heads_have_the_labels_of_their_experts(families):
    """What the tests above rest on: experts differ in what they tell apart."""
    assert len({len(labels) for labels in LABELS.values()}) == len(NAMES)
