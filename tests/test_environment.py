"""One set of pins, said three times: lock, conda environment and package requirements agree."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def pins(lines):
    """{normalised name: version} of requirement lines."""
    found = (re.match(r"\s*([A-Za-z0-9._-]+)==([^\s;\\]+)", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", m[1]).lower(): m[2] for m in found if m}


LOCK = pins(text("requirements.lock").splitlines()) | pins(
    text("requirements-torch.txt").splitlines()
)
HUB = pins(text("requirements-hub.lock").splitlines())
PROJECT = tomllib.loads(text("pyproject.toml"))


def test_the_conda_environment_has_the_pins_of_the_lock():
    dependencies = yaml.safe_load(text("environment.yml"))["dependencies"]
    pip = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    assert pins(pip) == LOCK
    assert "python=3.11" in dependencies


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-hub.lock"])
def test_every_locked_file_is_hashed(name):
    for requirement in re.split(r"\n(?=\S)", text(name).strip()):
        if not requirement.startswith("#"):
            assert "--hash=sha256:" in requirement, requirement.splitlines()[0]


@pytest.mark.parametrize(
    "name", [*(path.name for path in ROOT.glob("requirements*")), "environment.yml", "Makefile"]
)
def test_no_index_is_named(name):
    assert not re.search(r"https?://|file:|--(extra-)?index-url +[^.…\"]|--find-links", text(name))


def test_what_is_asked_for_by_name_is_locked_as_asked():
    assert pins(text("requirements.in").splitlines()).items() <= LOCK.items()
    assert pins(text("requirements-hub.in").splitlines()).items() <= HUB.items()


def test_what_reads_checkpoints_adds_to_the_pins_and_changes_none():
    assert {
        name: version for name, version in HUB.items() if LOCK.get(name, version) != version
    } == {}
    assert {"transformers", "tokenizers"} <= HUB.keys() - LOCK.keys()
    assert "pip install --require-hashes -r requirements-hub.lock" in text("environment.yml")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on this machine")
def test_whatever_runs_chapters_or_tests_installs_it():
    """As ``make`` itself sees it: what would be run, from an environment that is not there."""
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TIER", "VENV")
    }

    def planned(*words):
        words = ["make", "-n", "VENV=/nowhere", "PYTHON=python3", *words]
        done = subprocess.run(words, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
        return "-r requirements-hub.lock" in done.stdout

    assert [
        planned(*words) for words in (["book"], ["check", "TIER=paper"], ["test"], ["html"])
    ] == [True, True, True, False]


def test_everything_the_package_needs_is_locked_within_its_bounds():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    extras = {
        name: group
        for name, group in PROJECT["project"]["optional-dependencies"].items()
        if name != "oracles"
    }
    wanted = [
        Requirement(r)
        for group in (PROJECT["project"]["dependencies"], *extras.values())
        for r in group
    ]
    outside = [
        str(r)
        for r in wanted
        if not r.specifier.contains((HUB | LOCK).get(canonicalize_name(r.name), "0"))
    ]
    assert outside == []


def test_the_core_needs_five_packages():
    asked = PROJECT["project"]["dependencies"]
    names = sorted(pins(re.sub(r"[><=].*", "==0", line) for line in asked))
    assert names == ["greenlet", "numpy", "safetensors", "torch", "tqdm"]


def test_the_version_is_the_same_everywhere():
    version = PROJECT["project"]["version"]
    import qpmerge_lite

    assert qpmerge_lite.__version__ == version
    assert yaml.safe_load(text("CITATION.cff"))["version"] == version
