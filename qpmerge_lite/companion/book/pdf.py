"""The whole book as one PDF: the pages that Sphinx put into one, printed by an installed Chromium.

``make pdf`` builds that page first. How it looks on paper, the style sheet says under ``@media
print``.
"""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from ...errors import MergeError
from ..paths import HOME

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LARGEST = 20_000_000  # bytes
PLAIN = re.compile(r'<span class="(?:n|nn|p|w)">([^<]*)</span>')  # code in the colour of text
CONTENTS = '<div id="jb-print-docs-body"'  # what the theme prints first
PATIENCE = 600  # seconds that Chromium may take
# Frames scroll on a screen; on paper they are as high as what is in them, which is smaller so that
# its tables fit.
WHOLE_FRAMES = """<script>
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const inside = frame.contentDocument.documentElement;
    inside.style.zoom = 0.6;
    frame.style.height = `${inside.getBoundingClientRect().height + 40}px`;
  }
});
</script>"""


def chromium() -> str:
    """Path of Chromium or Chrome. Raises: MergeError where there is none, with what to install."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise MergeError(
            f"no Chromium: looked on PATH for {', '.join(NAMES)}; install one of them, for example "
            "with: apt-get install chromium"
        )
    return found


def rights() -> list[str]:
    """Options of Chromium that hang on who starts it: it has no sandbox for root."""
    return ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []


def write(root: Path = HOME) -> Path:
    """Print ``book/_build/singlehtml`` of a checkout to ``book/_build/book.pdf``.

    Raises: MergeError without that page, without Chromium, or where the file is too large.
    """
    built = root / "book" / "_build"
    target, program = built / "book.pdf", chromium()
    page = built / "singlehtml" / "intro.html"
    if not page.is_file():
        raise MergeError(f"no {page.relative_to(root)}: run `make pdf`, which builds it first")
    whole = page.with_name("book.html")
    cover = title_page(yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8")))
    whole.write_text(printable(page.read_text(encoding="utf-8"), cover), encoding="utf-8")
    target.unlink(missing_ok=True)
    _print(program, whole, target)
    size = target.stat().st_size
    if size > LARGEST:
        raise MergeError(f"{target.name}: expected at most {LARGEST} bytes, found {size}")
    return target


def title_page(citation: dict) -> str:
    """What stands on the first sheet, from ``CITATION.cff``."""
    paper = citation["preferred-citation"]
    people = [f"{person['given-names']} {person['family-names']}" for person in paper["authors"]]
    lines = [
        f"<h1>{html.escape(paper['title'])}</h1>",
        "<p>An executable companion</p>",
        f"<p>{html.escape(', '.join(person['name'] for person in citation['authors']))}</p>",
        f"<p>Version {citation['version']}, {citation['date-released']}</p>",
        f'<p class="paper">On the paper by {html.escape(", ".join(people))}: '
        f'<a href="{paper["url"]}">{html.escape(paper["url"])}</a></p>',
    ]
    return f'<section class="title-page">{"".join(lines)}</section>'


def printable(page: str, cover: str) -> str:
    """A page with its cover, everything that folds unfolded, frames whole, links to places in it
    that stay in it, and no element that only costs: a PDF for screen readers keeps every one."""
    page = PLAIN.sub(r"\1", page)
    page = re.sub(r'(href=")(?:intro|index)\.html(#)', r"\1\2", page)
    page = page.replace("<details", "<details open")
    # what runs nothing may be looked into
    page = page.replace(" sandbox style=", ' sandbox="allow-same-origin" style=')
    page = page.replace("</body>", f"{WHOLE_FRAMES}</body>")
    before, found, after = page.partition(CONTENTS)
    if not found:
        raise MergeError(f"the page to print has no {CONTENTS}> to put the cover before")
    return before + cover + found + after


def _print(program: str, page: Path, target: Path) -> None:
    """Have Chromium write the PDF, once the formulae are drawn."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program, *rights(), "--headless", "--disable-gpu", f"--user-data-dir={profile}",
            "--no-pdf-header-footer", "--generate-pdf-document-outline",
            f"--virtual-time-budget={PATIENCE * 1000}", f"--timeout={PATIENCE * 1000}",
            f"--print-to-pdf={target}", page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
    if done.returncode or not target.is_file():
        raise MergeError(f"{program} wrote no PDF:\n{done.stderr[-2000:]}")


def main() -> int:
    """Print the book of this checkout, or say in one line why not."""
    try:
        target = write()
    except MergeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{target.relative_to(HOME)}: {target.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
