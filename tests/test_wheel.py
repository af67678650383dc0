"""The wheel, installed where there is no repository: it imports, merges, holds the module and
nothing else, and its command says where the rest is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"
LARGEST = 400_000  # bytes: weights alone would be several times as many


def can_build():
    """Whether there are pip and a setuptools that reads this pyproject.toml."""
    try:
        return bool(find_spec("pip")) and int(version("setuptools").partition(".")[0]) >= 77
    except PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(
    not can_build(), reason="there is no pip, or no setuptools from 77 on, to build a wheel with"
)


def call(*words, cwd, **environment):
    """Run a command outside the repository, with none of its paths."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "QPMERGE", "PIP"))}
    return subprocess.run(
        [*map(str, words)], cwd=cwd, env=kept | environment, capture_output=True, text=True
    )


def pip(*words, cwd):
    done = call(
        sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words, cwd=cwd
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path of a wheel built from a copy of the tree."""
    tree, made = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("made")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(
        ROOT / "qpmerge_lite", tree / "qpmerge_lite", ignore=shutil.ignore_patterns("__pycache__")
    )
    pip("wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", made, cwd=tree)
    (path,) = made.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """Scripts of an environment with the wheel in it. The other packages are those of this one,
    but for what makes the repository importable here."""
    root = tmp_path_factory.mktemp("environment")
    done = call(sys.executable, "-m", "venv", "--without-pip", root, cwd=root)
    assert done.returncode == 0, done.stderr
    python = root / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel, cwd=root)
    (packages,) = root.glob("lib/python*/site-packages")
    # A path in a .pth file is searched; the .pth files under it are not read.
    (packages / "present.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return root / "bin"


def test_it_holds_the_module_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folders = {str(Path(name).parent) for name in names}
    assert {name for name in folders if ".dist-info" not in name} == {
        "qpmerge_lite",
        "qpmerge_lite/checkpoints",
        "qpmerge_lite/checkpoints/adapters",
        "qpmerge_lite/checkpoints/calibration",
        "qpmerge_lite/checkpoints/commands",
        "qpmerge_lite/checkpoints/comparison",
        "qpmerge_lite/checkpoints/completion",
        "qpmerge_lite/checkpoints/conversion",
        "qpmerge_lite/checkpoints/deltas",
        "qpmerge_lite/checkpoints/diagnosis",
        "qpmerge_lite/checkpoints/evaluation",
        "qpmerge_lite/checkpoints/heads",
        "qpmerge_lite/checkpoints/large",
        "qpmerge_lite/checkpoints/moments",
        "qpmerge_lite/checkpoints/processes",
        "qpmerge_lite/checkpoints/recipes",
        "qpmerge_lite/choice",
        "qpmerge_lite/engine",
        "qpmerge_lite/spectral",
    }
    sources = {p.name for p in (ROOT / "qpmerge_lite").glob("*.py")}
    assert {Path(n).name for n in names if n.count("/") == 1 and n.endswith(".py")} == sources
    assert not [name for name in names if name.endswith(".safetensors")]
    assert "qpmerge_lite/py.typed" in names and wheel.stat().st_size < LARGEST


def test_it_imports_from_where_it_was_installed(elsewhere, tmp_path):
    code = """
import importlib.util, qpmerge_lite
print(qpmerge_lite.__file__)
print(importlib.util.find_spec("qpmerge_lite.companion"))
print(all(getattr(qpmerge_lite, name) is not None for name in qpmerge_lite.__all__))
"""
    done = call(elsewhere / "python", "-W", "error", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    place, companion, there = done.stdout.splitlines()
    assert Path(place).is_relative_to(elsewhere.parent) and not Path(place).is_relative_to(ROOT)
    assert (companion, there) == ("None", "True")


def test_the_example_of_the_readme_runs(elsewhere, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = text.partition("```python\n")[2].partition("```")[0]
    done = call(elsewhere / "python", "-c", example, cwd=tmp_path)
    assert done.returncode == 0 and "'basis': 'rows'" in done.stdout, done.stderr


@pytest.mark.parametrize("command", [["qpmerge"], ["python", "-m", "qpmerge_lite"]], ids=" ".join)
def test_the_command_says_what_is_there(elsewhere, tmp_path, command):
    run = lambda *words: call(elsewhere / command[0], *command[1:], *words, cwd=tmp_path)
    for words in ([], ["--help"]):
        done = run(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert "from qpmerge_lite import qp" in done.stdout
        assert "come with the repository, not with the module" in done.stdout
        assert "merge checkpoints into one" in done.stdout
    done = run("book", "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "come with the repository, not with the module; in a clone of it" in done.stderr
    assert "make book" in done.stderr and ".venv/bin/qpmerge" in done.stderr


def test_the_command_merges_checkpoints(elsewhere, tmp_path):
    """By weights alone, which takes no more than the module needs."""
    for number, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "any"}', encoding="utf-8")
        save_file({"weight": torch.full((2, 2), float(number))}, tmp_path / name / WEIGHTS)
    done = call(elsewhere / "qpmerge", "merge", "base", "a", "b", "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)["weight"], torch.full((2, 2), 1.5))
    done = call(elsewhere / "qpmerge", "check", "base", "nonesuch", cwd=tmp_path)
    assert done.returncode == 1 and "ERROR nonesuch" in done.stdout
