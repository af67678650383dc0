"""Claims as one picture: how far every estimate is from the threshold of its rule, in units of its
own interval; HTML with inline SVG, which needs no script."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from html import escape

from ..records import Record
from .claims import (
    ABOUT,
    FAILS,
    HOLDS,
    NOT_RUN,
    SOURCES,
    UNDECIDED,
    VERDICTS,
    Row,
    format_record,
)
from .predicates import Standing

FAR = 3.0  # half widths; an estimate that is further from the threshold is drawn at the edge
EDGE = 4.0
SCALE = 50 / 5  # per cent of the picture's width in a half width; the threshold is in the middle
SHAPES = {
    HOLDS: '<circle r="5"/>',
    UNDECIDED: '<path d="M0-6 6 0 0 6-6 0Z"/>',
    FAILS: '<path d="M-4.5-4.5 4.5 4.5M-4.5 4.5 4.5-4.5"/>',
    NOT_RUN: '<path d="M-5 0H5"/>',
}
FURTHER = '<path class="further" d="M9-4 13 0 9 4"/>'


def picture(
    rows: Iterable[Row], link: Callable[[str], str], origin: Callable[[Row, Record], str]
) -> str:
    """Every claim as a point with its interval, by question, beside one line for all thresholds.

    Args:
        link: address of the claim of an id.
        origin: where a record of a row's claim comes from, in a line.
    """
    rows = list(rows)
    parts = []
    for about, question in ABOUT.items():
        drawn = [_row(row, link, origin) for row in rows if row.claim.about == about]
        if drawn:
            parts.append(f"<p>{escape(question)}</p><ul>{''.join(drawn)}</ul>")
    head = "".join(f"<span>{words}</span>" for words in ("← not met", "threshold", "met →"))
    return (
        f'<div class="claims-picture"><div class="head" aria-hidden="true">{head}</div>'
        f"{''.join(parts)}{_legend(rows)}</div>"
    )


def class_of(verdict: str) -> str:
    """The verdict as the class of an element of a page."""
    return "is-" + verdict.replace(" ", "-")


def _row(row: Row, link, origin) -> str:
    """One claim: its words, its point, and what is told on hover and focus."""
    claim = row.claim
    about = escape(f"about-{claim.id}")
    asked = ' <abbr title="asked for by the review">R</abbr>' if claim.source == "review" else ""
    return (
        f'<li class="{class_of(row.verdict)}"><a href="{escape(link(claim.id))}" '
        f'aria-describedby="{about}" class="told">'
        f"<span>{escape(claim.short or claim.statement)}{asked}</span>"
        f"{_drawn(row)}</a>{_told(row, about, origin)}</li>"
    )


def _drawn(row: Row) -> str:
    """The point on its line, with its interval."""
    standing = row.standing
    parts = [
        f"<title>{escape(said(row))}</title>",
        '<line class="threshold" x1="50%" x2="50%" y1="0" y2="100%"/>',
    ]
    shape, at = SHAPES[row.verdict], 0.0
    if standing is not None and abs(standing.at) <= FAR:
        at = standing.at
        ends = [_place(end) for end in (standing.low, standing.high)]
        if standing.low < standing.high:
            parts.append(f'<line x1="{ends[0]}" x2="{ends[1]}" y1="50%" y2="50%"/>')
    elif standing is not None:
        at = EDGE if standing.at > 0 else -EDGE
        if not _is_exact(standing):
            turn = "" if at > 0 else ' transform="scale(-1 1)"'
            shape += f"<g{turn}>{FURTHER}</g>"
    parts.append(f'<svg x="{_place(at)}" y="50%" overflow="visible">{shape}</svg>')
    return f'<svg role="img">{"".join(parts)}</svg>'


def _place(distance: float) -> str:
    """Where a distance from the threshold is on the page."""
    inside = max(-EDGE, min(EDGE, distance))
    return f"{50 + SCALE * inside:.1f}%"


def _is_exact(standing: Standing) -> bool:
    return standing.low == standing.high


def said(row: Row) -> str:
    """The picture of one claim in words."""
    standing = row.standing
    if standing is None:
        return row.verdict
    if _is_exact(standing):
        return f"{row.verdict}; no interval"
    side = "beyond" if standing.at > 0 else "short of"
    return (
        f"{row.verdict}; {abs(standing.at):.1f} half widths {side} the threshold, "
        f"interval from {standing.low:.1f} to {standing.high:.1f}"
    )


def _told(row: Row, id: str, origin) -> str:
    """Verdict, rule, and the records that decide, for hover and focus."""
    claim = row.claim
    voice = SOURCES[claim.source]
    lines = [f"<strong>{row.verdict}</strong>: {escape(claim.statement)} <em>({voice})</em>"]
    if claim.rule:
        lines.append(f"<em>Rule.</em> {escape(re.sub('[*`]', '', claim.rule))}")
    for record in dict.fromkeys(row.standing.records if row.standing else ()):
        counted = claim.samples if isinstance(claim.samples, str) else claim.samples.get(record.id)
        tail = f" · n counts {counted}" if counted and record.interval else ""
        value = escape(format_record(record))
        lines.append(f"<em>Decided by</em> {value}: {escape(origin(row, record))}{tail}")
    return f'<div role="tooltip" id="{id}">{"".join(f"<p>{line}</p>" for line in lines)}</div>'


def _legend(rows: list[Row]) -> str:
    """Shapes, how many of each there are, and what the axis is."""
    counted = Counter(row.verdict for row in rows)
    shapes = "".join(
        f'<span class="{class_of(verdict)}"><svg viewBox="-8 -8 16 16" aria-hidden="true">'
        f"{SHAPES[verdict]}</svg> {verdict}: {counted[verdict]}</span>"
        for verdict in VERDICTS
        if counted[verdict]
    )
    axis = (
        "Distances are in half widths of each claim's own interval: right of the line it holds, "
        "left of it it fails, across it is undecided. Of several comparisons the one that decides "
        "is drawn. Arrow: further than drawn. At the edge without one: no interval, as of what is "
        "exact. R: asked for by the review."
    )
    told = f"<details><summary>How to read it</summary><p>{axis}</p></details>"
    return f'<div class="legend">{shapes}{told}</div>'


def form() -> str:
    """What narrows a table of claims down, without meaning until a script shows it; the values are
    classes of the table's lines."""
    voices = {f"by-{source}": words for source, words in SOURCES.items()}
    verdicts = {class_of(verdict): verdict for verdict in VERDICTS}
    return (
        f'<form class="claims-filter" hidden>{_select("Claimed by", "anyone", voices)}'
        f'{_select("Verdict", "any", verdicts)}<output aria-live="polite"></output></form>'
    )


def _select(label: str, nothing: str, options: dict[str, str]) -> str:
    shown = "".join(
        f'<option value="{value}">{escape(words)}</option>' for value, words in options.items()
    )
    return f'<label>{label} <select><option value="">{nothing}</option>{shown}</select></label>'
