"""How often a worker reports: rarely while it only decodes, soon when a placement would go elsewhere."""

from __future__ import annotations

from workers.report_pace import ReportPace


def reports(pace: ReportPace, seconds: float, *, start: float = 0.0, load_changed: bool, progressed: bool) -> int:
    """In so many seconds of steps of 10 ms that are all alike."""
    steps = range(round(seconds * 100))
    return sum(pace.is_due(start + step / 100, load_changed=load_changed, progressed=progressed) for step in steps)


def test_a_batch_that_only_decodes_is_told_of_once_a_second() -> None:
    pace = ReportPace()
    pace.is_due(0.0, load_changed=True, progressed=True)
    assert 4 <= reports(pace, 5.0, start=0.01, load_changed=False, progressed=True) <= 6


def test_arrivals_are_told_at_most_ten_times_a_second() -> None:
    assert 18 <= reports(ReportPace(), 2.0, load_changed=True, progressed=True) <= 21


def test_the_first_change_after_a_quiet_time_is_told_at_once() -> None:
    pace = ReportPace()
    pace.is_due(0.0, load_changed=True, progressed=False)
    assert not pace.is_due(0.5, load_changed=False, progressed=False)
    assert pace.is_due(0.6, load_changed=True, progressed=True)


def test_falling_idle_is_told_at_once_and_only_once() -> None:
    pace = ReportPace()
    pace.is_due(0.0, load_changed=True, progressed=True)
    assert not pace.is_due(0.01, load_changed=False, progressed=True)
    assert pace.is_due(0.02, load_changed=False, progressed=False)
    assert pace.settled
    assert not pace.is_due(0.03, load_changed=False, progressed=False)
    assert not pace.settled


def test_silence_never_lasts_longer_than_the_heartbeat() -> None:
    assert 11 <= reports(ReportPace(), 10.0, load_changed=False, progressed=False) <= 13


def test_a_wanted_full_report_goes_out_with_the_next_change_of_load() -> None:
    pace = ReportPace()
    pace.is_due(0.0, load_changed=True, progressed=True)
    assert not pace.is_due(0.05, load_changed=False, progressed=True, urgent=True)
    assert pace.is_due(0.1, load_changed=False, progressed=True)
