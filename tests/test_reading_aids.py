"""What helps to read the book: tables behind figures, voices, previews, words found by a search."""

import base64
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from docutils import nodes
from docutils.utils import new_document
from drawn import drawn
from IPython.core.formatters import DisplayFormatter
from matplotlib.collections import QuadMesh

from qpmerge_lite.companion.book import behind, figures

matplotlib.use("agg")
ROOT = Path(__file__).parents[1]
HTML = ROOT / "book" / "_build" / "html"


@pytest.fixture
def extensions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))


def drawn_values(figure):
    """What lines and points, bars and shades of a figure stand for: along either of the axes where
    both are possible."""
    for axis in figure.axes:
        yield from (line.get_data() for line in axis.lines if line.get_label()[0] != "_")
        yield from ([[bar.get_height() for bar in bars]] for bars in axis.containers)
        if axis.get_label() != "<colorbar>":
            maps = [part for part in axis.collections if isinstance(part, QuadMesh)]
            yield from ([np.ma.asarray(part.get_array()).ravel()] for part in maps)


def looks(figure):
    """Label -> marker and colour of the points of a figure's first axis."""
    lines = figure.axes[0].lines
    return {line.get_label(): (line.get_marker(), line.get_color()) for line in lines}


def test_a_family_of_bases_looks_the_same_in_every_figure():
    one = looks(figures.nesting({"rows": (8, 0.6, 0.5), "elements": (9, 0.7, 0.6)}, []))
    other = looks(figures.projection({"elements": 0.7}, {"soup": (0.3, 0.9)}))
    assert one["elements"] == other["elements"]
    assert other["soup"] not in one.values()


def test_the_table_behind_a_figure_has_every_number_drawn():
    figures.style()
    told = 0
    for figure in drawn():
        if figure.table is not None:
            inside = figure.table.select_dtypes("number").to_numpy(float).ravel()
            for either in drawn_values(figure):
                told += 1
                assert any(
                    all(np.isclose(inside, float(value)).any() for value in values)
                    for values in either
                ), (figure.table, either)
    assert told > 40


def test_the_table_behind_contours_has_their_points_and_every_node():
    grid, values = [0.0, 1.0], [[1.0, 2.0], [3.0, 4.0]]
    table = behind.surfaces({"loss": (grid, values, [2])}, {"soup": (0.5, 0.25)})
    assert table.astype(object).where(table.notna(), None).values.tolist() == [
        ["soup", 0.5, 0.25, None],
        ["loss", 0.0, 0.0, 1.0],
        ["loss", 1.0, 0.0, 2.0],
        ["loss", 0.0, 1.0, 3.0],
        ["loss", 1.0, 1.0, 4.0],
    ]


def test_the_table_behind_contours_stays_small():
    grid = list(range(81))
    table = behind.surfaces({"loss": (grid, np.add.outer(grid, grid), [2])}, {})
    assert sorted(set(table.d1)) == list(range(0, 81, 4)) and len(table) == 21**2
    assert (table.value == table.d1 + table.d2).all()


def test_a_notebook_keeps_the_table_as_the_text_of_the_figure():
    """Every head is there, and every line has as many cells."""
    kinds = set()
    for figure in drawn():
        shown, _ = DisplayFormatter(active_types=["text/plain"]).format(figure)
        title, _, table = shown["text/plain"].partition("\n")
        kinds.add(title)
        rows = list(csv.reader(table.splitlines()))
        assert (title == behind.PICTURES) == (not rows)
        assert all(
            len(row) == len(rows[0]) and rows[0] == list(map(str, figure.table)) for row in rows
        )
        assert all(name for row in rows[:1] for name in row)
    assert kinds == {behind.DATA, behind.SHADES, behind.PICTURES}


def spoken(text, extensions):
    """Classes and text of the paragraphs that the extension makes of one, whose strong parts stand
    between stars."""
    import voices

    document = new_document("page")
    document += nodes.paragraph()
    for place, part in enumerate(text.split("**")):
        document[0] += nodes.strong("", part) if place % 2 else nodes.Text(part)
    voices.Voices(document).apply()
    return [(" ".join(part["classes"]), part.astext()) for part in document]


PAPER, REVIEW, OURS = ("voice voice-paper", "voice voice-review", "voice voice-ours")


@pytest.mark.parametrize(
    "text, told",
    [
        ("**Paper.** It is.", [(PAPER, "Paper It is.")]),
        ("**Ours, a reading:** we do.", [(OURS, "Ours A reading: we do.")]),
        ("**Ours**, written out. So.", [(OURS, "Ours Written out. So.")]),
        ("**Ours: it holds.** Let it.", [(OURS, "Ours It holds. Let it.")]),
        (
            "**Paper** (abstract): a. **Review:** nothing. **Ours:** the rest.",
            [(PAPER, "Paper (abstract): a. "), (REVIEW, "Review Nothing. "),
             (OURS, "Ours The rest.")],
        ),
        ("First. **Ours:** then.", [("", "First. "), (OURS, "Ours Then.")]),
        ("Three. **Paper** marks what it says.", [("", "Three. Paper marks what it says.")]),
        ("**Papers** are many.", [("", "Papers are many.")]),
    ],
)  # fmt: skip
def test_a_voice_is_a_paragraph_of_its_own(text, told, extensions):
    assert spoken(text, extensions) == told


GLOSSARY = """# Glossary

```{glossary}
captured energy
  What a merge takes away.

head
  A small map.
```
"""
PROSE = """# Page

**Paper** (abstract): captured energy and captured energy; a head. **Ours:** `captured energy`.

## Part

| | b |
|---|---|
| c | d |
"""


def notebook(*figures):
    """A notebook of a text and figures as they are kept: an image and the figure's text."""
    pixel = base64.b64encode(bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
        "1f15c4890000000d49444154789c6360000002000001e221bc330000000049454e44ae426082"
    )).decode()  # fmt: skip
    text = {"cell_type": "markdown", "metadata": {}, "source": PROSE}
    cells = [text]
    for figure in figures:
        bundle = {"image/png": pixel} | figure._repr_mimebundle_()
        output = {"output_type": "display_data", "metadata": {}, "data": bundle}
        cells.append(
            {"cell_type": "code", "metadata": {}, "source": "1", "execution_count": 1}
            | {"outputs": [output]}
        )
    python = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 4, "metadata": python, "cells": cells})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A book of one glossary and one notebook with curves, shades and pictures: its folder."""
    folder = tmp_path_factory.mktemp("book")
    (folder / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})\n"
        "extensions = ['myst_nb', 'voices', 'terms', 'behind', 'excerpts', 'access']\n"
        "nb_execution_mode = 'off'\nhtml_theme = 'basic'\n"
    )
    (folder / "index.md").write_text("# Book\n\n```{toctree}\npage\nglossary\n```\n")
    (folder / "glossary.md").write_text(GLOSSARY)
    curves = figures.cumulative({"a": [0.25, 0.5]}, "kept", "y")
    shades = figures.heat(pd.DataFrame({"a": [0.123456] * 200}, range(200)), "z", 0, 1)
    pictures = figures.gallery({"a": np.zeros((2, 3, 3)), "b": np.ones((2, 3, 3))}, 2)
    (folder / "page.ipynb").write_text(notebook(curves, shades, pictures))
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-n", str(folder), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "out"


def test_the_table_of_a_figure_is_on_the_page_and_in_a_file(small):
    html = BeautifulSoup((small / "page.html").read_text(encoding="utf-8"), "html.parser")
    curves, shades = html.select("details.behind")
    cells = [cell.text for cell in curves.select("th, td")]
    assert cells == ["kept", "a", "1", "0.25", "2", "0.5"]
    assert "200 rows, of which 20 rows and 2 columns are shown" in shades.text
    assert len(shades.select("tbody tr")) == 20
    whole = (small / shades.a["href"]).read_text(encoding="utf-8").splitlines()
    assert len(whole) == 201 and whole[-1] == "199,0.1235"
    kept = [image.get("class", []) for image in html.select(".cell_output img")]
    assert ["shades" in classes for classes in kept] == [False, True, True]


def test_the_first_time_that_a_page_says_a_term_it_is_a_link(small):
    html = BeautifulSoup((small / "page.html").read_text(encoding="utf-8"), "html.parser")
    links = html.select("a[href^='glossary.html#term-']")
    assert [link.text for link in links] == ["captured energy"]
    assert links[0].find_parent("p")["class"] == ["voice", "voice-paper"]


def test_corners_of_tables_are_no_headers(extensions):
    import access

    told = access.mended('<th class="blank">&nbsp;</th><th><p></p></th><th> a</th>')
    assert told == '<td class="blank"></td><td></td><th> a</th>'


def test_no_header_of_a_table_is_empty(small):
    html = BeautifulSoup((small / "page.html").read_text(encoding="utf-8"), "html.parser")
    assert html.select("th") and all(cell.text.strip() for cell in html.select("th"))


def test_a_search_finds_the_words_of_a_page_under_their_ids(small):
    text = (small / "_static" / "pages.js").read_text(encoding="utf-8")
    pages = json.loads(text.partition("\n")[0].removeprefix("const PAGES = ").rstrip(";"))
    assert set(pages) == {"index.html", "page.html", "glossary.html"}
    html = BeautifulSoup(pages["glossary.html"], "html.parser").find(role="main")
    told = html.find(id="term-captured-energy").text
    assert told == "captured energy: What a merge takes away."
    words = BeautifulSoup(pages["page.html"], "html.parser")
    assert words.find(id="part").text == "Part b c d" and "0.25" not in words.text
    scripts = BeautifulSoup((small / "search.html").read_text(encoding="utf-8"), "html.parser")
    assert [tag["src"] for tag in scripts.select("script[src*='pages.js']")]
    assert "pages.js" not in (small / "page.html").read_text(encoding="utf-8")


@pytest.mark.book
def test_every_figure_of_the_book_has_a_table_or_is_a_picture():
    for path in sorted((ROOT / "book" / "chapters").glob("[0-9][0-9]_*.ipynb")):
        outputs = [
            output["data"]["text/plain"]
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        heads = ["".join(text).partition("\n")[0] for text in outputs]
        kinds = {behind.DATA, behind.SHADES, behind.PICTURES}
        assert heads and set(heads) <= kinds, path.name
        page = (HTML / "chapters" / f"{path.stem}.html").read_text(encoding="utf-8")
        folded = page.count('<details class="behind">')
        assert folded == len(heads) - heads.count(behind.PICTURES), path.name


@pytest.mark.book
def test_the_definition_of_a_term_is_the_main_entry_of_its_words():
    """Sphinx puts it before any page that merely says them."""
    text = (HTML / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").rstrip(");\n"))
    ((page, id, main),) = index["indexentries"]["captured energy"]
    assert (index["docnames"][page], id, main) == ("glossary", "term-captured-energy", True)


@pytest.mark.book
def test_a_chapter_can_be_downloaded_as_it_was_executed():
    for path in sorted((ROOT / "book" / "chapters").glob("[0-9][0-9]_*.ipynb")):
        given = HTML / "_sources" / "chapters" / path.name
        assert given.read_bytes() == path.read_bytes()
        page = (HTML / "chapters" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert f'href="../_sources/chapters/{path.name}"' in page


@pytest.mark.book
def test_links_have_previews_of_terms_citations_and_pages():
    page = (HTML / "chapters" / "01_programme.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"_static/tippy/chapters/01_programme\.[\w-]+\.js", page)
    text = (HTML / script).read_text(encoding="utf-8").splitlines()[0]
    previews = json.loads(text.removeprefix("selector_to_html = "))
    for part in ("glossary.html#term-", "bibliography.html#", "02_bases.html"):
        told = [html for selector, html in previews.items() if part in selector]
        assert told and all(BeautifulSoup(html, "html.parser").text.strip() for html in told)


def test_where_one_page_has_changed_all_are_built(extensions):
    import excerpts

    environment = SimpleNamespace(found_docs={"b", "a"})
    outdated = excerpts.all_or_none
    assert outdated(None, environment, set(), {"a"}, set()) == ["a", "b"]
    assert outdated(None, environment, set(), set(), set()) == []
