"""Which chapter starts when, and how long a run has still to go."""

import json

import pytest

from qpmerge_lite.companion.book import schedule
from qpmerge_lite.companion.book.schedule import Schedule

MINUTES = {"01_short": 60, "02_long": 300, "03_middle": 120, "04_middle": 120}


def test_the_longest_starts_first_and_so_many_run_at_a_time():
    order = Schedule(MINUTES, 2)
    assert [order.next(0), order.next(0), order.next(0)] == ["02_long", "03_middle", None]
    order.end("03_middle", 120)
    assert [order.next(120), order.next(120)] == ["04_middle", None]
    order.end("04_middle", 120)
    assert order.next(240) == "01_short" and not order.waiting


def test_time_left_is_that_of_the_last_to_end():
    order = Schedule(MINUTES, 2)
    assert order.left(0) == 300  # the three others one after the other take as long
    order.next(0)
    assert order.next(0) and order.left(100) == 200
    order.end("03_middle", 120)
    order.next(120)
    assert order.left(130) == pytest.approx(170)


def test_time_left_follows_the_pace_of_this_machine():
    order = Schedule(MINUTES, 2)
    order.next(0), order.next(0)
    order.end("03_middle", 240)  # twice the time: 600 s and 120 + 60 s at double length
    assert order.left(240) == 360
    order.next(240)
    assert order.left(1000) == 120  # the rest is overdue, the last one has not begun


def test_one_worker_takes_the_sum():
    assert Schedule(MINUTES, 1).left(0) == 600


def test_seconds_are_those_of_the_last_run_or_the_committed_ones_or_their_mean(tmp_path):
    assert schedule.seconds(tmp_path, "smoke", ["01_a"]) == {"01_a": schedule.UNKNOWN}
    committed = tmp_path.joinpath(*schedule.COMMITTED)
    committed.parent.mkdir()
    committed.write_text(json.dumps({"smoke": {"01_a": 10, "02_b": 20}}))
    schedule.keep(tmp_path, "smoke", {"01_a": 30.04})
    schedule.keep(tmp_path, "full", {"02_b": 500.0})
    found = schedule.seconds(tmp_path, "smoke", ["01_a", "02_b", "03_new"])
    assert found == {"01_a": 30.0, "02_b": 20, "03_new": 25.0}


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0, "nearly done"),
        (7, "about 10 s left"),
        (84, "about 80 s left"),
        (118, "about 120 s left"),
        (150, "about 2 min left"),
        (1234, "about 21 min left"),
    ],
)
def test_time_left_in_words(seconds, words):
    assert schedule.in_words(seconds) == words
