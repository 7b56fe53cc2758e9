"""The virtual cluster: every request ends once, blocks come back, and the same seed gives the same figures."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import TYPE_CHECKING

import pytest

from cluster.simulate.cluster import VirtualCluster
from cluster.simulate.compare import MAKERS
from cluster.simulate.constants import Constants, Workers
from cluster.simulate.readers import read_trace
from cluster.simulate.run import Kill
from cluster.simulate.summary import summarise
from diptych.types import WorkerId

if TYPE_CHECKING:
    from cluster.simulate.run import Run
    from cluster.simulate.trace import Trace

KILLS = (Kill(worker=WorkerId("decode-0"), at=3.0), Kill(worker=WorkerId("prefill-1"), at=5.0, absent_seconds=1.0))


def run(trace: Trace, constants: Constants, policy: str, *, speed: float = 1.0, kills: tuple[Kill, ...] = ()) -> Run:
    cluster = VirtualCluster(trace, constants, MAKERS[policy](), speed=speed, kills=kills)
    done = cluster.run()
    cluster.check()
    return done


@pytest.mark.parametrize("kills", [(), KILLS], ids=["whole", "with deaths"])
@pytest.mark.parametrize("policy", MAKERS)
def test_every_request_gets_all_its_tokens_and_every_block_comes_back(
    conversations: Trace, small: Constants, policy: str, kills: tuple[Kill, ...]
) -> None:
    done = run(conversations, small, policy, speed=4.0, kills=kills)
    assert len(done.asked) == 80
    for asked in done.asked:
        assert not asked.error
        assert asked.tokens == asked.content.output_tokens
        assert asked.first_token is not None
        assert asked.last_token is not None
        assert asked.arrival < asked.first_token < asked.last_token == asked.ended


def read_again(trace: Trace, seed: int) -> Trace:
    """With arrivals in bins of a second."""
    binned = (replace(one, arrival=float(int(one.arrival))) for one in trace.requests)
    return replace(trace, requests=tuple(binned)).spread(seed)


@pytest.mark.parametrize("policy", ["dynamo", "ours"])
def test_the_same_seed_gives_the_same_figures_to_the_last_digit(
    conversations: Trace, small: Constants, policy: str
) -> None:
    trace = read_again(conversations, 7)
    first, second = (run(trace, small, policy, speed=4.0, kills=KILLS) for _ in range(2))
    assert [(a.first_token, a.last_token, a.sent_bytes) for a in first.asked] == [
        (a.first_token, a.last_token, a.sent_bytes) for a in second.asked
    ]
    assert [astuple(look) for look in first.looks] == [astuple(look) for look in second.looks]
    other = run(read_again(conversations, 8), small, policy, speed=4.0, kills=KILLS)
    assert [a.first_token for a in other.asked] != [a.first_token for a in first.asked]


def test_an_empty_cluster_serves_one_request_in_the_time_the_formulas_say(small: Constants) -> None:
    trace = read_trace("single-turn:1")
    [asked] = run(trace, small, "round_robin").asked
    prompt, output = asked.content.prompt_tokens, asked.content.output_tokens
    prefill, decode, chunk = small.prefill_seconds, small.decode_step_seconds, small.prefill_chunk_tokens
    steps = -(-prompt // chunk)
    flops = prefill.linear_flops * prompt + prefill.attention_flops * prompt * prompt / 2
    assert asked.ttft_seconds == pytest.approx(steps * prefill.base + flops / prefill.flops)
    last_chunk = prompt - (prompt - 1) // chunk * chunk
    sending = last_chunk * small.kv_bytes_per_token / small.link.bytes_per_second + small.link.latency_seconds
    steps = output - 1
    reading = sum(decode.per_kv_token * (prompt + 1 + step) for step in range(steps))
    decoding = steps * (decode.base + decode.per_sequence) + reading
    assert asked.last_token is not None
    assert asked.first_token is not None
    assert asked.last_token - asked.first_token == pytest.approx(sending + decoding, rel=1e-3)
    assert asked.sent_bytes == prompt * small.kv_bytes_per_token


def test_a_longer_chain_of_turns_is_found_in_the_caches(conversations: Trace, small: Constants) -> None:
    done = run(conversations, small.model_copy(update={"kv_tokens_per_worker": 2000 * 512}), "longest_prefix")
    assert summarise(done, small.slo, small.kv_bytes_per_token).hit_rate > 0.5


def test_what_decode_holds_is_not_sent_again(conversations: Trace, small: Constants) -> None:
    one = Constants(workers=Workers(prefill=1, decode=1), kv_tokens_per_worker=2000 * 512)
    done = run(conversations, one, "round_robin")
    last = done.asked[-1]
    assert last.sent_bytes < 0.5 * last.content.prompt_tokens * small.kv_bytes_per_token


def test_a_prompt_no_worker_can_hold_is_refused_and_counted(small: Constants) -> None:
    trace = read_trace("single-turn:20")
    tiny = small.model_copy(update={"kv_tokens_per_worker": 2048})
    refused = [asked for asked in run(trace, tiny, "ours").asked if asked.error]
    assert refused
    assert {asked.error for asked in refused} == {"PromptTooLong"}
    assert min(asked.content.prompt_tokens for asked in refused) + 512 > 1536
