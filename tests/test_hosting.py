"""Addresses that the build is told: buttons, links and the citation are right wherever the book is
hosted, and not there where its address is not known."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parents[1]
EXTENSIONS = ROOT / "book" / "_ext"
CONF = f"""
import sys
sys.path.insert(0, {str(EXTENSIONS)!r})
extensions = ["myst_nb", "hosting"]
html_theme, root_doc, nb_execution_mode = "sphinx_book_theme", "index", "off"
myst_enable_extensions = ["colon_fence"]
"""
CHAPTER = {
    "cells": [{"cell_type": "markdown", "metadata": {}, "source": "# A chapter"}],
    "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    "nbformat": 4,
    "nbformat_minor": 4,
}
INDEX = "# Page\n\n```{toctree}\nelsewhere\nchapters/01_a\n```\n"
HOSTED = {
    "QPMERGE_REPOSITORY": "https://github.com/some-one/a.book",
    "QPMERGE_BOOK_URL": "https://some-one.github.io/a.book/",
}
BUTTONS = {
    "https://github.com/some-one/a.book",
    "https://github.com/some-one/a.book/edit/main/notebooks/01_a.ipynb",
    "https://mybinder.org/v2/gh/some-one/a.book/main?urlpath=lab/tree/notebooks/01_a.ipynb",
    "https://colab.research.google.com/github/some-one/a.book/blob/main/notebooks/01_a.ipynb",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A function that builds a tiny book with the book's own page, told some addresses: name of a
    page -> HTML."""

    def build(**addresses):
        folder = tmp_path_factory.mktemp("hosted")
        book = folder / "book"
        (book / "chapters").mkdir(parents=True)
        for name in ("CITATION.cff", "THIRD_PARTY.md"):
            shutil.copy(ROOT / name, folder)
        shutil.copy(ROOT / "book" / "elsewhere.md", book)
        (book / "conf.py").write_text(CONF)
        (book / "index.md").write_text(INDEX)
        (book / "chapters" / "01_a.ipynb").write_text(json.dumps(CHAPTER))
        own = {n: v for n, v in os.environ.items() if not n.startswith("QPMERGE_")}
        command = [sys.executable, "-m", "sphinx", "-q", "-W", str(book), str(folder / "out")]
        done = subprocess.run(command, capture_output=True, text=True, env=own | addresses)
        assert (done.returncode, done.stderr) == (0, "")
        pages = {"chapter": "chapters/01_a.html", "elsewhere": "elsewhere.html"}
        return {name: (folder / "out" / path).read_text("utf-8") for name, path in pages.items()}

    return build


@pytest.fixture(scope="module")
def hosted(built):
    return built(**HOSTED)


@pytest.fixture(scope="module")
def unhosted(built):
    return built()


def links(page):
    return set(re.findall(r'href="(https?://[^"]+)"', page))


def test_the_buttons_of_a_chapter_open_its_notebook(hosted):
    buttons = {link for link in links(hosted["chapter"]) if "some-one/a.book" in link}
    assert buttons == BUTTONS
    assert "How to begin there" in hosted["chapter"]


def test_a_page_is_edited_where_it_lies(hosted):
    edit = "https://github.com/some-one/a.book/edit/main/book/elsewhere.md"
    assert edit in links(hosted["elsewhere"])
    assert not any("colab" in link or "binder" in link for link in links(hosted["elsewhere"]))


def test_another_branch_or_tag_is_the_one_that_is_opened(built):
    chapter = built(**HOSTED, QPMERGE_REF="v1.0.0")["chapter"]
    opened = {link for link in links(chapter) if "some-one/a.book/" in link}
    assert opened == {button.replace("/main", "/v1.0.0") for button in BUTTONS if "main" in button}


def test_the_pdf_is_linked_where_the_book_is_published(hosted, unhosted):
    assert f"{HOSTED['QPMERGE_BOOK_URL']}book.pdf" in links(hosted["elsewhere"])
    assert "book.pdf</a>" not in unhosted["elsewhere"]


def test_pages_know_their_own_address(hosted, unhosted):
    canonical = '<link rel="canonical" href="https://some-one.github.io/a.book/chapters/01_a.html"'
    assert canonical in hosted["chapter"] and 'rel="canonical"' not in unhosted["chapter"]


def test_commands_name_the_repository(hosted, unhosted):
    assert "git clone -q https://github.com/some-one/a.book qpmerge" in hosted["elsewhere"]
    assert "ADDRESS" not in hosted["elsewhere"]
    assert "git clone -q ADDRESS_OF_THIS_REPOSITORY qpmerge" in unhosted["elsewhere"]


def test_without_an_address_there_is_no_button(unhosted):
    theirs = re.compile("github.com/.*/edit|mybinder|colab|source-repository|How to begin there")
    assert not any(theirs.search(link) for page in unhosted.values() for link in links(page))
    assert not theirs.search(unhosted["chapter"])


def test_the_citation_has_paper_and_software(hosted, unhosted):
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    text = re.sub(r"<[^>]+>", "", hosted["elsewhere"])
    assert f"version = {{{content['version']}}}" in text
    assert "doi = {10.48550/arXiv.2605.29101}" in text and "Evans, Bethan and " in text
    assert "url = {https://github.com/some-one/a.book}" in text
    assert "url = {https://github.com" not in re.sub(r"<[^>]+>", "", unhosted["elsewhere"])


@pytest.fixture
def hosting(monkeypatch):
    monkeypatch.syspath_prepend(str(EXTENSIONS))
    import hosting

    return hosting


@pytest.mark.parametrize("found", [
    "github.com/a/b", "https://github.com/a", "https://github.com/a/b/tree/main",
    "https://github.com/a/b.git", "https://elsewhere.org/a/b", "git@github.com:a/b",
    'https://github.com/a/b"onclick="',
])  # fmt: skip
def test_an_address_that_is_none_is_refused(hosting, monkeypatch, found):
    monkeypatch.setenv("QPMERGE_REPOSITORY", found)
    config = SimpleNamespace(html_theme_options={})
    with pytest.raises(hosting.ConfigError) as refused:
        hosting.configure(SimpleNamespace(), config)
    assert str(refused.value) == (
        "QPMERGE_REPOSITORY: expected an address like https://github.com/OWNER/NAME, "
        f"found {found!r}"
    )


def test_the_address_of_the_pages_is_held_to_its_form_too(hosting, monkeypatch):
    monkeypatch.setenv("QPMERGE_BOOK_URL", "some-one.github.io")
    with pytest.raises(hosting.ConfigError, match="QPMERGE_BOOK_URL: expected an address like"):
        hosting.configure(SimpleNamespace(), SimpleNamespace(html_theme_options={}))
