"""`qpmerge`: notebooks run once per content, failures are kept and named, wrong usage is refused
with a reason."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from qpmerge_lite.companion import cli
from qpmerge_lite.companion.book.claims import BEGIN, END

ROOT = Path(__file__).parents[1]
RECORDING = """
from qpmerge_lite.records import Records
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


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one notebook that records its seed; the package itself is the installed
    one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("QPMERGE_RECORDS", raising=False)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("notebooks", "book", "qpmerge_lite"):
        (tmp_path / folder).mkdir()
    (tmp_path / "qpmerge_lite" / "solve.py").write_text("")
    (tmp_path / "book" / "claims.yml").write_text(
        "- {id: c, source: ours, statement: s, chapter: 01_a, records: [a.seed], predicate: a.seed >= 0, measured: '{a.seed}'}\n"
    )
    (tmp_path / "README.md").write_text(f"# Title\n{BEGIN}\n{END}\n")
    write(tmp_path / "notebooks" / "01_a.ipynb", RECORDING)
    return tmp_path


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
    (checkout / "qpmerge_lite" / "cli.py").write_text("# no notebook imports this")
    assert outcome(capsys, "-p", "seed=3") == ["up to date"]
    (checkout / "qpmerge_lite" / "solve.py").write_text("# a source that notebooks depend on")
    assert outcome(capsys, "-p", "seed=3") == ["executed"]
    (checkout / "book" / "_records" / "smoke" / "01_a.json").unlink()
    assert outcome(capsys, "-p", "seed=3") == ["executed"]


def test_force_executes_anyway_and_leaves_no_trace_of_the_machine(checkout, capsys):
    assert outcome(capsys) == ["executed"] and outcome(capsys, "--force") == ["executed"]
    assert str(checkout) not in (checkout / "book" / "chapters" / "01_a.ipynb").read_text()
    assert [path.name for path in (checkout / "book" / "chapters").iterdir()] == ["01_a.ipynb"]


def test_a_failing_notebook_is_kept_and_named_and_the_others_still_run(checkout, capsys):
    write(checkout / "notebooks" / "00_broken.ipynb", "raise ValueError('on purpose')")
    status, out, err = run(capsys, "book", "run")
    assert status == 1 and "01_a: executed" in out
    assert (
        "00_broken failed with ValueError: on purpose" in err
        and "book/chapters/00_broken.failed.ipynb" in err
    )
    kept = nbformat.read(checkout / "book" / "chapters" / "00_broken.failed.ipynb", as_version=4)
    assert any(
        o["output_type"] == "error"
        for cell in kept.cells
        if cell.cell_type == "code"
        for o in cell.outputs
    )
    write(checkout / "notebooks" / "00_broken.ipynb", "1 + 1")
    assert outcome(capsys, "--only", "00") == ["executed"]
    assert not (checkout / "book" / "chapters" / "00_broken.failed.ipynb").exists()


def test_a_notebook_whose_kernel_dies_is_kept_and_named_too(checkout, capsys):
    write(checkout / "notebooks" / "00_killed.ipynb", "print('so far')", "import os; os._exit(1)")
    status, out, err = run(capsys, "book", "run")
    assert (
        status == 1 and "01_a: executed" in out and "00_killed failed with DeadKernelError" in err
    )
    assert "so far" in (checkout / "book" / "chapters" / "00_killed.failed.ipynb").read_text()
    assert not list((checkout / "book" / "chapters").glob(".*"))


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


def test_advice_to_install_widgets_stays_out_of_the_chapters_and_other_warnings_do_not(
    checkout, capsys, monkeypatch
):
    monkeypatch.setenv("PYTHONWARNINGS", "always::UserWarning")
    write(
        checkout / "notebooks" / "01_a.ipynb",
        "import tqdm.auto",
        "import warnings; warnings.warn('look here')",
    )
    assert outcome(capsys) == ["executed"]
    shown = (checkout / "book" / "chapters" / "01_a.ipynb").read_text()
    assert "IProgress" not in shown and "UserWarning: look here" in shown
    assert os.environ["PYTHONWARNINGS"] == "always::UserWarning"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    "own, shown", [(None, "reused"), ("glibc.malloc.mmap_threshold=131072", "fresh")]
)
def test_notebooks_use_pages_again_unless_their_user_says_how_to_allocate(
    checkout, capsys, monkeypatch, own, shown
):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    count = "from resource import RUSAGE_SELF, getrusage\nfaults = lambda: getrusage(RUSAGE_SELF).ru_minflt\nwrite = lambda: len(b'x' * (64 << 20))"
    write(
        checkout / "notebooks" / "01_a.ipynb",
        count,
        "write(); before = faults(); write(); print('reused' if faults() - before < 1000 else 'fresh')",
    )
    assert outcome(capsys) == ["executed"]
    cells = nbformat.read(checkout / "book" / "chapters" / "01_a.ipynb", as_version=4).cells
    assert cells[-1].outputs[0].text.strip() == shown
    assert os.environ.get("GLIBC_TUNABLES") == own


def test_kernels_take_no_ports_that_another_may_take_at_the_same_time(checkout, capsys):
    asks = "from ipykernel.kernelapp import IPKernelApp\nrecorder.record('a.transport', IPKernelApp.instance().transport)"
    write(checkout / "notebooks" / "01_a.ipynb", RECORDING, asks)
    assert outcome(capsys) == ["executed"]
    assert (
        json.loads((checkout / "book" / "_records" / "smoke" / "01_a.json").read_text())["records"][
            "a.transport"
        ]["value"]
        == "ipc"
    )


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
        "| s *(this book)* | 3 | **holds** | [01_a](notebooks/01_a.ipynb) |"
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
