"""`qpmerge completion`: in a real bash the printed script completes verbs, options, methods,
folders and files, with nothing of Python running."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qpmerge_lite import __main__ as alone
from qpmerge_lite.checkpoints.calibration import records
from qpmerge_lite.checkpoints.completion.scripts import script
from qpmerge_lite.checkpoints.methods import METHODS
from qpmerge_lite.companion import cli

BASH = shutil.which("bash")
ASKED = """
source "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$(( $# - 2 ))
_shtab_qpmerge
printf '%s\\n' "${COMPREPLY[@]}"
"""
VERBS = {"merge", "check", "moments", "delta", "diagnose", "completion"}


@pytest.fixture(scope="module", params=[cli.parser, alone.parser], ids=["repository", "module"])
def written(request, tmp_path_factory):
    """The script of either command, in a file."""
    pytest.importorskip("shtab", reason="the completion extra, which writes scripts, is not here")
    path = tmp_path_factory.mktemp("completion") / "qpmerge.bash"
    path.write_text(script(request.param(), "bash"), encoding="utf-8")
    return path


@pytest.fixture
def here(tmp_path):
    """Folders and files to be completed."""
    for name in ("base", "tuned/french", "tuned/german"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("french.jsonl", "french.safetensors", "recipe.yml"):
        (tmp_path / name).touch()
    return tmp_path


def completed(written, here, line):
    """What bash offers for the last word of a line, without a Python to be found."""
    words = []
    for part in line.split(" "):  # readline breaks words at these, too
        words += [word for word in re.split("([=:])", part) if word] or [""]
    done = subprocess.run(
        [BASH, "--norc", "-c", ASKED, "bash", written, *words],
        capture_output=True, text=True, cwd=here, env={"PATH": "/nonesuch"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return {word for word in done.stdout.splitlines() if word}


needs_bash = pytest.mark.skipif(BASH is None, reason="there is no bash on this machine")


@needs_bash
def test_verbs_are_completed(written, here):
    assert completed(written, here, "qpmerge ") >= VERBS
    assert completed(written, here, "qpmerge me") == {"merge"}


@needs_bash
def test_options_of_a_verb_are_completed(written, here):
    options = completed(written, here, "qpmerge merge base --")
    assert {"--out", "--method", "--calibration", "--moments", "--option", "--config"} <= options
    assert completed(written, here, "qpmerge delta base expert --d") == {"--dtype"}
    assert "--method" not in completed(written, here, "qpmerge check base --")


@needs_bash
def test_methods_are_completed(written, here):
    assert completed(written, here, "qpmerge merge base tuned --method ") == {*METHODS}
    assert completed(written, here, "qpmerge merge base tuned --method ti") == {"ties"}
    assert "float64" in completed(written, here, "qpmerge delta a b --dtype float")


@needs_bash
@pytest.mark.parametrize(("line", "expected"), [
    ("merge b", {"base"}),
    ("merge base tuned/f", {"tuned/french"}),
    ("merge base tuned/french tuned/g", {"tuned/german"}),
    ("merge base fr=tuned/f", {"tuned/french"}),
    ("merge base fr=delta:fr", {"french.jsonl", "french.safetensors"}),
    ("merge base tuned/french --calibration french=french.j", {"french.jsonl"}),
    ("merge --config rec", {"recipe.yml"}),
    ("moments tu", {"tuned"}),
    ("moments fr", set()),
    ("diagnose base base tuned/french tuned/g", {"tuned/german"}),
], ids=lambda given: given if isinstance(given, str) else " ".join(sorted(given)))  # fmt: skip
def test_folders_and_files_are_completed(written, here, line, expected):
    assert completed(written, here, f"qpmerge {line}") == expected


def test_a_script_of_zsh_is_written_too():
    pytest.importorskip("shtab")
    text = script(cli.parser(), "zsh")
    assert text.startswith("#compdef qpmerge") and f"({' '.join(METHODS)})" in text
    assert re.search(r'"\*:folder of an expert[^\n]*:_qpmerge_named_files"', text)
    assert "_qpmerge_named_files() {" in text


def test_the_command_prints_the_script(written):
    """The one of its own parser, in a process that never loads torch."""
    code = """
import sys
from qpmerge_lite.__main__ import main
status = main(["completion", "bash"])
print("torch" in sys.modules, file=sys.stderr)
sys.exit(status)
"""
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert done.stdout == script(cli.parser(), "bash") + "\n"


def test_without_shtab_the_cure_is_said(monkeypatch, capsys):
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    assert cli.main(["completion", "bash"]) == 1
    told = capsys.readouterr()
    assert told.out == "" and "pip install 'qpmerge-lite[completion]'" in told.err


def test_other_shells_are_not_understood(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["completion", "fish"])
    assert left.value.code == 2 and "bash" in capsys.readouterr().err
