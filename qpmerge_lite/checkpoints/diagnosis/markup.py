"""A page as a tree of HTML, and the few things that a page is made of; names are text in it,
whatever they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from .summary import printable

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --page: #ffffff; --bar: #3b6ea5; --grid: #d0d0d0;
  --quiet: #555555; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --page: #16181b; --bar: #7fb0e6;
  --grid: #3d4146; --quiet: #a8a8a8; } }
@media print { :root { --ink: #000000; --page: #ffffff; --bar: #777777; --grid: #cccccc;
  --quiet: #333333; } tr, svg { break-inside: avoid; } .scroll { overflow: visible; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); padding-bottom: .4rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
td.number, th.number { text-align: right; } td.number { white-space: nowrap; }
th { overflow-wrap: break-word; max-width: 18rem; }
code, pre { font: .85rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; border: 1px solid var(--grid); padding: .7rem; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin-left: 1.2rem; }
svg { display: block; max-width: 100%; height: auto; margin: 1rem 0; }
svg .word { fill: var(--ink); } svg .bar { fill: var(--bar); }
svg .ink { stroke: var(--ink); stroke-width: 1.5; } svg .grid { stroke: var(--grid); }
.quiet { color: var(--quiet); }
"""


def empty_page(title: str) -> tuple[Element, Element]:
    """A page, and its part that is to be filled."""
    page = Element("html", {"lang": "en"})
    head, body = SubElement(page, "head"), SubElement(page, "body")
    SubElement(head, "meta", {"charset": "utf-8"})
    settings = {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    SubElement(head, "meta", settings)
    say(head, "title", title)
    SubElement(head, "style").text = STYLE
    return page, SubElement(body, "main")


def written(page: Element) -> str:
    """The page, as HTML."""
    return "<!DOCTYPE html>\n" + tostring(page, encoding="unicode", method="html") + "\n"


def say(parent: Element, tag: str, words: str, **attributes: str) -> Element:
    """An element of words alone."""
    made = SubElement(parent, tag, attributes)
    made.text = printable(words)
    return made


def add_section(parent: Element, title: str) -> Element:
    """A part of the page with a heading."""
    section = SubElement(parent, "section")
    say(section, "h2", title)
    return section


def add_table(
    parent: Element, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: int
) -> None:
    """A table whose first column names its rows.

    Args:
        words: how many columns, the first ones, are no numbers.
    """
    region = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": caption}
    frame = SubElement(parent, "div", region)
    table = SubElement(frame, "table")
    say(table, "caption", caption)
    line = SubElement(SubElement(table, "thead"), "tr")
    for column, title in enumerate(head):
        say(line, "th", title, scope="col", **_kind(column, words))
    body = SubElement(table, "tbody")
    for row in rows:
        line = SubElement(body, "tr")
        say(line, "th", row[0], scope="row", **_kind(0, words))
        for column, cell in enumerate(row[1:], start=1):
            say(line, "td", cell, **_kind(column, words))


def _kind(column: int, words: int) -> dict[str, str]:
    return {} if column < words else {"class": "number"}


def add_terms(parent: Element, meanings: Mapping[str, str], titles: Mapping[str, str]) -> None:
    """What every number means."""
    terms = SubElement(parent, "dl")
    for name, meaning in meanings.items():
        say(terms, "dt", titles[name])
        say(terms, "dd", f"{meaning}.")


def add_names(section: Element, words: str, names: Sequence[str]) -> None:
    """A list of names that is shown when it is asked for."""
    details = SubElement(section, "details")
    say(details, "summary", f"{words} ({len(names)})")
    say(SubElement(details, "p"), "code", ", ".join(names))
