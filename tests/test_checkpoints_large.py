# ruff: noqa: F811 (fixtures come by import)
"""Merges of large models: weights stay in their files until they are used, layers that were solved
are not solved again, and what it costs is said before."""

import json
import signal

import pytest
import torch
from checkpoint_families import (
    EXPERTS,
    assert_same,
    contents,
    families,
    run,
    safetensors,
)
from test_checkpoints_adapters import LORA, bases, write_adapter
from test_checkpoints_robust import KILLS, hidden, models, python

from qpmerge_lite import sequential
from qpmerge_lite.checkpoints.calibrated import build
from qpmerge_lite.checkpoints.compatibility import check
from qpmerge_lite.checkpoints.digests import sha256
from qpmerge_lite.checkpoints.large import mapped
from qpmerge_lite.checkpoints.large.measured import STATUS, measured, taken
from qpmerge_lite.checkpoints.recipes import arithmetic
from qpmerge_lite.checkpoints.tensors import read_tensors
from qpmerge_lite.spectral import essential

__all__ = ["bases", "families", "models"]  # fixtures
linux = pytest.mark.skipif(not STATUS.exists(), reason="what memory is made of is not told here")
MIB = 2**20


def checkpoint(folder):
    report = check(folder, {})
    assert not report.errors
    return report.base


def a_file(path, **state):
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(state, path, metadata={"format": "pt"})
    (path.parent / "config.json").write_text('{"model_type": "own"}')
    return checkpoint(path.parent)


def every_kind():
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
             torch.int64, torch.int8, torch.bool)  # fmt: skip
    state = {str(kind): torch.arange(5).to(kind) for kind in kinds}
    return state | {"empty": torch.empty(0, 3), "number": torch.tensor(2.5)}


def test_mapped_tensors_are_those_of_the_files(tmp_path):
    model = a_file(tmp_path / "model" / "model.safetensors", **every_kind())
    before = sha256(tmp_path / "model" / "model.safetensors")
    found = mapped.mapped_tensors(model)
    for name, value in read_tensors(model, model.entries).items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name].double(), value.double())
        found[name].fill_(1)
    assert sha256(tmp_path / "model" / "model.safetensors") == before


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_what_is_rounded_to_the_base_s_dtype_goes_through_a_file_without_a_name(kind, tmp_path):
    state = {"a": torch.randn(4, 3), "large": torch.full((2,), 1e39, dtype=torch.float64)}
    model = a_file(tmp_path / "model" / "model.safetensors", **state, code=torch.tensor([3]))
    found = mapped.expert_state(model, dict.fromkeys(model.entries, kind), tmp_path)
    assert torch.equal(found["a"], state["a"].to(kind)) and found["a"].dtype == kind
    assert torch.equal(found["large"], state["large"])  # which is refused where it is looked at
    assert torch.equal(found["code"], torch.tensor([3]))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_adapters_are_folded_as_they_are_read(bases, tmp_path):
    write_adapter(tmp_path / "adapter", LORA)
    report = check(bases / "half", {"adapter": tmp_path / "adapter"})
    (adapter,) = report.experts
    expected = read_tensors(adapter, report.base.entries)
    found = mapped.expert_state(adapter, dict.fromkeys(expected), tmp_path)
    rounded = mapped.expert_state(adapter, dict.fromkeys(expected, torch.bfloat16), tmp_path)
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype
        assert torch.equal(rounded[name], value.bfloat16())


@linux
def test_mapped_weights_are_no_memory_of_the_process(tmp_path):
    state = {f"{n}.weight": torch.randn(1024, 4096) for n in range(4)}
    model = a_file(tmp_path / "model" / "model.safetensors", **state)
    dtypes = dict.fromkeys(model.entries, torch.bfloat16)
    del state
    before = taken()["RssAnon"]
    kept = [mapped.mapped_tensors(model)]
    total = sum(float(value.sum()) for value in kept[0].values())
    kept.append(mapped.expert_state(model, dtypes, tmp_path))
    total += sum(float(value.sum()) for value in kept[1].values())
    assert total and taken()["RssAnon"] - before < 40 * MIB  # of 64 and 32 that are in files


def test_a_model_has_the_weights_of_its_files(families):
    for family in families.values():
        model, _ = build(checkpoint(family.root / "base"))
        assert_same(family.root / "base", model.state_dict())
        for name, value in model.state_dict().items():
            assert value.data_ptr() != family.model.state_dict()[name].data_ptr()


@linux
def test_memory_is_measured_while_it_is_there(tmp_path):
    with measured() as found:
        taken_until_the_end = torch.zeros(60 * MIB, dtype=torch.uint8).fill_(1)
    assert taken_until_the_end.all()
    assert 50 * MIB < found["memory"] < 90 * MIB and found["peak"] >= found["memory"]
    path = tmp_path / "file"
    path.write_bytes(bytes(60 * MIB))
    with measured() as found, path.open("rb") as file:
        assert mapped.mapped(file).max() == 0
    assert found["memory"] < 20 * MIB


# ------------------------------------------------------------------------------- solved layers

ON_TEXTS = {
    "regmean": [],
    "qp": ["--option", "basis=rows"],
    "regmean_plus_plus": [],
    "auto": [],
}


def words_of(family, method, out):
    options = ON_TEXTS.get(method, [])
    return ["merge", *family.folders, *family.given, "--method", method, *options, "--out",
            str(out)]  # fmt: skip


class Stopping:
    """Stops a merge before one of its solves, and counts those that were done."""

    def __init__(self, monkeypatch, at=None):
        self.count, self.at, self.solve = 0, at, sequential.Pass._solve
        monkeypatch.setattr(sequential.Pass, "_solve", lambda *words: self.take(*words))

    def take(self, *words):
        if self.count == self.at:
            raise KeyboardInterrupt
        self.count += 1
        return self.solve(*words)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("method", ON_TEXTS)
def test_what_was_solved_is_not_solved_again(families, kind, method, tmp_path, capsys, monkeypatch):
    family = families[kind]
    with monkeypatch.context() as patch:
        undisturbed = Stopping(patch)
        assert run(capsys, *words_of(family, method, tmp_path / "whole"))[0] == 0
    at = undisturbed.count * 2 // 3
    words = words_of(family, method, tmp_path / "out")
    with monkeypatch.context() as patch:
        Stopping(patch, at)
        status, _, err = run(capsys, *words)
    assert status == 130 and f"{at} solved group(s) of layers are kept in " in err
    assert hidden(tmp_path)[0] in err and "the same command goes on" in err
    with monkeypatch.context() as patch:
        rest = Stopping(patch)
        status, _, err = run(capsys, *words)
    assert status == 0 and rest.count == undisturbed.count - at
    assert f"{at} groups of layers were solved by an earlier run" in err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and hidden(tmp_path) == []


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_what_esm_has_decomposed_is_not_decomposed_again(
    families, kind, tmp_path, capsys, monkeypatch
):
    family, words = families[kind], {}
    for name in ("whole", "out"):
        words[name] = words_of(family, "esm", tmp_path / name)
    done: list[int] = []
    plain = essential.merge_subspaces, essential.merge_triplets

    def counted(compute, at=None):
        def counting(*tensors):
            if len(done) == at:
                raise KeyboardInterrupt
            done.append(1)
            return compute(*tensors)

        counting.__name__ = compute.__name__
        return counting

    def made(name, at=None):
        done.clear()
        for function in plain:
            monkeypatch.setattr(essential, function.__name__, counted(function, at))
        return run(capsys, *words[name])

    assert made("whole")[0] == 0
    every = len(done)
    for at in (every // 3, every - 1 - every // 3):
        status, _, err = made("out", at)
        assert status == 130 and "solved group(s) of layers are kept in " in err
    status, _, err = made("out")
    assert status == 0 and len(done) == every - every // 3 - (every - 1 - every // 3)
    assert "groups of layers were solved by an earlier run" in err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and hidden(tmp_path) == []


def test_another_order_does_not_take_what_was_solved(families, tmp_path, capsys, monkeypatch):
    family = families["bert"]
    with monkeypatch.context() as patch:
        Stopping(patch, 3)
        assert run(capsys, *words_of(family, "regmean", tmp_path / "out"))[0] == 130
    other = [*words_of(family, "regmean", tmp_path / "out"), "--option", "alpha=0.5"]
    status, _, err = run(capsys, *other)
    assert status == 0 and "another order" in err and "solved by an earlier run" not in err
    whole = [*words_of(family, "regmean", tmp_path / "whole"), "--option", "alpha=0.5"]
    assert run(capsys, *whole)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED_IN_PASS = KILLS.replace(
    "import qpmerge_lite.checkpoints.weights_only\n",
    "import transformers.models.bert.modeling_bert, transformers.models.llama.modeling_llama\n"
    "import qpmerge_lite.checkpoints.calibrated, qpmerge_lite.checkpoints.calibration.feeds\n",
).replace(".*.partial/merged/*.safetensors", ".*.partial/solved/*")


def killed_at_random(family, method, count, tmp_path):
    """How often a merge was killed, and how often it had solved layers then."""
    given = [*family.folders, *family.given, "--method", method, *ON_TEXTS.get(method, [])]
    done = python(KILLED_IN_PASS, tmp_path / "out", count, 0, *given)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_pass_killed_at_any_moment_ends_as_an_undisturbed_one(families, tmp_path):
    killed, _ = killed_at_random(families["llama"], "auto", 3, tmp_path)
    assert killed >= 3


@pytest.mark.slow
@pytest.mark.parametrize("method", [*ON_TEXTS, "esm"])
def test_a_pass_killed_at_fifty_moments_ends_as_an_undisturbed_one(families, method, tmp_path):
    killed, resumable = killed_at_random(families["llama"], method, 50, tmp_path)
    assert killed >= 50 and resumable


def test_what_is_over_of_a_merge_that_was_killed_when_it_was_made_goes(families, tmp_path, capsys):
    family = families["bert"]
    code = """
import os, signal, sys
from qpmerge_lite.__main__ import main
from qpmerge_lite.checkpoints import partial
partial._remove_what_is_over = lambda hidden: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""
    words = words_of(family, "regmean", tmp_path / "out")
    assert python(code, *words).returncode == -signal.SIGKILL
    assert (tmp_path / "out").is_dir() and list(tmp_path.glob(".*/solved/*"))
    status, _, err = run(capsys, *words)
    assert status == 1 and "one with files in it" in err and hidden(tmp_path) == []


def test_a_recipe_that_draws_nothing_goes_on_from_its_finished_files(
    models, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("yaml", reason="the yaml extra, which reads recipes, is not here")
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}}
    recipe["models"] = [{"model": folder} for folder in models]
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    words = ["merge", "--config", tmp_path / "recipe.yml", "--out"]
    assert run(capsys, *words, tmp_path / "whole")[0] == 0
    plain, made = arithmetic.linear, []

    def counted(*values):
        made.append(len(made))
        if len(made) == 12:
            raise KeyboardInterrupt
        return plain(*values)

    with monkeypatch.context() as patch:
        patch.setattr(arithmetic, "linear", counted)
        status, _, err = run(capsys, *words, tmp_path / "out")
        assert status == 130 and "finished file(s) of weights are kept in " in err
        made.clear()
        status, _, err = run(capsys, *words, tmp_path / "out")
    assert status == 0 and len(made) < 11 and "from an earlier run" in err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ------------------------------------------------------------------------------- costs before


def test_costs_of_recipes_and_of_moments_are_told_before(families, tmp_path, capsys, monkeypatch):
    pytest.importorskip("yaml", reason="the yaml extra, which reads recipes, is not here")
    family = families["bert"]
    models = [{"model": family.root / name} for name in EXPERTS]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe, default=str))
    given = []
    for name, texts in family.files.items():
        file = tmp_path / f"{name}.moments.safetensors"
        words = ["moments", family.root / name, "--calibration", texts, "--out", file]
        assert run(capsys, *words, "--folds", 1)[0] == 0
        given += ["--moments", f"{name}={file}"]
    merges = {
        "a tensor": ["--config", tmp_path / "recipe.yml"],
        "layers that read alike": [*family.folders, *given, "--method", "regmean"],
    }
    written = (family.root / "base" / "model.safetensors").stat().st_size
    for at_once, words in merges.items():
        status, out, _ = run(capsys, "merge", *words, "--out", tmp_path / at_once, "--json")
        told = json.loads(out)["costs"]["estimated"]
        assert status == 0 and told["at_once"] == at_once and told["memory"] > 0
        assert told["read"] >= 2 * written and abs(told["written"] / written - 1) < 0.1
    status, out, _ = run(capsys, "merge", *merges["a tensor"], "--out", tmp_path / "c")
    assert status == 0 and out.startswith("estimated: ")
