"""Merges that several processes share: they are those of one process, what one refuses all refuse,
and a process that is lost ends all with one line."""

import json
import os
import subprocess
import sys

import pytest
import shares
import torch
from checkpoint_families import ROOT, Family, bert, contents, run, state_of
from safetensors.torch import load_file

from qpmerge_lite.checkpoints.processes.joining import Launch, launch_of
from qpmerge_lite.engine.agreement import digest
from qpmerge_lite.engine.processes import processes_of

COUNTS = list(shares.NAMES)
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)


def environment(**more):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folders of what groups of two and of four processes have made; each process has one."""
    root = tmp_path_factory.mktemp("shared")
    words = [sys.executable, shares.__file__, str(root)]
    subprocess.run(words, env=environment(), check=True, timeout=240)
    return {count: root / str(count) for count in COUNTS}


def made(folder, name):
    """Which merge of a case -> (its state, what was averaged) as a process has left it."""
    found = {}
    for path in folder.glob(f"{name}, *.safetensors"):
        told = json.loads(path.with_suffix(".json").read_text())
        found[path.stem.removeprefix(f"{name}, ")] = load_file(path), told
    return found


@pytest.fixture(scope="module")
def by_itself():
    """What one process makes of a case."""
    kept = {}

    def merges(name):
        if name not in kept:
            kept[name] = shares.CASES[name](None)
        return kept[name]

    return merges


@pytest.mark.parametrize(
    ("count", "name"), [(count, name) for count in COUNTS for name in shares.NAMES[count]]
)
def test_several_processes_make_the_merge_of_one(shared, by_itself, name, count):
    expected, found = by_itself(name), made(shared[count] / "0", name)
    assert found.keys() == expected.keys()
    for which, (state, averaged) in found.items():
        torch.testing.assert_close(state, dict(expected[which].state_dict), rtol=1e-10, atol=1e-10)
        assert averaged == expected[which].averaged
    for number in range(1, count):
        for which, (state, averaged) in made(shared[count] / str(number), name).items():
            assert averaged == found[which][1]
            assert all(torch.equal(state[key], value) for key, value in found[which][0].items())


def test_cases_are_about_what_they_say(by_itself):
    averaged = by_itself("qp branches")["merge"].averaged
    reasons = {name.rpartition(".")[0]: reason for name, reason in averaged.items()}
    assert reasons == {
        "few": "which rows it reads depends on what they hold",
        "one": "batches come to it in different orders",
        "other": "batches come to it in different orders",
    }
    assert any(name.startswith("experts") for name in by_itself("qp routes")["merge"].averaged)
    assert not any(name.startswith("experts") for name in averaged)


@pytest.mark.parametrize("count", COUNTS)
def test_a_process_of_a_group_merges_by_itself_unless_it_is_told_otherwise(shared, count):
    expected = shares.CASES["featcal"](None)["merge"].state_dict
    for number in range(count):
        ((state, _),) = made(shared[count] / str(number), "alone").values()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def told(folder, count):
    return [json.loads((folder / str(number) / "told.json").read_text()) for number in range(count)]


REFUSED = {
    "damaged": "NonFinite: layer embed, task b, inputs: 1 of 256 ",
    "shuffled": "MergeError: group: expected the same calibration of 'b' in all processes, found "
    "others in process 1 than in process 0; give all of it to each",
    "drawn": "MergeError: group: expected the same base in all processes, found others in process",
    "misshapen": "MergeError: task 'c': the model does not take its calibration batch {'pixels': "
    "(3, 1, 7, 8)}, number 2",
    "no group": "MergeError: group: expected None, or a group of torch.distributed with this "
    "process in it, such as torch.distributed.group.WORLD, found str",
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_one_process_refuses_all_refuse(shared, name, count):
    lines = {of_one[name] for of_one in told(shared[count], count)}
    (line,) = lines
    assert line.startswith(REFUSED[name])


def test_more_processes_than_batches_are_refused(shared):
    (line,) = {of_one["scarce"] for of_one in told(shared[4], 4)}
    assert line.endswith(
        "expected no more processes than calibration batches, found 4 processes and 3 batches; "
        "make batches smaller (--batch-size), or start fewer processes"
    )


@pytest.mark.parametrize("count", COUNTS)
def test_there_is_one_all_reduce_for_every_stage(shared, count):
    for of_one in told(shared[count], count):
        assert of_one["counted"][0] == of_one["counted"][1] > 10


@pytest.mark.parametrize("count", COUNTS)
def test_the_loss_of_a_process_is_an_error_of_all_others(shared, count):
    lines = [path.read_text() for path in shared[count].glob("*/loss")]
    assert len(lines) == count - 1
    for line in lines:
        assert line.startswith(
            f"LostProcess: group: expected an answer of all {count} processes, found that one has "
            "ended or was silent for too long ("
        )
        assert line.endswith("; start all of them again") and "\n" not in line


def test_a_digest_is_of_names_dtypes_shapes_and_values():
    value = torch.arange(4.0)
    alike = [{"a": value}, {"a": value.clone().requires_grad_()}]
    others = [
        {"b": value},
        {"a": value.view(2, 2)},
        {"a": value.double()},
        {"a": value + 1},
        {"a": 1},
    ]
    assert len({digest(entries) for entries in alike}) == 1
    assert len({digest(entries) for entries in [alike[0], *others]}) == 6
    assert digest({"a": torch.tensor(1.0)}) != digest({"a": torch.tensor(2.0)})


def test_no_group_is_this_process_alone():
    assert processes_of(None).count == 1 and processes_of(None).own([1, 2]) == [1, 2]


# ------------------------------------------------------------------------------ the command line


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("change", "expected"), [
    ({}, (1, 4)),
    ({"MASTER_PORT": ""}, (0, 1)),
    ({"WORLD_SIZE": "all"}, (0, 1)),
    ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
])  # fmt: skip
def test_a_launcher_is_known_by_its_variables(change, expected):
    assert launch_of(LAUNCHED | change) == Launch(*expected)
    assert launch_of({}) == Launch(0, 1)


# Children are forked from a process that has loaded what a merge needs, each with the environment
# that torchrun would give it; the store where they meet has a process of its own, as with torchrun.
LAUNCHER = """
import json, os, signal, sys
from pathlib import Path
import torch.distributed
from transformers import AutoModel, AutoTokenizer, BertModel, PreTrainedTokenizerFast
import qpmerge_lite as q
from qpmerge_lite.__main__ import main
from qpmerge_lite.checkpoints import calibrated, merging
from qpmerge_lite.checkpoints.calibration import feeds

q.auto, q.featcal, q.esm  # which are loaded when they are used

def carry_out(number, count, port, words, change, folder):
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}{number}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, descriptor)
    exec(change, {"number": number, "words": words})
    try:
        status = main(words)
    except SystemExit as error:
        status = error.code
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)

def host():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        signal.pause()
    return child, int(os.read(reading, 8))

def begun(folder, count, words, change):
    folder.mkdir()
    store, port = host()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            carry_out(number, count, port, words, change, folder)
        children.append(child)
    return folder, store, children

def end(folder, store, children):
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "statuses").write_text(json.dumps(ended))
    os.kill(store, signal.SIGKILL)
    os.waitpid(store, 0)

commands, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
slow = begun(folder / "silent", *commands.pop("silent"))
for name, command in commands.items():
    end(*begun(folder / name, *command))
end(*slow)
"""
# changes of the process of some number, while the first layers are solved
SOLVING = """
import os, signal
from qpmerge_lite.sequential import Pass
solve = Pass._solve
def changed(*arguments):
    if number in {numbers}:
        os.kill(os.getpid(), signal.{signal})
    solve(*arguments)
Pass._solve = changed
"""
ALONE = """
from qpmerge_lite.checkpoints import calibrated
from qpmerge_lite.errors import MergeError
def build(base):
    raise MergeError("process 1 alone has no room for the model")
if number == 1:
    calibrated.build = build
"""


SILENT = """
import time
from datetime import timedelta
from qpmerge_lite.checkpoints.processes import joining
from qpmerge_lite.sequential import Pass
joining.PATIENCE = timedelta(seconds=5)
if number == 1:
    Pass._solve = lambda *arguments: time.sleep(10)
"""


def signalled(name, *numbers):
    return SOLVING.format(numbers=numbers, signal=name)


class Told:
    """What the processes of a command said, and how they ended."""

    def __init__(self, folder):
        self.statuses = json.loads((folder / "statuses").read_text())
        numbers = range(len(self.statuses))
        self.out = [(folder / f"out{number}").read_text() for number in numbers]
        self.err = [(folder / f"err{number}").read_text() for number in numbers]

    @property
    def line(self):
        """The only line that was said on an error stream, by whichever process."""
        (line,) = "".join(self.err).splitlines()
        return line


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return Family(tmp_path_factory.mktemp("doubles"), lambda: bert().double())


@pytest.fixture(scope="module")
def commands(family, tmp_path_factory):
    """What became of many commands, and the folder that they wrote to."""
    root = tmp_path_factory.mktemp("out")
    (root / "full").mkdir()
    (root / "full" / "file").touch()

    def merge(out, *words):
        given = [*family.given, "--batch-size", "4"]
        return ["merge", *family.folders, "--out", str(root / out), *given, *words]

    featcal = ["--method", "featcal"]
    weights_only = ["merge", *family.folders, "--out", str(root / "ties"), "--method", "ties"]
    again = merge("again", *featcal)
    commands = {
        "featcal": (2, merge("featcal", *featcal), ""),
        "auto": (4, merge("auto", "--json"), ""),
        "weights only": (2, weights_only, ""),
        "check": (2, ["check", family.folders[0], str(root)], ""),
        "usage": (2, ["merge", "--nonesuch"], ""),
        "place": (2, merge("full", *featcal), ""),
        "alone": (2, merge("none", *featcal), ALONE),
        "killed": (2, again, signalled("SIGKILL", 1)),
        "again": (2, again, ""),
        "first killed": (2, merge("more", *featcal), signalled("SIGKILL", 0)),
        "once more": (2, merge("more", *featcal), ""),
        "interrupted": (2, merge("none", *featcal), signalled("SIGINT", 0, 1)),
        "terminated": (2, merge("none", *featcal), signalled("SIGTERM", 0, 1)),
        "silent": (2, merge("none", *featcal), SILENT),
        "other data": (2, merge("none", *featcal, "--samples", "8"), "if number: words[-1] = '7'"),
        "idle": (4, merge("none", *featcal, "--batch-size", "16"), ""),
    }
    told = tmp_path_factory.mktemp("told")
    words = [sys.executable, "-c", LAUNCHER, json.dumps(commands), str(told)]
    subprocess.run(words, env=environment(), check=True, timeout=240, cwd=ROOT)
    return {name: Told(told / name) for name in commands}, root


def single(family, out, capsys, *words):
    """The folder that one process makes."""
    given = [*family.given, "--batch-size", "4"] if "ties" not in words else []
    assert run(capsys, "merge", *family.folders, "--out", out, *given, *words)[0] == 0
    return out


def assert_close(folder, expected):
    found, state = state_of(folder), state_of(expected)
    assert found and all(value.dtype == torch.float64 for value in found.values())
    torch.testing.assert_close(found, state, rtol=1e-10, atol=1e-10)


def test_several_processes_write_what_one_does(family, commands, tmp_path, capsys):
    told, root = commands
    expected = single(family, tmp_path / "featcal", capsys, "--method", "featcal")
    assert told["featcal"].statuses == [0, 0] and told["featcal"].err == ["", ""]
    assert "written: " in told["featcal"].out[0] and told["featcal"].out[1] == ""
    assert "in each of 2 processes" in told["featcal"].out[0]
    assert_close(root / "featcal", expected)
    one, two = (json.loads((f / "merge.json").read_text()) for f in (expected, root / "featcal"))
    assert two["versions"].pop("processes") == "2"
    assert one["inputs"] == two["inputs"] and one["calibration"] == two["calibration"]
    assert contents(expected).keys() == contents(root / "featcal").keys()


def test_four_processes_choose_what_one_does(family, commands, tmp_path, capsys):
    told, root = commands
    expected = single(family, tmp_path / "auto", capsys)
    assert told["auto"].statuses == [0] * 4 and "".join(told["auto"].err) == ""
    assert_close(root / "auto", expected)
    choice = json.loads((expected / "merge.json").read_text())["choice"]
    assert json.loads(told["auto"].out[0])["choice"]["chosen"] == choice["chosen"]


def test_one_process_does_what_runs_no_model(family, commands, tmp_path, capsys):
    told, root = commands
    expected = single(family, tmp_path / "ties", capsys, "--method", "ties")
    assert told["weights only"].statuses == [0, 0]
    assert "one of the 2 processes makes this merge" in told["weights only"].line
    assert state_of(root / "ties").keys() == state_of(expected).keys()
    for name, value in state_of(root / "ties").items():
        assert torch.equal(value, state_of(expected)[name])


def test_all_end_as_the_first_does(commands):
    told, _ = commands
    assert told["check"].statuses == [1, 1] and "".join(told["check"].out[1:]) == ""
    assert "ERROR" in told["check"].out[0]
    assert told["usage"].statuses == [2, 2] and "usage: " in told["usage"].err[0]
    assert told["usage"].err[1] == ""
    assert told["place"].statuses == [1, 1] and "one with files in it" in told["place"].line


def test_a_process_that_fails_alone_tells_why(commands):
    told, _ = commands
    assert told["alone"].statuses == [1, 1]
    assert told["alone"].line == "qpmerge: process 1 alone has no room for the model"


def test_a_lost_process_ends_the_others_and_leaves_nothing(commands):
    told, root = commands
    statuses = {"killed": [1, -9], "first killed": [-9, 1], "silent": [1, 1]}
    for name, expected in statuses.items():
        assert told[name].statuses == expected
        assert "expected an answer of all 2 processes, found that one has ended" in told[name].line
    for name, out in {"again": "again", "once more": "more"}.items():
        assert told[name].statuses == [0, 0]
        assert contents(root / out) == contents(root / "featcal")
    assert sorted(path.name for path in root.iterdir()) == [
        "again", "auto", "featcal", "full", "more", "ties",
    ]  # fmt: skip


def test_processes_that_are_told_to_stop_say_so_once(commands):
    told, _ = commands
    assert told["interrupted"].statuses == [130, 130]
    assert told["interrupted"].line == "qpmerge: stopped; nothing is kept"
    assert told["terminated"].statuses == [143, 143]
    assert told["terminated"].line.startswith("qpmerge: stopped; ")
    assert "end all processes where one is lost" in told["terminated"].line


def test_differences_and_idle_processes_are_refused(commands):
    told, _ = commands
    assert told["other data"].statuses == [1, 1]
    assert "group: expected the same calibration of 'first' in all" in told["other data"].line
    assert told["idle"].statuses == [1] * 4
    assert "found 4 processes and 2 batches; make batches smaller (--batch-size)" in (
        told["idle"].line
    )


UNDER_TORCHRUN = (
    "import os, sys; number = int(os.environ['RANK'])\n"
    + SOLVING.format(numbers=(1,), signal="SIGKILL")
    + "from qpmerge_lite.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
)


def test_a_process_that_is_lost_under_torchrun_is_told_of(family, tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "new" / "out"
    out.parent.mkdir()
    script.write_text(UNDER_TORCHRUN)
    words = ["merge", *family.folders, "--out", str(out), *family.given, "--method", "regmean"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([sys.executable, *launch, *words], env=environment(), timeout=120,
                          capture_output=True, text=True)  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if line.startswith("qpmerge: ")]
    assert done.returncode == 1 and len(ours) == 1 and list(out.parent.iterdir()) == []
    assert "found that one has ended" in ours[0] or "where one is lost" in ours[0]
