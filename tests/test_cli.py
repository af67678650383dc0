"""`qpmerge`: notebooks run once per content, failures are kept and named, wrong usage is refused
with a reason."""

import io
import json
import os
import platform
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

from qpmerge_lite.companion import cli
from qpmerge_lite.companion.book import run as book
from qpmerge_lite.companion.book.claim_pages import BEGIN, END

ROOT = Path(__file__).parents[1]
RECORDING = """
from qpmerge_lite.companion.records import Records
recorder = Records("01_a", tier, device=device)
recorder.record("a.seed", seed)
"""


def write(path, *sources):
    parameters = nbformat.v4.new_code_cell(
        'tier = "smoke"\nseed = 0\ndevice = "cpu"', metadata={"tags": ["parameters"]}
    )
    cells = [parameters, *(nbformat.v4.new_code_cell(source) for source in sources)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


def make_checkout(root):
    """A checkout with one notebook that records its seed; the package itself is the one under
    test, of which the checkout has a module to be changed."""
    shutil.copy(ROOT / "pyproject.toml", root)
    for folder in ("notebooks", "book", "qpmerge_lite/companion"):
        (root / folder).mkdir(parents=True)
    (root / "qpmerge_lite" / "companion" / "records.py").write_text("")
    (root / "book" / "claims.yml").write_text(
        "- {id: c, source: paper, about: bases, statement: s, chapter: 01_a, records: [a.seed], "
        "predicate: a.seed >= 0, rule: r, why: w, measured: '{a.seed}'}\n"
    )
    (root / "README.md").write_text(f"# Title\n{BEGIN}\n{END}\n")
    write(root / "notebooks" / "01_a.ipynb", RECORDING)
    return root


def execute(path, target, parameters, progress):
    """What papermill does, without the seconds that a kernel takes to start."""
    notebook, names = nbformat.read(path, as_version=4), {}
    nbformat.write(notebook, target)
    for number, cell in enumerate(notebook.cells):
        try:
            exec(cell.source, names)
        except Exception as error:
            told = number, number, cell.source, type(error).__name__, str(error), []
            raise PapermillExecutionError(*told) from error
        names |= parameters if "parameters" in cell.metadata.get("tags", []) else {}


def one_by_one(stale, not_before, report):
    """``run._run_all`` in this process."""
    outcomes = {}
    for job in stale:
        outcomes[job[0]] = book._run_one(*job)
        report(str(outcomes[job[0]]))
    return outcomes


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose notebooks are executed in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QPMERGE_RECORDS", raising=False)
    monkeypatch.setattr(book, "_execute", execute)
    monkeypatch.setattr(book, "_run_all", one_by_one)
    return make_checkout(tmp_path)


COUNT = """
from resource import RUSAGE_SELF, getrusage
faults = lambda: getrusage(RUSAGE_SELF).ru_minflt
write = lambda: len(b'x' * (64 << 20))
write()
before = faults()
write()
print('reused' if faults() - before < 1000 else 'fresh')
"""
TRANSPORT = """
from ipykernel.kernelapp import IPKernelApp
recorder.record('a.transport', IPKernelApp.instance().transport)
"""
IN_KERNELS = {
    "00_broken": ["raise ValueError('on purpose')"],
    "00_killed": ["print('so far')", "import os; os._exit(1)"],
    "01_a": [RECORDING, TRANSPORT],
    "02_warned": ["import tqdm.auto", "import warnings; warnings.warn('look here')"],
    "03_pages": [COUNT],
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(exit status, output, errors, chapters, environment afterwards) of one run of several
    notebooks in kernels."""
    root = make_checkout(tmp_path_factory.mktemp("kernels"))
    for name, sources in IN_KERNELS.items():
        write(root / "notebooks" / f"{name}.ipynb", *sources)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(root)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.delenv("QPMERGE_RECORDS", raising=False)
        patch.delenv("GLIBC_TUNABLES", raising=False)
        patch.setenv("PYTHONWARNINGS", "always::UserWarning")
        status = cli.main(["book", "run"])
        return SimpleNamespace(
            status=status,
            out=out.getvalue(),
            err=err.getvalue(),
            root=root,
            chapters=root / "book" / "chapters",
            environment=dict(os.environ),
        )


def run(capsys, *arguments):
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def outcome(capsys, *arguments):
    return [
        entry["status"] for entry in json.loads(run(capsys, "book", "run", "--json", *arguments)[1])
    ]


def test_a_notebook_is_executed_once_per_content(checkout, capsys):
    assert outcome(capsys) == ["executed"]
    assert outcome(capsys) == ["up to date"]
    assert outcome(capsys, "-p", "seed=3") == ["executed"]
    record = json.loads((checkout / "book" / "_records" / "smoke" / "01_a.json").read_text())[
        "records"
    ]["a.seed"]
    assert record["value"] == 3
    (checkout / "qpmerge_lite" / "companion" / "cli.py").write_text("outside = 'this notebook'")
    assert outcome(capsys, "-p", "seed=3") == ["up to date"]
    (checkout / "qpmerge_lite" / "companion" / "records.py").write_text("inside = 'this notebook'")
    assert outcome(capsys, "-p", "seed=3") == ["executed"]
    (checkout / "book" / "_records" / "smoke" / "01_a.json").unlink()
    assert outcome(capsys, "-p", "seed=3") == ["executed"]


def test_force_executes_anyway(checkout, capsys):
    assert outcome(capsys) == ["executed"] and outcome(capsys, "--force") == ["executed"]
    assert [path.name for path in (checkout / "book" / "chapters").iterdir()] == ["01_a.ipynb"]


def test_a_failing_notebook_is_kept_and_named_and_the_others_still_run(executed):
    assert executed.status == 1 and "01_a: executed" in executed.out
    assert "00_broken failed with ValueError: on purpose" in executed.err
    assert "book/chapters/00_broken.failed.ipynb" in executed.err
    kept = nbformat.read(executed.chapters / "00_broken.failed.ipynb", as_version=4)
    assert any(
        o["output_type"] == "error"
        for cell in kept.cells
        if cell.cell_type == "code"
        for o in cell.outputs
    )


def test_a_run_names_every_notebook_as_it_starts_and_ends_and_the_time_left(executed):
    lines = executed.out.splitlines()
    for name in IN_KERNELS:
        own = [line for line in lines if line.startswith(f"{name}: ")]
        assert [line.split()[1].strip(",") for line in own] in (
            ["started", "executed"],
            ["started", "failed"],
        )
        assert all(line.endswith((" left", "nearly done")) for line in own)
    assert lines[-1].endswith("nearly done")


def test_a_run_remembers_how_long_its_notebooks_took(executed):
    taken = json.loads((executed.root / ".cache" / "seconds.json").read_text())["smoke"]
    assert set(taken) == {"01_a", "02_warned", "03_pages"} and min(taken.values()) > 0


def test_a_failed_copy_goes_once_its_notebook_works(checkout, capsys):
    write(checkout / "notebooks" / "00_broken.ipynb", "raise ValueError('on purpose')")
    assert outcome(capsys) == ["failed", "executed"]
    assert (checkout / "book" / "chapters" / "00_broken.failed.ipynb").exists()
    write(checkout / "notebooks" / "00_broken.ipynb", "1 + 1")
    assert outcome(capsys, "--only", "00") == ["executed"]
    assert not (checkout / "book" / "chapters" / "00_broken.failed.ipynb").exists()


def test_a_notebook_whose_kernel_dies_is_kept_and_named_too(executed):
    assert "00_killed failed with DeadKernelError" in executed.err
    assert "so far" in (executed.chapters / "00_killed.failed.ipynb").read_text()
    assert not list(executed.chapters.glob(".*"))


def test_chapters_leave_no_trace_of_the_machine(executed):
    names = {path.name for path in executed.chapters.iterdir()}
    assert names == {
        "00_broken.failed.ipynb", "00_killed.failed.ipynb", "01_a.ipynb", "02_warned.ipynb",
        "03_pages.ipynb",
    }  # fmt: skip
    assert str(executed.root) not in (executed.chapters / "01_a.ipynb").read_text()


def test_advice_to_install_widgets_stays_out_of_the_chapters_and_other_warnings_do_not(executed):
    shown = (executed.chapters / "02_warned.ipynb").read_text()
    assert "IProgress" not in shown and "UserWarning: look here" in shown
    assert executed.environment["PYTHONWARNINGS"] == "always::UserWarning"


def test_kernels_take_no_ports_that_another_may_take_at_the_same_time(executed):
    records = json.loads((executed.root / "book" / "_records" / "smoke" / "01_a.json").read_text())
    assert records["records"]["a.transport"]["value"] == "ipc"


def last_output(chapter):
    return nbformat.read(chapter, as_version=4).cells[-1].outputs[0].text.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_notebooks_use_pages_again(executed):
    assert last_output(executed.chapters / "03_pages.ipynb") == "reused"
    assert "GLIBC_TUNABLES" not in executed.environment


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_whoever_says_how_to_allocate_is_obeyed(tmp_path, monkeypatch, capsys):
    own = "glibc.malloc.mmap_threshold=131072"
    monkeypatch.chdir(make_checkout(tmp_path))
    monkeypatch.setenv("GLIBC_TUNABLES", own)
    write(tmp_path / "notebooks" / "01_a.ipynb", COUNT)
    assert outcome(capsys) == ["executed"]
    assert last_output(tmp_path / "book" / "chapters" / "01_a.ipynb") == "fresh"
    assert os.environ["GLIBC_TUNABLES"] == own


def test_records_of_a_run_that_broke_off_are_not_taken_for_those_of_the_chapter(checkout, capsys):
    assert outcome(capsys) == ["executed"]
    write(checkout / "notebooks" / "01_a.ipynb", RECORDING, "recorder.record('a.more', 1)", "1 / 0")
    assert outcome(capsys) == ["failed"]
    write(
        checkout / "notebooks" / "01_a.ipynb", RECORDING
    )  # back to what the chapter was made from
    assert outcome(capsys) == ["executed"]
    assert list(
        json.loads((checkout / "book" / "_records" / "smoke" / "01_a.json").read_text())["records"]
    ) == ["a.seed"]


def test_a_renamed_notebook_leaves_nothing_behind(checkout, capsys):
    assert outcome(capsys) == ["executed"]
    (checkout / "notebooks" / "01_a.ipynb").unlink()
    write(checkout / "notebooks" / "02_b.ipynb", "1 + 1")
    assert outcome(capsys) == ["executed"]
    assert [path.name for path in (checkout / "book" / "chapters").iterdir()] == ["02_b.ipynb"]
    assert list((checkout / "book" / "_records" / "smoke").iterdir()) == []


def test_check_update_and_claims_follow_the_records(checkout, capsys):
    assert outcome(capsys) == ["executed"]
    assert run(capsys, "book", "check", "--no-run")[0] == 1
    assert run(capsys, "book", "check", "--no-run", "--update", "--quiet") == (0, "", "")
    assert run(capsys, "book", "check", "--no-run")[0] == 0
    assert outcome(capsys, "-p", "seed=3") == ["executed"]
    status, _, err = run(capsys, "book", "check", "--no-run")
    assert status == 1 and "01_a: a.seed: found 3, expected exact 0" in err
    assert run(capsys, "book", "claims") == (0, "c: holds\n", "")
    assert (
        "| s *(paper)* | **holds** | [01_a](notebooks/01_a.ipynb) |"
        in (checkout / "README.md").read_text()
    )


def test_another_tier_runs_the_chapters_of_its_plan_and_is_recorded_with_its_commit(
    checkout, capsys
):
    assert outcome(capsys) == ["executed"] and outcome(capsys, "--tier", "standard") == []
    write(checkout / "notebooks" / "05_b.ipynb", RECORDING.replace("01_a", "05_b"))
    assert outcome(capsys, "--tier", "standard") == ["executed"]
    assert {path.name for path in (checkout / "book" / "chapters").iterdir()} == {
        "01_a.ipynb",
        "05_b.ipynb",
    }
    status, _, err = run(capsys, "book", "record")
    assert status == 1 and "05_b.json: expected a provenance with commit, found none" in err
    subprocess.run(["git", "init", "-q"], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert outcome(capsys, "--tier", "standard", "--force", "--only", "05") == ["executed"]
    kept = Path("book", "recorded", "standard", "05_b.json")
    assert run(capsys, "book", "record") == (0, f"wrote {kept}\n", "")
    assert json.loads(kept.read_text())["records"]["a.seed"]["value"] == 0


def test_a_tier_of_checkpoints_asks_for_what_reads_them_before_anything_runs(
    checkout, capsys, monkeypatch
):
    write(checkout / "notebooks" / "05_b.ipynb", RECORDING.replace("01_a", "05_b"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, out, err = run(capsys, "book", "run", "--tier", "standard")
    assert (status, out) == (
        1,
        "",
    ) and "tier standard: transformers, which read its checkpoints, are not installed" in err
    assert "run `make notebooks TIER=standard`" in err and not list(
        (checkout / "book" / "chapters").iterdir()
    )
    assert outcome(capsys, "--only", "05") == ["executed"]


def test_check_executes_all_notebooks_again(checkout, capsys):
    assert outcome(capsys) == ["executed"]
    run(capsys, "book", "check", "--no-run", "--update")
    (checkout / "book" / "_records" / "smoke" / "01_a.json").write_text("{}")
    status, out, _ = run(capsys, "book", "check")
    assert status == 0 and "01_a: executed" in out and "outside tests/expected/smoke: 0" in out


@pytest.mark.parametrize(("arguments", "problem"), [
    (["-p", "sead=1"], "01_a.ipynb: no parameter sead; it has: tier, seed, device"),
    (["-p", "seed"], "expected NAME=VALUE"),
    (["--only", "07"], "no notebook starts with '07'; there are: 01_a"),
])  # fmt: skip
def test_wrong_usage_is_refused_before_anything_runs(checkout, capsys, arguments, problem):
    status, out, err = run(capsys, "book", "run", *arguments)
    assert status == 1 and out == "" and problem in err
    assert not (checkout / "book" / "chapters").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["book"], ["book", "bake"], ["book", "run", "--tier", "huge"]]
)
def test_an_unknown_command_prints_its_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "usage: qpmerge" in capsys.readouterr().err


def test_it_ends_without_a_word_where_nobody_reads_what_it_says():
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "qpmerge_lite", "completion", "bash"]
    done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(written)
    assert (done.returncode, done.stderr) == (141, b"")


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "book", "run")
    assert status == 1 and "no qpmerge-lite checkout above the working directory" in err


def test_values_on_the_command_line_are_literals_or_words():
    read = dict(
        cli._assignment(text)
        for text in ["seed=1", "rate=0.5", "tier=paper", "tasks=['a', 'b']", "empty="]
    )
    assert read == {"seed": 1, "rate": 0.5, "tier": "paper", "tasks": ["a", "b"], "empty": ""}


def test_data_are_listed_and_verified(capsys):
    sources = json.loads(run(capsys, "data", "list", "--json")[1])
    assert {"manifest", "source", "kind", "licence", "verified", "bytes"} == set(sources[0])
    status, out, err = run(capsys, "data", "verify")
    assert (status, err) == (0, "")
    assert all(f"{name}: " in out for name in {source["manifest"] for source in sources})
    status, _, err = run(capsys, "data", "verify", "nonesuch")
    assert status == 1 and "nonesuch" in err


def test_the_example_of_the_readme_runs(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    exec(text.partition("```python\n")[2].partition("```")[0], {"__name__": "example"})
    assert "'basis': 'rows'" in capsys.readouterr().out
