"""`qpmerge diagnose`: its numbers are what the models say when transformers run them, an expert is
at one and the base at zero, and the page is text whatever names hold."""

import html.parser
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from checkpoint_families import (
    EXPERTS,
    SIZE,
    WORDS,
    Family,
    bert,
    change,
    contents,
    run,
    state_of,
    texts,
)
from safetensors.torch import load_file, save_file

import qpmerge_lite as q
from qpmerge_lite.checkpoints.diagnosis import comparing, page, summary, svg
from qpmerge_lite.checkpoints.diagnosis.diagnosing import Question, diagnose_folders

transformers = pytest.importorskip(
    "transformers", reason="the hub extra, which makes and runs checkpoints, is not here"
)
IDS = {word: number for number, word in enumerate(WORDS)}
HOSTILE = "<script>alert('x')</script> & \"quotes\""


def llama():
    """In single precision, so that padding changes next to nothing."""
    config = transformers.LlamaConfig(
        max_position_embeddings=16, num_key_value_heads=1, tie_word_embeddings=True, **SIZE
    )
    return transformers.LlamaForCausalLM(config)


def classifier(**fields):
    config = transformers.BertConfig(max_position_embeddings=16, **fields, **SIZE)
    return transformers.BertForSequenceClassification(config)


def three_classes():
    return classifier(num_labels=3)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Bases and experts, and a soup of each that is written by transformers alone."""
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("diagnose")
    made = {}
    for make in (bert, llama, three_classes):
        family = made[make.__name__] = Family(root / make.__name__, make)
        merged = type(family.model)(family.model.config)
        mean = {
            name: sum(state[name] for state in family.states.values()) / len(EXPERTS)
            for name in merged.state_dict()
        }
        merged.load_state_dict(mean)
        merged.save_pretrained(family.root / "merged")
        family.merged = merged.eval()
    return made


@pytest.fixture
def family(families, tmp_path):
    """A copy of the BERTs, to be damaged."""
    return families["bert"].copied(tmp_path / "bert")


def diagnosed(family, merged="merged", **sizes):
    experts = {name: family.root / name for name in EXPERTS}
    question = Question(family.root / merged, family.base, experts, family.files, **sizes)
    return diagnose_folders(question)


def value(found, name):
    return found[name]["value"]


@pytest.mark.parametrize("kind", ["bert", "llama", "three_classes"])
def test_an_expert_is_at_one_and_the_base_at_zero(families, kind):
    told = diagnosed(families[kind], EXPERTS[0])
    own = told["experts"][EXPERTS[0]]
    assert value(own, "captured") == 1 and own["captured"]["low"] is None
    energies = [row["energy"][EXPERTS[0]] for row in told["layers"]]
    assert energies and all(energy in (1, None) for energy in energies) and 1 in energies
    assert value(told["experts"][EXPERTS[1]], "captured") < 1
    assert told["untouched"] == []
    if kind != "bert":
        assert value(own, "agreement") == 1
    if kind == "llama":
        assert value(own, "perplexity_ratio") == 1

    told = diagnosed(families[kind], "base")
    for found in told["experts"].values():
        assert value(found, "captured") == 0
        if kind != "bert":
            assert found["agreement"] == found["agreement_of_base"]
    for row in told["layers"]:
        assert all(energy in (0, None) for energy in row["energy"].values())
        assert row["certificate"]["captured"] == pytest.approx(0, abs=1e-12)
    assert set(told["untouched"]) == state_of(families[kind].base).keys()


@torch.no_grad()
def by_hand(family, name, number):
    """Models of transformers on the texts of one expert, one text at a time: what each returns."""
    models = {"merged": family.merged, "expert": family.experts[name], "base": family.model}
    for text in texts(number):
        ids = torch.tensor([[IDS[word] for word in text.split()]])
        yield ids, {role: model(ids, return_dict=True) for role, model in models.items()}


def test_outputs_are_compared_as_transformers_compute_them(families):
    family = families["bert"]
    told = diagnosed(family)
    for number, name in enumerate(EXPERTS, 5):
        lost, energy, positions = 0.0, 0.0, 0
        for ids, outputs in by_hand(family, name, number):
            hidden = {role: output.last_hidden_state.double() for role, output in outputs.items()}
            lost += float(((hidden["merged"] - hidden["expert"]) ** 2).sum())
            energy += float(((hidden["base"] - hidden["expert"]) ** 2).sum())
            positions += ids.shape[1]
        found = told["experts"][name]
        assert value(found, "captured") == pytest.approx(1 - lost / energy, abs=1e-5)
        assert found["positions"] == positions and "agreement" not in found
        low, high = found["captured"]["low"], found["captured"]["high"]
        assert low < value(found, "captured") < high
        audited = q.audit(family.model, family.merged.state_dict(), {name: family.states[name]},
                          {name: family.calibration()[name]})  # fmt: skip
        assert value(found, "captured") == pytest.approx(audited["output"], abs=1e-6)
        layers = {row["layer"]: row["energy"][name] for row in told["layers"]}
        assert layers == audited["layers"]


@pytest.mark.parametrize("kind", ["llama", "three_classes"])
def test_predictions_are_compared_as_transformers_compute_them(families, kind):
    family = families[kind]
    told = diagnosed(family)
    kl = torch.nn.functional.kl_div
    for number, name in enumerate(EXPERTS, 5):
        lost, energy, equal, positions = 0.0, 0.0, 0, 0
        losses, targets = dict.fromkeys(comparing.ROLES, 0.0), 0
        for ids, outputs in by_hand(family, name, number):
            logits = {
                role: output.logits.flatten(0, -2).double() for role, output in outputs.items()
            }
            logs = {role: row.log_softmax(-1) for role, row in logits.items()}
            own = {"target": logs["expert"], "log_target": True, "reduction": "sum"}
            lost += float(kl(logs["merged"], **own))
            energy += float(kl(logs["base"], **own))
            equal += int((logits["merged"].argmax(-1) == logits["expert"].argmax(-1)).sum())
            positions += len(logits["expert"])
            if kind == "llama":
                targets += ids.shape[1] - 1
                for role in losses:
                    loss = torch.nn.functional.cross_entropy(logits[role][:-1], ids[0, 1:])
                    losses[role] += float(loss) * (ids.shape[1] - 1)
        found = told["experts"][name]
        assert value(found, "captured") == pytest.approx(1 - lost / energy, abs=1e-4)
        assert value(found, "agreement") == pytest.approx(equal / positions, abs=1e-12)
        for role in losses if kind == "llama" else ():
            expected = math.exp(losses[role] / targets)
            assert value(found, f"perplexity_of_{role}") == pytest.approx(expected, rel=1e-5)
        assert ("perplexity_ratio" in found) == (kind == "llama")


@pytest.mark.parametrize("kind", ["bert", "llama", "three_classes"])
def test_batches_and_padding_change_nothing(families, kind):
    one, other = (diagnosed(families[kind], batch_size=size) for size in (1, 10))
    for name in EXPERTS:
        for number in ("captured", "agreement", "perplexity_of_merged", "perplexity_ratio"):
            if number in one["experts"][name]:
                first, second = (told["experts"][name][number] for told in (one, other))
                assert list(first.values()) == pytest.approx(list(second.values()), abs=1e-4)
    for first, second in zip(one["layers"], other["layers"], strict=True):
        assert first["layer"] == second["layer"]
        assert first["energy"] == pytest.approx(second["energy"], abs=1e-4)
        assert first["certificate"] == pytest.approx(second["certificate"], abs=1e-3)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_certificates_are_those_of_certify(families, kind):
    family = families[kind]
    state = family.merged.state_dict()
    options = {"along": state, "folds": 1, "full_energy": False}
    moments = q.layer_moments(family.model, family.states, family.calibration(), **options)
    expected = q.certify(moments, family.model, state)
    found = {row["layer"]: row["certificate"] for row in diagnosed(family)["layers"]}
    assert found.keys() == expected.keys()
    for layer, certificate in expected.items():
        assert found[layer] == pytest.approx(certificate, abs=1e-6), layer
        assert certificate["gap"] >= -1e-12


def test_what_no_layer_tells_of_has_a_reason(families):
    told = diagnosed(families["llama"])
    assert told["left_out"] == {"tied to lm_head.weight": ["model.embed_tokens.weight"]}
    assert diagnosed(families["bert"])["left_out"] == {}


def test_untouched_are_entries_that_an_expert_changed_and_the_merge_did_not(family):
    path = family.root / "merged" / "model.safetensors"
    state, base = load_file(path), load_file(family.base / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    state[name] = base[name]
    save_file(state, path, metadata={"format": "pt"})
    assert diagnosed(family)["untouched"] == [name]


def test_an_expert_that_is_the_base_has_nothing_to_capture(family, capsys):
    shutil.rmtree(family.root / EXPERTS[0])
    shutil.copytree(family.base, family.root / EXPERTS[0])
    told = diagnosed(family)
    assert told["experts"][EXPERTS[0]]["captured"] is None
    assert value(told["experts"][EXPERTS[1]], "captured") > 0
    assert f"{EXPERTS[0]}   10     –\n" in summary.as_text(told) + "\n"
    parsed(page.as_page(told))


def test_numbers_that_are_no_classes_are_compared_as_outputs(tmp_path):
    family = Family(tmp_path / "one", lambda: classifier(num_labels=1))
    family.merged = family.experts[EXPERTS[0]]
    told = diagnosed(family, EXPERTS[0])
    assert told["compared"]["kind"] == "outputs" and told["compared"]["field"] == "logits"
    assert value(told["experts"][EXPERTS[0]], "captured") == 1


def test_heads_for_questions_are_refused(tmp_path):
    config = transformers.BertConfig(max_position_embeddings=16, **SIZE)
    family = Family(tmp_path / "qa", lambda: transformers.BertForQuestionAnswering(config))
    with pytest.raises(q.checkpoints.findings.Refused, match="found start_logits"):
        diagnosed(family, "base")


def words_of(family):
    return ["diagnose", str(family.root / "merged"), *family.folders, *family.given]


REFUSALS = {
    "no calibration": (
        lambda f, w: w[:5], "--calibration: expected a file for every expert, for diagnose",
    ),
    "calibration of nobody": (
        lambda f, w: [*w, "--calibration", "third=x.txt"], "one of the experts (first, second)",
    ),
    "no merge": (lambda f, w: ["diagnose", str(f.root / "none"), *w[2:]], "found nothing"),
    "a batch of none": (lambda f, w: [*w, "--batch-size", "0"], "--batch-size"),
    "no texts": (
        lambda f, w: (f.files["first"].write_text(""), w)[1], "expected at least one text",
    ),
    "a report of another kind": (
        lambda f, w: [*w, "--report", str(f.root / "r.safetensors")], "ends in .html",
    ),
    "a report among weights": (
        lambda f, w: [*w, "--report", str(f.base / "r.html")], "which is an input",
    ),
    "a report nowhere": (
        lambda f, w: [*w, "--report", str(f.root / "no" / "r.html")], "make that folder first",
    ),
    "a merge of another architecture": (
        lambda f, w: (change(f.root / "merged", hidden_size=16), w)[1], "hidden_size",
    ),
    "a manifest that does not parse": (
        lambda f, w: ((f.root / "merged" / "merge.json").write_text("{"), w)[1], "merge.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_place_and_cure(family, case, capsys):
    altered, expected = REFUSALS[case]
    words = altered(family, words_of(family))
    before = contents(family.root)
    status, out, err = run(capsys, *words)
    assert (status, out) == (1, "") and expected in err, err
    assert contents(family.root) == before


def test_weights_that_are_not_finite_are_refused_with_their_file(family, capsys):
    path = family.root / "merged" / "model.safetensors"
    state = load_file(path)
    state["pooler.dense.weight"][0, 0] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    status, _, err = run(capsys, *words_of(family))
    assert status == 1 and "pooler.dense.weight" in err and str(path) in err


class Outline(html.parser.HTMLParser):
    """What a page is made of; a tag that does not close what is open is an error."""

    VOID = ("meta",)

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.words, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parsed(text):
    outline = Outline()
    outline.feed(text)
    outline.close()
    assert outline.open == [] and text.startswith("<!DOCTYPE html>")
    return outline


def test_the_page_is_one_file_that_loads_and_runs_nothing(families, tmp_path, capsys):
    family, report = families["llama"], tmp_path / "r.html"
    words = words_of(family)
    before = contents(family.root)
    status, out, err = run(capsys, *words, "--report", report)
    assert (status, err) == (0, "") and f"written: {report}" in out
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    assert contents(family.root) == before
    text = report.read_text(encoding="utf-8")
    outline = parsed(text)
    assert not {"script", "link", "img", "iframe", "a", "base", "object"} & set(outline.tags)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert str(tmp_path.parent) not in text
    assert outline.tags.count("svg") == 4
    assert outline.tags.count("desc") == 4
    keys = [value for _, name, value in outline.attributes if name == "id"]
    assert len(set(keys)) == len(keys) == 8
    for _, name, value in outline.attributes:
        if name == "aria-labelledby":
            assert set(value.split()) <= set(keys)
    scopes = [value for tag, name, value in outline.attributes if (tag, name) == ("th", "scope")]
    assert len(scopes) == outline.tags.count("th") and set(scopes) == {"col", "row"}
    assert run(capsys, *words, "--report", tmp_path / "again.html", "--quiet") == (0, "", "")
    assert (tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_names_are_text_whatever_they_hold(family, capsys):
    name = HOSTILE + "\x1b[31m\u202e"
    folder = family.root / "<b>&amp;\x1b[2J"
    (family.root / "merged").rename(folder)
    recipe = {"method": HOSTILE, "calibration": [HOSTILE], "\x1b]0;": "</pre><script>"}
    (folder / "merge.json").write_text(json.dumps(recipe))
    experts = {name.replace("/", "\N{DIVISION SLASH}"): family.root / EXPERTS[0]}
    calibration = dict.fromkeys(experts, family.files[EXPERTS[0]])
    told = diagnose_folders(Question(folder, family.base, experts, calibration))
    told["warnings"].append(dict.fromkeys(("level", "where", "expected", "found", "cure"), HOSTILE))
    told["layers"][0]["layer"] = HOSTILE
    text = page.as_page(told)
    outline = parsed(text)
    assert "script" not in outline.tags and "b" not in outline.tags and "\x1b" not in text
    assert any(HOSTILE in words for words in outline.words)
    assert "</pre><script>" in "".join(outline.words)
    assert "\x1b" not in summary.as_text(told) and "\u202e" not in summary.as_text(told)


def test_the_recipe_is_shown_and_texts_that_it_has_seen_are_told(families, tmp_path, capsys):
    family, out = families["bert"], tmp_path / "out"
    assert run(capsys, "merge", *family.folders, "--out", out, *family.given,
               "--method", "regmean", "--quiet")[0] == 0  # fmt: skip
    words = ["diagnose", out, *family.folders]
    (tmp_path / "new.txt").write_text("w1 w2 w3\nw4 w5\n")
    given = ["--calibration", f"first={family.files['first']}"]
    given += ["--calibration", f"second={tmp_path / 'new.txt'}"]
    report = tmp_path / "r.html"
    status, told, _ = run(capsys, *words, *given, "--json", "--report", report)
    told = json.loads(told)
    assert status == 0 and told["recipe"] == json.loads((out / "merge.json").read_text())
    assert [row["where"] for row in told["warnings"]] == ["calibration of 'first', first.jsonl"]
    assert [source["name"] for source in told["inputs"]] == ["merged", "base", *EXPERTS]
    assert told["experts"]["second"]["captured"]["low"] is None  # of two texts
    hashes = [digest for source in told["inputs"] for digest in source["files"].values()]
    text = report.read_text()
    assert all(digest in text for digest in hashes) and '"method": "regmean"' in text


def test_a_report_that_cannot_be_written_leaves_the_old_one(families, tmp_path, monkeypatch):
    told = diagnosed(families["bert"])
    report = tmp_path / "r.html"
    report.write_text("old")

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(q.checkpoints.findings.Refused, match="No space left on device"):
            page.write_page(report, told)
    assert report.read_text() == "old" and list(tmp_path.iterdir()) == [report]
    page.write_page(report, told)
    assert report.read_text() == page.as_page(told)


def test_the_tables_fit_a_terminal(families, capsys):
    told = diagnosed(families["llama"])
    wide = "日本語" * 30
    told["experts"] = {wide: told["experts"]["first"], "second": told["experts"]["second"]}
    rows = [row | {"energy": {wide: -12.345, "second": None}} for row in told["layers"]]
    told["layers"] = [rows[0] | {"layer": "model." * 40}, *rows * 5]
    lines = summary.as_text(told).splitlines()
    assert max(summary.columns_of(line) for line in lines) <= summary.WIDTH
    assert (
        f"({summary.LAYERS} of {len(told['layers'])} layers, those with the largest gap)" in lines
    )


@pytest.mark.parametrize(("estimate", "expected"), [
    ((0.53412, 0.41, 0.62), "0.5 [0.4, 0.6]"),
    ((0.53412, 0.511, 0.552), "0.53 [0.51, 0.55]"),
    ((0.99996, 0.99995, 0.99999), "1.0000 [1.0000, 1.0000]"),
    ((-0.004, -0.02, 0.01), "0.00 [−0.02, 0.01]"),
    ((1234.5, 1000.0, 1700.0), "1200 [1000, 1700]"),
    ((40.61, 39.9, 41.2), "40.6 [39.9, 41.2]"),
    ((1.0, None, None), "1.00"),
    ((0.0, None, None), "0.00"),
    ((1234.5, None, None), "1230"),
    ((math.inf, 3.0, math.inf), "∞ [3.00, ∞]"),
    ((3.2e9, None, None), "3e+09"),
])  # fmt: skip
def test_numbers_have_the_digits_that_their_intervals_leave(estimate, expected):
    assert summary.told(dict(zip(("value", "low", "high"), estimate))) == expected


def test_intervals_are_those_of_ratios_of_paired_sums():
    generator = torch.Generator().manual_seed(3)
    below = torch.rand(400, generator=generator).double() + 0.5
    above = 0.4 * below + 0.1 * torch.randn(400, generator=generator).double()
    found = comparing.ratio(above.tolist(), below.tolist())
    share = float(above.sum() / below.sum())
    error = float((above - share * below).std() / math.sqrt(400) / below.mean())
    assert found.value == pytest.approx(share)
    assert found.low == pytest.approx(share - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(share + 1.96 * error, abs=0.2 * error)
    assert comparing.ratio((2 * below).tolist(), below.tolist()).value == pytest.approx(2)
    few = comparing.ratio([1.0] * 7, [2.0, 3.0] + [1.0] * 5)
    assert few == comparing.Estimate(7 / 10, None, None)
    assert comparing.ratio([1.0] * 9, [1.0] * 9) == comparing.Estimate(1.0, None, None)
    assert comparing.ratio([0.0] * 9, [0.0] * 9) is None
    sparse = comparing.ratio([0.5] + [0.0] * 9, [1.0] + [0.0] * 9)
    assert sparse.value == 0.5


def test_charts_draw_what_they_are_given():
    rows = [svg.Bar("a", 0.5, 0.4, 0.6, "0.5"), svg.Bar("b" * 99, -7.0), svg.Bar("c", None)]
    chart = svg.bars("key", "title", "description", rows, -1.0)
    again = ElementTree.fromstring(ElementTree.tostring(chart))
    lengths = [float(bar.get("width")) for bar in again.findall("rect")]
    whole = svg.WIDTH - svg.LEFT - svg.RIGHT
    assert lengths == pytest.approx([whole / 4, whole / 2], abs=0.01)
    assert again.findtext("title") == "title" and again.findtext("desc") == "description"
    written = [text.text or "" for text in again.findall("text")]
    assert "◀" in written and not any(len(text) > svg.LONGEST for text in written)
    ends = {"low": -1.0, "high": 1.0, "below": ("first", "last")}
    panel = svg.Panel("p", [1.0, None, -3.0, 0.0], ["", "", "", ""])
    chart = svg.columns("key", "title", "description", [panel], **ends)
    heights = [float(column.get("height")) for column in chart.findall("rect")]
    assert heights == pytest.approx([38, 38, 0]) and "×" in [t.text for t in chart.findall("text")]
    svg.columns("key", "title", "description", [svg.Panel("p", [], [])], **ends)


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    (0, 1234, [0, 500, 1000]),
])  # fmt: skip
def test_ticks_are_round(low, high, expected):
    assert svg.ticks(low, high) == expected


def test_histograms_count_everything_once():
    values = [-9.0, -1.0, -0.95, 0.0, 0.999, 1.0]
    counts = page.histogram(values, -1.0)
    assert sum(counts) == 6 and counts[0] == 3 and counts[10] == 1 and counts[-1] == 2


def test_pages_and_refusals_load_no_torch():
    code = (
        "import sys; import qpmerge_lite.checkpoints.diagnosis.page, qpmerge_lite.__main__ as m;"
        "m.parser().format_help(); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (done.stdout.strip(), done.stderr) == ("False", "")
