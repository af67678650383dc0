"""The chapters: execute every notebook whose content changed, keep what failed, leave the rest
alone."""

import ast
import base64
import hashlib
import io
import json
import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ...errors import MergeError
from .. import staleness
from ..paths import records_folder, repository
from ..plans import EMBEDDED, plan
from . import schedule

# tqdm's advice to install ipywidgets, given to whoever imports something that imports tqdm.auto:
# the book draws no widgets.
NO_WIDGETS = "ignore:IProgress not found"
# glibc would hand every large tensor back to the system and ask for fresh pages, which takes up to
# a third of a merge's time; so it
# keeps up to 4 GiB that are free.
KEEP_PAGES = f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={4 << 30}:glibc.malloc.hugetlb=1"


class BookError(MergeError):
    """A notebook or a parameter that the book cannot run."""


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook: ``executed``, ``up to date`` or ``failed`` (then ``path`` is the
    kept copy)."""

    notebook: str
    status: str
    seconds: float
    path: str
    error: str = ""

    def __str__(self):
        took = f" in {self.seconds:.0f} s" if self.seconds else ""
        return f"{self.notebook}: {self.status}{took}"


def notebooks(root=None, only=None):
    """Source notebooks ``notebooks/NN_*.ipynb`` in order; ``only`` keeps those whose name starts
    with it.

    Raises: BookError when nothing is left.
    """
    paths = sorted((Path(root or repository()) / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for path in paths if only is None or path.stem.startswith(only)]
    if not chosen:
        names = ", ".join(path.stem for path in paths) or "none"
        raise BookError(
            f"no notebook starts with {only!r}; there are: {names}"
            if only
            else "notebooks/ is empty"
        )
    return chosen


def declared(path):
    """Parameters of a notebook and their defaults, ``{name: literal}``, from its one cell tagged
    ``parameters``.

    Raises: BookError unless there is exactly one such cell and it holds nothing but
        ``name = literal`` lines.
    """
    cells = _read_notebook(path)["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise BookError(f"{path.name}: {len(tagged)} cells tagged 'parameters', expected 1")
    parameters = {}
    for statement in ast.parse("".join(tagged[0]["source"])).body:
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
            raise BookError(
                f"{path.name}: line {statement.lineno} of the parameters cell is not `name = "
                f"literal`"
            )
        try:
            parameters[statement.targets[0].id] = ast.literal_eval(statement.value)
        except (ValueError, AttributeError) as error:
            raise BookError(
                f"{path.name}: line {statement.lineno} of the parameters cell depends on "
                f"something else; "
                "write a literal and derive the rest in a later cell"
            ) from error
    return parameters


def overrides(path, given):
    """The ``given`` parameters that differ from the notebook's own. Raises: BookError for a name it
    does not have."""
    own = declared(path)
    unknown = sorted(set(given) - set(own))
    if unknown:
        raise BookError(f"{path.name}: no parameter {', '.join(unknown)}; it has: {', '.join(own)}")
    return {name: value for name, value in given.items() if value != own[name]}


def fingerprint(path, parameters):
    """sha256 of all that decides a chapter: its cells with tags and captions, the modules of the
    package that they reach (see ``staleness``) and the scripts beside these, the suites' weights,
    parameters, lock and data manifests."""
    root = path.parent.parent
    cells = [
        (cell["cell_type"], "".join(cell["source"]), cell["metadata"])
        for cell in _read_notebook(path)["cells"]
    ]
    digest = hashlib.sha256(json.dumps([cells, parameters], sort_keys=True).encode())
    code = [source for kind, source, _ in cells if kind == "code"]
    reached, places = staleness.reached(root, cells=code), staleness.modules(root)
    digest.update(staleness.digest(root, reached).encode())
    scripts = [places[name].with_suffix(".js") for name in reached]
    inputs = [script for script in scripts if script.exists()]
    inputs += [*(root / "qpmerge_lite").rglob("*.safetensors"), *root.glob("requirements*")]
    inputs += [p for p in (root / "data_manifests").rglob("*") if p.is_file()]
    for file in sorted(inputs):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def run(
    root=None,
    tier="smoke",
    only=None,
    force=False,
    parameters=None,
    progress=True,
    report=lambda line: None,
):
    """Execute the notebooks that are not up to date into ``book/chapters``, two at a time and the
    longest first, and go on after a failure.

    Models this small leave a second core idle, so each of two has half the cores
    (``OMP_NUM_THREADS``, unless it is set).

    Args:
        only: beginning of a notebook's name, e.g. ``05``; default all that the tier's plan names.
        force: also execute those whose fingerprint has not changed, and make the merges again that
            were kept; experts stay.
        parameters: values for the parameters cells; a name that a chosen notebook does not have is
            an error.
        report: called with a line of text for every notebook that starts or ends, which says how
            long the run has still to go.
    Returns: the outcomes. Raises: BookError before anything runs when a parameter is unknown, or
        when what reads the tier's
    checkpoints is not installed.
    """
    root = Path(root or repository())
    names = ("",) if only else plan(tier).chapters
    chosen = {
        path: overrides(path, {"tier": tier} | (parameters or {}))
        for path in notebooks(root, only)
        if path.stem.startswith(names)
    }
    chapters = root / "book" / "chapters"
    chapters.mkdir(parents=True, exist_ok=True)
    if only is None:
        _prune(chapters, records_folder() / tier, {path.stem for path in notebooks(root)})
    marks = {path: fingerprint(path, given) for path, given in chosen.items()}
    outcomes, stale = {}, []
    for path in chosen:
        if not force and _is_current(chapters / path.name, marks[path], _records(tier, path)):
            outcomes[path] = Outcome(path.stem, "up to date", 0.0, str(chapters / path.name))
            report(str(outcomes[path]))
        else:
            stale.append((path, chapters, tier, chosen[path], marks[path], progress))
    if stale:
        _require_readers(tier)
        not_before = (
            time.time() if force else 0
        )  # chapters share the merges made during one forced run
        outcomes |= _run_all(stale, not_before, report)
    return [outcomes[path] for path in chosen]


def _require_readers(tier):
    lacking = [name for name in ("transformers", "tokenizers") if find_spec(name) is None]
    if lacking and plan(tier).data != EMBEDDED:
        raise BookError(
            f"tier {tier}: {' and '.join(lacking)}, which read its checkpoints, are not installed; "
            f"run `make notebooks TIER={tier}`, which installs requirements-hub.lock first"
        )


def _run_all(stale, not_before, report):
    """Path -> outcome of the notebooks, given as arguments of ``_run_one``."""
    jobs, workers = {job[0].stem: job for job in stale}, min(2, os.cpu_count() or 1, len(stale))
    root, tier = stale[0][1].parents[1], stale[0][2]
    order = schedule.Schedule(schedule.seconds(root, tier, list(jobs)), workers)
    with (
        _environment(not_before, workers),
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
    ):
        try:
            outcomes = _executed(pool, order, jobs, report)
        except BaseException:
            # an interrupted run starts no further notebook
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _keep_seconds(root, tier, jobs, outcomes)
    return outcomes


def _executed(pool, order, jobs, report):
    """Path -> outcome of jobs by name, as many at a time as the schedule says, in its order."""
    running, outcomes = {}, {}
    while order.waiting or running:
        while name := order.next():
            running[pool.submit(_run_one, *jobs[name])] = name
            report(f"{name}: started, {schedule.in_words(order.left())}")
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name, outcome = running.pop(future), future.result()
            order.end(name, outcome.seconds)
            outcomes[jobs[name][0]] = outcome
            report(f"{outcome}, {schedule.in_words(order.left())}")
    return outcomes


def _keep_seconds(root, tier, jobs, outcomes):
    """Remember how long notebooks took that were executed with their own parameters."""
    taken = {}
    for path, outcome in outcomes.items():
        if outcome.status == "executed" and not jobs[path.stem][3].keys() - {"tier"}:
            taken[path.stem] = outcome.seconds
    schedule.keep(root, tier, taken)


def _records(tier, path):
    return records_folder() / tier / f"{path.stem}.json"


def _run_one(path, chapters, tier, parameters, mark, progress):
    from papermill.exceptions import PapermillExecutionError

    chapter = chapters / path.name
    failed = chapter.with_suffix(".failed.ipynb")
    partial = chapter.with_name(f".{path.stem}.partial.ipynb")
    begin = time.monotonic()
    try:
        _execute(path, partial, parameters, progress)
        _stamp(partial, mark, tier, parameters, _records(tier, path))
        os.replace(partial, chapter)
        failed.unlink(missing_ok=True)
    except (
        PapermillExecutionError,
        RuntimeError,
    ) as error:  # nbclient's RuntimeErrors: the kernel died or never answered
        os.replace(partial, failed)
        told = isinstance(error, PapermillExecutionError)
        summary = f"{error.ename}: {error.evalue}" if told else f"{type(error).__name__}: {error}"
        return Outcome(path.stem, "failed", time.monotonic() - begin, str(failed), summary)
    finally:
        partial.unlink(missing_ok=True)
    return Outcome(path.stem, "executed", time.monotonic() - begin, str(chapter))


def _execute(path, target, parameters, progress):
    import papermill
    from traitlets.config import Config

    with TemporaryDirectory() as sockets:
        papermill.execute_notebook(
            os.path.relpath(path),
            os.path.relpath(target),
            parameters=parameters,
            cwd=str(path.parent),
            kernel_name="python3",
            progress_bar=progress,
            # Kernels that several processes start pick TCP ports that are free at that moment, and
            # can pick the same one.
            config=Config(
                ConnectionFileMixin={"transport": "ipc", "ip": os.path.join(sockets, "kernel")}
            ),
        )


@contextmanager
def _environment(not_before, workers):
    """Kernels started inside inherit these variables; afterwards the environment is as it was."""
    values = {
        "PYTHONWARNINGS": ",".join(
            filter(None, [os.environ.get("PYTHONWARNINGS"), NO_WIDGETS])
        ),  # of several filters the last one counts
        "QPMERGE_NOT_BEFORE": str(not_before),
        "GLIBC_TUNABLES": os.environ.get(
            "GLIBC_TUNABLES", KEEP_PAGES
        ),  # no other C library looks at it
        "OMP_NUM_THREADS": os.environ.get(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers))
        ),
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            os.environ.update({name: value} if value is not None else {})


def _stamp(path, mark, tier, parameters, records):
    """Replace papermill's bookkeeping (which names paths and times) by what decides whether to run
    again, and figures by smaller files."""
    notebook = _read_notebook(path)
    notebook["metadata"].pop("papermill", None)
    for cell in notebook["cells"]:
        cell["metadata"].pop("papermill", None)
        cell["metadata"].pop("execution", None)
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                output["data"]["image/png"] = _with_a_palette(png)
    notebook["metadata"]["qpmerge"] = {
        "fingerprint": mark, "tier": tier, "parameters": parameters, "records": _sha256(records),
    }  # fmt: skip
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_a_palette(png):
    """A figure with at most 256 colours, which takes a third of the bytes: of a page and of the
    notebook to download. Both in base64; figures are opaque."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    file = io.BytesIO()
    few.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _is_current(chapter, mark, records):
    """Whether a chapter was made from these sources and wrote the records that are there; a later
    run that broke off did not."""
    if not chapter.is_file():
        return False
    stamp = _read_notebook(chapter)["metadata"].get("qpmerge", {})
    return stamp.get("fingerprint") == mark and stamp.get("records") == _sha256(records)


def _sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _prune(chapters, records, names):
    """Drop executed chapters and records whose notebook is gone or was renamed."""
    for file in (*chapters.glob("*.ipynb"), *records.glob("*.json")):
        if file.name.split(".")[0] not in names:
            file.unlink()


def _read_notebook(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BookError(f"{path.name}: not a notebook ({error})") from error
