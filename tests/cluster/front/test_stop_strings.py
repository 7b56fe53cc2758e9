"""Where a text ends: however it is cut into pieces, and whatever the shortest answer is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.front.stop_strings import StopStrings


def said(stops: StopStrings, *pieces: str) -> tuple[list[str], bool]:
    shown: list[str] = []
    for piece in pieces:
        text, found = stops.push(piece)
        shown.append(text)
        if found:
            return shown, True
    return [*shown, stops.finish()], False


def test_text_that_could_begin_a_stop_string_is_held_until_it_does_not() -> None:
    assert said(StopStrings(("STOP",)), "a S", "T", "O", "x", "S") == (["a ", "", "", "STOx", "", "S"], False)
    assert said(StopStrings(("STOP",)), "a S", "TO", "P b") == (["a ", "", ""], True)


def test_the_stop_string_is_shown_when_it_is_to_be_included_and_nothing_after_it() -> None:
    assert said(StopStrings(("STOP",), include=True), "a S", "TO", "P b") == (["a ", "", "STOP"], True)


def test_the_first_to_begin_ends_the_text() -> None:
    assert said(StopStrings(("cd", "bcx", "b")), "abcd") == (["a"], True)
    assert said(StopStrings(("bcd", "bc"), include=True), "abcd") == (["abc"], True)


def test_a_stop_string_that_came_too_early_is_text_now_and_later() -> None:
    stops = StopStrings(("ab",))
    assert stops.push("xab", may_stop=False) == ("xab", False)
    assert stops.push("ya") == ("y", False)
    assert stops.push("b") == ("", True)


@pytest.mark.parametrize(("before", "after"), [("xa", "b"), ("a", "b"), ("", "ab")])
def test_one_that_began_too_early_and_ends_in_time_counts(before: str, after: str) -> None:
    stops = StopStrings(("ab",))
    stops.push(before, may_stop=False)
    assert stops.push(after)[1]


def test_one_that_overlaps_with_one_that_came_too_early_counts() -> None:
    stops = StopStrings(("aba",))
    assert stops.push("aba", may_stop=False) == ("ab", False)
    assert stops.push("ba") == ("", True)


@given(text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_letter_by_letter_the_text_ends_where_its_first_stop_string_is_complete(text: str, stops: list[str]) -> None:
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    for include in (False, True):
        shown, found = said(StopStrings(tuple(stops), include=include), *text)
        assert found == bool(ends)
        if not ends:
            assert "".join(shown) == text
            continue
        longest = max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))
        assert "".join(shown) == text[: ends[0] if include else ends[0] - longest]
