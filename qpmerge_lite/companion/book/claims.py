"""Claims and verdicts: a predicate over recorded intervals decides each one."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..paths import records_folder, repository
from ..records import Record, find, load_records
from .predicates import ClaimError as ClaimError
from .predicates import Standing, outlook, standing
from .predicates import evaluate as evaluate

SOURCES = {"paper": "paper", "review": "its review", "ours": "this book"}
ABOUT = {  # the parts of the claims page, and the question that each of them asks
    "programme": "Is merging a convex programme, with known methods in it?",
    "bases": "Which basis?",
    "accuracy": "Is the merge more accurate?",
    "energy": "Does captured energy say which merge is good?",
    "calibration": "What hangs on the calibration set?",
}
VERDICTS = HOLDS, UNDECIDED, FAILS, NOT_RUN = ("holds", "undecided", "fails", "not run")
NO_INTERVAL = " (no interval)"
OF_TRUTH = {True: HOLDS, None: UNDECIDED, False: FAILS}


@dataclass(frozen=True)
class Claim:
    """One entry of ``book/claims.yml``.

    Attributes:
        about: the part of the claims page that it stands in, one of ``ABOUT``.
        short: a few words for the picture of all claims.
        records: ids of the records that it rests on; without any it is *not run*.
        predicate: an expression over them that decides it.
        rule, why: the predicate in words, and why its thresholds are what they are.
        measured: a template whose ``{id format}`` parts are filled from the records.
        parts: label -> predicate, judged beside the claim's own and shown under the verdict.
        sentence: verdict -> what it means for this claim. It never takes the verdict's place.
        samples: what the records' ``n`` counts, in a word, or a word by record.
        tier: the recorded tier whose records decide instead of those of the build.
    """

    id: str
    source: str
    statement: str
    about: str
    short: str = ""
    chapter: str = ""
    records: tuple[str, ...] = ()
    predicate: str = ""
    rule: str = ""
    why: str = ""
    measured: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    sentence: dict[str, str] = field(default_factory=dict)
    samples: str | dict[str, str] = ""
    tier: str = ""


@dataclass(frozen=True)
class Row:
    """A claim beside its verdict, one of ``VERDICTS``.

    Attributes:
        measured: the claim's template, filled.
        parts: label -> verdict of its parts.
        needed: where it is undecided, how many samples would decide it.
        standing: how far it is from its threshold; None where it is not run.
    """

    claim: Claim
    verdict: str
    measured: str
    parts: dict[str, str] = field(default_factory=dict)
    needed: str = ""
    standing: Standing | None = None

    @property
    def sentence(self) -> str:
        """What the verdict means for this claim; empty where the claim says nothing of it."""
        return self.claim.sentence.get(self.verdict, "")


def load_claims(path) -> list[Claim]:
    """Claims of a YAML file, checked. Raises: ClaimError naming the claim and the field."""
    import yaml

    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    claims = [_claim(entry, number) for number, entry in enumerate(entries, 1)]
    uses = Counter(claim.id for claim in claims)
    repeated = sorted(id for id, times in uses.items() if times > 1)
    if repeated:
        raise ClaimError(f"claim {', '.join(repeated)}: the id is used twice")
    return claims


def _claim(entry: dict, number: int) -> Claim:
    """The claim of one entry. Raises: ClaimError naming it and the field."""
    name = entry.get("id", f"number {number}")
    unknown = set(entry) - set(Claim.__dataclass_fields__)
    if unknown:
        raise ClaimError(f"claim {name}: unknown field {', '.join(sorted(unknown))}")
    wanted = ["id", "source", "statement", "about"]
    if entry.get("records"):
        wanted += ["chapter", "predicate", "rule", "why", "measured"]
    missing = [key for key in wanted if not entry.get(key)]
    if missing:
        raise ClaimError(f"claim {name}: field {', '.join(missing)} is missing or empty")
    words = {
        "source": ([entry["source"]], SOURCES),
        "about": ([entry["about"]], ABOUT),
        "sentence": (entry.get("sentence", {}), VERDICTS),
    }
    for key, (words_used, known) in words.items():
        odd = [word for word in words_used if word not in known]
        if odd:
            expected = f"expected one of {', '.join(known)}"
            raise ClaimError(f"claim {name}: {key} {', '.join(map(repr, odd))}; {expected}")
    return Claim(**(entry | {"records": tuple(entry.get("records") or ())}))


def judge(claim: Claim, records: Mapping[str, Record]) -> Row:
    """The claim's row under the given records.

    A claim of a recorded tier that has recorded nothing of it is *not run*. A record without an
    interval is judged by its value.

    Raises: RecordError for a record that is missing.
    """
    if not claim.records:
        return Row(claim, NOT_RUN, "—")
    if claim.tier and not any(id in records for id in claim.records):
        return Row(claim, NOT_RUN, f"not recorded at tier {claim.tier}")
    chosen = {id: find(records, id) for id in claim.records}
    found = standing(claim.predicate, chosen)
    verdict = OF_TRUTH[found.truth]
    parts = {label: OF_TRUTH[evaluate(part, chosen)] for label, part in claim.parts.items()}
    needed = _needed(claim, chosen) if verdict == UNDECIDED else ""
    return Row(claim, verdict, _filled(claim, chosen), parts, needed, found)


def rows(root=None, tier="smoke") -> list[Row]:
    """Every claim of ``book/claims.yml`` judged by the records of a tier, or of its own, in the
    order of the file."""
    root = Path(root or repository())

    def read(name):
        return load_records(name, records_folder(root))

    return judged(load_claims(root / "book" / "claims.yml"), tier, read)


def judged(claims: Iterable[Claim], tier: str, read: Callable) -> list[Row]:
    """The rows of claims, each by the records that ``read`` returns for its own tier or else for
    the given one."""
    claims = list(claims)
    tiers = {claim.tier or tier for claim in claims if claim.records}
    records = {name: read(name) for name in tiers}
    return [judge(claim, records.get(claim.tier or tier, {})) for claim in claims]


def _needed(claim: Claim, records: Mapping[str, Record]) -> str:
    """In words, how many samples would decide an undecided claim at the present estimates."""
    forecast = outlook(claim.predicate, records, _rounding(claim))
    ids = " and ".join(f"`{record.id}`" for record in forecast.records)
    if math.isinf(forecast.factor):
        return f"none at this estimate: {ids} lies on the threshold, to the digits shown"
    truth = "hold" if forecast.truth else "fail"
    if forecast.samples is None:
        times = f"{forecast.factor:.1f}"
        return (
            f"{times} times as many samples behind {ids}, if the estimates stay: it would {truth}"
        )
    record = min((r for r in forecast.records if r.n is not None), key=_count)
    word = claim.samples if isinstance(claim.samples, str) else claim.samples.get(record.id)
    return (
        f"about {forecast.samples:,} {word or 'samples'} instead of {record.n:,} behind {ids}, if "
        f"the estimates stay: it would {truth}"
    )


def _count(record: Record) -> int:
    return record.n or 0


PLACE = re.compile(r"\{([^{} ]+) ?([^{}]*)\}")  # {id format} in a template


def _rounding(claim: Claim) -> dict[str, float]:
    """Half a unit of the last digit that is shown of every record in the claim's template."""
    halves = {}
    for id, spec in PLACE.findall(claim.measured):
        digits = re.search(r"\.(\d+)f", spec)
        if digits:
            halves[id] = 0.5 * 10.0 ** -int(digits[1])
    return halves


def _filled(claim: Claim, records: Mapping[str, Record]) -> str:
    """The claim's template with the numbers of the records in it."""

    def value(match):
        return format_record(records[match[1]], match[2])

    shown(claim)
    return PLACE.sub(value, claim.measured)


def shown(claim: Claim) -> list[tuple[str, str]]:
    """(id, format) of every record in the claim's template. Raises: ClaimError for one that is not
    among the claim's records."""
    places = PLACE.findall(claim.measured)
    for id, _ in places:
        if id not in claim.records:
            raise ClaimError(
                f"claim {claim.id}: `measured` names {id}, which is not among its records"
            )
    return places


def format_record(record: Record, spec: str = "") -> str:
    """A record as text: ``spec`` holds, in any order, a Python format such as ``.3f``, ``pct``,
    ``ci`` and ``unit``.

    A number of one seed has no interval, and ``ci`` says so in words.
    """
    words = re.split(r"[\s|]+", spec.strip())
    known = {"pct", "ci", "unit", ""}
    formats = [word for word in words if word not in known]
    if len(formats) > 1:
        raise ClaimError(f"record {record.id}: more than one number format in {spec!r}")
    default = ".1%" if "pct" in words else ""
    number = formats[0] if formats else default
    text = _number(record.id, record.value, number)
    if "ci" in words:
        text += _interval(record, number)
    return f"{text} {record.unit}" if "unit" in words and record.unit else text


def _interval(record, spec):
    """What stands behind a record's value; nothing behind a word."""
    if record.interval is None:
        return "" if isinstance(record.value, (bool, str)) else NO_INTERVAL
    low, high = (_number(record.id, end, spec) for end in record.interval)
    return f" [{low}, {high}]"


FINEST = 6  # digits behind the point, of numbers that fewer would show as zero


def _number(id, value, spec):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    spec = spec or ("," if isinstance(value, int) else ".4g")
    try:
        return _signed(value, spec)
    except ValueError as error:
        raise ClaimError(f"record {id}: {spec!r} is no number format ({error})") from error


def _signed(value: float, spec: str) -> str:
    """A number in a format, with as many digits more as it takes to see on which side of zero it
    is; zero, and what is closer to it than the last of these digits, has no minus."""
    text = format(value, spec)
    digits = re.fullmatch(r"(\+?)\.(\d)f", spec)
    if digits is None or re.search("[1-9]", text) or not math.isfinite(value):
        return format(value + 0, spec)  # -0.0 becomes 0.0
    sign, shown = digits[1], int(digits[2])
    for more in range(shown + 1, FINEST + 1):
        text = format(value, f"{sign}.{more}f")
        if re.search("[1-9]", text):
            return text
    return format(0.0, spec)
