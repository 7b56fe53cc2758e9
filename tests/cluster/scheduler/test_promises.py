"""Prefixes that are promised to be cached soon."""

from __future__ import annotations

from cluster.scheduler.promises import Promises
from diptych.types import BlockHash

LONG = tuple(BlockHash(bytes([place])) for place in range(100))
OTHER = (*LONG[:50], *(BlockHash(bytes([1, place])) for place in range(50)))
A, B = 1, 2


def test_a_prompt_is_promised_whole_to_who_asks_for_the_same() -> None:
    promises = Promises()
    promises.make(LONG, A, 0.0, 1.0)
    assert promises.depths(LONG, 0.5) == [(100, A)]
    assert promises.depths(OTHER, 0.5) == [(48, A)], "the most of 50 with two significant bits"
    assert promises.depths((BlockHash(b"new"), *OTHER[51:]), 0.5) == []
    assert promises.depths((), 0.5) == []


def test_who_was_promised_more_is_told_apart() -> None:
    promises = Promises()
    promises.make(LONG, A, 0.0, 1.0)
    promises.make(LONG[:10], B, 0.0, 1.0)
    assert sorted(promises.depths(LONG, 0.5)) == [(8, B), (100, A)]


def test_a_promise_holds_until_its_time_and_not_twice_as_long() -> None:
    promises = Promises()
    promises.make(LONG, A, 0.0, 10.0)
    promises.make(OTHER, B, 9.0, 10.0)
    assert promises.depths(OTHER, 9.9) == [(48, A), (100, B)] or promises.depths(OTHER, 9.9) == [(100, B), (48, A)]
    assert promises.depths(LONG, 30.0) == []
    assert len(promises) == 0


def test_the_promises_of_who_is_gone_are_gone() -> None:
    promises = Promises()
    promises.make(LONG, A | B, 0.0, 10.0)
    promises.revoke(A)
    assert promises.depths(LONG, 1.0) == [(100, B)]


def test_what_promises_cost_is_bounded_by_few_entries_each() -> None:
    promises = Promises()
    promises.make(LONG, A, 0.0, 10.0)
    assert len(promises) == 14
