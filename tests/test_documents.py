"""README and CONTRIBUTING say what is so: paths are there, names defined, commands known."""

import inspect
import json
import re
import shlex
from pathlib import Path

import peers_merge
import pytest

import qpmerge_lite as q
from qpmerge_lite.companion import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
every_document = pytest.mark.parametrize("name", DOCUMENTS)
TABLE = re.compile("<!-- claims: begin.*<!-- claims: end -->", re.DOTALL)


def text(name):
    """A document without its generated table."""
    return TABLE.sub("", (ROOT / name).read_text(encoding="utf-8"))


def links(name):
    return re.findall(r"\]\(([^)#:]+)\)", text(name))


def commands(name):
    """Lines of the shell blocks without their comments, parts joined by ``&&`` apart."""
    for block in re.findall(r"```sh\n(.*?)```", text(name), re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():
            yield from (part.strip() for part in line.partition("#")[0].split("&&") if part.strip())


@every_document
def test_every_path_exists(name):
    assert len(links(name)) > 20
    assert [path for path in links(name) if not (ROOT / path).exists()] == []


@every_document
def test_code_that_looks_like_a_path_is_one(name):
    """Of this repository, or under a folder that the build makes."""
    made = ("book/_build", "book/_records", "book/chapters", ".cache", ".venv", "../", "chapters/")
    prose = re.sub(r"```.*?```", "", text(name), flags=re.DOTALL)
    paths = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", prose)
    gone = [p for p in paths if not p.startswith(made) and not (ROOT / p).exists()]
    assert [p for p in gone if p.upper() != p] == []


def test_every_name_that_a_file_or_folder_is_said_to_have_is_defined_there():
    """``NAME`` in [path](path): assigned at the beginning of a line of that file or folder."""
    pairs = re.findall(r"`([A-Z_]{2,})`\s+in\s+\[[^\]]*\]\(([^)]+)\)", text("CONTRIBUTING.md"))
    assert {name for name, _ in pairs} == {
        "ORDER", "FAMILIES", "CALIBRATED", "ENTRIES", "REGISTRY", "PLANS",
    }  # fmt: skip
    for name, path in pairs:
        files = [ROOT / path] if path.endswith(".py") else sorted((ROOT / path).glob("*.py"))
        assert any(re.search(rf"^{name}\b.*=", f.read_text(), re.MULTILINE) for f in files), name


@pytest.mark.parametrize(("path", "names"), [
    ("tests/strategies.py", ["FREE"]),
    ("tests/test_bases.py", ["INCLUSIONS", "def listed"]),
    ("tests/small.py", ["ON_THE_BASE", "WITHOUT_BASE"]),
    ("qpmerge_lite/bases.py", ["FAMILIES", "class Basis"]),
])  # fmt: skip
def test_other_names_of_the_guide_are_where_it_says(path, names):
    for name in names:
        assert name.split()[-1] in text("CONTRIBUTING.md")
        assert re.search(rf"^{name}\b", (ROOT / path).read_text(), re.MULTILINE), name


@pytest.mark.parametrize("name", [*DOCUMENTS, "book/intro.md"])
def test_every_command_is_known(name):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands(name):
        program, *words = shlex.split(command)
        if program == "make":
            assert words[0] in targets, command
        elif program in ("qpmerge", ".venv/bin/qpmerge"):
            cli.parser().parse_args(words)
        elif program == "torchrun":
            cli.parser().parse_args(words[words.index("qpmerge_lite") + 1 :])
        elif "pytest" in words:
            files = [word for word in words if word.startswith("tests/")]
            assert files and all((ROOT / file).exists() for file in files), command
        else:
            assert program.rpartition("/")[2] in {"pip", "ruff", "mypy", "python"}, command


@every_document
def test_make_is_asked_for_what_it_has(name):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z]+)", text(name))) <= set(targets)


def test_the_readme_lists_every_method():
    """Whatever is called as ``method(base, experts, calibration, …)``."""
    rows = re.findall(r"^\| (?:weights only|calibration inputs).*", text("README.md"), re.MULTILINE)
    named = {n for row in rows for n in re.findall(r"`(\w+)`", row)}
    methods = set()
    for name in filter(lambda name: inspect.isfunction(getattr(q, name)), q.__all__):
        parameters = inspect.signature(getattr(q, name)).parameters.values()
        given = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if given == ["base", "experts", "calibration"]:
            methods.add(name)
    assert named == methods


def test_the_map_has_every_folder():
    ours = (path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    tracked = {path.name for path in ours if path.suffix != ".egg-info"}
    shown = {path.strip("/").split("/")[0] for path in links("README.md")}
    assert {n for n in tracked if any((ROOT / n).glob("*.*"))} - {"shared"} <= shown


@every_document
def test_no_machine_is_named(name):
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|Users|work)/", text(name))


def test_the_table_of_merges_is_that_of_its_record():
    record = json.loads(peers_merge.RECORD.read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    between = readme.partition(peers_merge.BEGIN)[2].partition(peers_merge.END)[0]
    assert between.strip() == peers_merge.shown_in_readme(record).strip()
