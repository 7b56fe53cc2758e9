"""What of all that workers say is accepted: the current attempt, the next index, once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.front.inbox import Inbox
from cluster.front.patience import Patience
from diptych.errors import Internal, WorkerLost
from diptych.types import Emission, Failure, How, RequestId, Served

REQUEST = RequestId("r")


def said(index: int, token: int | None = None, attempt: int = 0, how: How | None = None) -> Emission:
    served = None
    if how:
        served = Served(how=how, prefill_worker="p", decode_worker="d", prompt_tokens_computed=1, cached_tokens=0)
    return Emission(REQUEST, attempt, 0, index, 100 + index if token is None else token, served=served)


def heard(inbox: Inbox) -> list[int]:
    """The tokens that are there now; raises what ended the answer."""
    return [emission.token for emission in asyncio.run(inbox.wait_next(0.01))]


def test_what_is_early_waits_for_its_turn() -> None:
    inbox = Inbox(Patience())
    inbox.put(said(2))
    inbox.put(said(1))
    assert inbox.accepted == 0
    with pytest.raises(TimeoutError):
        heard(inbox)
    inbox.put(said(0))
    assert heard(inbox) == [100, 101, 102]
    assert inbox.accepted == 3


def test_nothing_is_heard_twice() -> None:
    inbox = Inbox(Patience())
    for emission in (said(0), said(0), said(1), said(0), said(1)):
        inbox.put(emission)
    assert heard(inbox) == [100, 101]
    inbox.put(said(1))
    with pytest.raises(TimeoutError):
        heard(inbox)


def test_another_attempt_is_not_heard_before_or_after_its_time() -> None:
    inbox = Inbox(Patience())
    inbox.put(said(0, attempt=1))
    inbox.restart()
    inbox.put(said(0, attempt=0))
    inbox.put(Failure(REQUEST, 0, Internal("a zombie's")))
    with pytest.raises(TimeoutError):
        heard(inbox)
    inbox.put(said(0, token=7, attempt=1))
    assert heard(inbox) == [7]


def test_a_restart_forgets_what_came_early_and_what_failed() -> None:
    inbox = Inbox(Patience())
    inbox.put(said(1, token=8))
    inbox.fail(WorkerLost("gone"))
    inbox.restart()
    with pytest.raises(TimeoutError):
        heard(inbox)
    inbox.put(said(0, token=1, attempt=1))
    assert heard(inbox) == [1]


def test_another_attempt_goes_on_where_the_last_one_ended() -> None:
    inbox = Inbox(Patience())
    inbox.put(said(0))
    inbox.put(said(1))
    inbox.put(said(3))
    assert heard(inbox) == [100, 101]
    assert inbox.spoke
    inbox.restart()
    assert (inbox.said, inbox.spoke) == ([100, 101], False)
    for late in (said(2), said(2, token=9, attempt=1), said(0, attempt=1), said(3, attempt=1)):
        inbox.put(late)
    assert heard(inbox) == [9, 103]


def test_what_was_not_read_is_not_left_behind() -> None:
    inbox = Inbox(Patience())
    inbox.put(said(0))
    with pytest.raises(AssertionError, match="wait to be read"):
        inbox.restart()


def test_tokens_before_a_failure_are_read_first_and_none_after() -> None:
    inbox = Inbox(Patience())
    inbox.put(said(0))
    inbox.put(Failure(REQUEST, 0, Internal("first")))
    inbox.put(said(1))
    inbox.fail(WorkerLost("second"))
    assert heard(inbox) == [100]
    with pytest.raises(Internal, match="first"):
        heard(inbox)


def test_a_first_token_said_again_is_the_same_one() -> None:
    inbox = Inbox(Patience())
    inbox.put(said(0, token=5, how="remote"))
    inbox.put(said(0, token=5, how="remote"))  # decode repeats what prefill said
    inbox.put(said(1))
    assert heard(inbox) == [5, 101]


def test_an_answer_that_goes_on_from_another_first_token_ends_in_an_error() -> None:
    inbox = Inbox(Patience())
    inbox.put(said(0, token=5, how="remote"))
    assert heard(inbox) == [5]
    inbox.put(said(0, token=6, how="local"))
    inbox.put(said(1))
    with pytest.raises(WorkerLost, match="first token"):
        heard(inbox)


def test_a_late_first_token_of_prefill_does_not_disturb_decodes_own() -> None:
    inbox = Inbox(Patience())
    inbox.put(said(0, token=6, how="local"))
    inbox.put(said(0, token=5, how="remote"))
    inbox.put(said(1))
    assert heard(inbox) == [6, 101]


def test_waiting_ends_when_something_comes() -> None:
    async def test() -> Any:
        inbox = Inbox(Patience())
        waiting = asyncio.ensure_future(inbox.wait_next(20))
        await asyncio.sleep(0)
        inbox.put(said(0))
        return await waiting

    assert asyncio.run(test()) == [said(0)]
