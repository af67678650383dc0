"""The chapter on the command line: commands run in a folder, their transcript, and what the suite
measures beside them."""

import pytest
import torch

from qpmerge_lite.companion.experiments.commands import terminal, written
from qpmerge_lite.companion.suites import language
from qpmerge_lite.errors import MergeError

TEXTS = ["abc", "de fg"]


def test_a_command_runs_in_the_folder_and_is_shown(tmp_path, capsys):
    (tmp_path / "a.py").write_text("import sys; print('here', sys.argv[1:])")
    said = terminal.run(tmp_path, "python a.py one\n'two three'")
    assert said == "here ['one', 'two three']\n"
    assert capsys.readouterr().out == f"\n$ python a.py one 'two three'\n{said}"


def test_a_refusal_is_shown_where_it_is_expected_and_an_error_elsewhere(tmp_path, capsys):
    said = terminal.run(tmp_path, "qpmerge check base expert", refused=True)
    assert "ERROR base" in said and str(tmp_path) not in said
    assert capsys.readouterr().out.startswith("\n$ qpmerge check base expert\nERROR base")
    with pytest.raises(MergeError, match="expected success, found exit status 1"):
        terminal.run(tmp_path, "qpmerge check base expert")
    (tmp_path / "a.py").write_text("")
    with pytest.raises(MergeError, match="expected a refusal, found exit status 0"):
        terminal.run(tmp_path, "python a.py", refused=True)


def test_wrong_usage_ends_with_its_own_status(tmp_path):
    with pytest.raises(MergeError, match="(?s)found exit status 2: usage: qpmerge"):
        terminal.run(tmp_path, "qpmerge merge base")


def test_accuracies_that_evaluate_prints_are_read_back():
    said = (
        "task    model   inputs  accuracy           ratio to expert\n"
        "digits  expert  300     0.95 [0.92, 0.97]  –\n"
        "digits  mine    300     0.88 [0.84, 0.91]  0.93 [0.89, 0.96]\n"
        "more    mine    9       0.5 [0.2, 0.8]     –\n"
    )
    found = written.accuracies(said, "digits")
    assert found == {"expert": (0.95, 0.92, 0.97), "mine": (0.88, 0.84, 0.91)}


def test_a_long_command_is_cut_before_its_options():
    files = [f"--calibration expert{n}=a/long/way/expert{n}.jsonl" for n in range(4)]
    lines = terminal.shown(" ".join(["qpmerge merge base", *files])).split(" \\\n")
    assert len(lines) > 1 and max(map(len, lines)) <= terminal.WIDTH
    assert all(line.startswith("    --calibration expert") for line in lines[1:])


def test_a_command_begins_behind_the_prompt_however_long():
    folders = " ".join(f"expert{n}=a/long/way/expert{n}" for n in range(4))
    assert terminal.shown(f"qpmerge check {folders}") == f"$ qpmerge check {folders}"


def test_long_lines_are_folded_and_no_word_is_lost():
    said = "ERROR " + "word " * 40 + "\nshort   line"
    folded = terminal.folded(said)
    assert folded.split() == said.split() and folded.endswith("\nshort   line")
    assert max(map(len, folded.splitlines())) <= terminal.WIDTH


def test_what_was_folded_wider_is_folded_anew():
    said = f"first: {'word ' * 18}\n  {'more ' * 10}\nsecond: x\n"
    lines = terminal.folded(said).splitlines()
    assert lines[0].startswith("first:") and lines[-1] == "second: x"
    assert len(lines) == 3 and lines[1].startswith("  ")


def test_files_are_listed_by_relative_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.bin").write_bytes(bytes(1500))
    assert terminal.files(tmp_path, "*/*") == "b/x.bin  1.5 kB"


class Bare:
    """A suite as far as its base."""

    base = language.build()


def test_captured_energy_is_one_for_the_expert_and_zero_for_the_base():
    torch.manual_seed(0)
    expert = language.build().state_dict()
    assert written.captured(Bare, expert, expert, TEXTS) == {"character": 1, "text": 1}
    assert written.captured(Bare, {}, expert, TEXTS) == {"character": 0, "text": 0}


def test_captured_energy_counts_no_padding():
    torch.manual_seed(0)
    expert, half = language.build().state_dict(), language.build().state_dict()
    alone = written.captured(Bare, half, expert, TEXTS[:1])
    several = written.captured(Bare, half, expert, [TEXTS[0], TEXTS[0]])
    assert several == pytest.approx(alone, abs=1e-5)


def test_what_diagnose_prints_is_read_back():
    said = "expert  texts  captured\nfirst   64     0.56 [0.53, 0.59]\nsecond  9      −0.10\n"
    assert (written.told(said, "first"), written.told(said, "second")) == (0.56, -0.1)


def test_a_framed_page_stays_inside_its_frame(tmp_path):
    (tmp_path / "a.html").write_text('<p title="x">a & b</p>', encoding="utf-8")
    frame = written.framed(tmp_path / "a.html", 300)
    assert frame.count("<") == 4 and "sandbox" in frame and "300px" in frame
    assert "&lt;p title=&quot;x&quot;&gt;a &amp; b" in frame
