"""The log as it is written: text for people, JSON for programs, bars on a terminal only."""

from __future__ import annotations

import io
import json
import os
import pickle
import pty
import re
import time
from contextlib import suppress

import pytest

from cluster import terminal
from cluster.config.schema import Log
from cluster.journal import Entry, Journal
from cluster.models.progress import Step, watched
from cluster.terminal import Terminal

ENDS = Entry(
    1_795_374_600.25,
    "info",
    "front-0",
    "request ends",
    {"status": 200, "seconds": 0.1234567, "finish": None, "method": 'POST "/v1"'},
)


def written(entry: Entry, **log: str) -> str:
    stream = io.StringIO()
    Journal(Log(**log), Terminal(stream)).add(entry)
    return stream.getvalue()


def test_text_is_a_clock_who_speaks_and_what_is_known() -> None:
    line = written(ENDS)
    assert re.fullmatch(
        r'\d\d:\d\d:\d\d\.250 front-0 request ends status=200 seconds=0\.123 method="POST \\"/v1\\""\n', line
    )


def test_json_is_one_object_with_utc_time_and_plain_numbers() -> None:
    line = written(ENDS, format="json")
    assert line.endswith("}\n")
    assert json.loads(line) == {
        "time": "2026-11-22T19:10:00.250Z",
        "level": "info",
        "source": "front-0",
        "message": "request ends",
        "status": 200,
        "seconds": 0.1234567,
        "method": 'POST "/v1"',
    }


@pytest.mark.parametrize("shape", ["text", "json"])
def test_nothing_that_was_logged_can_forge_a_line(shape: str) -> None:
    line = written(ENDS._replace(fields={"request_id": "a\n12:00:00.000 front-0 forged"}), format=shape)
    assert line.count("\n") == 1


def test_a_traceback_stands_below_its_line() -> None:
    line = written(ENDS._replace(level="error", fields={"traceback": "  File x\nValueError"}))
    assert line.endswith("front-0 error: request ends\n  File x\nValueError\n")


def test_what_matters_less_than_the_level_is_not_written() -> None:
    assert written(ENDS, level="warning") == ""
    assert "warning: request ends" in written(ENDS._replace(level="warning"), level="warning")


def test_the_last_word_is_written_at_any_level() -> None:
    stream = io.StringIO()
    Journal(Log(level="error"), Terminal(stream)).fail("no port is free")
    assert stream.getvalue() == "error: no port is free\n"
    stream = io.StringIO()
    Journal(Log(format="json"), Terminal(stream)).fail("no port is free")
    assert json.loads(stream.getvalue())["level"] == "error"


def test_a_step_is_a_line_that_crosses_processes_whole() -> None:
    step = pickle.loads(pickle.dumps(Step("half", 1, 2)))
    assert (step, step.part, step.whole) == ("half", 1, 2)


def test_in_a_file_steps_are_lines_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with Terminal(stream) as told:
        told.tell("begins")
        for part in range(50):
            told.tell(Step(f"{part} of 50", part, 50))
        monkeypatch.setattr(terminal, "EVERY_SECONDS", 0)
        told.tell(Step("50 of 50", 50, 50))
    assert stream.getvalue() == "begins\n50 of 50\n"


def drawn(*lines: str, bars: bool = True) -> str:
    """What a terminal got."""
    screen, inside = pty.openpty()
    with os.fdopen(screen, "rb", buffering=0) as shown:
        with os.fdopen(inside, "w") as stream, Terminal(stream, bars=bars) as told:
            for line in lines:
                told.tell(line)
        pieces: list[bytes] = []
        with suppress(OSError):  # the end of a terminal
            while piece := shown.read(1 << 16):
                pieces.append(piece)
    return b"".join(pieces).decode()


def test_on_a_terminal_steps_are_a_bar_that_makes_room_for_lines() -> None:
    shown = drawn("begins", Step("12 of 50", 12, 50), "ends")
    assert re.search(r"12 of 50 .*━", shown)
    assert shown.startswith("begins\r\n")
    assert re.search(r"\x1b\[2K(\x1b\[[0-9;?]*[a-z])*ends\r\n$", shown, re.DOTALL)


def test_a_bar_is_taken_away_when_nothing_follows() -> None:
    shown = drawn(Step("12 of 50", 12, 50))
    assert re.sub(r"\x1b\[\?25h|\r|\n", "", shown).endswith("\x1b[1A\x1b[2K")
    assert "\x1b[?25h" in shown, "the cursor is back"


def test_programs_that_own_a_terminal_get_no_bar() -> None:
    assert "━" not in drawn("begins", Step("12 of 50", 12, 50), bars=False)


def test_whoever_waits_is_told_how_far_it_is() -> None:
    said: list[str] = []
    with watched(said.append, lambda: Step("half", 1, 2)):
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
    assert said[0] == "half"
