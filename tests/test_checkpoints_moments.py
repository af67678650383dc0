"""`qpmerge moments` and `qpmerge merge --moments`: a file of sums over what one expert's layers
read gives the merge that its data give, and a file that is not what it should be is refused."""

import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from checkpoint_families import (
    EXPERTS,
    ROOT,
    SIZE,
    WORDS,
    Family,
    assert_same,
    bert,
    change,
    contents,
    cut,
    run,
    safetensors,
    state_of,
    texts,
    transformers,
)
from test_checkpoints_adapters import write_adapter

import qpmerge_lite as q
from qpmerge_lite.checkpoints import fingerprints
from qpmerge_lite.checkpoints.folders import read_folder
from qpmerge_lite.checkpoints.moments import grams, measuring, solving
from qpmerge_lite.checkpoints.moments.files import KEY, read_moments

FOLDS = 4


def llama():
    """Tied, with layers that have no bias."""
    config = transformers.LlamaConfig(
        max_position_embeddings=16, num_key_value_heads=1, tie_word_embeddings=True, **SIZE
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    """With layers whose weights are stored as their transposes."""
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 40}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))


def double(make):
    return lambda: make().double()


MAKES = {"bert": double(bert), "llama": double(llama), "gpt2": double(gpt2), "single": bert}


class Measured(Family):
    """A family, and a file of moments for each expert."""

    def __init__(self, root, make):
        super().__init__(root, make)
        self.moments = {}
        for name in EXPERTS:
            self.moments[name] = root / f"{name}.moments.safetensors"
            order = measuring.Measurement(root / name, self.files[name], self.moments[name])
            measuring.measure(order)

    @property
    def measured(self):
        """--moments for every expert."""
        pairs = [f"{name}={file}" for name, file in self.moments.items()]
        return [word for pair in pairs for word in ("--moments", pair)]

    def copied(self, root):
        """The same in another place."""
        other = super().copied(root)
        other.moments = {name: root / file.name for name, file in self.moments.items()}
        return other


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("moments")
    return {kind: Measured(root / kind, make) for kind, make in MAKES.items()}


@pytest.fixture
def family(families, tmp_path):
    """A copy of the BERTs, to be damaged."""
    return families["bert"].copied(tmp_path / "bert")


def merge(capsys, family, out, *words):
    return run(capsys, "merge", *family.folders, "--out", out, *family.measured, *words)


METHODS = [
    ("regmean", {}),
    ("regmean", {"alpha": 1.0}),
    ("qp", {"basis": "layer", "ridge": 0.1}),
    ("qp", {"basis": "rows", "prior": 0.0}),
    ("qp", {"basis": "rotated_rows", "scope": "dense", "ridge": 0.1}),
    ("qp", {"basis": "rotated_columns", "ridge": 0.01, "folds": 1}),
    ("qp", {"basis": "elements", "penalty": "diagonal"}),
    ("qp", {"basis": "elements", "scope": "weights", "weights": "energy"}),
    ("qp", {"basis": ["rows", "elements"]}),
]


CASES = [("bert", *case) for case in METHODS]
CASES += [(kind, *case) for kind in ("llama", "gpt2") for case in METHODS[::3]]


@pytest.mark.parametrize(("kind", "method", "options"), CASES, ids=str)
def test_moments_give_what_the_data_give(families, kind, method, options, tmp_path, capsys):
    family, out = families[kind], tmp_path / "out"
    words = [word for k, v in options.items() for word in ("--option", f"{k}={v}")]
    done = merge(capsys, family, out, "--method", method, *words)
    assert (done[0], done[2]) == (0, "")
    inputs = {"inputs": "expert"} if method == "qp" else {}
    function = getattr(q, method)
    expected = function(family.model, family.states, family.calibration(), **options, **inputs)
    found = state_of(out)
    for name, value in found.items():
        torch.testing.assert_close(value, expected.state_dict[name], rtol=0, atol=1e-10)
    told = json.loads((out / "merge.json").read_text(encoding="utf-8"))
    reasons = {name: reason for reason, names in told["averaged"].items() for name in names}
    assert reasons == expected.averaged
    rows = {row["layer"]: row for row in expected.table}
    assert [row["layer"] for row in told["table"]] == list(rows)
    for row in told["table"]:
        same = rows[row["layer"]]
        assert (row["basis"], row["ridge"]) == (same["basis"], same["ridge"])
        assert row["captured"] == pytest.approx(same["captured"], abs=1e-8)


def esm():
    """With norms whose names in the files are other ones than in the model."""
    config = transformers.EsmConfig(
        max_position_embeddings=16,
        pad_token_id=0,
        mask_token_id=1,
        token_dropout=False,
        position_embedding_type="absolute",
        **SIZE,
    )
    return transformers.EsmModel(config).double()


def test_what_is_averaged_is_told_by_the_names_in_the_files(families, tmp_path, capsys):
    family = Measured(tmp_path / "esm", esm)
    assert merge(capsys, family, tmp_path / "out")[0] == 0
    told = json.loads((tmp_path / "out" / "merge.json").read_text(encoding="utf-8"))
    assert "encoder.layer.0.LayerNorm" in [row["layer"] for row in told["table"]]
    averaged = {name for names in told["averaged"].values() for name in names}
    assert averaged <= state_of(tmp_path / "out").keys()
    assert not any("LayerNorm" in name for name in averaged)


@pytest.mark.parametrize(("method", "options", "bound"), [
    ("qp", {"basis": "rows"}, 0.0),
    ("qp", {"basis": "elements"}, 0.0),
    ("regmean", {}, 1e-5),
    ("regmean", {"alpha": 1.0}, 2e-4),  # inverts grams as they are
], ids=str)  # fmt: skip
def test_single_precision_is_not_lost_by_the_file(
    families, method, options, bound, tmp_path, capsys
):
    """The numbers that the docstring of ``measure`` has: relative to how far the merge is from its
    base. In as many folds nothing is rounded at all, as these texts are few."""
    family, out = families["single"], tmp_path / "out"
    words = [word for k, v in options.items() for word in ("--option", f"{k}={v}")]
    assert merge(capsys, family, out, "--method", method, *words)[0] == 0
    inputs = {"inputs": "expert"} if method == "qp" else {}
    function, data = getattr(q, method), family.calibration()
    expected = function(family.model, family.states, data, **options, **inputs).state_dict
    for name, value in state_of(out).items():
        moved = expected[name].double() - family.model.state_dict()[name]
        assert (value.double() - expected[name]).norm() <= bound * moved.norm(), name


def test_a_file_is_as_large_as_it_says(families):
    """A triangle of (n + 1) n / 2 numbers for each fold and each tensor that is read, in single
    precision where the model is; the layer here reads twelve numbers and the one of its bias."""
    name = "encoder.layer.0.output.dense.gram"
    for kind, dtype, size in (("single", "F32", 4), ("bert", "F64", 8)):
        entry = read_moments(families[kind].moments["first"]).header.entries[name]
        assert (entry.dtype, entry.shape) == (dtype, (FOLDS, 1, 13 * 14 // 2))
        assert entry.stop - entry.start == FOLDS * 13 * 14 // 2 * size


def reads(model, batches, layer):
    """What a layer reads of every text, without padding, in the order of the texts."""
    rows = []

    def note(module, args):
        rows.append(args[0])

    hook = model.get_submodule(layer).register_forward_pre_hook(note)
    by_text = []
    for batch in batches:
        with torch.no_grad():
            model(**batch)
        read = rows.pop()
        for text, mask in zip(read, batch["attention_mask"]):
            by_text.append(text[mask.bool()])
    hook.remove()
    return by_text


@pytest.mark.parametrize(("kind", "layer", "bias"), [
    ("bert", "encoder.layer.0.output.dense", True),
    ("llama", "model.layers.0.mlp.down_proj", False),
    ("gpt2", "transformer.h.0.attn.c_attn", True),
])  # fmt: skip
def test_a_gram_is_the_sum_over_what_is_read(families, kind, layer, bias):
    family = families[kind]
    for name in EXPERTS:
        file = read_moments(family.moments[name])
        found = grams.read_gram(file, file.layers[layer], 40)
        by_text = reads(family.experts[name], family.calibration()[name], layer)
        for fold in range(FOLDS):
            X = torch.cat(by_text[fold::FOLDS])
            X = torch.cat([X, torch.ones(len(X), 1)], 1) if bias else X
            assert int(found.counts[fold]) == len(X)
            torch.testing.assert_close(found.C[fold, 0], X.mT @ X, rtol=1e-7, atol=1e-9)


def test_a_table_counts_tokens(families):
    file = read_moments(families["bert"].moments["first"])
    layer = file.layers["embeddings.word_embeddings"]
    found = grams.read_gram(file, layer, 40)
    for fold in range(FOLDS):
        words = " ".join(texts(5)[fold::FOLDS]).split()
        expected = Counter(WORDS.index(word) for word in words)
        counted = zip(found.ids.tolist(), found.C[fold, :, 0, 0].tolist())
        assert {place: count for place, count in counted if count} == expected
        assert int(found.counts[fold]) == len(words)


def test_the_programme_is_the_least_squares_of_the_data(families, tmp_path, capsys):
    """Dense least squares on the rows themselves, by another routine: min Σ_t ‖(W - W_t) X_t‖²/N_t
    over weights and bias of a layer."""
    family, layer = families["bert"], "encoder.layer.0.intermediate.dense"
    words = ["--option", "basis=elements", "--option", "ridge=0", "--option", f"layers=['{layer}']"]
    assert merge(capsys, family, tmp_path / "out", "--method", "qp", *words)[0] == 0
    inputs, outputs = [], []
    for name in EXPERTS:
        rows = torch.cat(reads(family.experts[name], family.calibration()[name], layer))
        dense = family.experts[name].get_submodule(layer)
        inputs.append(torch.cat([rows, torch.ones(len(rows), 1)], 1) / len(rows) ** 0.5)
        outputs.append((rows @ dense.weight.mT + dense.bias).detach() / len(rows) ** 0.5)
    expected = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution.mT
    found = state_of(tmp_path / "out")
    solved = torch.cat([found[f"{layer}.weight"], found[f"{layer}.bias"][:, None]], 1)
    torch.testing.assert_close(solved, expected, rtol=0, atol=1e-9)
    average = sum(state["pooler.dense.weight"] for state in family.states.values()) / 2
    torch.testing.assert_close(found["pooler.dense.weight"], average)


def test_layers_that_read_the_same_share_their_sums(families):
    for kind, names in {
        "bert": [f"encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")],
        "llama": [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")],
    }.items():
        file = read_moments(families[kind].moments["first"])
        assert {file.layers[name].sums for name in names} == {names[0]}
        held = [name for name in file.header.entries if name.endswith(".gram")]
        assert set(held) == {f"{layer.sums}.gram" for layer in file.layers.values()}


def test_files_of_one_expert_are_added(families, tmp_path, capsys):
    """Texts in two files of moments, of which the first has as many for each fold."""
    family = families["bert"].copied(tmp_path / "bert")
    lines = family.files["first"].read_text(encoding="utf-8").splitlines()
    words = []
    for number, part in enumerate((lines[:4], lines[4:])):
        data, out = tmp_path / f"{number}.jsonl", tmp_path / f"{number}.safetensors"
        data.write_text("\n".join(part), encoding="utf-8")
        done = run(capsys, "moments", family.root / "first", "--calibration", data, "--out", out)
        assert done[0] == 0
        words += ["--moments", f"first={out}"]
    words += ["--moments", f"second={family.moments['second']}"]
    order = ["merge", *family.folders, "--out"]
    assert run(capsys, *order, tmp_path / "two", *words)[0] == 0
    assert merge(capsys, family, tmp_path / "one")[0] == 0
    one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9)
    told = json.loads((tmp_path / "two" / "merge.json").read_text(encoding="utf-8"))
    assert [file["calibration"]["inputs"] for file in told["moments"]["first"]] == [4, 6]


def test_adding_does_not_hang_on_the_order(families):
    file = read_moments(families["bert"].moments["first"])
    other = read_moments(families["bert"].moments["second"])
    for name, layer in file.layers.items():
        parts = [grams.read_gram(f, layer, 40) for f in (file, other, file)]
        totals = [grams.added(order) for order in itertools.permutations(parts)]
        for total in totals:
            torch.testing.assert_close(total.C, totals[0].C)
            assert torch.equal(total.counts, sum(part.counts for part in parts)), name


def test_triangles_are_packed_and_unpacked():
    for shape in [(1, 1), (3, 2, 2), (2, 1, 300, 300)]:
        C = torch.randn(shape, dtype=torch.float64)
        C = C + C.mT
        triangles = grams.packed(C.tril())
        n = shape[-1]
        assert triangles.shape == (*shape[:-2], n * (n + 1) // 2)
        assert torch.equal(grams.unpacked(triangles), C)


WITHOUT = """
import sys
sys.modules["transformers"] = None
from qpmerge_lite.__main__ import main
status = main(sys.argv[1:])
sys.exit(status)
"""


def test_a_merge_needs_no_transformers(families, tmp_path, capsys):
    family = families["llama"]
    words = ["merge", *family.folders, "--out", str(tmp_path / "a"), *family.measured]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT, *words], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    words[words.index("--out") + 1] = str(tmp_path / "b")
    assert run(capsys, *words)[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_default_is_the_programme_over_single_entries(families, tmp_path, capsys):
    family = families["bert"]
    status, told, _ = merge(capsys, family, tmp_path / "a")
    assert status == 0 and "method: qp (the default with moments" in told
    done = merge(
        capsys, family, tmp_path / "b", "--method", "qp", "--option", "basis=elements", "--json"
    )
    assert done[0] == 0 and json.loads(done[1])["options"] == {"basis": "elements"}
    assert_same(tmp_path / "a", state_of(tmp_path / "b"))
    merge(capsys, family, tmp_path / "c", "--option", "basis=rows")
    told = json.loads((tmp_path / "c" / "merge.json").read_text(encoding="utf-8"))
    assert told["options"] == {"basis": "rows"}


def test_the_manifest_says_what_was_measured(families, tmp_path, capsys):
    family = families["llama"]
    assert merge(capsys, family, tmp_path / "out", "--method", "regmean")[0] == 0
    told = json.loads((tmp_path / "out" / "merge.json").read_text(encoding="utf-8"))
    assert told["calibration"] == {} and "transformers" not in told["versions"]
    for name in EXPERTS:
        (file,) = told["moments"][name]
        expert, _ = read_folder(name, family.root / name)
        assert file["model"]["weights"] == fingerprints.of_weights(expert)
        assert file["calibration"]["inputs"] == 10 and file["folds"] == FOLDS
        assert file["file"] == family.moments[name].name and len(file["sha256"]) == 64
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "`first.moments.safetensors`, measured on 10 inputs" in card
    assert str(family.root) not in (tmp_path / "out" / "merge.json").read_text() + card


def test_moments_are_written_once_and_the_same(families, tmp_path, capsys):
    family = families["bert"]
    words = ["moments", family.root / "first", "--calibration", family.files["first"], "--out"]
    status, told, err = run(capsys, *words, tmp_path / "ä b.safetensors", "--json")
    assert (status, err) == (0, "")
    said = json.loads(told)
    assert said["layers"] == 13 and said["calibration"]["inputs"] == 10
    assert said["model"]["architectures"] == ["BertModel"]
    assert (tmp_path / "ä b.safetensors").read_bytes() == family.moments["first"].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["ä b.safetensors"]
    assert run(capsys, *words, tmp_path / "b.safetensors", "--quiet") == (0, "", "")
    status, _, err = run(capsys, *words, tmp_path / "b.safetensors")
    assert status == 1 and "expected a new file, found something of that name" in err
    assert family.moments["first"].read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_file_is_one_for_other_readers_too(families):
    path = families["bert"].moments["first"]
    with safetensors.safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()[KEY])["format"] == 1
        for name, entry in read_moments(path).header.entries.items():
            assert tuple(file.get_tensor(name).shape) == entry.shape


def test_weights_are_the_same_in_whatever_files(families, tmp_path):
    family = families["llama"]
    whole, _ = read_folder("first", family.root / "first")
    family.experts["first"].save_pretrained(tmp_path / "shards", max_shard_size="1KB")
    shards, _ = read_folder("first", tmp_path / "shards")
    assert len(shards.headers) > 1 == len(whole.headers)
    assert fingerprints.of_weights(whole) == fingerprints.of_weights(shards)
    other, _ = read_folder("second", family.root / "second")
    assert fingerprints.of_weights(whole) != fingerprints.of_weights(other)


def test_a_full_disk_leaves_nothing(families, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measuring, "_write", full)
    family = families["bert"]
    words = ["moments", family.root / "first", "--calibration", family.files["first"]]
    status, _, err = run(capsys, *words, "--out", tmp_path / "a.safetensors")
    assert status == 1 and "No space left on device" in err
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_one_expert_has_not_is_averaged(family, tmp_path, capsys):
    layer = "pooler.dense"

    def leave_out(about):
        about["layers"] = [given for given in about["layers"] if given["name"] != layer]
        about["averaged"] |= dict.fromkeys(NAMES, "no calibration batch was seen to call it")

    NAMES = [f"{layer}.weight", f"{layer}.bias"]
    rewrite(family.moments["second"], leave_out)
    assert merge(capsys, family, tmp_path / "out", "--method", "regmean")[0] == 0
    told = json.loads((tmp_path / "out" / "merge.json").read_text(encoding="utf-8"))
    reason = "not measured for 'second': no calibration batch was seen to call it"
    assert set(told["averaged"][reason]) == set(NAMES)
    average = sum(state[NAMES[0]] for state in family.states.values()) / 2
    torch.testing.assert_close(state_of(tmp_path / "out")[NAMES[0]], average)


def rewrite(path, about=None, tensors=None):
    """Change what a file of moments says, or holds."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    told, state = json.loads(metadata[KEY]), safetensors.load_file(path)
    if about is not None:
        about(told)
    if tensors is not None:
        tensors(state)
    safetensors.save_file(state, path, metadata={**metadata, KEY: json.dumps(told)})


GRAM, COUNT = "pooler.dense.gram", "pooler.dense.count"
TABLE = "embeddings.word_embeddings"


def spoil(name, change):
    """Change one tensor of the second expert's moments."""

    def damage(family):
        def tensors(state):
            state[name] = change(state[name].clone()).contiguous()

        rewrite(family.moments["second"], tensors=tensors)

    return damage


def set_first(value):
    def change(tensor):
        tensor.reshape(-1)[0] = value
        return tensor

    return change


def say(**fields):
    """Change what the second expert's moments say."""

    def damage(family):
        rewrite(family.moments["second"], about=lambda about: about.update(fields))

    return damage


def without_sums(family):
    rewrite(family.moments["second"], tensors=lambda state: state.pop(GRAM))


def without_a_layer(family):
    def about(told):
        told["layers"] = [given for given in told["layers"] if given["name"] != "pooler.dense"]

    rewrite(family.moments["second"], about=about)


def with_a_layer_more(family):
    def about(told):
        names = {"nonesuch.weight": ["nonesuch.weight"]}
        more = {"name": "nonesuch", "parameters": names, "bias": False}
        told["layers"].append(told["layers"][-1] | more)

    rewrite(family.moments["second"], about=about)


def swapped(family):
    one, other = family.moments.values()
    family.moments = {"first": other, "second": one}


def read_otherwise(family):
    def about(told):
        for given in told["layers"]:
            given["offset"] = 1.0

    rewrite(family.moments["second"], about=about)


def not_moments(family):
    shutil.copyfile(family.root / "second" / "model.safetensors", family.moments["second"])


def pickled(family):
    torch.save({"a": torch.zeros(2)}, family.moments["second"])


def cut_short(family):
    cut(family.moments["second"], family.moments["second"].stat().st_size - 10)


def gone(family):
    family.moments["second"].unlink()


def trained_on(family):
    path = family.root / "second" / "model.safetensors"
    state = safetensors.load_file(path)
    state["pooler.dense.bias"] += 1e-3
    safetensors.save_file(state, path, metadata={"format": "pt"})


DAMAGES = {
    "cut short": (cut_short, ["second.moments.safetensors", "cut short or damaged"]),
    "a pickle": (pickled, ["second.moments.safetensors", "a pickled file"]),
    "not there": (gone, ["second.moments.safetensors: expected a file that can be read"]),
    "not moments": (not_moments, ["expected moments, found a safetensors file of something else"]),
    "of another expert": (swapped, ["weights of the model: expected those of", "SHA-256"]),
    "weights trained on": (trained_on, ["second.moments.safetensors, weights of the model"]),
    "another configuration": (
        lambda family: [change(Path(f), layer_norm_eps=0.1) for f in family.folders],
        ["config of the model: expected those of"],
    ),
    "another format": (say(format=2), ["format: expected 1, found 2"]),
    "metadata of another kind": (say(layers={}), ["metadata", "as 'layers'"]),
    "no layers": (say(layers=[]), ["metadata", "no layer"]),
    "layers that are none": (say(layers=[{"name": 3}]), ["metadata", "a layer {'name': 3}"]),
    "no digest": (say(model={}), ["metadata", "no digest of the model's weights"]),
    "folds of no kind": (say(folds=0), ["metadata", "0 folds"]),
    "folds that are not there": (say(folds=3), ["F64 of shape (4, "]),
    "sums that are missing": (without_sums, ["layer 'pooler.dense'", f"no entry '{GRAM}'"]),
    "a layer that is missing": (without_a_layer, ["nothing of 'pooler.dense.bias'"]),
    "norms read otherwise": (read_otherwise, ["second.moments", "expected it as", "offset=1.0"]),
    "a layer that the base has not": (with_a_layer_more, ["layer 'nonesuch'", "'nonesuch.weight'"]),
    "other widths": (spoil(GRAM, lambda t: t[..., :36]), ["layer 'pooler.dense'", "width 9"]),
    "another shape": (spoil(GRAM, lambda t: t[0]), [f"tensor '{GRAM}'", "of shape"]),
    "another dtype": (spoil(GRAM, lambda t: t.half()), [f"tensor '{GRAM}'", "F32 or F64"]),
    "NaN": (spoil(GRAM, set_first(float("nan"))), [f"tensor '{GRAM}'", "finite sums"]),
    "a negative square": (spoil(GRAM, set_first(-1.0)), [f"tensor '{GRAM}'", "negative"]),
    "a negative count": (spoil(COUNT, set_first(-1)), [f"tensor '{COUNT}'", "at least 1"]),
    "unknown tokens": (spoil(f"{TABLE}.ids", lambda t: t + 1000), [f"'{TABLE}.ids'", "below 40"]),
    "tokens twice": (spoil(f"{TABLE}.ids", lambda t: t * 0), [f"'{TABLE}.ids'", "in their order"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_no_file_of_these_moments_is_refused(family, name, tmp_path, capsys):
    damage, words = DAMAGES[name]
    damage(family)
    before = contents(family.root)
    status, _, err = merge(capsys, family, tmp_path / "out")
    assert status == 1 and err.startswith("qpmerge: ")
    for word in words:
        assert word in err
    assert not (tmp_path / "out").exists() and contents(family.root) == before


COMMANDS = {
    "with calibration": (
        ["--calibration", "first=x.jsonl"],
        ["--moments: expected no --calibration beside them, found both"],
    ),
    "an unknown name": (
        ["--moments", "third=x.safetensors"],
        ["--moments: expected one of the experts (first, second), found 'third'"],
    ),
    "a method of weights": (
        ["--method", "ties"],
        ["--method: expected one of qp, regmean, which moments are enough for, found 'ties'"],
    ),
    "a method that runs models": (["--method", "featcal"], ["found 'featcal'"]),
    "other inputs": (["--option", "inputs=merged"], ["--option", "found 'inputs'"]),
    "the same file twice": (
        ["--moments", "first={first}"],
        ["--moments first: expected files of different texts"],
    ),
    "a layer outside the scope": (
        ["--option", "scope=weights", "--option", f"layers=['{TABLE}']"],
        ["--option layers: expected layers of scope 'weights'", TABLE],
    ),
    "an unknown layer": (["--option", "layers=['x']"], ["--option layers", "found 'x'"]),
    "folds that are not there": (
        ["--option", "folds=3"],
        ["first.moments.safetensors: expected 3 folds, as --option folds"],
    ),
    "no folds to choose by": (["--option", "folds=1"], ["one fold leaves nothing to choose by"]),
    "an unknown basis": (["--option", "basis=x"], ["basis"]),
    "an unknown option": (["--option", "density=1"], ["--option", "found 'density'"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_moments_are_not_for_is_refused(families, name, tmp_path, capsys):
    words, expected = COMMANDS[name]
    words = [word.format(first=families["bert"].moments["first"]) for word in words]
    status, _, err = merge(capsys, families["bert"], tmp_path / "out", *words)
    assert status == 1 and err.startswith("qpmerge: ")
    for word in expected:
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_every_expert_needs_its_own(families, tmp_path, capsys):
    family = families["bert"]
    words = ["--moments", f"first={family.moments['first']}"]
    status, _, err = run(capsys, "merge", *family.folders, "--out", tmp_path / "out", *words)
    assert status == 1 and "expected a file for every expert, found none for 'second'" in err
    status, _, err = run(
        capsys, "merge", *family.folders, "--out", tmp_path / "o", "--moments", "x"
    )
    assert status == 1 and "--moments: expected NAME=VALUE" in err


def test_an_adapter_is_made_a_whole_model_first(families, tmp_path, capsys):
    """It is refused with the command that does so, and what that command writes is taken."""
    family, layer = families["bert"], "encoder.layer.0.attention.self.query"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}
    adapter = write_adapter(tmp_path / "first", state)
    words = ["--calibration", family.files["first"], "--out", tmp_path / "a.safetensors"]
    status, _, err = run(capsys, "moments", adapter, *words)
    assert status == 1 and "expected a whole model, found an adapter; make a whole" in err
    given = [family.root / "base", f"first={adapter}", family.root / "second"]
    status, _, err = run(capsys, "merge", *given, *family.measured, "--out", tmp_path / "b")
    assert status == 1 and "expected a whole model beside --moments, found an adapter" in err
    whole = tmp_path / "whole"
    assert run(capsys, "merge", family.root / "base", adapter, "--out", whole)[0] == 0
    assert run(capsys, "moments", whole, *words)[0] == 0
    given[1] = f"first={whole}"
    measured = ["--moments", f"first={words[-1]}", *family.measured[2:]]
    assert run(capsys, "merge", *given, *measured, "--out", tmp_path / "b")[0] == 0


def test_other_folds_can_be_added_up(families, tmp_path, capsys):
    family = families["bert"].copied(tmp_path / "bert")
    words = ["moments", family.root / "first", "--calibration", family.files["first"]]
    family.moments["first"] = tmp_path / "two.safetensors"
    assert run(capsys, *words, "--out", family.moments["first"], "--folds", 2)[0] == 0
    status, _, err = merge(capsys, family, tmp_path / "a")
    assert status == 1 and "expected 2 folds, as" in err and "two.safetensors" in err
    assert merge(capsys, family, tmp_path / "b", "--method", "regmean")[0] == 0
    assert merge(capsys, families["bert"], tmp_path / "c", "--method", "regmean")[0] == 0
    for name, value in state_of(tmp_path / "b").items():
        expected = state_of(tmp_path / "c")[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)


MEASUREMENTS = {
    "too few texts": (
        ["--folds", "11"],
        ["first.jsonl: expected at least 11 inputs", "--folds 10"],
    ),
    "no folds": (["--folds", "0"], ["--folds: expected a whole number from 1 on, found 0"]),
    "no tokens": (["--max-length", "0"], ["--max-length"]),
    "no batch": (["--batch-size", "0"], ["--batch-size"]),
    "another suffix": (["--out", "{}/a.pt"], ["ends in .safetensors"]),
    "no folder": (["--out", "{}/none/a.safetensors"], ["expected a folder"]),
    "no calibration": (["--calibration", "{}/none.txt"], ["none.txt"]),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_what_cannot_be_measured_is_refused(families, name, tmp_path, capsys):
    family, (words, expected) = families["bert"], MEASUREMENTS[name]
    given = ["--calibration", family.files["first"], "--out", tmp_path / "a.safetensors"]
    words = [word.format(tmp_path) for word in words]
    status, _, err = run(capsys, "moments", family.root / "first", *given, *words)
    assert status == 1
    for word in expected:
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_run_is_refused(family, tmp_path, capsys):
    given = ["--calibration", family.files["first"], "--out", tmp_path / "a.safetensors"]
    status, _, err = run(capsys, "moments", family.root / "none", *given)
    assert status == 1 and "expected a folder with a model" in err
    (family.root / "first" / "model.safetensors").write_bytes(b"")
    status, _, err = run(capsys, "moments", family.root / "first", *given)
    assert status == 1 and "model.safetensors" in err
    assert not (tmp_path / "a.safetensors").exists()


class Routed(torch.nn.Module):
    """A layer that reads more rows, the larger the first number of a batch is."""

    def __init__(self):
        super().__init__()
        self.first, self.routed, self.last = (torch.nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        if x[0, 0] > 5:
            self.routed(torch.cat([x, x]))
        else:
            self.routed(x)
        return self.last(x)


def test_a_layer_that_turns_out_to_be_none_is_left_out():
    torch.manual_seed(0)
    model, told = Routed().eval(), []
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(3))
    small, large = torch.rand(4, 3), torch.rand(4, 3) + 10
    covered = measuring.record(model, [{"x": small}, {"x": large}], told.append, folds=2)
    assert covered.layers == ["first", "last"]
    assert covered.averaged.keys() == {"routed.weight", "routed.bias"}
    X = torch.cat([model.first(small), model.first(large)]).double()
    X = torch.cat([X, torch.ones(8, 1)], 1)
    last = next(inputs for inputs in reversed(told) if inputs.views[0].name == "last")
    torch.testing.assert_close(last.C[0].sum(0)[0].tril(), (X.mT @ X).tril(), rtol=1e-6, atol=1e-5)


def test_every_kind_of_layer_can_be_read_back(families):
    kinds = set()
    for family in families.values():
        file = read_moments(family.moments["first"])
        kinds |= {layer.kind for layer in file.layers.values()}
        state = family.experts["first"].state_dict()
        for layer in file.layers.values():
            shape = state[layer.names[0]].shape
            view = solving.view_of(layer, "all", shape, None)
            for name, value in view.parts(view.matrix(state), state).items():
                torch.testing.assert_close(value.to(state[name]), state[name])
    assert kinds == {"Dense", "Transposed", "Norm", "Table"}
