"""The built book: every chapter there, executed without error, readable with no network, its
numbers from records.

`make test` runs the notebooks and builds the pages once, before these tests look at them.
"""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import yaml
from PIL import Image

from qpmerge_lite.companion.book import expected, run
from qpmerge_lite.companion.book.claims import load_claims

ROOT = Path(__file__).parents[1]
BOOK, HTML = ROOT / "book", ROOT / "book" / "_build" / "html"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
of_the_built_book = pytest.mark.book
every_chapter = pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])


def toc():
    parts = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    return [entry["file"] for part in parts for entry in part["chapters"]]


def chapter(name):
    return json.loads((BOOK / "chapters" / f"{name}.ipynb").read_text(encoding="utf-8"))


def pages():
    found = sorted(path for path in HTML.rglob("*.html") if "_static" not in path.parts)
    assert found, "no pages: run `make book` first"
    return {path.relative_to(HTML).as_posix(): path.read_text(encoding="utf-8") for path in found}


def test_the_contents_list_exactly_the_notebooks():
    assert [entry for entry in toc() if entry.startswith("chapters/")] == [
        f"chapters/{path.stem}" for path in NOTEBOOKS
    ]


def test_a_figure_of_a_chapter_has_few_colours_and_looks_the_same():
    """A gradient of ten thousand colours, each of which may come out a little different."""
    steps = np.linspace(0, 255, 100)
    drawn = np.stack(np.broadcast_arrays(steps, steps[:, None], 128), axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(drawn).save(file, "PNG")
    smaller = base64.b64decode(run._with_a_palette(base64.b64encode(file.getvalue()).decode()))
    with Image.open(io.BytesIO(smaller)) as picture:
        assert picture.mode == "P" and len(picture.getcolors()) > 128
        differences = np.asarray(picture.convert("RGB")).astype(int) - drawn
    assert 0 < np.abs(differences).max() <= 16


@of_the_built_book
def test_the_pages_take_25_megabytes_at_most():
    """Not counting figures that an earlier build has left."""
    shown = set(re.findall(r"_images/([\w.-]+)", "".join(pages().values())))
    files = [path for path in HTML.rglob("*") if path.is_file()]
    files = [path for path in files if path.parent.name != "_images" or path.name in shown]
    assert sum(path.stat().st_size for path in files) <= 25e6


@of_the_built_book
def test_every_page_of_the_contents_was_built():
    assert {f"{entry}.html" for entry in toc()} | {"index.html", "intro.html"} <= set(pages())


@of_the_built_book
@every_chapter
def test_a_chapter_was_executed_from_the_present_sources(name):
    stamp = chapter(name)["metadata"]["qpmerge"]
    assert stamp["fingerprint"] == run.fingerprint(
        ROOT / "notebooks" / f"{name}.ipynb", stamp["parameters"]
    )
    assert stamp["parameters"] == {}, "executed with other parameters than its own: run `make book`"


@of_the_built_book
@every_chapter
def test_a_chapter_has_no_error_and_no_warning(name):
    outputs = [output for cell in chapter(name)["cells"] for output in cell.get("outputs", [])]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    stderr = ["".join(output["text"]) for output in outputs if output.get("name") == "stderr"]
    assert [text for text in stderr if "Warning" in text] == []


@of_the_built_book
@every_chapter
def test_a_chapter_shows_what_it_computed(name):
    cells = chapter(name)["cells"]
    assert any(
        "image/png" in output.get("data", {})
        for cell in cells
        for output in cell.get("outputs", [])
    )
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")


@of_the_built_book
def test_the_pages_need_no_network():
    """No script, style, image, frame or font comes from elsewhere; what npm gives may where there
    was no npm to install it."""
    allowed = set() if (BOOK / "_scripts").is_dir() else {"cdn.jsdelivr.net/npm"}
    loads = r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=[\"'](?:https?:)?//[^\"']+"
    for name, html in pages().items():
        assert [
            tag for tag in re.findall(loads, html) if not any(word in tag for word in allowed)
        ] == [], name
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", html), name
    for style in HTML.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", style.read_text(encoding="utf-8"), flags=re.S)
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", text), style.name


@of_the_built_book
def test_the_pages_and_the_notebooks_to_download_name_no_machine():
    downloads = {
        path.name: path.read_text(encoding="utf-8") for path in (HTML / "_sources").rglob("*.ipynb")
    }
    assert len(downloads) == len(NOTEBOOKS)
    for name, text in (pages() | downloads).items():
        assert not re.search(
            rf"{re.escape(str(ROOT))}\b|(?<![\w.])/(?:home|root|tmp|Users)/|site-packages", text
        ), name


@of_the_built_book
def test_the_pages_show_no_markup():
    """No raw role, directive, citation or docutils message reaches the reader."""
    for name, html in pages().items():
        visible = re.sub(r"<(script|style|pre)\b.*?</\1>", "", html, flags=re.S)
        assert not re.search(
            r"\{(res|verdict|cite\S*|doc|ref|eq|claims(-picture)?|questions|tiers)\}"
            r"|class=\"system-message|np\.float64\(",
            visible,
        ), name


@of_the_built_book
def test_there_is_one_search_box():
    assert all(
        len(re.findall(r"class=\"[^\"]*\bsearch-button-field\b", html)) <= 1
        for html in pages().values()
    )


@of_the_built_book
def test_measured_numbers_say_where_they_come_from():
    for name, html in pages().items():
        for title in re.findall(r"<abbr class=\"record\" title=\"([^\"]*)\"", html):
            tier = re.match(r"[a-z0-9_.]+ · .*tier (?:smoke|full|standard|paper)(-\w+)?", title)
            assert tier and (
                tier[1] is None or (BOOK / "recorded" / f"standard{tier[1]}").is_dir()
            ), (
                name,
                title,
            )
    assert any('<abbr class="record"' in html for html in pages().values())


ASKED_FOR = re.compile(r'(?:src|href)="([^"#?]+\.(?:js|css|png|svg))[?"]')


@of_the_built_book
def test_pages_are_light_but_for_what_draws_formulae_and_figures():
    """Each with all that it asks for, besides MathJax and Bokeh: in bytes."""
    weights = {}
    for name, html in pages().items():
        page = HTML / name
        files = {(page.parent / unquote(asked)).resolve() for asked in ASKED_FOR.findall(html)}
        own = {file for file in files if not {"mathjax", "bokeh"} & set(file.parts)}
        weights[name] = sum(file.stat().st_size for file in {page, *own} if file.is_file())
    assert {name: weight for name, weight in weights.items() if weight > 1_500_000} == {}


@of_the_built_book
def test_the_first_page_draws_every_claim_of_others_and_leads_to_its_rule():
    built = pages()
    wanted = [c.id for c in load_claims(BOOK / "claims.yml") if c.source != "ours"]
    drawn = re.findall(r"<a href=\"claims\.html#([\w-]+)\" aria-describedby", built["intro.html"])
    assert sorted(drawn) == sorted(re.sub(r"[._]", "-", f"claim-{id}") for id in wanted)
    for id in drawn:
        assert f'id="{id}"' in built["claims.html"], id
    assert len(re.findall(r"<script[^>]* src=\"_static/claims\.js", built["claims.html"])) == 1


@of_the_built_book
def test_the_records_agree_with_the_expected_ones():
    assert expected.compare("smoke", ROOT) == []


class Anchors(HTMLParser):
    """What a page can be pointed at, and what it points to."""

    def __init__(self, page):
        super().__init__()
        self.ids, self.links = {"", "top"}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])


@of_the_built_book
def test_every_link_within_the_book_leads_somewhere():
    """To a page or file that is there, and to a place that it has."""
    anchors = {name: Anchors(page) for name, page in pages().items()}
    broken = []
    for name, page in anchors.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path)))
            target = name if not parts.path else target
            known = anchors[target].ids if target in anchors else None
            if known is None and not (HTML / target).is_file():
                broken.append((name, link))
            elif known is not None and unquote(parts.fragment) not in known:
                broken.append((name, link))
    assert broken == []


@of_the_built_book
def test_what_folds_has_one_name():
    """The words that it shows, not others beside them."""
    assert [name for name, html in pages().items() if "<summary aria-label" in html] == []


@of_the_built_book
def test_the_pages_load_the_scripts_that_they_use_and_each_once():
    for name, html in pages().items():
        scripts = re.findall(r"<script\b[^>]*\bsrc=\"([^\"?]+)", html)
        assert len(scripts) == len(set(scripts)), name
        assert not any("/mathjax/input/" in script for script in scripts), name


@of_the_built_book
def test_the_pages_are_no_more_than_a_reader_would_load():
    """Without the notebooks to download."""
    files = [path for path in HTML.rglob("*") if path.is_file() and "_sources" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
