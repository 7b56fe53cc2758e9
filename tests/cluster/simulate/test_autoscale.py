"""Roles that follow the load, in virtual time: better than any fixed split, and never to and fro."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from cluster.simulate.cluster import VirtualCluster
from cluster.simulate.constants import Autoscale, Constants, Workers
from cluster.simulate.made import LONG_ANSWERS, LONG_PROMPTS, flipping
from cluster.simulate.ours import ours
from cluster.simulate.run import Run
from cluster.simulate.summary import summarise

TOTAL = 4
LONG = replace(LONG_PROMPTS, seconds=60, requests_per_second=0.8, prompt_tokens=(8000, 24_000), output_tokens=(32, 96))
PHASES = (LONG, replace(LONG_ANSWERS, seconds=30, requests_per_second=1.9), LONG)
SLOTS = 32
"""A worker's: few, so that few requests fill it."""


def run(prefill: int, *, autoscale: bool = False) -> tuple[Run, float]:
    """What came of it, and its goodput."""
    constants = Constants(
        workers=Workers(prefill=prefill, decode=TOTAL - prefill),
        max_decode_batch=SLOTS,
        how="remote",
        autoscale=Autoscale(enabled=autoscale),
    )
    cluster = VirtualCluster(flipping(TOTAL, PHASES, 512), constants, ours(constants))
    done = cluster.run()
    cluster.check()
    return done, summarise(done, constants.slo, constants.kv_bytes_per_token).goodput


@pytest.fixture(scope="module")
def autoscaled() -> tuple[Run, float]:
    return run(TOTAL // 2, autoscale=True)


@pytest.fixture(scope="module")
def fixed() -> dict[int, tuple[Run, float]]:
    """By their prefill workers."""
    return {prefill: run(prefill) for prefill in range(1, TOTAL)}


def test_moving_roles_beat_every_fixed_split_when_the_load_flips_and_turn_once_at_each_flip(
    autoscaled: tuple[Run, float], fixed: dict[int, tuple[Run, float]]
) -> None:
    (done, moving), others = autoscaled, {prefill: goodput for prefill, (_, goodput) in fixed.items()}
    print(f"\nautoscaled {moving:.3f}, fixed {others}")
    assert moving > 1.05 * max(others.values())
    begin = 0.0
    for phase in PHASES:
        roles = [change.role for change in done.role_changes if begin <= change.at < begin + phase.seconds]
        assert roles
        assert sum(before != after for before, after in pairwise(roles)) <= 1
        begin += phase.seconds


def test_whoever_changed_the_role_ends_its_answers_and_gives_back_every_block(autoscaled: tuple[Run, float]) -> None:
    done, _ = autoscaled
    assert len({change.worker for change in done.role_changes}) > 1
    for asked in done.asked:
        assert not asked.error
        assert asked.tokens == asked.content.output_tokens


def test_nobody_moves_where_nobody_autoscales(fixed: dict[int, tuple[Run, float]]) -> None:
    assert not any(done.role_changes for done, _ in fixed.values())
