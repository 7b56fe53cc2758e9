"""Sixty-four answers at the same time: all complete, each is what it would be alone, none is left waiting."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Cluster

pytestmark = pytest.mark.e2e

STREAMS = 64
SLOTS = 16
"""Sequences that one tiny worker runs at a time."""
ALONE_TOKENS = 16
WAIT_SECONDS = 60

Ask = dict[str, Any]


def asks(dice: random.Random, vocabulary: range, longest_prompt: int, answers: range) -> list[Ask]:
    """Mixed lengths; every other one is sampled."""
    return [
        {
            "tokens": dice.choices(vocabulary, k=dice.randint(1, longest_prompt)),
            "max_tokens": dice.choice(answers),
            "temperature": place % 2,
            "seed": place,
            "ignore_eos": True,
        }
        for place in range(STREAMS)
    ]


class Streams:
    """Answers on their way, each asked for when the one before has its first token."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.decoding: list[int] = []
        """Places of the streams, in the order in which decode first spoke for them."""

    def read(self, asks: list[Ask]) -> list[list[int]]:
        """All tokens of all."""
        with ThreadPoolExecutor(len(asks)) as threads:
            reads = []
            for place, ask in enumerate(asks):
                begun = Event()
                reads.append(threads.submit(self._read, place, ask, begun))
                assert begun.wait(WAIT_SECONDS), f"stream {place} has no first token"
            return [read.result(WAIT_SECONDS) for read in reads]

    def _read(self, place: int, ask: Ask, begun: Event) -> list[int]:
        tokens: list[int] = []
        for response in self._cluster.client.generate(**ask):
            if not tokens:
                begun.set()
            elif len(tokens) == 1:
                self.decoding.append(place)
            tokens += response.chunk.token_ids
        return tokens


def occupancy(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, int]:
    """Sequences in a mean decode step, and steps."""
    rows, steps = (
        getattr(after["decode-0"].counters, name) - getattr(before["decode-0"].counters, name)
        for name in ("decode_rows", "decode_steps")
    )
    return rows / steps, steps


def test_sixty_four_streams_complete_and_none_starves(tiny: Cluster) -> None:
    wanted = asks(random.Random(64), range(3, 256), 300, range(100, 300))
    streams = Streams(tiny)
    before = tiny.at_rest()
    answers = streams.read(wanted)
    after = tiny.at_rest()

    assert [len(tokens) for tokens in answers] == [ask["max_tokens"] for ask in wanted]
    mean, steps = occupancy(before, after)
    overtaken = max(
        sum(later > place for later in streams.decoding[: streams.decoding.index(place)]) for place in range(STREAMS)
    )
    print(f"\n6: {STREAMS} streams, {sum(map(len, answers))} tokens in {steps} decode steps;")
    print(f"   {mean:.1f} of {SLOTS} sequences in a step; overtaken by at most {overtaken} that came later")
    assert overtaken <= SLOTS
    assert after["decode-0"].counters.preemptions == before["decode-0"].counters.preemptions

    alone = [tiny.answer(**{**ask, "max_tokens": ALONE_TOKENS}).tokens for ask in wanted]
    assert [tuple(tokens[:ALONE_TOKENS]) for tokens in answers] == alone


@pytest.mark.full
def test_sixty_four_streams_of_the_real_model_complete(served: Cluster) -> None:
    wanted = asks(random.Random(6), range(1000, 40000), 64, range(4, 48))
    before = served.at_rest()
    answers = served.answers(wanted)
    after = served.at_rest()
    assert [len(answer.tokens) for answer in answers] == [ask["max_tokens"] for ask in wanted]
    mean, steps = occupancy(before, after)
    print(f"\n6: {STREAMS} streams of the 135M model: {mean:.1f} sequences in each of {steps} decode steps")
    assert mean > 1
