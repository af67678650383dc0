"""The book as PDF: what is done to the page before it is printed, and what is said where it cannot
be."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from qpmerge_lite.companion.book import pdf
from qpmerge_lite.errors import MergeError

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
PAGE = (
    '<!DOCTYPE html><html lang="en" data-content_root="./"><head><title>t</title></head><body>'
    '<div id="jb-print-docs-body"><h1>t</h1></div><article><h1>First</h1>'
    '<a href="intro.html#b">to b</a><a href="https://example.org/x">away</a><details><summary>s</summary>hidden</details>'
    '<h1 id="b">Second</h1></article></body></html>'
)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the one page that Sphinx would have made."""
    shutil.copy(ROOT / "CITATION.cff", tmp_path)
    single = tmp_path / "book" / "_build" / "singlehtml"
    single.mkdir(parents=True)
    (single / "intro.html").write_text(PAGE, encoding="utf-8")
    return tmp_path


def test_the_first_sheet_names_book_paper_and_version():
    cover = pdf.title_page(CITATION)
    paper = CITATION["preferred-citation"]
    for said in (paper["title"], paper["url"], "Stephen Roberts", f"Version {CITATION['version']}"):
        assert said in cover


def test_what_folds_is_open_and_links_stay_in_the_document():
    page = pdf.printable(PAGE, "<p>cover</p>")
    assert '<body><p>cover</p><div id="jb-print-docs-body">' in page
    assert "<details open>" in page and 'href="#b"' in page and "example.org/x" in page


def test_frames_are_as_high_as_what_is_in_them():
    frame = '<iframe title="t" sandbox style="height: 800px" srcdoc="x"></iframe></body>'
    page = pdf.printable(PAGE.replace("</body>", frame), "")
    assert '<iframe title="t" sandbox="allow-same-origin" style="height: 800px"' in page
    assert page.count(pdf.WHOLE_FRAMES) == 1


def test_code_in_the_colour_of_text_has_no_elements_of_its_own():
    code = '<span class="k">for</span><span class="w"> </span><span class="n">x</span>'
    assert '<span class="k">for</span> x' in pdf.printable(PAGE + code, "")


def test_without_chromium_it_is_said_what_to_install(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    with pytest.raises(MergeError, match="no Chromium: looked on PATH for chromium.*apt-get"):
        pdf.write(checkout)
    assert not (checkout / "book" / "_build" / "book.pdf").exists()


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A stand-in for Chromium on PATH, of a given script."""

    def put(script):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "chromium").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "chromium").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return put


def test_without_the_page_it_is_said_how_to_make_it(checkout, program):
    program("exit 0")
    shutil.rmtree(checkout / "book" / "_build" / "singlehtml")
    with pytest.raises(MergeError, match="no book/_build/singlehtml/intro.html: run `make pdf`"):
        pdf.write(checkout)


def test_a_browser_that_fails_is_quoted(checkout, program):
    program("echo out of paper >&2; exit 3")
    with pytest.raises(MergeError, match="wrote no PDF:\nout of paper"):
        pdf.write(checkout)


def test_a_file_that_is_too_large_is_refused(checkout, program, monkeypatch):
    program(f"printf 12345 > {checkout}/book/_build/book.pdf")
    monkeypatch.setattr(pdf, "LARGEST", 4)
    with pytest.raises(MergeError, match="book.pdf: expected at most 4 bytes, found 5"):
        pdf.write(checkout)


def test_a_real_browser_prints_it(checkout):
    try:
        pdf.chromium()
    except MergeError as error:
        pytest.skip(str(error))
    target = pdf.write(checkout)
    assert target.read_bytes().startswith(b"%PDF")
    if shutil.which("pdftotext"):
        done = subprocess.run(
            ["pdftotext", target, "-"], capture_output=True, text=True, check=True
        )
        assert all(word in done.stdout for word in ("executable companion", "hidden", "Second"))
