"""`qpmerge merge --config`: a recipe of mergekit gives mergekit's weights, and what cannot be
honoured is refused by its field."""

import hashlib
import json

import pytest
import torch
from frozen_recipes import RECIPES, apart, flat, recipe, states, thaw, write_models

import qpmerge_lite as q
from qpmerge_lite.checkpoints.calibration import records
from qpmerge_lite.checkpoints.costs import estimated_plan
from qpmerge_lite.checkpoints.large import estimates
from qpmerge_lite.checkpoints.large.estimates import THINNED
from qpmerge_lite.checkpoints.large.measured import STATUS, measured
from qpmerge_lite.checkpoints.merging import merge_folders
from qpmerge_lite.checkpoints.orders import ordered
from qpmerge_lite.checkpoints.planning import plan_of
from qpmerge_lite.checkpoints.recipes import arithmetic
from qpmerge_lite.checkpoints.recipes.plans import Plan
from qpmerge_lite.checkpoints.recipes.reading import read_recipe
from qpmerge_lite.checkpoints.recipes.settings import RULES
from qpmerge_lite.companion import cli
from qpmerge_lite.sparse import TiesRule, consensus

pytest.importorskip("yaml", reason="the yaml extra, which reads recipes, is not here")
safetensors = pytest.importorskip("safetensors.torch")

MODELS, ANSWERS = thaw()
EXPERTS = ("first", "second", "third")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with models in float32 to be in, and to be named from."""
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, "fp32", MODELS["fp32"])
    return tmp_path


def merged(here, text, out="out", seed=0):
    """What a recipe's text gives: name -> tensor."""
    (here / "recipe.yml").write_text(text, encoding="utf-8")
    merge_folders(ordered(read_recipe(here / "recipe.yml"), here / out, seed))
    state = {}
    for path in sorted((here / out).glob("*.safetensors")):
        state |= safetensors.load_file(path)
    return state


def run(capsys, *words):
    """(exit status, what was printed, what was complained of)."""
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_frozen_models_are_those_that_are_made():
    for kind, models in MODELS.items():
        for name, state in states(kind).items():
            for key, value in state.items():
                assert torch.equal(value, models[name][key])


@pytest.mark.parametrize(("kind", "title"), ANSWERS, ids=str)
def test_a_recipe_gives_what_mergekit_gives(kind, title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, kind, MODELS[kind])
    text, theirs = ANSWERS[kind, title]
    assert text == RECIPES[title], "frozen of another recipe: python tests/oracles.py --freeze"
    merged(tmp_path, text)
    ours, _ = flat(tmp_path / "out")
    assert apart(title, ours, theirs) == 0


def equal_weights(method, **parameters):
    """A recipe in float64 in which every expert has weight 1."""
    models = dict.fromkeys(EXPERTS, "")
    own = {} if method in ("model_stock", "slerp") else {"weight": 1}
    return recipe(method, models, more="dtype: float64", **own, **parameters)


@pytest.mark.parametrize(
    ("text", "function", "options"),
    [
        (equal_weights("linear").replace("base_model: base\n", ""), "soup", {}),
        (equal_weights("task_arithmetic", **{"lambda": 0.4}), "task_arithmetic", {"scale": 0.4}),
        (
            equal_weights("ties", density=0.3),
            "ties",
            {"semantics": "mergekit", "density": 0.3},
        ),
        (
            equal_weights("breadcrumbs", density=0.6, gamma=0.1),
            "breadcrumbs",
            {"density": 0.6, "outliers": 0.1, "scale": 1.0},
        ),
        (equal_weights("model_stock"), "model_stock", {}),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_in_float64_it_is_the_function_of_this_package(here, text, function, options):
    wide = {name: {k: v.double() for k, v in s.items()} for name, s in MODELS["fp32"].items()}
    base = model_of(wide["base"])
    experts = {name: wide[name] for name in EXPERTS}
    expected = getattr(q, function)(base, experts, **options).state_dict
    for name, value in merged(here, text).items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def model_of(state):
    """A model of these parameters."""
    from frozen_oracles import Parameters

    return Parameters(state)


def test_slerp_is_between_base_and_expert(here):
    wide = {name: {k: v.double() for k, v in s.items()} for name, s in MODELS["fp32"].items()}
    pair = {name: wide[name] for name in ("base", "first")}
    expected = q.slerp(model_of(wide["base"]), pair, t=0.3).state_dict
    text = recipe("slerp", {"first": ""}, more="dtype: float64", t=0.3)
    for name, value in merged(here, text).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def updates(state):
    """What a merge has added to the base."""
    return {k: v.double() - MODELS["fp32"]["base"][k].double() for k, v in state.items()}


def test_dare_keeps_some_entries_and_the_l1_norm_of_all(here):
    text = recipe("dare_linear", {"first": ""}, weight=1, density=0.5)
    whole, kept, entries = updates(MODELS["fp32"]["first"]), 0, 0
    for name, update in updates(merged(here, text)).items():
        survivors = update != 0
        ratios = update[survivors] / whole[name][survivors]
        assert ratios.numel() == 0 or ratios.max() - ratios.min() < 1e-3
        torch.testing.assert_close(update.abs().sum(), whole[name].abs().sum(), rtol=1e-4, atol=0)
        kept, entries = kept + int(survivors.sum()), entries + update.numel()
    assert abs(kept / entries - 0.5) < 0.1


def test_another_seed_drops_other_entries_and_the_same_the_same(here):
    text = RECIPES["dare_ties"]
    first, second = merged(here, text, "a", 1), merged(here, text, "b", 2)
    again = merged(here, text, "c", 1)
    assert all(torch.equal(again[k], v) for k, v in first.items())
    assert any(not torch.equal(second[k], v) for k, v in first.items())


def test_a_gradient_goes_over_the_layers_and_a_filter_by_the_name(here):
    own = "{weight: [{filter: mlp, value: [0, 1]}, {filter: norm, value: 0.25}]}"
    text = recipe("task_arithmetic", {"first": own}, weight=0.75)
    whole = updates(MODELS["fp32"]["first"])
    for name, update in updates(merged(here, text)).items():
        share = 0.75
        if "mlp" in name:
            share = int(name.split(".")[2]) / 2
        elif "norm" in name:
            share = 0.25
        torch.testing.assert_close(update, share * whole[name], rtol=0, atol=1e-6)


def test_a_gradient_begins_before_the_layers_and_is_over_after_them(here):
    """Embeddings and the head have the first value, as in mergekit."""
    whole = updates(MODELS["fp32"]["first"])
    text = recipe("task_arithmetic", {"first": "{weight: [0.5, 1]}"})
    state = updates(merged(here, text))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        torch.testing.assert_close(state[name], 0.5 * whole[name], rtol=0, atol=1e-6)


def test_another_dtype_is_in_weights_configuration_and_index(here):
    state = merged(
        here, recipe("linear", {"first": ""}, base=None, more="out_dtype: float16", weight=1)
    )
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert json.loads((here / "out" / "config.json").read_text())["dtype"] == "float16"
    index = json.loads((here / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in state.values())
    for name, value in state.items():
        assert torch.equal(value, MODELS["fp32"]["first"][name].half())


def test_transformers_load_it(here):
    transformers = pytest.importorskip("transformers", reason="the hub extra is not here")
    transformers.utils.logging.disable_progress_bar()
    state = merged(here, recipe("ties", {"first": ""}, more="dtype: bfloat16", weight=1))
    model = transformers.AutoModelForCausalLM.from_pretrained(here / "out")
    assert model.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_the_command_merges_and_the_manifest_has_the_recipe(here, capsys):
    (here / "recipe.yml").write_text(RECIPES["ties"])
    status, out, err = run(capsys, "merge", "--config", "recipe.yml", "--out", "made")
    assert (status, err) == (0, "")
    assert "method: ties (the recipe names it)" in out
    manifest = json.loads((here / "made" / "merge.json").read_text())
    said = manifest["recipe"]
    assert said["sha256"] == hashlib.sha256(RECIPES["ties"].encode()).hexdigest()
    assert [model["name"] for model in said["models"]] == ["first", "second", "third", "base"]
    assert said["models"][1]["parameters"]["density"] == [{"filter": "", "values": [0.3]}]
    assert str(here) not in json.dumps(manifest)
    before = {p.name: p.read_bytes() for p in (here / "made").iterdir()}
    assert run(capsys, "merge", "--config", "recipe.yml", "--out", "again")[0] == 0
    assert before == {p.name: p.read_bytes() for p in (here / "again").iterdir()}


def test_folders_of_one_name_are_told_apart(here):
    for name in ("x", "y"):
        write_models(here / name, "fp32", {"tuned": MODELS["fp32"]["first"]})
    models = {"x/tuned": "", "y/tuned": ""}
    state = merged(here, recipe("linear", models, weight=1, base=None))
    assert all(torch.equal(v, MODELS["fp32"]["first"][k]) for k, v in state.items())


@pytest.mark.parametrize(
    "words",
    [
        ["base"],
        ["base", "first"],
        ["--method", "ties"],
        ["--option", "density=0.1"],
        ["--calibration", "first=texts.txt"],
    ],
    ids=" ".join,
)
def test_the_command_line_says_nothing_beside_a_recipe(words, here, capsys):
    (here / "recipe.yml").write_text(RECIPES["ties"])
    status, _, err = run(capsys, "merge", *words, "--config", "recipe.yml", "--out", "made")
    assert status == 1 and "expected none beside --config" in err
    assert not (here / "made").exists()


def test_without_a_recipe_folders_are_needed_and_no_seed(here, capsys):
    for words in ([], ["base"]):
        with pytest.raises(SystemExit) as left:
            run(capsys, "merge", *words, "--out", "made")
        assert left.value.code == 2
    words = ["merge", "base", "first", "--random-seed", "1", "--out", "made"]
    status, _, err = run(capsys, *words)
    assert status == 1 and "--option seed=N" in err


def test_without_pyyaml_the_cure_is_said(here, monkeypatch, capsys):
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    status, _, err = run(capsys, "merge", "--config", "recipe.yml", "--out", "made")
    assert status == 1 and "pip install 'qpmerge-lite[yaml]'" in err


PLAIN = RECIPES["ties"]
SLICED = RECIPES["slerp of slices"]
ONE = recipe("task_arithmetic", {"first": ""}, weight=1)
REFUSALS = {
    "empty": ("", ["recipe.yml", "found nothing"]),
    "no mapping": ("- a", ["fields and their values", "list"]),
    "no yaml": ("a: [", ["YAML in UTF-8", "does not parse"]),
    "python in it": ("a: !!python/object/apply:os.system ['ls']", ["does not parse"]),
    "no method": (PLAIN.replace("merge_method: ties", ""), ["merge_method", "found nothing"]),
    "unknown method": (PLAIN.replace("merge_method: ties", "merge_method: karcher"), ["'karcher'"]),
    "unknown field": (PLAIN + "dtpye: float32", ["recipe.yml, dtpye", "correct its name"]),
    "modules": (PLAIN + "modules: {}", ["modules", "not honoured"]),
    "chat template": (PLAIN + "chat_template: chatml", ["chat_template", "leave it out"]),
    "no models": ("merge_method: linear", ["models or slices", "neither"]),
    "models and slices": (PLAIN + "slices: []", ["models or slices", "both"]),
    "models empty": ("merge_method: linear\nmodels: []", ["a list of models", "list []"]),
    "model without name": ("merge_method: linear\nmodels: [{}]", ["models[0], model", "nothing"]),
    "model is a word": ("merge_method: linear\nmodels: [first]", ["models[0]", "'first'"]),
    "unknown field of model": (
        "merge_method: linear\nmodels: [{model: first, weight: 1}]",
        ["models[0], weight", "model, parameters"],
    ),
    "adapter": (PLAIN.replace("model: first", "model: first+lora"), ["first+lora", "peft"]),
    "hub": (PLAIN.replace("model: first", "model: org/name"), ["'org/name'", "download"]),
    "revision": (PLAIN.replace("model: first", "model: org/name@main"), ["org/name@main"]),
    "twice": (PLAIN.replace("model: second", "model: ./first"), ["models[1]", "first again"]),
    "no base": (PLAIN.replace("base_model: base", ""), ["base_model", "a base, for ties"]),
    "base alone": (recipe("ties", {"base": ""}, weight=1), ["2 models or more", "1 with the base"]),
    "slerp of three": (recipe("slerp", {"first": "", "second": ""}, t=1), ["2 models, for slerp"]),
    "stock of one": (recipe("model_stock", {"first": ""}), ["3 models or more"]),
    "no weight": (recipe("ties", {"first": ""}), ["model first, parameters.weight", "found none"]),
    "weight of some tensors": (
        recipe("ties", {"first": "{weight: {filter: mlp, value: 1}}"}),
        ["tensor 'lm_head.weight'", "found none"],
    ),
    "weight of a base that counts": (
        recipe("linear", {"first": "{weight: 1}"}),
        ["model base, parameters.weight"],
    ),
    "unknown parameter": (ONE.replace("weight: 1", "weigth: 1"), ["parameters.weigth", "weight"]),
    "parameter of another method": (ONE + "  density: 0.1", ["parameters.density"]),
    "parameter of all at one": (
        recipe("ties", {"first": "{weight: 1, normalize: true}"}),
        ["models[0], parameters.normalize", "whole merge"],
    ),
    "parameter of the base": (
        recipe("ties", {"first": "", "base": "{weight: 1}"}, weight=1),
        ["models[1], parameters.weight", "models"],
    ),
    "no number": (ONE.replace("weight: 1", "weight: heavy"), ["a finite number", "'heavy'"]),
    "infinite": (ONE.replace("weight: 1", "weight: .inf"), ["a finite number", "inf"]),
    "flag as number": (ONE.replace("weight: 1", "weight: true"), ["a finite number", "True"]),
    "number as flag": (ONE + "  normalize: 2", ["true or false", "2"]),
    "nothing as value": (ONE.replace("weight: 1", "weight:"), ["parameters.weight", "nothing"]),
    "empty gradient": (ONE.replace("weight: 1", "weight: []"), ["an empty list"]),
    "gradient of words": (ONE.replace("weight: 1", "weight: [1, a]"), ["weight[1]", "'a'"]),
    "condition without value": (
        ONE.replace("weight: 1", "weight: [{filter: mlp}]"),
        ["weight[0]", "value, and filter"],
    ),
    "condition and number": (
        ONE.replace("weight: 1", "weight: [{filter: mlp, value: 1}, 2]"),
        ["weight[1]", "int 2"],
    ),
    "filter is a number": (
        ONE.replace("weight: 1", "weight: [{filter: 3, value: 1}]"),
        ["weight[0].filter", "int 3"],
    ),
    "density too large": (PLAIN.replace("density: 0.5", "density: 1.5"), ["from 0 to 1", "1.5"]),
    "epsilon too large": (
        recipe("della", {"first": ""}, weight=1, density=0.9),
        ["density ± epsilon", "0.9 ± 0.15"],
    ),
    "dtype": (PLAIN + "dtype: int8", ["recipe.yml, dtype", "bfloat16", "'int8'"]),
    "tokenizer union": (PLAIN + "tokenizer_source: union", ["tokenizer_source", "'union'"]),
    "tokenizer of a model": (PLAIN + "tokenizer: {source: first}", ["tokenizer, source", "first"]),
    "tokens": (PLAIN + "tokenizer: {source: base, tokens: {}}", ["tokenizer, tokens"]),
    "tokenizer that is not there": (PLAIN + "tokenizer_source: base", ["tokenizer.json in base"]),
    "two slices": (
        "merge_method: linear\nslices: [{sources: []}, {sources: []}]",
        ["one slice, of all layers", "found 2"],
    ),
    "some layers": (SLICED.replace("[0, 3]", "[0, 2]"), ["all 3 layers", "[0, 2]"]),
    "last layers": (SLICED.replace("[0, 3]", "[1, 3]"), ["layer_range", "[1, 3]"]),
    "no layers": (
        SLICED.replace("layer_range: [0, 3]", "layer_range: all"),
        ["all layers", "'all'"],
    ),
    "slices without the base": (
        SLICED.replace("- model: base", "- model: second"),
        ["the base among"],
    ),
    "residual weight": (
        SLICED.replace("  - sources:", "  - residual_weight: 1\n    sources:"),
        ["residual_weight", "not honoured"],
    ),
    "other base of a slice": (
        SLICED.replace("  - sources:", "  - base_model: first\n    sources:"),
        ["slices[0], base_model", "'first'"],
    ),
}


@pytest.mark.parametrize("title", REFUSALS)
def test_it_is_refused_by_its_field_with_the_cure(title, here, capsys):
    text, words = REFUSALS[title]
    (here / "recipe.yml").write_text(text)
    status, out, err = run(capsys, "merge", "--config", "recipe.yml", "--out", "made")
    assert (status, out) == (1, "")
    for word in words:
        assert word in err
    assert "expected" in err and "found" in err
    assert not [path for path in here.iterdir() if "made" in path.name]


def test_a_recipe_that_is_not_there_is_refused(here, capsys):
    status, _, err = run(capsys, "merge", "--config", "none.yml", "--out", "made")
    assert status == 1 and "none.yml" in err


def test_numbers_of_several_dtypes_need_one(here, capsys):
    half = {name: value.half() for name, value in MODELS["fp32"]["first"].items()}
    write_models(here, "bf16", {"half": half})
    (here / "half" / "config.json").write_text((here / "base" / "config.json").read_text())
    text = recipe("linear", {"second": "", "half": ""}, weight=1, base=None)
    (here / "recipe.yml").write_text(text)
    status, _, err = run(capsys, "merge", "--config", "recipe.yml", "--out", "made")
    assert status == 1 and "none beside F16, F32" in err
    (here / "recipe.yml").write_text(text + "dtype: float32")
    status, out, err = run(capsys, "merge", "--config", "recipe.yml", "--out", "made")
    assert (status, err) == (0, "") and "float64" not in out


def test_gradients_need_one_stack_of_layers(here, capsys):
    for name in ("base", "first"):
        state = MODELS["fp32"][name]
        renamed = {k.replace("model.layers.2", "other.layers.0"): v for k, v in state.items()}
        write_models(here / "two", "fp32", {name: renamed})
    text = recipe("task_arithmetic", {"two/first": ""}, base="two/base", weight="[0, 1]")
    (here / "recipe.yml").write_text(text)
    status, _, err = run(capsys, "merge", "--config", "recipe.yml", "--out", "made")
    assert status == 1 and "2 ('model.layers', 'other.layers')" in err


def write_tokenizer(folder, tokens):
    vocabulary = {f"w{number}": number for number in range(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ((12, 12), None),
        ((12, 11), ["another one in first"]),
        ((11, 11), ["a token for each of 12 rows", "11 tokens"]),
    ],
)
def test_the_bases_tokenizer_is_taken_where_mergekit_changes_no_row(tokens, words, here, capsys):
    for name, count in zip(("base", "first"), tokens):
        write_tokenizer(here / name, count)
    (here / "recipe.yml").write_text(ONE + "tokenizer_source: base\n")
    status, _, err = run(capsys, "merge", "--config", "recipe.yml", "--out", "made")
    if words is None:
        assert (status, err) == (0, "") and (here / "made" / "tokenizer.json").is_file()
    else:
        assert status == 1 and all(word in err for word in words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_merge_is_the_same_in_pieces_of_any_size(dtype, monkeypatch):
    values = [torch.randn(5, 401).to(dtype) for _ in range(3)]
    weights = [0.2, 0.3, 0.7]
    expected = {n: arithmetic.linear(values, weights, n) for n in (True, False)}
    for piece in (1, 64, 1000):
        monkeypatch.setattr(arithmetic, "PIECE", piece)
        for normalize, value in expected.items():
            found = arithmetic.linear(values, weights, normalize)
            assert found.shape == value.shape and torch.equal(found, value)


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 5, 2**15, 2**15 + 1, 2**16 + 1, 100_003])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_signs_are_elected_piece_by_piece_as_for_all_at_once(count, size, dtype):
    generator = torch.Generator().manual_seed(size + count)
    updates = torch.randn(count, size, generator=generator).to(dtype)
    weights = torch.rand(count, generator=generator).to(dtype)
    how = TiesRule(weighted_votes=True, divisor="weights")
    found = arithmetic._elected([*updates], how, weights)
    assert torch.equal(found, consensus(updates, how, weights))


@pytest.mark.parametrize("method", ["linear", "ties", "breadcrumbs", "dare_ties"])
def test_tensors_merged_at_the_same_time_are_those_merged_in_turn(here, method, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = merged(here, RECIPES[method], "together", seed=1)
    monkeypatch.setattr(arithmetic, "TOGETHER", 1)
    in_turn = merged(here, RECIPES[method], "in_turn", seed=1)
    assert all(torch.equal(value, in_turn[name]) for name, value in together.items())
    monkeypatch.undo()
    assert torch.get_num_threads() == threads


def test_what_is_read_while_others_are_merged_is_estimated_too(here, monkeypatch):
    """Of a small model all others."""
    (here / "recipe.yml").write_text(RECIPES["linear"], encoding="utf-8")
    plan = plan_of(ordered(read_recipe(here / "recipe.yml"), here / "out", 0))
    whole = estimated_plan(plan).memory
    monkeypatch.setattr(estimates, "TOGETHER", 1)
    in_turn = estimated_plan(plan).memory
    assert in_turn < whole < in_turn + plan.report.bytes


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="what memory is made of is not told here")
def test_a_trimmed_tensor_takes_no_more_than_is_estimated():
    size = 2**24 + 1  # an array of so many is given back to the system when it is let go
    rule = RULES["ties"]
    own = {"weight": [1.0] * 3, "density": [0.2] * 3}
    plan = Plan({"normalize": True, "rescale": False, "lambda": 1}, own)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator).bfloat16() for _ in range(4)]
    with measured() as found:
        arithmetic.sparse(values.pop(0), values, rule, plan, generator)
    assert found["memory"] / size < 1.25 * THINNED["magnitude"]  # beside base and experts
