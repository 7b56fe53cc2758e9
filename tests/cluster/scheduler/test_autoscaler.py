"""The autoscaler: who moves when, what it waits for, and that it neither flaps nor leaves its bounds."""

from __future__ import annotations

from math import inf

import pytest

from cluster.scheduler.autoscaler import AutoscalePolicy, Autoscaler, Bounds, Decision
from cluster.scheduler.pressure import Pressure, WorkerPressure
from diptych.types import ScalePool, SetWorkerRole, WorkerId

PATIENT = AutoscalePolicy(workers=Bounds(least=8, most=8))


class Load:
    """A cluster whose demand is set by hand: second after second."""

    def __init__(self, policy: AutoscalePolicy, prefill: int, decode: int) -> None:
        self.autoscaler = Autoscaler(policy)
        self.roles = {f"w{number}": "prefill" if number < prefill else "decode" for number in range(prefill + decode)}
        self.now = self.asked = 0.0

    def seconds(self, count: int, *, prefill: float = 0.0, decode: float = 0.0, waiting: float = 0.0) -> list[Decision]:
        """What it decides while prompts of so many workers' work are asked for and answers fill so many."""
        return [found for _ in range(count) if (found := self.second(prefill, decode, waiting)).operations]

    def second(self, prefill: float, decode: float, waiting: float) -> Decision:
        self.now += 1.0
        self.asked += prefill
        prefills, decodes = self.of("prefill"), self.of("decode")
        pressure = Pressure(
            at=self.now,
            asked_seconds=self.asked,
            queued_seconds=waiting,
            ttft_seconds=2.0,
            prefill=tuple(WorkerPressure(WorkerId(who), 0.0) for who in prefills),
            decode=tuple(WorkerPressure(WorkerId(who), decode / len(decodes)) for who in decodes),
        )
        decision = self.autoscaler.decide(pressure)
        for operation in decision.operations:
            if isinstance(operation, SetWorkerRole):
                self.roles[operation.worker] = operation.role
        return decision

    def of(self, role: str) -> list[str]:
        return [who for who, does in self.roles.items() if does == role]

    @property
    def split(self) -> tuple[int, int]:
        return len(self.of("prefill")), len(self.of("decode"))


def test_workers_go_to_the_role_that_is_short_and_come_back_when_the_load_flips() -> None:
    load = Load(PATIENT, 4, 4)
    load.seconds(60, prefill=4.5, decode=0.5)
    assert load.split == (6, 2)
    load.seconds(60, prefill=0.5, decode=4.5)
    assert load.split[1] >= 6
    assert load.autoscaler.status.reversals == 1


def test_a_decision_says_who_goes_where_and_why() -> None:
    load = Load(PATIENT, 4, 4)
    [decision, *_] = load.seconds(60, prefill=4.5, decode=0.5)
    assert "to prefill, which is short: prefill load 1." in decision.words
    assert dict(load.autoscaler.status.wanted) == {"prefill": 6, "decode": 2}
    assert dict(load.autoscaler.status.changes) == {"prefill short": 2}


def test_what_waits_counts_as_work_to_be_done_within_the_wished_time() -> None:
    load = Load(PATIENT, 4, 4)
    load.seconds(60, prefill=2.0, waiting=5.0)
    assert load.split == (6, 2)


def test_answers_that_grow_are_met_before_they_fill_their_workers() -> None:
    load = Load(PATIENT, 6, 2)
    decided = [load.seconds(1, decode=0.2 * second) for second in range(8)]
    assert sum(map(len, decided)) == 1
    assert load.split[1] > 2


def test_a_moment_s_rush_moves_nobody() -> None:
    load = Load(PATIENT, 4, 4)
    load.seconds(10, prefill=2.0)
    assert not load.seconds(1, prefill=2.0, waiting=10.0)
    assert not load.seconds(30, prefill=2.0)


def test_no_role_is_starved_for_one_that_is_no_worse_off() -> None:
    load = Load(PATIENT, 4, 4)
    assert not load.seconds(60, prefill=6.0, decode=6.0)
    assert load.split == (4, 4)


def test_a_load_that_swings_faster_than_moves_settle_moves_each_way_once_at_most() -> None:
    load = Load(PATIENT, 4, 4)
    for _ in range(6):
        load.seconds(6, prefill=4.5, decode=0.5)
        load.seconds(6, prefill=0.5, decode=4.5)
    assert load.autoscaler.status.reversals <= 72 // PATIENT.settle_seconds


@pytest.mark.parametrize("demand", [0.0, 0.3, 1.0, 3.0, 5.0, 6.8])
def test_a_steady_load_comes_to_rest_without_a_reversal(demand: float) -> None:
    load = Load(PATIENT, 4, 4)
    load.seconds(300, prefill=demand, decode=6.8 - demand)
    split = load.split
    assert not load.seconds(300, prefill=demand, decode=6.8 - demand)
    assert load.split == split
    assert load.autoscaler.status.reversals == 0


def test_bounds_and_what_links_bear_are_kept() -> None:
    load = Load(AutoscalePolicy(decode=Bounds(least=3), workers=Bounds(least=8, most=8)), 4, 4)
    load.seconds(60, prefill=20.0)
    assert load.split == (5, 3)
    load = Load(AutoscalePolicy(workers=Bounds(least=20, most=20)), 10, 10)
    load.seconds(60, prefill=40.0)
    assert load.split == (16, 4)


def test_a_worker_comes_only_when_roles_can_not_help_and_goes_when_all_are_calm() -> None:
    load = Load(AutoscalePolicy(workers=Bounds(least=4, most=6)), 2, 2)
    [grown] = load.seconds(16, prefill=2.5, decode=2.5)
    assert [type(operation) for operation in grown.operations] == [ScalePool]
    assert grown.operations[0] in (ScalePool(role="prefill", workers=4), ScalePool(role="decode", workers=4))
    load = Load(AutoscalePolicy(workers=Bounds(least=3, most=6)), 2, 2)
    assert not load.seconds(119, prefill=0.5, decode=1.0)
    [shrunk] = load.seconds(3, prefill=0.5, decode=1.0)
    assert shrunk.operations == (ScalePool(role="prefill", workers=1),)
    assert "all are calm" in shrunk.words


def test_there_are_never_more_or_fewer_than_allowed() -> None:
    load = Load(AutoscalePolicy(workers=Bounds(least=4, most=4)), 2, 2)
    assert not load.seconds(300, prefill=20.0, decode=20.0)
    load = Load(AutoscalePolicy(workers=Bounds(least=4, most=inf)), 2, 2)
    assert not load.seconds(600)


def test_a_dry_run_says_once_what_it_would_do() -> None:
    load = Load(AutoscalePolicy(dry_run=True, workers=Bounds(least=8, most=8)), 4, 4)
    decided = [load.second(4.5, 0.5, 0.0) for _ in range(1)]
    for _ in range(20):
        load.roles = {f"w{number}": "prefill" if number < 4 else "decode" for number in range(8)}
        decided.append(load.second(4.5, 0.5, 0.0))
    assert sum(bool(each.operations) for each in decided) == 1
    assert dict(load.autoscaler.status.wanted)["prefill"] > 4
