"""The page of a diagnosis: one file of HTML that needs no other, and runs nothing.

It is built as a tree and then written, so that names out of files are text, whatever they hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

from ..deltas.reading import behind
from ..findings import Refused
from ..output import new_file
from . import svg
from .markup import add_names, add_section, add_table, add_terms, empty_page, say, written
from .summary import (
    INTERVAL,
    LAYER_MEANINGS,
    MEANINGS,
    NONE,
    NOTHING_TO_CAPTURE,
    TITLES,
    certificate,
    compared,
    number,
    parts_of,
    printable,
    shown_columns,
    told,
)

ENDINGS = (".html", ".htm")
LOWEST, HIGHEST = -1.0, 1.0  # energies and gaps beyond are drawn here
BINS = 20  # columns of a histogram
PARTS = {
    "captured": "How near the merge is to every expert",
    "perplexity_of_merged": "How well it predicts the texts of every expert",
}
COMPARED = "Compared are outputs at every token without padding, or one for a text."


def check_report(path: Path, inputs: Sequence[Path]) -> None:
    """Refused for a report that is no page, has no folder to be in, or lies in an input."""
    where = f"--report {path}"
    if path.suffix.lower() not in ENDINGS:
        cure = "name it so, as report.html"
        raise Refused(where, "a name that ends in .html", repr(path.name), cure)
    if path.is_dir() or path.is_symlink():
        cure = "choose another name"
        raise Refused(where, "a file to write", "a folder or a link", cure)
    if not path.absolute().parent.is_dir():
        cure = "make that folder first"
        raise Refused(where, f"a folder {path.absolute().parent} to be in", "none", cure)
    for place in inputs:
        folder = behind(place) or place
        if path.resolve().is_relative_to(folder.resolve()):
            cure = "choose a place outside"
            raise Refused(where, "a place of its own", f"one in {folder}, which is an input", cure)


def write_page(path: Path, diagnosis: Mapping) -> None:
    """Write the page, all of it or nothing; a page of that name is replaced.

    Raises: Refused where it cannot be written.
    """
    with new_file(path, "page", "--report") as made:
        (made / "page").write_text(as_page(diagnosis), encoding="utf-8")


def as_page(diagnosis: Mapping) -> str:
    """The page, as HTML."""
    title = f"What the merge “{_folder(diagnosis, 0)}” does to experts of “{_folder(diagnosis, 1)}”"
    page, main = empty_page(title)
    say(main, "h1", title)
    say(main, "p", f"On unlabelled texts of every expert's task; {compared(diagnosis)}.")
    _warnings(main, diagnosis["warnings"])
    _experts(main, diagnosis)
    _texts(main, diagnosis)
    _layers(main, diagnosis)
    _entries(main, diagnosis)
    _origin(main, diagnosis)
    return written(page)


def _folder(diagnosis: Mapping, place: int) -> str:
    return printable(diagnosis["inputs"][place]["folder"])


def _warnings(main: Element, warnings: Sequence[Mapping]) -> None:
    if not warnings:
        return
    section = add_section(main, "Warnings")
    items = SubElement(section, "ul")
    for warning in warnings:
        place, cure = warning["where"], warning["cure"]
        said = f"expected {warning['expected']}, found {warning['found']}; {cure}"
        say(items, "li", f"{place}: {said}.")


def _experts(main: Element, diagnosis: Mapping) -> None:
    """The summary: a table, and captured energies as bars."""
    section = add_section(main, "Every expert")
    names = shown_columns(diagnosis)
    for part in parts_of(names):
        rows = []
        for expert, own in diagnosis["experts"].items():
            counts = [str(len(own["texts"])), str(own["positions"])]
            rows.append([expert, *counts, *(told(own[name]) for name in part)])
        head = ["expert", "texts", "compared", *(TITLES[name] for name in part)]
        caption = f"{PARTS[part[0]]}; {INTERVAL}."
        add_table(section, caption, head, rows, 1)
    meanings = MEANINGS[diagnosis["compared"]["kind"]]
    say(section, "p", COMPARED)
    add_terms(section, {name: meanings[name] for name in names}, TITLES)
    if any(own["captured"] is None for own in diagnosis["experts"].values()):
        say(section, "p", f"{NOTHING_TO_CAPTURE[0].upper()}{NOTHING_TO_CAPTURE[1:]}.")
    drawn = [_bar(name, own["captured"]) for name, own in diagnosis["experts"].items()]
    reached = [bar.value for bar in drawn if bar.value is not None]
    low = LOWEST if reached and min(reached) < 0 else 0.0
    title = "Captured, by expert"
    description = "; ".join(f"{bar.name}: {bar.label}" for bar in drawn)
    section.append(svg.bars("captured", title, description, drawn, low))
    words = "Captured: the base is at 0, the expert at 1; the thin lines are the intervals."
    say(section, "p", words, **{"class": "quiet"})


def _bar(expert: str, estimate: Mapping | None) -> svg.Bar:
    name = printable(expert)
    if estimate is None:
        return svg.Bar(name, None, label=NONE)
    return svg.Bar(name, estimate["value"], estimate["low"], estimate["high"], told(estimate))


def _texts(main: Element, diagnosis: Mapping) -> None:
    """How the texts of every expert spread."""
    predicts = diagnosis["compared"]["kind"] == "predictions"
    what, low = ("agreement", 0.0) if predicts else ("captured energy", LOWEST)
    section = add_section(main, "Text by text")
    panels, told_of = [], []
    for expert, own in diagnosis["experts"].items():
        values = [_of_text(text, predicts) for text in own["texts"]]
        known = [value for value in values if value is not None]
        counts = histogram(known, low)
        width = (1 - low) / BINS
        labels = []
        for place, count in enumerate(counts):
            start = low + place * width
            labels.append(f"{count} texts from {start:.2f} to {start + width:.2f}")
        name = printable(expert)
        panels.append(svg.Panel(name, [float(count) for count in counts], labels))
        middle = sorted(known)[len(known) // 2] if known else None
        told_of.append(f"{name}: {len(known)} texts, median {number(middle)}")
    highest = max((value or 0.0) for panel in panels for value in panel.values)
    title = f"Texts by {what}"
    chart = svg.columns(
        "texts",
        title,
        "; ".join(told_of),
        panels,
        low=0.0,
        high=max(highest, 1.0),
        below=(f"{what} {low:g}" + ("" if predicts else " or less"), "1"),
    )
    words = f"How many texts have which {what}: to the left those that changed most."
    say(section, "p", words)
    section.append(chart)


def _of_text(text: Mapping, predicts: bool) -> float | None:
    """Agreement, or captured energy, of one text; None where there is nothing to capture."""
    if predicts:
        return text["equal"]["merged"] / text["positions"]
    return 1 - text["lost"] / text["energy"] if text["energy"] else None


def histogram(values: Sequence[float], low: float) -> list[int]:
    """How many values there are in each of ``BINS`` equal parts of ``low`` to one; what is below is
    in the first of them."""
    counts = [0] * BINS
    for value in values:
        place = int((value - low) / (1 - low) * BINS)
        counts[min(max(place, 0), BINS - 1)] += 1
    return counts


def _layers(main: Element, diagnosis: Mapping) -> None:
    """Energies and certificates of layers: charts, and a table of all."""
    rows = diagnosis["layers"]
    section = add_section(main, "Every layer")
    if not rows:
        say(section, "p", "There is no layer that a merge can solve.")
        return
    titles = {"energy": "energy", "captured": "all experts", "gap": "gap"}
    add_terms(section, LAYER_MEANINGS, titles)
    experts = list(diagnosis["experts"])
    panels = []
    for expert in experts:
        panels.append(_panel(printable(expert), rows, [row["energy"][expert] for row in rows]))
    _layer_chart(section, "energies", "Energy of every layer, by expert", panels)
    gaps = _panel("gap", rows, [certificate(row, "gap") for row in rows])
    _layer_chart(section, "gaps", "What is left to gain in every layer", [gaps])
    table = []
    for place, row in enumerate(rows, start=1):
        energies = [number(row["energy"][expert]) for expert in experts]
        certified = [number(certificate(row, name)) for name in ("captured", "gap")]
        table.append([str(place), row["layer"], *energies, *certified])
    head = ["#", "layer", *experts, "all experts", "gap"]
    add_table(section, "Energies of layers in forward order, and certificates.", head, table, 2)


def _panel(name: str, rows: Sequence[Mapping], values: Sequence[float | None]) -> svg.Panel:
    labels = []
    for place, (row, value) in enumerate(zip(rows, values, strict=True), start=1):
        labels.append(f"{place}, {printable(row['layer'])}: {number(value)}")
    return svg.Panel(name, values, labels)


def _layer_chart(section: Element, key: str, title: str, panels: Sequence[svg.Panel]) -> None:
    """Columns for layers, with words for who does not see them."""
    values, told_of = [], []
    for panel in panels:
        known = [value for value in panel.values if value is not None]
        values += known
        if known:
            ends = f"from {number(min(known))} to {number(max(known))}"
            told_of.append(f"{panel.name}: {ends}")
    low = max(min([0.0, *values]), LOWEST)
    below = ("layer 1", f"layer {len(panels[0].values)}")
    words = "; ".join(told_of)
    drawn = svg.columns(key, title, words, panels, low=low, high=HIGHEST, below=below)
    say(section, "h3", title)
    section.append(drawn)
    if values and not low <= min(values) <= max(values) <= HIGHEST:
        say(section, "p", "A cross marks what lies beyond the scale.")


def _entries(main: Element, diagnosis: Mapping) -> None:
    """Tensors in no layer, with reasons, and untouched ones."""
    if not diagnosis["left_out"] and not diagnosis["untouched"]:
        return
    section = add_section(main, "Tensors that no layer tells of, or that are the base's")
    for reason, names in diagnosis["left_out"].items():
        add_names(section, f"In no layer: {reason}", names)
    if diagnosis["untouched"]:
        words = "Untouched: the base's, though an expert has others"
        add_names(section, words, diagnosis["untouched"])


def _origin(main: Element, diagnosis: Mapping) -> None:
    """How the merge was made, as it says itself, and hashes of everything that was read."""
    section = add_section(main, "How the merge was made")
    recipe = diagnosis["recipe"]
    if recipe is None:
        say(section, "p", "Its folder has no merge.json that says so.")
    else:
        method = f"{recipe.get('method')}, with options {recipe.get('options')}"
        say(section, "p", f"By its merge.json: {method}.")
        details = SubElement(section, "details")
        say(details, "summary", "All that merge.json says")
        lines = json.dumps(recipe, indent=1, ensure_ascii=False).split("\n")
        SubElement(details, "pre").text = "\n".join(printable(line) for line in lines)
    section = add_section(main, "What was read")
    rows = []
    for source in diagnosis["inputs"]:
        for file, digest in source["files"].items():
            rows.append([source["name"], source["folder"], file, digest])
    for name, given in diagnosis["calibration"].items():
        rows.append([name, "calibration", given["file"], given["sha256"]])
    head = ["input", "folder", "file", "SHA-256"]
    add_table(section, "Files and their hashes.", head, rows, 4)
    made = ", ".join(f"{name} {version}" for name, version in diagnosis["versions"].items())
    first = next(iter(diagnosis["calibration"].values()))
    limits = f"texts of at most {first['max_length']} tokens, {first['batch_size']} a forward"
    say(section, "p", f"Computed with {made}; {limits}.", **{"class": "quiet"})
