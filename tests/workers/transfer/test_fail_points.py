"""Fail points: inert by default, each where it was asked for, once."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from diptych.errors import InvalidRequest
from diptych.types import TransferId
from workers.transfer.fail_points import VARIABLE, FailPoint, fail_points
from workers.transfer.states import State, Tally, Transfer


def transfer(value: str, side: Any = "sender") -> Transfer:
    return Transfer(TransferId("t"), Tally(on_transition=fail_points(side, {VARIABLE: value})))


@pytest.mark.parametrize("value", ["", "receiver:new>granted:raise", "receiver:*>*:kill"])
def test_without_a_point_of_its_side_nothing_is_hooked(value: str) -> None:
    assert fail_points("sender", {VARIABLE: value}) is None
    assert fail_points("sender", {}) is None


def test_it_happens_at_its_transition_before_it_is_taken_and_once() -> None:
    one = transfer("sender:granted>packing:raise")
    one.advance(State.GRANTED)
    with pytest.raises(FailPoint, match="sender:granted>packing:raise of t"):
        one.advance(State.PACKING)
    assert one.state is State.GRANTED
    one.advance(State.PACKING)
    assert one.tally.transitions == {(State.NEW, State.GRANTED): 1, (State.GRANTED, State.PACKING): 1}


@pytest.mark.parametrize("value", ["sender:*>failed:raise", "sender:granted>*:raise", " sender:*>*:raise"])
def test_a_star_is_any_state(value: str) -> None:
    one = transfer(f"receiver:*>*:kill,{value}")
    if "*>failed" in value:
        one.advance(State.GRANTED)
    if "granted>" in value:
        one.advance(State.GRANTED)
    with pytest.raises(FailPoint):
        one.advance(State.FAILED)


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_signals_go_to_its_own_process(action: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr("os.kill", lambda *words: sent.append(words))
    monkeypatch.setattr("os.getpid", lambda: 7)
    transfer(f"receiver:new>granted:{action}", "receiver").advance(State.GRANTED)
    assert sent == [(7, number)]


@pytest.mark.parametrize(
    "value",
    [
        "x",
        "sender:new>landed:kill",
        "sender:new>granted",
        "both:new>granted:kill",
        "sender:new>granted:crash",
        "sender:released>*:kill",
    ],
)
def test_what_is_no_fail_point_is_refused_in_words(value: str) -> None:
    with pytest.raises(InvalidRequest, match="no fail point; side:before>after:action"):
        fail_points("receiver", {VARIABLE: value})
