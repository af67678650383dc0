"""The words and numbers of a diagnosis, and its tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from unicodedata import combining, east_asian_width

WIDTH = 100  # letters of a line of a terminal
LAYERS = 30  # rows of the table of layers on a terminal
NONE = "–"
TITLES = {
    "captured": "captured",
    "agreement": "agreement",
    "agreement_of_base": "agreement of base",
    "energy": "energy of outputs",
    "perplexity_of_merged": "perplexity",
    "perplexity_of_expert": "perplexity of expert",
    "perplexity_of_base": "perplexity of base",
    "perplexity_ratio": "ratio to expert",
}
MEANINGS = {
    "predictions": {
        "captured": "share of the divergence between the base's predictions and the expert's that "
        "is gone in the merge's: 1 is the expert on every text, 0 no nearer than the base, below 0 "
        "further away",
        "agreement": "share of predictions in which the merge's first choice is the expert's",
        "agreement_of_base": "the same of the base, which is where the merge started from",
        "energy": "share of the squared difference between the base's outputs, which the heads "
        "read, and the expert's that is gone in the merge's",
        "perplexity_of_merged": "how many tokens the merge wavers between, on average, when it "
        "reads these texts: lower is better",
        "perplexity_of_expert": "the same of the expert",
        "perplexity_of_base": "the same of the base",
        "perplexity_ratio": "the merge's perplexity over the expert's, on the same texts: above 1 "
        "is worse",
    },
    "outputs": {
        "captured": "share of the squared difference between the base's outputs and the expert's "
        "that is gone in the merge's: 1 is the expert, 0 no nearer than the base, below 0 further "
        "away",
    },
}
LAYER_MEANINGS = {
    "energy": "share of the squared difference that the expert's weights make to a layer's output "
    "which the merge's weights make up for, layers reading what the merge's own earlier layers "
    "put out: 1 is the expert, 0 the base's weights in that place, below 0 further away",
    "captured": "the same over the texts of all experts, each expert weighing the same per token",
    "gap": "what is left to gain in this layer: how much more the best weights for all experts "
    "would capture on these very texts, 0 being none; few texts make it larger than it is",
}
INTERVAL = "in brackets, 95 % intervals over texts; none for fewer than eight or all alike"
NOTHING_TO_CAPTURE = "a dash is where the expert's outputs are the base's, so that nothing is told"


def printable(text: str) -> str:
    """The text without what would steer a terminal or is no letter of a page."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def number(value: float | None, decimals: int = 2) -> str:
    """A number with so many decimals, rounded before the point where they are negative."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    if abs(value) >= 1e6:
        return f"{value:.0e}"
    rounded = round(value, decimals) + 0.0  # no minus before a zero
    return f"{rounded:.{max(decimals, 0)}f}".replace("-", "−")


def decimals_of(estimate: Mapping) -> int:
    """How many decimals an estimate is told with: up to the first in which its interval is not one
    number; without an interval, what leaves three digits, and two at the most."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    finite = low is not None and math.isfinite(low) and math.isfinite(high)
    if finite and high > low:
        return min(math.ceil(-math.log10((high - low) / 2)), 4)
    if value == 0 or not math.isfinite(value):
        return 2
    return min(2 - math.floor(math.log10(abs(value))), 2)


def told(estimate: Mapping | None) -> str:
    """A number with its interval, no digit of which is chance alone."""
    if estimate is None:
        return NONE
    decimals = decimals_of(estimate)
    value = number(estimate["value"], decimals)
    if estimate["low"] is None:
        return value
    return f"{value} [{number(estimate['low'], decimals)}, {number(estimate['high'], decimals)}]"


def shown_columns(diagnosis: Mapping) -> list[str]:
    """Names of the estimates that there are, in the order of ``TITLES``."""
    first = next(iter(diagnosis["experts"].values()))
    return [name for name in TITLES if name in first]


def parts_of(columns: Sequence[str]) -> list[list[str]]:
    """Columns of the table of experts, in as many tables as it takes for it not to be too wide."""
    read = [name for name in columns if name.startswith("perplexity")]
    others = [name for name in columns if name not in read]
    return [others, read] if read else [others]


def compared(diagnosis: Mapping) -> str:
    """What of the models is compared, in a sentence."""
    what = diagnosis["compared"]
    kind = "predictions" if what["kind"] == "predictions" else "outputs"
    heads = " with the head of every expert" if what["by_heads"] else ""
    return f"compared: {kind} of {what['model']}{heads} ({what['field']})"


def lowest(row: Mapping) -> tuple[str, float | None]:
    """The expert for which a layer captures least, and how much; none where nothing is told."""
    known = {name: value for name, value in row["energy"].items() if value is not None}
    if not known:
        return NONE, None
    name = min(known, key=known.__getitem__)
    return name, known[name]


def certificate(row: Mapping, name: str) -> float | None:
    """One number of a layer's certificate, None where there is none."""
    return None if row["certificate"] is None else row["certificate"][name]


def as_text(diagnosis: Mapping) -> str:
    """The diagnosis for a terminal, in lines of at most 100 letters."""
    lines = [compared(diagnosis), "", *_experts(diagnosis), ""]
    meanings = MEANINGS[diagnosis["compared"]["kind"]]
    for name in shown_columns(diagnosis):
        lines += wrapped(f"{TITLES[name]}: {meanings[name]}")
    lines += wrapped(INTERVAL)
    if any(own["captured"] is None for own in diagnosis["experts"].values()):
        lines += wrapped(NOTHING_TO_CAPTURE)
    lines += ["", *_layers(diagnosis["layers"]), ""]
    titles = {"energy": "lowest", "captured": "all", "gap": "gap"}
    for name, meaning in LAYER_MEANINGS.items():
        lines += wrapped(f"{titles[name]}: {meaning}")
    for reason, names in diagnosis["left_out"].items():
        lines += wrapped(f"in no layer, tensors: {len(names)}, {reason}")
    if diagnosis["untouched"]:
        count = len(diagnosis["untouched"])
        lines += wrapped(f"untouched, tensors: {count}, the base's though an expert has others")
    for warning in diagnosis["warnings"]:
        place, cure = warning["where"], warning["cure"]
        said = f"expected {warning['expected']}, found {warning['found']}; {cure}"
        lines += wrapped(f"warning: {place}: {said}")
    return "\n".join(line.rstrip() for line in lines)


def _experts(diagnosis: Mapping) -> list[str]:
    """The tables of experts."""
    lines: list[str] = []
    for place, part in enumerate(parts_of(shown_columns(diagnosis))):
        head = ["expert", "texts", *(TITLES[name] for name in part)]
        rows = []
        for expert, own in diagnosis["experts"].items():
            rows.append([expert, str(len(own["texts"])), *(told(own[name]) for name in part)])
        lines += ([""] if place else []) + aligned(head, rows)
    return lines


def _layers(rows: Sequence[Mapping]) -> list[str]:
    """The table of layers; of many, those with the largest gap."""
    if not rows:
        return ["no layer that a merge can solve"]

    def gap(place: int) -> float:
        """Of the layer in this place."""
        return certificate(rows[place], "gap") or 0.0

    places = sorted(sorted(range(len(rows)), key=gap, reverse=True)[:LAYERS])
    table = []
    for place in places:
        row = rows[place]
        expert, value = lowest(row)
        captured, gap_ = certificate(row, "captured"), certificate(row, "gap")
        numbers = [number(value), expert, number(captured), number(gap_)]
        table.append([str(place + 1), row["layer"], *numbers])
    lines = aligned(["#", "layer", "lowest", "for", "all", "gap"], table, widest=1)
    if len(places) < len(rows):
        lines.append(f"({len(places)} of {len(rows)} layers, those with the largest gap)")
    return lines


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], widest: int = 0) -> list[str]:
    """Lines of aligned columns; names in column ``widest`` are cut where they do not fit, and
    others after 16 letters where they are names."""
    cells = [list(map(printable, row)) for row in (head, *rows)]
    names = [0] if widest == 0 else [widest, 3]
    for column in names[1:]:
        for row in cells:
            row[column] = fitted(row[column], 16)
    widths = [max(map(columns_of, column)) for column in zip(*cells, strict=True)]
    spare = WIDTH - sum(widths) + widths[widest] - 2 * (len(head) - 1)
    widths[widest] = min(widths[widest], spare)
    lines = []
    for row in cells:
        row[widest] = fitted(row[widest], widths[widest])
        padded = [cell + " " * (w - columns_of(cell)) for cell, w in zip(row, widths, strict=True)]
        lines.append("  ".join(padded))
    return lines


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes."""
    total = 0
    for letter in text:
        if not combining(letter):
            total += 2 if east_asian_width(letter) in "WF" else 1
    return total


def fitted(text: str, most: int) -> str:
    """A text of at most so many columns, with an ellipsis for its middle where it is wider."""
    if columns_of(text) <= most:
        return text
    head, tail = text, text
    while columns_of(head) > (most - 1) // 2:
        head = head[:-1]
    while columns_of(head) + 1 + columns_of(tail) > most:
        tail = tail[1:]
    return f"{head}…{tail}"


def wrapped(text: str) -> list[str]:
    """A sentence in lines that fit."""
    from textwrap import wrap

    return wrap(printable(text), WIDTH, subsequent_indent="  ")
