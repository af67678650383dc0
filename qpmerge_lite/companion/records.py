"""Results as records: written by code that ran, read by the pages, the claims and the regression
check."""

import difflib
import hashlib
import json
import math
import numbers
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import MergeError
from .paths import MANIFESTS, records_folder

SCHEMA = 1
ID = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")
PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "datasets",
    "transformers",
    "scikit-learn",
    "wordfreq",
    "qpmerge-lite",
)
PROVENANCE = (
    "date",
    "device",
    "python",
    "machine",
    "threads",
    "packages",
    "commit",
    "data",
)  # all of it goes with committed records


class RecordError(MergeError):
    """A record that cannot be written, read or found."""


@dataclass(frozen=True)
class Record:
    """One result: a plain value with what is needed to read it.

    ``unit`` is a word or symbol, ``n`` the number of samples behind the value, ``seed`` the seed it
    hangs on, ``interval`` a pair (low, high) that the notebook says how it made, ``tier`` and
    ``notebook`` where it comes from.
    """

    id: str
    value: float | int | str | bool
    unit: str = ""
    n: int | None = None
    seed: int | None = None
    interval: tuple[float, float] | None = None
    note: str = ""
    notebook: str = ""
    tier: str = "smoke"


class Records:
    """The results of one run of one notebook, rewritten atomically after each new one.

    Args:
        notebook: its name without suffix, e.g. ``06_vision``.
        tier: ``smoke``, ``standard`` or ``paper``.
        root: folder that holds one folder per tier; default ``records_folder()``.
        device: named in the provenance.
    """

    def __init__(self, notebook, tier, root=None, device="cpu"):
        self.notebook, self.tier = notebook, tier
        self.path = Path(root or records_folder()) / tier / f"{notebook}.json"
        self._provenance = provenance(device)
        self._records = {}

    def record(self, id, value, *, unit="", n=None, seed=None, interval=None, note=""):
        """Keep one result under a dotted lower-case id and give the plain value back.

        Raises: RecordError for a malformed or repeated id, a NaN or infinite value, an interval out
            of order.
        """
        if not ID.fullmatch(id):
            raise RecordError(
                f"record {id!r}: expected dotted lower-case words such as vision.rows.accuracy"
            )
        if id in self._records:
            raise RecordError(
                f"record {id!r}: recorded twice in {self.notebook}; give each result its own id"
            )
        value = _plain(id, value)
        if interval is not None:
            interval = tuple(_plain(id, end) for end in interval)
            if len(interval) != 2 or interval[0] > interval[1]:
                raise RecordError(
                    f"record {id!r}: expected an interval (low, high), found {interval}"
                )
        count, seed = (None if x is None else int(x) for x in (n, seed))
        self._records[id] = Record(
            id, value, unit, count, seed, interval, note, self.notebook, self.tier
        )
        self._write()
        return value

    def _write(self):
        records = {
            r.id: {k: v for k, v in asdict(r).items() if k not in ("id", "notebook", "tier")}
            for r in self._records.values()
        }
        head = {"schema": SCHEMA, "notebook": self.notebook, "tier": self.tier}
        write_json(self.path, head | {"provenance": self._provenance, "records": records})


def load_records(tier, root=None):
    """All records of a tier, ``{id: Record}``.

    They are read from ``<root>/<tier>/*.json``; a tier that this machine has not run falls back to
    the committed ``book/recorded/<tier>``.

    Raises: RecordError when there are none, when a file is not a record file, or when two notebooks
        share an id.
    """
    records = {}
    for path in record_files(tier, root):
        for record in _read(path):
            if record.id in records:
                other = records[record.id].notebook
                raise RecordError(
                    f"record {record.id!r}: written by both {other} and {record.notebook}; rename "
                    f"one"
                )
            records[record.id] = record
    return records


def record_files(tier, root=None):
    """Paths of the record files of a tier, sorted; see ``load_records``."""
    root = Path(root or records_folder())
    for folder in (root / tier, root.parent / "recorded" / tier):
        files = sorted(folder.glob("*.json"))
        if files:
            return files
    raise RecordError(
        f"no records of tier {tier!r} in {root.name}; run `qpmerge book run --tier {tier}` first"
    )


def keep(tier, root=None):
    """Copy the records of a tier from ``<root>/<tier>`` to the committed ``recorded/<tier>`` beside
    it, and return the paths there.

    Raises: RecordError when there are none, or when a file lacks part of its provenance.
    """
    root = Path(root or records_folder())
    written = []
    for path in sorted((root / tier).glob("*.json")):
        list(_read(path))
        content = read_json(path)
        lacking = [name for name in PROVENANCE if not content["provenance"].get(name)]
        if lacking:
            raise RecordError(
                f"{path.name}: expected a provenance with {', '.join(lacking)}, found none; "
                "run its notebook again in a checkout"
            )
        written.append(root.parent / "recorded" / tier / path.name)
        write_json(written[-1], content)
    if not written:
        raise RecordError(
            f"no records of tier {tier!r} in {root.name}; run `qpmerge book run --tier {tier}` "
            f"first"
        )
    return written


def find(records, id):
    """The record of that id. Raises: RecordError naming the ids that look alike."""
    if id not in records:
        alike = difflib.get_close_matches(id, records, n=5, cutoff=0.4)
        raise RecordError(
            f"no record {id!r}; recorded ids that look alike: {', '.join(alike) or 'none'}"
        )
    return records[id]


def provenance(device="cpu"):
    """What ran: package versions, Python, machine type, threads, device, date (UTC), git commit if
    there is one, and on which data.

    ``data`` is one SHA-256 over all data manifests, which hold that of every file; None where there
    are none.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _device(device),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "data": _data(),
    }


def write_json(path, content):
    """Write JSON to a temporary name beside ``path``, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(
        json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    os.replace(partial, path)


def read_json(path):
    """Parsed JSON of a file. Raises: RecordError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path.name}: not valid JSON ({error}); delete it and run its notebook again"
        ) from error


def _read(path):
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        schema = content.get("schema")
        raise RecordError(
            f"{path.name}: expected record schema {SCHEMA}, found {schema}; run its notebook again"
        )
    for id, fields in content["records"].items():
        interval = fields.pop("interval")
        interval = None if interval is None else tuple(interval)
        yield Record(
            id, interval=interval, notebook=content["notebook"], tier=content["tier"], **fields
        )


def _plain(id, value):
    if hasattr(value, "item"):  # a NumPy or torch scalar
        value = value.item()
    if isinstance(value, (bool, str, int)):
        return value
    if not isinstance(value, numbers.Real):
        raise RecordError(
            f"record {id!r}: expected a number, a word or a truth value, found "
            f"{type(value).__name__}"
        )
    if not math.isfinite(value):
        raise RecordError(
            f"record {id!r}: the value is {value}; record a finite number or say in a word why "
            f"there is none"
        )
    return float(value)


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _data():
    manifests, digest = sorted(MANIFESTS.glob("*.yaml")), hashlib.sha256()
    for path in manifests:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest() if manifests else None


def _device(device):
    """The name of an accelerator beside its kind."""
    if not str(device).startswith("cuda"):
        return str(device)
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def _commit():
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
