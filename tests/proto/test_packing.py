"""What a step says to a front comes out of its bytes as it went in, by value and by type."""

from __future__ import annotations

from diptych.errors import Overloaded, WorkerLost
from diptych.packing import packed, unpacked
from diptych.types import Emission, Failure, RequestId, Served, TokenLogprobs

SERVED = Served(
    how="remote", prefill_worker="p", decode_worker="d", prompt_tokens_computed=3, cached_tokens=16, kv_blocks_sent=2
)


def test_tokens_come_out_as_they_went_in() -> None:
    scores = TokenLogprobs(-0.5, 1, (5, 6), (-0.5, -2.0))
    items = (
        Emission(RequestId("a"), 0, 0, 0, 17),
        Emission(RequestId("b"), 2, 1, 9, 4, "stop", SERVED, b"f" * 32, 5, scores, (scores, scores)),
    )
    out = unpacked(packed(items))
    assert out == items
    assert [type(item) for item in out] == [Emission, Emission]
    last = out[1]
    assert isinstance(last, Emission)
    assert isinstance(last.logprobs, TokenLogprobs)
    assert last.prompt_logprobs is not None
    assert isinstance(last.prompt_logprobs[0], TokenLogprobs)


def test_failures_keep_their_error_and_their_place() -> None:
    items = (
        Emission(RequestId("a"), 0, 0, 0, 17),
        Failure(RequestId("b"), 1, WorkerLost("it died")),
        Failure(RequestId("c"), 0, Overloaded("too much", retry_after=2.5)),
        Emission(RequestId("a"), 0, 0, 1, 18),
    )
    out = unpacked(packed(items))
    assert [type(item) for item in out] == [Emission, Failure, Failure, Emission]
    assert [item.request for item in out] == ["a", "b", "c", "a"]
    lost, overloaded = out[1], out[2]
    assert isinstance(lost, Failure)
    assert isinstance(overloaded, Failure)
    assert (type(lost.error), str(lost.error)) == (WorkerLost, "it died")
    assert (type(overloaded.error), overloaded.error.retry_after) == (Overloaded, 2.5)


def test_nothing_is_nothing() -> None:
    assert unpacked(packed(())) == ()
