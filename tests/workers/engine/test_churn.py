"""Requests come, are cancelled or end by the thousand: no block is lost and few are idle."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from diptych.hashing import KvIdentity, granule_hashes
from diptych.types import FrontId, ModelSource, Request, RequestId, SamplingParams
from workers.engine.engine import Engine, EngineLimits
from workers.engine.model import Model
from workers.engine.sequence import Sequence
from workers.engine.weights import load_weights

BLOCK = 16
TINY = ModelSource(name="random:tiny", path="random:tiny", digest="0123456789abcdef")
ROOT = KvIdentity(model_digest=TINY.digest, weight_format="fp32", kv_dtype="fp32").root()


@dataclass(slots=True)
class Tally:
    """What was seen over all steps."""

    finished: int = 0
    cancelled: int = 0
    preempted: int = 0
    used_slots: int = 0
    allocated_slots: int = 0
    living: dict[str, Sequence] = field(default_factory=dict[str, Sequence])


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    limits = EngineLimits(block_size=BLOCK, blocks=48, max_batch_tokens=256, max_running=32, max_context=1024)
    model = Model(load_weights(TINY, "fp32", cache=None), max_context=1024, device=device)
    return Engine(model, limits, dtype="fp32", device=device)


def arriving(number: int, dice: random.Random) -> Sequence:
    """Half of the prompts begin with one of eight shared prefixes; lengths are mostly short, some long."""
    shared = [dice.randrange(8)] * 48 if dice.random() < 0.5 else []
    length = int(min(dice.expovariate(1 / 40) + 1, 400))
    prompt = (*shared, *(dice.randrange(256) for _ in range(length)))
    request = Request(
        id=RequestId(f"r{number}"),
        front=FrontId("front"),
        tokens=prompt,
        granules=granule_hashes(prompt, ROOT),
        root=ROOT,
        params=SamplingParams(max_tokens=dice.choice((1, 2, 4, 8, 96)), temperature=0.0),
    )
    return Sequence(request=request, attempt=0, task="answer", arrival=number, block_size=BLOCK)


def measure(engine: Engine, tally: Tally) -> None:
    """Slots of the blocks that running sequences hold, each one's last partial block left out."""
    for sequence in engine.batcher.running:
        tally.used_slots += sequence.computed // BLOCK * BLOCK
        partial = 1 if sequence.computed % BLOCK else 0
        # The block for the token of the next step is there before the step.
        growing = 1 if len(sequence.blocks) * BLOCK - sequence.computed >= BLOCK and sequence.remaining == 1 else 0
        tally.allocated_slots += (len(sequence.blocks) - partial - growing) * BLOCK


def churn(engine: Engine, arrivals: int, dice: random.Random) -> Tally:
    tally, arrived, step = Tally(), 0, 0
    while arrived < arrivals or engine.has_work:
        for _ in range(dice.randrange(8) if arrived < arrivals and len(tally.living) < 64 else 0):
            sequence = arriving(arrived, dice)
            tally.living[sequence.owner] = sequence
            engine.add(sequence)
            arrived += 1
        if tally.living and dice.random() < 0.3:
            victim = tally.living.pop(dice.choice(list(tally.living)))
            engine.drop(victim)
            tally.cancelled += 1
        result = engine.step()
        tally.preempted += len(result.plan.preempted)
        measure(engine, tally)
        for sampled in result.sampled:
            if sampled.finish:
                engine.drop(sampled.sequence)
                del tally.living[sampled.sequence.owner]
                tally.finished += 1
        step += 1
        if step % 16 == 0:
            engine.pool.check()
            assert set(engine.pool.owners()) <= set(tally.living), "someone who is gone holds a block"
    return tally


@pytest.mark.parametrize("arrivals", [1_500, pytest.param(10_000, marks=pytest.mark.full)])
def test_no_block_is_lost_or_idle_in_thousands_of_arrivals(engine: Engine, arrivals: int) -> None:
    tally = churn(engine, arrivals, random.Random(20261122))
    engine.pool.check()
    ratio = tally.used_slots / tally.allocated_slots
    print(
        f"finished {tally.finished} cancelled {tally.cancelled} preempted {tally.preempted} used/allocated {ratio:.4f}"
    )
    assert tally.finished + tally.cancelled >= arrivals
    assert tally.cancelled > arrivals // 20, "the run is too kind to prove anything"
    assert tally.preempted > 0, "the pool is too large to prove anything"
    assert not tally.living
    assert engine.pool.held == engine.pool.granted == engine.pool.lent == 0
    assert engine.pool.free + engine.pool.cached == engine.pool.size
    assert ratio >= 0.96
