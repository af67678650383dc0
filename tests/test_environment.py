"""One set of pins, said three times: lock, conda environment and package requirements agree."""

import ast
import fnmatch
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from qpmerge_lite.companion import staleness

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
BROWSER = pins(text("requirements-browser.lock").splitlines())
PROJECT = tomllib.loads(text("pyproject.toml"))


def test_the_conda_environment_has_the_pins_of_the_lock():
    dependencies = yaml.safe_load(text("environment.yml"))["dependencies"]
    pip = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    assert pins(pip) == LOCK
    assert "python=3.11" in dependencies


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("requirements*.lock")))
def test_every_locked_file_is_hashed(name):
    for requirement in re.split(r"\n(?=\S)", text(name).strip()):
        if not requirement.startswith("#"):
            assert "--hash=sha256:" in requirement, requirement.splitlines()[0]


@pytest.mark.parametrize(
    "name",
    [
        *sorted(path.name for path in ROOT.glob("requirements*")),
        "environment.yml",
        "binder/environment.yml",
        "binder/postBuild",
        "Makefile",
    ],
)
def test_no_index_is_named(name):
    assert not re.search(r"https?://|file:|--(extra-)?index-url +[^.…\"]|--find-links", text(name))


def test_what_is_asked_for_by_name_is_locked_as_asked():
    assert pins(text("requirements.in").splitlines()).items() <= LOCK.items()
    assert pins(text("requirements-hub.in").splitlines()).items() <= HUB.items()
    assert pins(text("requirements-browser.in").splitlines()).items() <= BROWSER.items()


def test_what_reads_checkpoints_adds_to_the_pins_and_changes_none():
    assert {
        name: version for name, version in HUB.items() if LOCK.get(name, version) != version
    } == {}
    assert {"transformers", "tokenizers"} <= HUB.keys() - LOCK.keys()
    assert "pip install --require-hashes -r requirements-hub.lock" in text("environment.yml")


def test_what_drives_a_browser_changes_no_pin():
    assert {name: v for name, v in BROWSER.items() if LOCK.get(name, v) != v} == {}


def test_binder_has_a_torch_that_the_package_takes_and_no_cuda():
    """Its Python is that of the pins, torch is conda's, and everything else is from the locks."""
    from packaging.requirements import Requirement

    binder = yaml.safe_load(text("binder/environment.yml"))["dependencies"]
    assert "python=3.11" in binder and all(isinstance(entry, str) for entry in binder)
    (torch,) = (Requirement(entry) for entry in binder if entry.startswith("pytorch"))
    asked = next(r for r in PROJECT["project"]["dependencies"] if r.startswith("torch"))
    assert (torch.name, torch.specifier) == ("pytorch-cpu", Requirement(asked).specifier)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash on this machine")
def test_binder_installs_the_pins_and_this_folder(tmp_path):
    """As it will be run, with a pip that only says what it was told."""
    told, pip = tmp_path / "told", tmp_path / "pip"
    pip.write_text(f'#!/bin/sh\necho "$@" > {told}\ncp "$4" {told}.pins\n')
    pip.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert os.access(ROOT / "binder" / "postBuild", os.X_OK)
    subprocess.run([ROOT / "binder" / "postBuild"], cwd=ROOT, env=environment, check=True)
    assert told.read_text().split()[-2:] == ["--editable", ".[suites,qp,hub]"]
    wanted = {name: version for name, version in (LOCK | HUB).items() if name != "torch"}
    assert pins((tmp_path / "told.pins").read_text().splitlines()) == wanted


def imported(source):
    """Names of the top-level packages that some code imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_what_chapters_import_comes_with_the_extras_that_pages_name():
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *extras["suites"], *extras["qp"], *extras["hub"]]
    named = {re.split(r"[<>=!~]", entry)[0].replace("-", "_") for entry in asked}
    named |= {"PIL", "sklearn", "yaml"}  # what pillow, scikit-learn and pyyaml are called in Python
    brought = {"IPython", "filelock", "jinja2", "packaging", "tqdm"}  # by Jupyter, datasets, torch
    cells = []
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        written = json.loads(path.read_text(encoding="utf-8"))["cells"]
        cells += ["".join(cell["source"]) for cell in written if cell["cell_type"] == "code"]
    modules = staleness.modules(ROOT)
    sources = [text(modules[name]) for name in staleness.reached(ROOT, cells=cells)]
    names = {name for source in [*cells, *sources] for name in imported(source)}
    foreign = names - sys.stdlib_module_names - {"qpmerge_lite"}
    assert foreign >= {"torch", "bokeh", "transformers"} and foreign - named - brought == set()


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


def third_party():
    """Rows of the table of what the pages carry: (what, version, licence, patterns, origin)."""
    rows = [line.strip("| ").split(" | ") for line in text("THIRD_PARTY.md").splitlines()]
    return [
        (row[0], row[1], row[2], re.findall(r"`([^`]+)`", row[3]), row[4])
        for row in rows
        if len(row) == 5 and row[0] not in ("what", "---")
    ]


def test_what_the_pages_carry_is_listed_in_the_version_that_is_pinned():
    """What comes from npm, and what comes with a package as a part of it."""
    listed = [f"{row[4]}@{row[1]}" for row in third_party() if row[4].startswith("npm: ")]
    installer = runpy.run_path(str(ROOT / "book" / "_ext" / "offline.py"))
    assert listed == [f"npm: {package.name}" for package in installer["PACKAGES"]]
    for what, version, licence, patterns, origin in third_party():
        assert licence and patterns, what
        if re.sub(r"[ -]+", "-", what).lower() == origin:  # not a part of it under another name
            assert LOCK[origin] == version, what
        elif not origin.startswith("npm: "):
            assert origin in LOCK, what


@pytest.mark.book
def test_every_file_of_others_that_the_pages_carry_is_listed():
    """Ours are those of ``book/_static`` that git keeps, and the words that a search finds."""
    static = ROOT / "book" / "_build" / "html" / "_static"
    ours = {path.name for path in (ROOT / "book" / "_static").iterdir() if path.is_file()}
    ours.add(runpy.run_path(str(ROOT / "book" / "_ext" / "excerpts.py"))["FILE"])  # of the build
    files = {path.relative_to(static).as_posix() for path in static.rglob("*") if path.is_file()}
    listed = [pattern for row in third_party() for pattern in row[3]]
    unlisted = {f for f in files - ours if not any(fnmatch.fnmatchcase(f, p) for p in listed)}
    licences = {f for f in unlisted if f.startswith("licences/")}
    assert sorted(unlisted - licences) == []
    carried = {row[4] for row in third_party() if not row[4].startswith("npm: ")}
    assert {f.split("/")[1] for f in licences} == carried
    for what, version, _, patterns, origin in third_party():
        if what in ("Bootstrap", "Font Awesome Free", "clipboard.js"):  # a part has its own version
            parts = [f for f in files if any(fnmatch.fnmatchcase(f, p) for p in patterns)]
            said = [(static / f).read_bytes() for f in parts if f.endswith((".js", ".txt"))]
            assert any(version.encode() in content for content in said), (what, origin)


def test_the_archive_is_told_what_the_citation_says():
    citation, archive = yaml.safe_load(text("CITATION.cff")), json.loads(text(".zenodo.json"))
    paper = citation["preferred-citation"]
    assert archive["title"] == citation["title"]
    assert archive["version"] == citation["version"]
    assert archive["publication_date"] == str(citation["date-released"])
    assert archive["license"] == citation["license"] == PROJECT["project"]["license"]
    assert [item["identifier"] for item in archive["related_identifiers"]] == [paper["doi"]]
    assert archive["keywords"] == PROJECT["project"]["keywords"]


def test_the_newest_version_of_the_changelog_is_the_one_that_is_cited():
    citation = yaml.safe_load(text("CITATION.cff"))
    version, day = re.search(r"^## \[(\d[\d.]*)\] - (\S+)$", text("CHANGELOG.md"), re.M).groups()
    assert (version, day) == (citation["version"], str(citation["date-released"]))


WORKFLOWS = sorted(path.name for path in (ROOT / ".github" / "workflows").glob("*.yml"))
WRITES = {"contents": "write", "pages": "write", "id-token": "write"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_asks_for_what_there_is_and_code_of_a_change_may_write_nothing(name):
    """Whatever may write does not check anything out, and so runs nothing of the repository."""
    workflow = yaml.safe_load(text(f".github/workflows/{name}"))
    assert workflow["permissions"] == {"contents": "read"}
    targets = re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE)
    for job in workflow["jobs"].values():
        asked = job.get("permissions", {}).items()
        if asked & WRITES.items():
            assert not any("actions/checkout" in step.get("uses", "") for step in job["steps"])
        for line in "\n".join(step.get("run", "") for step in job["steps"]).splitlines():
            words = line.split()
            if words[:1] == ["make"]:
                wanted = [word for word in words[1:] if re.fullmatch("[a-z]+", word)]
                assert set(wanted) <= set(targets), line


def test_published_pages_are_told_their_addresses():
    steps = yaml.safe_load(text(".github/workflows/book.yml"))["jobs"]["build"]["steps"]
    (told,) = [step["env"] for step in steps if step.get("run", "").startswith("make ")]
    assert told == {
        "QPMERGE_REPOSITORY": "${{ github.server_url }}/${{ github.repository }}",
        "QPMERGE_REF": "${{ github.ref_name }}",
        "QPMERGE_BOOK_URL": "${{ steps.pages.outputs.base_url }}",
    }
