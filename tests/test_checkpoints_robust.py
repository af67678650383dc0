"""Merges that are killed, stopped, short of room or given damaged files: what is left is whole or
nothing, the next run ends as an undisturbed one would, and costs are what was said before."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_families import (
    DENSE,
    EXPERTS,
    KILLED,
    ROOT,
    change,
    contents,
    cut,
    families,
    family,
    reshape,
    run,
    safetensors,
    state_of,
)

import qpmerge_lite as q
from qpmerge_lite.checkpoints import tensors
from qpmerge_lite.checkpoints.costs import estimated
from qpmerge_lite.checkpoints.digests import Digest, sha256
from qpmerge_lite.checkpoints.merging import carry_out, merge_folders
from qpmerge_lite.checkpoints.methods import METHODS, WEIGHTS_ONLY
from qpmerge_lite.checkpoints.orders import Order
from qpmerge_lite.checkpoints.planning import plan_of

__all__ = ["families", "family"]  # fixtures
QUICK = {"wudi": ["--option", "steps=2"], "qp": ["--option", "basis=rows"]}
MAIN = "import sys; from qpmerge_lite.__main__ import main; sys.exit(main(sys.argv[1:]))"


def write_models(root, rows, width, layers, shards):
    """A base and two experts of random matrices, in several files."""
    shapes = {"embed.weight": (rows, width)}
    for layer in range(layers):
        shapes[f"layers.{layer}.up.weight"] = (2 * width, width)
        shapes[f"layers.{layer}.down.weight"] = (width, 2 * width)
        shapes[f"layers.{layer}.norm.running_mean"] = (width,)
    names = list(shapes)
    for seed, model in enumerate(("base", *EXPERTS)):
        generator = torch.Generator().manual_seed(seed)
        state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        folder = root / model
        folder.mkdir(parents=True)
        places = {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = {name: state[name] for name in names[number::shards]}
            safetensors.save_file(part, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(part, file)
        index = {"weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config = {"model_type": "own", "tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(config))
    return [str(root / model) for model in ("base", *EXPERTS)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), 400, 128, 4, 6)


def python(code, *words, **options):
    """A run of some code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# Children are forked from a process that has torch but has not run it, so that a merge begins at
# once and a kill falls into it.
KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch._dynamo  # which Adam asks for
import qpmerge_lite.checkpoints.weights_only
from qpmerge_lite.__main__ import main

out, count, seed, *words = sys.argv[1:]
words, draw = ["merge", *words, "--out", out, "--quiet"], random.Random(int(seed))

def begun():
    child = os.fork()
    if child == 0:
        os._exit(main(words))
    return child

def contents():
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}

def killed_after(seconds):  # whether a merge was still running then
    child = begun()
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1]) and not Path(out).exists()

started = time.perf_counter()
assert os.waitpid(begun(), 0)[1] == 0
seconds, expected = time.perf_counter() - started, contents()
killed = resumable = 0
while killed < int(count):
    shutil.rmtree(out)
    for _ in range(draw.randint(1, 3)):  # killed while it goes on, too
        if not killed_after(draw.uniform(0, seconds)):
            seconds *= 0.8  # it is quicker than it was, or had little left to do
            break
        killed, seconds = killed + 1, seconds * 1.05
        resumable += any(Path(out).parent.glob(".*.partial/merged/*.safetensors"))
    is_there = Path(out).exists()
    assert os.waitstatus_to_exitcode(os.waitpid(begun(), 0)[1]) == int(is_there)
    assert contents() == expected
    assert [path.name for path in Path(out).parent.iterdir()] == [Path(out).name]
print(json.dumps([killed, resumable]))
"""
RANDOM = ["--method", "dare", "--option", "seed=3"]


def assert_kills_leave_no_trace(models, words, count, tmp_path):
    done = python(KILLS, tmp_path / "out", count, 0, *models, *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("words", [["--method", "iso_c"], ["--method", "wudi", *QUICK["wudi"]],
                                   RANDOM], ids=str)  # fmt: skip
def test_a_merge_killed_at_any_moment_ends_as_an_undisturbed_one(models, words, tmp_path):
    killed, _ = assert_kills_leave_no_trace(models, words, 3, tmp_path)
    assert killed >= 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soup", "iso_c", "wudi", "dare", "della", "ties"])
def test_a_merge_killed_at_fifty_moments_ends_as_an_undisturbed_one(models, method, tmp_path):
    words = ["--method", method, *QUICK.get(method, [])]
    killed, resumable = assert_kills_leave_no_trace(models, words, 50, tmp_path)
    assert killed >= 50 and (resumable or method not in ("iso_c", "wudi"))


@pytest.fixture
def killed(models, tmp_path):
    """Words of a soup that was killed in its second file; its output, and its hidden folder."""
    out = tmp_path / "new" / "out"
    out.parent.mkdir()
    words = ["merge", *models, "--out", str(out)]
    assert python(KILLED, *words).returncode == -signal.SIGKILL
    (left,) = out.parent.iterdir()
    return words, out, left


def test_finished_files_are_taken_as_they_are(models, killed, tmp_path, capsys):
    words, out, left = killed
    finished = left / "merged" / "model-00001-of-00006.safetensors"
    before = finished.stat()
    status, _, err = run(capsys, *words)
    assert status == 0 and "1 of 6 files of weights are there from an earlier run" in err
    assert os.path.samestat(before, (out / finished.name).stat())
    assert run(capsys, "merge", *models, "--out", tmp_path / "whole", "--quiet")[0] == 0
    assert contents(out) == contents(tmp_path / "whole") and hidden(out.parent) == []


def test_another_order_leaves_what_it_finds_and_says_so(models, killed, tmp_path, capsys):
    words, out, left = killed
    before = contents(left)
    status, _, err = run(capsys, *words, "--option", "weights=[0.3,0.7]")
    assert status == 0 and str(left) in err and "another order" in err
    assert contents(left) == before and hidden(out.parent) == [left.name]
    expected = run(capsys, "merge", *models, "--out", tmp_path / "whole", "--quiet",
                   "--option", "weights=[0.3,0.7]")  # fmt: skip
    assert expected[0] == 0 and contents(out) == contents(tmp_path / "whole")


def test_changed_inputs_are_another_order(models, tmp_path, capsys):
    shutil.copytree(Path(models[0]).parent, tmp_path / "models")
    folders = [tmp_path / "models" / Path(folder).name for folder in models]
    words = ["merge", *folders, "--out", tmp_path / "out"]
    assert python(KILLED, *words).returncode == -signal.SIGKILL
    file = folders[2] / "model-00001-of-00006.safetensors"
    state = {name: value + 1 for name, value in safetensors.load_file(file).items()}
    safetensors.save_file(state, file, metadata={"format": "pt"})
    status, _, err = run(capsys, *words)
    assert status == 0 and "another order" in err and "earlier run" not in err
    loaded = [state_of(folder) for folder in folders[1:]]
    for name, value in state_of(tmp_path / "out").items():
        expected = (loaded[0][name].double() + loaded[1][name].double()) / 2
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-6)


PAUSED = KILLED.replace("SIGKILL", "SIGSTOP")


def test_two_processes_do_not_make_one_output(models, tmp_path, capsys):
    words = ["merge", *models, "--out", str(tmp_path / "out")]
    child = subprocess.Popen(
        [sys.executable, "-c", PAUSED, *words], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        before = contents(tmp_path)
        for more in ([], ["--option", "weights=[0.3,0.7]"]):
            status, _, err = run(capsys, *words, *more)
            assert status == 1 and "expected no other process, found one that is making it" in err
        after = contents(tmp_path)
        assert before.items() <= after.items() and not (tmp_path / "out").exists()
    finally:
        child.kill()
        child.wait()
    assert run(capsys, *words)[0] == 0  # the lock of a dead process holds nobody
    assert hidden(tmp_path) == []


def test_of_two_processes_at_once_one_makes_it(models, tmp_path, capsys):
    words = ["merge", *models, "--out", str(tmp_path / "out"), "--quiet"]
    both = [subprocess.Popen([sys.executable, "-c", MAIN, *words], cwd=ROOT,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]  # fmt: skip
    told = [child.communicate()[1] for child in both]
    assert sorted(child.returncode for child in both) == [0, 1], told
    assert "making it now" in "".join(told) or "files in it" in "".join(told)
    assert run(capsys, *words[:-3], "--out", tmp_path / "whole", "--quiet")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_merge_that_is_told_to_stop_says_what_is_kept(models, name, status, tmp_path, capsys):
    words = ["merge", *models, "--out", tmp_path / "out", "--quiet"]
    done = python(KILLED.replace("SIGKILL", name).replace("main(sys", "status = main(sys")
                  + "sys.exit(status)", *words)  # fmt: skip
    assert done.returncode == status and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("qpmerge: stopped; 1 finished file(s) of weights are kept in ")
    assert hidden(tmp_path)[0] in line and "the same command goes on" in line
    assert run(capsys, *words)[0] == 0 and hidden(tmp_path) == []


STOPPED = """
import os, signal, sys
from qpmerge_lite import sequential
from qpmerge_lite.__main__ import main
solve = sequential.Pass._solve

def stopped(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    solve(*arguments)

sequential.Pass._solve = stopped
sys.exit(main(sys.argv[1:]))
"""


def test_a_pass_that_is_told_to_stop_leaves_nothing(families, tmp_path):
    family = families["llama"]
    words = ["merge", *family.folders, *family.given, "--method", "regmean", "--quiet"]
    done = python(STOPPED, *words, "--out", tmp_path / "out")
    assert done.returncode == 130 and done.stderr == "qpmerge: stopped; nothing is kept\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["soup", "ties", "wudi", "dare"])
def test_the_manifest_has_the_digests_of_the_files(models, method, tmp_path, capsys):
    out = tmp_path / "out"
    done = run(capsys, "merge", *models, "--out", out, "--method", method, *QUICK.get(method, []))
    assert done[0] == 0
    told = json.loads((out / "merge.json").read_text(encoding="utf-8"))
    for source, folder in zip(told["inputs"], models):
        for file, digest in source["files"].items():
            assert digest == hashlib.sha256(Path(folder, file).read_bytes()).hexdigest()


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what was read is not counted here")
@pytest.mark.parametrize("method", ["soup", "ties"])
def test_weights_are_read_once(models, method, tmp_path):
    def read():
        return int(Path("/proc/self/io").read_text().split()[1])

    experts = dict(zip(EXPERTS, map(Path, models[1:])))
    plan = plan_of(Order(Path(models[0]), experts, tmp_path / "out", method))
    before = read()
    carry_out(plan)
    assert 1 <= (read() - before) / plan.report.bytes < 1.1


def test_a_digest_is_that_of_the_file_in_whatever_order_its_parts_pass(tmp_path):
    path, content = tmp_path / "file", random.Random(0).randbytes(9000)
    path.write_bytes(content)
    parts = {start: content[start : start + 3000] for start in (100, 3100, 6100)}
    for order in ([100, 3100, 6100], [3100, 100, 6100], [6100], []):
        digest = Digest(path, content[:100])
        for start in order:
            digest.take(start, parts[start])
        assert digest.finish() == sha256(path) == hashlib.sha256(content).hexdigest()


def sparse(folder, rows):
    """A model of as many rows of 4 kB, of which nothing is stored."""
    entry = {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, 4096 * rows]}
    header = json.dumps({"weight": entry}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    cut(path, 8 + len(header) + 4096 * rows)


def test_a_disk_without_room_is_refused_before_a_weight_is_read(tmp_path, capsys):
    folders = [tmp_path / name for name in ("base", *EXPERTS)]
    rows = 2 * shutil.disk_usage(tmp_path).free // 4096
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        sparse(folder, rows)
    before = [folder.stat() for folder in folders]
    status, _, err = run(capsys, "merge", *folders, "--out", tmp_path / "out")
    assert status == 1 and f"--out {tmp_path / 'out'}: expected " in err
    assert "of free space, found " in err and "make room" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "first", "second"]
    assert [folder.stat().st_mtime_ns for folder in folders] == [s.st_mtime_ns for s in before]


def test_a_file_that_cannot_grow_is_refused_and_leaves_nothing(models, tmp_path):
    before = contents(Path(models[0]).parent)
    limit = 100_000
    done = python(
        MAIN, "merge", *models, "--out", tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1 and "expected a place that can be written" in done.stderr
    assert "see that there is room" in done.stderr and list(tmp_path.iterdir()) == []
    assert contents(Path(models[0]).parent) == before


def test_a_disk_that_is_full_half_way_keeps_what_is_finished(models, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "out"
    out.parent.mkdir()
    words, begin = ["merge", *models, "--out", out], tensors.Shards._begin

    def full(shards, file):
        if any(shards.folder.glob("*.safetensors")):
            raise OSError(28, "No space left on device")
        begin(shards, file)

    with monkeypatch.context() as patched:
        patched.setattr(tensors.Shards, "_begin", full)
        status, _, err = run(capsys, *words)
    assert status == 1 and not out.exists() and "found No space left on device; see that" in err
    (left,) = hidden(out.parent)
    assert f"1 finished file(s) of weights are kept in {out.parent / left}" in err
    status, _, err = run(capsys, *words)
    assert status == 0 and "1 of 6 files of weights are there from an earlier run" in err
    assert run(capsys, "merge", *models, "--out", tmp_path / "whole", "--quiet")[0] == 0
    assert contents(out) == contents(tmp_path / "whole") and hidden(out.parent) == []


def test_what_is_refused_of_weights_leaves_nothing(models, tmp_path, capsys):
    """Corrected weights are another order, which could not use what was made beside them."""
    shutil.copytree(Path(models[0]).parent, tmp_path / "models")
    folders = [tmp_path / "models" / Path(folder).name for folder in models]
    file = folders[2] / "model-00006-of-00006.safetensors"
    state = safetensors.load_file(file)
    spoilt = state | {name: torch.full_like(value, torch.nan) for name, value in state.items()}
    safetensors.save_file(spoilt, file, metadata={"format": "pt"})
    status, _, err = run(capsys, "merge", *folders, "--out", tmp_path / "out")
    assert status == 1 and str(file) in err and "kept" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def weights(value):
    """A damage to the second expert's file."""
    return lambda folder: reshape(folder / "second", DENSE, value)


def unknown_dtype(folder):
    """Weights in four bits, of which the header tells."""
    path = folder / "second" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"F32"', b'"F4" ', 1))


def codes(folder):
    """Weights quantised in all folders, other ones in each, and no word of it."""
    for seed, name in enumerate(("base", *EXPERTS)):
        reshape(folder / name, DENSE, lambda value, seed=seed: (value + seed).to(torch.int8))


def without_shard(folder):
    places = {DENSE: "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "second" / "model.safetensors").rename(folder / "second" / places[DENSE])
    index = folder / "second" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))


def longer_vocabulary(folder):
    """Tokens of the tokenizer that the model has no rows for."""
    path = folder / "second" / "tokenizer.json"
    path.write_text(path.read_text().replace('"w37":39', '"w37":4000').replace(
        '"w37": 39', '"w37": 4000'))  # fmt: skip
    (folder / "second.jsonl").write_text('{"text": "w37 w1"}\n{"text": "w1 w2"}')


def given(content):
    return lambda folder: (folder / "second.jsonl").write_bytes(content)


NAN, INFINITE = (
    weights(lambda value, n=number: value.fill_(n)) for number in (torch.nan, torch.inf)
)
SECOND = "second/model.safetensors"
# what is done to the folders of three models -> the method, and what the refusal says
DAMAGES = {
    "NaN, in a soup": (NAN, "soup", [DENSE, "NaN or infinite", SECOND]),
    "infinite, in a soup": (INFINITE, "soup", [DENSE, "NaN or infinite", SECOND]),
    "NaN, sorted": (NAN, "breadcrumbs", [DENSE, "NaN or infinite", SECOND]),
    "NaN, drawn": (NAN, "della", [DENSE, "NaN or infinite", SECOND]),
    "NaN, decomposed": (NAN, "tsv_merge", [DENSE, "NaN or infinite", SECOND]),
    "NaN, in a pass": (NAN, "qp", [DENSE, "NaN or infinite", SECOND]),
    "four bits": (unknown_dtype, "soup", [SECOND, "'F4'", "dequantised"]),
    "codes of weights": (codes, "soup", [DENSE, "dequantise base and experts", SECOND]),
    "missing shard": (without_shard, "soup", ["index.json, weight_map", "fetch the missing file"]),
    "vocabulary beyond the model": (
        longer_vocabulary,
        "regmean",
        ["second.jsonl, line 1: expected token ids below 40", "belong together"],
    ),
    "calibration of blanks": (
        given(b" \n\t\n"),
        "regmean",
        ["second.jsonl: expected at least one text", "unlabelled inputs"],
    ),
    "calibration in UTF-16": (
        given('{"text": "w1"}'.encode("utf-16")),
        "regmean",
        ["second.jsonl, line 1: expected text in UTF-8", "save the file as UTF-8"],
    ),
    "calibration with labels alone": (
        given(b'{"label": 1}'),
        "regmean",
        ["second.jsonl, line 1: expected a field 'text', found only 'label'", "rename"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_is_refused_with_its_place_and_a_cure(family, name, tmp_path, capsys):
    damage, method, expected = DAMAGES[name]
    damage(family.root)
    before = contents(family.root)
    words = ["merge", *family.folders, "--out", tmp_path / "out", "--method", method]
    status, _, err = run(capsys, *words, *(family.given if method in ("qp", "regmean") else []))
    assert status == 1 and all(part in err for part in expected), err
    assert contents(family.root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


def plan_for(family, out, **fields):
    experts = {name: family.root / name for name in EXPERTS}
    return plan_of(Order(family.base, experts, out, **fields))


def cut_later(path):
    cut(path, path.stat().st_size - 1000)


def rewritten(path):
    state = {name: value * 2 for name, value in safetensors.load_file(path).items()}
    safetensors.save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("harm", "expected"), [
    (cut_later, "model.safetensors, tensor '.*': expected .* bytes, .* damaged"),
    (Path.unlink, "model.safetensors, tensor '.*': expected a file that can be read"),
    (rewritten, "model.safetensors: expected a file that stays as it is .* run the command again"),
])  # fmt: skip
def test_a_file_that_changes_during_the_merge_is_refused(family, harm, expected, tmp_path):
    plan = plan_for(family, tmp_path / "out")
    harm(family.root / "second" / "model.safetensors")
    with pytest.raises(q.errors.MergeError, match=expected):
        carry_out(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


def test_labels_and_what_is_beyond_the_model_s_positions_change_nothing(family, tmp_path, capsys):
    found = []
    for words in (["w3", "w4"] * 8, ["w3", "w4"] * 30):
        for name, path in family.files.items():
            rows = [{"text": " ".join(words)}, {"text": f"w5 w{len(name)}", "label": len(found)}]
            path.write_text("\n".join(map(json.dumps, rows)))
        out = tmp_path / str(len(words))
        done = run(capsys, "merge", *family.folders, "--out", out, *family.given, "--method",
                   "regmean", "--quiet")  # fmt: skip
        assert done[0] == 0
        found.append(state_of(out))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


BY_ENTRY = ("soup", "task_arithmetic", "ties", "dare", "breadcrumbs", "della")


@pytest.mark.parametrize("method", WEIGHTS_ONLY)
def test_threads_change_no_more_than_rounding(models, method, tmp_path):
    """Methods that go entry by entry give the same bits; where sums, products or singular vectors
    come in, numbers of order one agree to 1e-5."""
    experts, options = dict(zip(EXPERTS, map(Path, models[1:]))), {}
    if method == "wudi":
        options = {"steps": 2}
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = tmp_path / str(threads)
            merge_folders(Order(Path(models[0]), experts, out, method, options=options))
            found.append(state_of(out))
    finally:
        torch.set_num_threads(before)
    error = {"rtol": 0, "atol": 0} if method in BY_ENTRY else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found[0], found[1], **error)


@pytest.mark.parametrize("method", [*WEIGHTS_ONLY, "regmean", "qp", "sketched"])
def test_random_numbers_of_others_are_left_alone(families, method, tmp_path, capsys):
    family = families["bert"]
    texts = [] if method in WEIGHTS_ONLY else family.given
    options = [*QUICK.get(method, []), *(["--option", "rank=4"] if method == "sketched" else [])]
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    words = ["merge", *family.folders, "--out", tmp_path / "out", "--method", method]
    assert run(capsys, *words, *texts, *options)[0] == 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_a_merge_in_a_thread_is_a_merge(models, tmp_path):
    """Where no signal can be waited for."""
    words = ["merge", *models, "--out", str(tmp_path / "out"), "--quiet"]
    from qpmerge_lite.__main__ import main

    found = []
    thread = threading.Thread(target=lambda: found.append(main(words)))
    thread.start()
    thread.join()
    assert found == [0]


def test_a_check_tells_the_costs_of_every_method(models, capsys):
    status, out, _ = run(capsys, "check", *models, "--json")
    told = json.loads(out)
    assert status == 0 and set(told["estimates"]) == set(METHODS)
    written = sum(path.stat().st_size for path in Path(models[0]).glob("*.safetensors"))
    for cost in told["estimates"].values():
        assert cost["written"] == written and cost["memory"] > 0 and cost["seconds"] > 0
        assert cost["read"] >= told["bytes"]
    assert told["estimates"]["soup"]["memory"] < told["estimates"]["ties"]["memory"]
    assert told["estimates"]["soup"]["read"] == told["bytes"]
    _, out, _ = run(capsys, "check", *models)
    assert all(f"\n{method} " in out for method in METHODS)
    assert "sees at once" in out and "time at rates measured just now" in out


def test_no_costs_are_told_of_what_does_not_fit(models, tmp_path, capsys):
    shutil.copytree(models[1], tmp_path / "other")
    change(tmp_path / "other", model_type="another")
    status, out, _ = run(capsys, "check", models[0], tmp_path / "other", "--json")
    assert status == 1 and json.loads(out)["estimates"] == {}


def test_a_merge_tells_its_costs_before_and_after(models, tmp_path, capsys):
    status, out, _ = run(capsys, "merge", *models, "--out", tmp_path / "a")
    lines = out.splitlines()
    assert status == 0 and lines[0].startswith("estimated: ") and "of memory, reads" in lines[0]
    assert "time: " in lines[0] and " had been estimated" in lines[-2]
    assert lines[-2].startswith("measured: ") and lines[-1] == f"written: {tmp_path / 'a'}"
    told = json.loads(run(capsys, "merge", *models, "--out", tmp_path / "b", "--json")[1])
    assert told["costs"]["estimated"]["written"] > 0 < told["costs"]["estimated"]["seconds"]
    assert told["costs"]["measured"].keys() == {"memory", "own", "peak", "seconds"}
    assert "costs" not in json.loads((tmp_path / "b" / "merge.json").read_text())


FACTOR = 2.0  # memory that is let go in small pieces is not given back at once


def assert_memory_is_as_estimated(folders, method, out):
    words = ["merge", *folders, "--out", out, "--method", method, "--json"]
    done = python(MAIN, *words, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)["costs"]
    ratio = costs["measured"]["memory"] / costs["estimated"]["memory"]
    assert 1 / FACTOR < ratio < FACTOR, (method, costs)


def test_the_memory_of_a_merge_is_what_was_estimated(tmp_path):
    folders = write_models(tmp_path / "models", 20_000, 256, 2, 2)
    assert_memory_is_as_estimated(folders, "task_arithmetic", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soup", "ties", "task_arithmetic"])
def test_the_memory_of_a_large_merge_is_what_was_estimated(method, tmp_path):
    folders = write_models(tmp_path / "models", 20_000, 1024, 2, 2)
    assert_memory_is_as_estimated(folders, method, tmp_path / "out")


def test_every_method_has_an_estimate_that_grows_with_the_experts(models, tmp_path):
    experts = dict(zip(EXPERTS, map(Path, models[1:])))
    more = experts | {"third": Path(models[1])}
    reports = [plan_of(Order(Path(models[0]), e, tmp_path / "out")).report for e in (experts, more)]
    for method in METHODS:
        fewer, larger = (estimated(report, method, {}).memory for report in reports)
        assert fewer < larger, method
