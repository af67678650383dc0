"""The notebooks as git keeps them: functions of one parameters cell, stripped, short, and free of
typed results."""

import ast
import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from qpmerge_lite.companion.book.run import BookError, declared, overrides

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
VOICES = ["Paper", "Review", "Ours"]


def cells(path, kind):
    return [
        cell
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


def source(cell):
    return "".join(cell["source"])


def test_there_are_notebooks():
    assert NOTEBOOKS and all(re.fullmatch(r"\d\d_[a-z_]+", path.stem) for path in NOTEBOOKS)


@every_notebook
def test_it_is_valid_and_stripped(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None, source(cell)


@every_notebook
def test_it_is_a_function_of_one_parameters_cell(path):
    assert {"tier": "smoke", "seed": 0, "device": "cpu"}.items() <= declared(path).items()


@every_notebook
def test_an_unknown_parameter_is_an_error(path):
    with pytest.raises(BookError, match=f"{path.name}: no parameter sead; it has: .*seed"):
        overrides(path, {"sead": 1})


def statements(cell):
    """How many statements a cell holds."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(source(cell))))


@every_notebook
def test_it_is_short(path):
    lengths = [statements(cell) for cell in cells(path, "code")]
    assert 8 <= len(lengths) <= 20 and statistics.median(lengths) < 8, lengths


@every_notebook
def test_no_cell_is_long(path):
    for cell in cells(path, "code"):
        lines = [line for line in source(cell).splitlines() if line.strip()]
        assert len(lines) <= 20, source(cell)


def paragraphs(path):
    """Blocks of prose and items of lists."""
    for cell in cells(path, "markdown"):
        for block in re.split(r"\n\s*\n", source(cell)):
            if block and not re.match(r"#|\||```|\$\$", block):
                yield from re.split(r"\n(?=(?:-|\d+\.) )", block)


def words(paragraph):
    """How many, a record or a formula counting as one."""
    one = r"\{(?:res|cite:p)\}`[^`]*`|(?<!\$)\$[^$]+\$(?!\$)"
    return len(re.sub(one, "x", paragraph).split())


@every_notebook
def test_a_paragraph_is_short(path):
    lengths = [words(paragraph) for paragraph in paragraphs(path)]
    assert max(lengths) <= 80 and statistics.median(lengths) <= 32, sorted(lengths)


def numbers(paragraph):
    """Ids of the measured numbers that a paragraph quotes; names of methods are none."""
    return [id for id in re.findall(r"\{res\}`([^` ]+)", paragraph) if not id.endswith(".label")]


@every_notebook
def test_the_answer_quotes_three_numbers_at_most(path):
    opening = source(cells(path, "markdown")[0])
    (answer,) = re.findall(r"^\*\*Answer in one sentence\.\*\*.*$", opening, re.MULTILINE)
    assert len(numbers(answer)) <= 3, numbers(answer)


@every_notebook
def test_many_numbers_stand_in_a_table(path):
    """A paragraph quotes four at most."""
    assert [p for p in paragraphs(path) if len(numbers(p)) > 4] == []


OPENING = ["Question.", "Answer in one sentence.", "Before this.", "Time.", *VOICES]


@every_notebook
def test_it_opens_as_all_chapters_do(path):
    opening = source(cells(path, "markdown")[0]).partition("\n## ")[0]
    title, *begins = [block.partition("**")[2] for block in re.split(r"\n\s*\n", opening)]
    assert not title and [text.partition("**")[0] for text in begins if text] == OPENING


@every_notebook
def test_a_voice_has_a_paragraph_of_its_own(path):
    """The pages mark a paragraph that begins with one of the three words in bold."""
    for cell in cells(path, "markdown"):
        for block in re.split(r"\n\s*\n", source(cell)):
            for bold in re.finditer(r"\*\*([^*]+)\*\*", block):
                if re.match(r"(?:paper|review|ours)\b", bold[1], re.IGNORECASE):
                    assert bold[1] in VOICES and not bold.start(), block
                    assert re.match(r" [A-Z]", block[bold.end() :]), block


@every_notebook
def test_it_ends_with_an_exercise_that_changes_a_parameter(path):
    prose = [source(cell) for cell in cells(path, "markdown")]
    headings = [re.findall(r"^## Exercise$", text, re.MULTILINE) for text in prose]
    assert sum(map(len, headings)) == len(headings[-1]) == 1
    exercise = prose[-1].partition("## Exercise")[2]
    named = re.findall(r"`(\w+) = ([^`]+)`", exercise)
    assert named and re.search("second|minute|hour", exercise)
    for name, value in named:
        assert declared(path)[name] != ast.literal_eval(value), name


@every_notebook
def test_its_imports_exist(path):
    """Names that a notebook imports are there, which a run of minutes would tell as well."""
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.ImportFrom):
                exec(compile(ast.Module([node], []), path.name, "exec"), {})


@every_notebook
def test_its_words(path):
    """What a method is compared with is a baseline, and a reader is told where to look."""
    prose = re.sub(r"`[^`]*`", "", "\n".join(source(cell) for cell in cells(path, "markdown")))
    assert not re.search(r"neighbour|\b(?:see|as|table) above\b", prose)


@every_notebook
def test_a_figure_has_a_caption_and_a_description(path):
    """In the metadata of the cell that ends with it, as sentences and without a typed result."""
    for cell in cells(path, "code"):
        if not re.search(r"^(?:figures\.(?!style)\w+|points)\(", source(cell), re.MULTILINE):
            continue
        said = cell["metadata"].get("mystnb", {})
        texts = [said.get("figure", {}).get("caption", ""), said.get("image", {}).get("alt", "")]
        for text in texts:
            assert text.endswith(".") and 5 <= len(text.split()) <= 70, (source(cell), text)
            assert not re.search(r"\d\.\d|\d\s?%", text), text


@every_notebook
def test_its_records_carry_its_name(path):
    code = "\n".join(source(cell) for cell in cells(path, "code"))
    assert re.findall(r"Records\(\s*[\"']([^\"']+)", code) == [path.stem]


@every_notebook
def test_no_measured_number_is_typed_in_its_prose(path):
    """Numbers with decimals or a percent sign come from records, outside code, formulae and
    links."""
    for cell in cells(path, "markdown"):
        prose = re.sub(r"`[^`]*`|\$[^$]*\$|\[[^\]]*\]\([^)]*\)|arXiv:\d+\.\d+", " ", source(cell))
        assert not re.findall(r"(?<![\w.{])(?:\d+\.\d{2,}|\d+(?:\.\d+)?\s?%)", prose)


def recorded(root):
    """Whether a record has an interval, by ``id`` for what the build is expected to record and by
    ``tier:id`` for what other tiers recorded."""
    found = {}
    for path in (root / "tests" / "expected" / "smoke").glob("*.json"):
        entries = json.loads(path.read_text(encoding="utf-8"))
        found |= {id: "interval" in entry for id, entry in entries.items()}
    for path in (root / "book" / "recorded").glob("*/[0-9][0-9]_*.json"):
        entries = json.loads(path.read_text(encoding="utf-8"))["records"]
        found |= {f"{path.parent.name}:{id}": bool(r["interval"]) for id, r in entries.items()}
    return found


@every_notebook
def test_a_number_with_an_interval_has_one(path):
    """Only a run of one seed has to say that there is none."""
    prose = "\n".join(source(cell) for cell in cells(path, "markdown"))
    asked = re.findall(r"\{res\}`([^` ]+) [^`]*\bci`", prose)
    has_interval = recorded(path.parents[1])
    assert [id for id in asked if not has_interval[id]] == []


@every_notebook
def test_it_names_no_machine_and_installs_nothing(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|Users)/", text)
    assert not re.search(r"[!%]\s*pip\b", text)


@pytest.mark.parametrize(("cell", "problem"), [
    ("a = 1\nb = a", "line 2 .* depends on something else"),
    ("a = len('x')", "line 1 .* depends on something else"),
    ("import os", "line 1 .* is not `name = literal`"),
    ("a = b = 1", "line 1 .* is not `name = literal`"),
])  # fmt: skip
def test_parameters_have_to_be_independent_literals(tmp_path, cell, problem):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]})]
    )
    nbformat.write(notebook, tmp_path / "01_a.ipynb")
    with pytest.raises(BookError, match=f"01_a.ipynb: {problem}"):
        declared(tmp_path / "01_a.ipynb")


def test_there_is_exactly_one_parameters_cell(tmp_path):
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("a = 1")]),
        tmp_path / "01_a.ipynb",
    )
    with pytest.raises(BookError, match="0 cells tagged 'parameters', expected 1"):
        declared(tmp_path / "01_a.ipynb")
