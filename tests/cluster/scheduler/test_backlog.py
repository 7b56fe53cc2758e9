"""Work that waits at a worker, between what was placed and what was reported."""

from __future__ import annotations

import pytest

from cluster.scheduler.backlog import Backlog

HIGH, NORMAL, LOW = range(3)


def test_work_goes_on_between_reports_the_more_important_first() -> None:
    backlog = Backlog()
    backlog.place(0.0, LOW, 1000, 1.0)
    backlog.place(0.5, HIGH, 500, 1.0)
    assert backlog.reported(1.0, 1000 - 500 + 500 - 250, 1.0) == pytest.approx([0.5, 0.5, 1.0])


def test_a_report_says_how_much_of_it_is_done() -> None:
    backlog = Backlog()
    for _ in range(2):
        backlog.place(0.0, NORMAL, 1000, 1.0)
    assert backlog.reported(0.5, 1000, 9.9)[NORMAL] == pytest.approx(1.0), "faster than predicted"
    assert backlog.reported(1.0, 900, 9.9)[NORMAL] == pytest.approx(0.9), "slower than predicted"
    assert backlog.reported(9.0, 0, 9.9) == [0.0, 0.0, 0.0]


def test_what_others_placed_counts_at_the_workers_rate() -> None:
    backlog = Backlog()
    assert backlog.reported(1.0, 1000, 0.002) == pytest.approx([2.0, 2.0, 2.0])


def test_what_may_still_be_on_its_way_is_not_taken_for_done() -> None:
    backlog = Backlog()
    backlog.place(1.0, NORMAL, 1000, 1.0)
    assert backlog.reported(1.001, 0, 9.9)[NORMAL] == pytest.approx(1.0, abs=0.01)
    assert backlog.reported(1.1, 0, 9.9)[NORMAL] == 0.0
