"""The table of a hand-off's states: what it allows happens, nothing else does."""

from __future__ import annotations

import itertools

import pytest

from diptych.types import TransferId
from workers.transfer.states import FINAL, TABLE, State, Tally, Transfer

ENDS = {"aborted", "expired", "failed"}
DRAWN = {
    "new": {"granted"} | ENDS,
    "granted": {"packing", "sending", "landed"} | ENDS,
    "packing": {"sending"} | ENDS,
    "sending": {"packing", "landed"} | ENDS,
    "landed": {"committed"} | ENDS,
    "committed": {"released", "expired", "failed"},
    "released": set(),
    "aborted": set(),
    "expired": set(),
    "failed": set(),
}


def at(state: State) -> Transfer:
    return Transfer(TransferId("t"), Tally(), state)


def test_the_table_is_the_one_that_is_drawn() -> None:
    assert {before.value: {after.value for after in afters} for before, afters in TABLE.items()} == DRAWN
    assert {state.value for state in FINAL} == {"released"} | ENDS


@pytest.mark.parametrize(("before", "after"), [*itertools.product(State, State)])
def test_each_transition_is_taken_and_counted_or_refused(before: State, after: State) -> None:
    transfer = at(before)
    if after is before:
        transfer.advance(after)
        assert not transfer.tally.transitions
    elif after.value in DRAWN[before.value]:
        transfer.advance(after, "why")
        assert (transfer.state, transfer.reason) == (after, "why")
        assert transfer.tally.transitions == {(before, after): 1}
        assert transfer.tally.ended(after) == 1
    else:
        with pytest.raises(AssertionError, match=f"{before.value} → {after.value} is not in the table"):
            transfer.advance(after)
        assert transfer.state is before


@pytest.mark.parametrize("state", [*State])
def test_the_first_end_counts_and_later_ones_change_nothing(state: State) -> None:
    transfer = at(state)
    assert transfer.live == (state not in FINAL)
    assert transfer.end(State.FAILED, "first") == (state not in FINAL)
    assert not transfer.end(State.EXPIRED, "second")
    assert transfer.reason == ("" if state in FINAL else "first")
    assert transfer.tally.ended(State.EXPIRED) == 0


def test_a_fail_point_stops_a_transition_before_it_happens() -> None:
    seen: list[tuple[str, State, State]] = []

    def stop(transfer: TransferId, before: State, after: State) -> None:
        seen.append((transfer, before, after))
        raise RuntimeError("stopped")

    transfer = Transfer(TransferId("t"), Tally(on_transition=stop))
    with pytest.raises(RuntimeError, match="stopped"):
        transfer.advance(State.GRANTED)
    assert seen == [("t", State.NEW, State.GRANTED)]
    assert (transfer.state, dict(transfer.tally.transitions)) == (State.NEW, {})
