"""Workers that come, go and are replaced while operators, nodes and growth want something too."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import pytest

from cluster.pools.parts import WorkerPart
from diptych.errors import Internal, InvalidRequest
from diptych.types import DrainNode, DrainWorker, ScalePool, SetWorkerRole, WorkerId, WorkerInfo, WorkerSpec
from tests.cluster.pools.small_ray import Handle, SmallRay

if TYPE_CHECKING:
    from collections.abc import Callable

    from diptych.types import Operation
    from tests.cluster.pools.conftest import House

    Play = Callable[..., None]


NEW = "e" * 56
"""Ray's id of a node that is added: Ray's own classes look whether it is one."""


def cpus(**nodes: float) -> SmallRay:
    """`cpus(a=2.0, b=4.0)`: names are hexadecimal digits."""
    return SmallRay({name * len(NEW): amount for name, amount in nodes.items()})


async def until(happened: Callable[[], bool], seconds: float = 600.0) -> None:
    """By the clock that skips."""
    async with asyncio.timeout(seconds):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


# ---- nobody takes another's place -----------------------------------------------------------------


@pytest.mark.parametrize("later", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
def test_growth_leaves_the_name_and_the_room_of_who_is_just_replaced(play: Play, later: float) -> None:
    """Whenever it looks: every two seconds, and for one."""

    async def scenario(house: House) -> None:
        await asyncio.sleep(later)
        changed = await house.perform(DrainWorker(worker="decode-0", replace=True))
        assert changed.started == ("decode-0",)
        await asyncio.sleep(60)
        assert house.ray.workers() == house.registered()
        assert [(who, epoch) for who, epoch, _ in house.registered()] == [
            ("decode-0", 1),
            ("decode-1", 0),
            ("prefill-0", 0),
        ]

    play(scenario, cpus(a=2.0, b=2.0, c=2.0), pools__decode__workers=2, pools__decode__max_workers=3)


def test_a_successor_on_another_node_does_not_take_the_name_of_who_returns(play: Play) -> None:
    async def scenario(house: House) -> None:
        decode = house.ray.worker("decode-0").node
        other = next(name for name in house.ray.cpus if name != decode)
        replaced = asyncio.ensure_future(house.perform(DrainWorker(worker="decode-0", replace=True)))
        await until(lambda: WorkerId("decode-0") not in house.pools.workers)
        house.ray.add_node(NEW, 4.0)
        drained = asyncio.ensure_future(house.perform(DrainNode(node=other)))
        await asyncio.gather(replaced, drained)
        await asyncio.sleep(60)
        assert house.ray.workers() == house.registered()
        names = [who for who, _, _ in house.ray.workers()]
        assert len(names) == len(set(names)) == 3, names

    play(scenario, cpus(a=4.0, b=4.0), pools__decode__workers=2)


@pytest.mark.parametrize("load_seconds", [2.0, 300.0], ids=["comes up while it is ended", "still loads"])
@pytest.mark.parametrize("grown", [True, False], ids=["grown", "replaced"])
def test_who_is_scaled_away_while_it_starts_does_not_come_back(play: Play, load_seconds: float, grown: bool) -> None:
    async def scenario(house: House) -> None:
        house.ray.load_seconds = load_seconds
        if grown:
            house.ray.add_node(NEW, 2.0)
        else:
            house.ray.worker("decode-2").die()
            await until(lambda: not house.pools.workers[WorkerId("decode-2")].info)
        await until(lambda: any(p.kind == "WorkerActor" and p.node and not p.up for p in house.ray.living()))
        await asyncio.sleep(1.0)
        changed = await house.perform(ScalePool(role="decode", workers=2))
        assert changed.ended == ("decode-2",)
        await asyncio.sleep(900)
        assert set(house.pools.workers) == {"decode-0", "decode-1", "prefill-0"}
        assert house.ray.workers() == house.registered()
        assert not [p for p in house.ray.living() if p.kind == "WorkerActor" and p.spec.id == "decode-2"]
        heard = [(what, epoch) for what, who, epoch in house.ray.told if who == "decode-2"]
        assert not heard or heard[-1][0] == "leave", "the scheduler would count on it for ever"

    if grown:
        play(scenario, cpus(a=2.0, b=2.0, c=2.0), pools__decode__workers=2, pools__decode__max_workers=3)
    else:
        play(scenario, cpus(a=4.0, b=4.0), pools__decode__workers=3)


def test_who_serves_stays_when_a_pool_is_made_smaller_while_another_is_away(play: Play) -> None:
    async def scenario(house: House) -> None:
        house.ray.load_seconds = 300.0
        house.ray.worker("decode-0").die()
        await until(lambda: not house.pools.workers[WorkerId("decode-0")].info)
        changed = await house.perform(ScalePool(role="decode", workers=1))
        assert changed.ended == ("decode-0",), "the other is all that decodes"
        await asyncio.sleep(900)
        assert [who for who, _, _ in house.registered()] == ["decode-1", "prefill-0"]
        assert house.ray.workers() == house.registered()

    play(scenario, cpus(a=4.0, b=4.0), pools__decode__workers=2)


# ---- a node that is to go -------------------------------------------------------------------------


def test_a_drain_moves_what_a_node_has_to_another_and_nothing_comes_back_to_it(play: Play) -> None:
    async def scenario(house: House) -> None:
        left = house.ray.worker("decode-0").node
        house.ray.add_node(NEW, 4.0)
        changed = await house.perform(DrainNode(node=left))
        assert "decode-0" in changed.ended
        await asyncio.sleep(60)
        assert house.ray.workers() == house.registered()
        assert left not in {node for _, _, node in house.registered()}
        assert sorted(part.spec.role for part in house.pools.workers.values()) == ["decode", "prefill"]
        assert house.pools.avoided == {left}
        again = await house.perform(DrainNode(node=left))  # a pod's end, and an operator who says it again
        assert again.ended == ()
        assert house.pools.avoided == {left}

    play(scenario, cpus(a=2.0, b=2.0))


def test_a_drain_that_is_refused_leaves_everything_as_it_was(play: Play) -> None:
    async def scenario(house: House) -> None:
        before, node = house.registered(), house.ray.worker("decode-0").node
        with pytest.raises(InvalidRequest, match=f"no successor was up in time, so {node} stays in use"):
            await house.perform(DrainNode(node=node))
        await asyncio.sleep(1)
        assert house.pools.avoided == set()
        assert house.registered() == before == house.ray.workers()
        assert set(house.pools.workers) == {"prefill-0", "decode-0"}
        assert not any(part.leaving or part.retiring for part in house.pools.workers.values())
        house.ray.worker("decode-0").die()  # the node takes the next one
        await until(lambda: (WorkerId("decode-0"), 1, node) in house.registered())

    play(scenario, cpus(a=2.0, b=2.0), cluster__drain_seconds=20)


def test_of_two_drains_of_a_node_the_last_that_is_refused_opens_it_again(play: Play) -> None:
    async def scenario(house: House) -> None:
        node = house.ray.worker("decode-0").node
        first = asyncio.ensure_future(house.perform(DrainNode(node=node)))
        await asyncio.sleep(10)
        second = asyncio.ensure_future(house.perform(DrainNode(node=node)))
        with pytest.raises(InvalidRequest, match="stays in use"):
            await first
        assert house.pools.avoided == {node}
        with pytest.raises(InvalidRequest, match="stays in use"):
            await second
        assert house.pools.avoided == set()
        await asyncio.sleep(1)
        assert set(house.pools.workers) == {"prefill-0", "decode-0"}

    play(scenario, cpus(a=2.0, b=2.0), cluster__drain_seconds=20)


@pytest.mark.parametrize("crashes", [False, True], ids=["comes up", "is given up"])
def test_a_refused_drain_keeps_the_successor_that_loads(play: Play, crashes: bool) -> None:
    """The next drain needs another one only where that was given up."""

    async def scenario(house: House) -> None:
        node = house.ray.worker("decode-0").node
        house.ray.load_seconds = 100.0
        house.ray.add_node(NEW, 2.0)
        with pytest.raises(InvalidRequest, match="stays in use"):
            await house.perform(DrainNode(node=node))
        assert house.pools.avoided == set()
        house.ray.load_seconds = 5.0
        if crashes:
            house.ray.crashes = lambda spec: spec.id == "decode-1"
            house.ray.worker("decode-1").die()
            await until(lambda: house.pools.workers[WorkerId("decode-1")].lost)
        else:
            await until(lambda: len(house.registered()) == 3)
        changed = await house.perform(DrainNode(node=node))
        assert changed.ended == ("decode-0",)
        heir = "decode-2" if crashes else "decode-1"
        assert [(who, where) for who, _, where in house.registered() if who != "prefill-0"] == [(heir, NEW)]

    play(scenario, cpus(a=2.0, b=2.0), cluster__drain_seconds=20)


def test_a_node_that_is_lost_while_it_drains_takes_no_pool_with_it(play: Play) -> None:
    """Its worker's successor was given up: nobody else would come for it."""

    async def scenario(house: House) -> None:
        node = house.ray.worker("decode-0").node
        house.ray.crashes = lambda spec: spec.id == "decode-1"
        house.ray.add_node(NEW, 2.0)
        drained = asyncio.ensure_future(house.perform(DrainNode(node=node)))
        await until(lambda: any(part.lost for part in house.pools.workers.values()))
        house.ray.lose_node(node)
        await until(lambda: (WorkerId("decode-0"), 1, NEW) in house.registered())
        await drained
        assert not house.pools.workers[WorkerId("decode-0")].leaving, "nobody has to come for it"

    play(scenario, cpus(a=2.0, b=2.0))


def test_a_second_drain_asks_for_a_successor_again(play: Play) -> None:
    async def scenario(house: House) -> None:
        node = house.ray.worker("decode-0").node
        with pytest.raises(InvalidRequest):
            await house.perform(DrainNode(node=node))
        house.ray.add_node(NEW, 2.0)
        changed = await house.perform(DrainNode(node=node))
        assert changed.ended == ("decode-0",)
        assert ("decode", NEW) in {(part.spec.role, part.where) for part in house.pools.workers.values()}

    play(scenario, cpus(a=2.0, b=2.0), cluster__drain_seconds=20)


# ---- room -----------------------------------------------------------------------------------------


def test_waiting_for_room_is_no_death(play: Play) -> None:
    """A stranger has the room for an hour; whoever waits for it is not given up, and says so."""

    async def scenario(house: House) -> None:
        broken = house.broken()
        house.ray.lose_node(house.ray.worker("decode-1").node)
        await asyncio.sleep(3600)
        part = house.pools.workers[WorkerId("decode-1")]
        assert not part.lost
        assert not broken.done(), "another one decodes"
        assert len([line for _, line in house.said if "decode-1 did not start: NoRoom" in line]) > 30
        assert list(house.ray.away) == ["decode-1"]
        assert "needs 2 CPU, free are 0 CPU of 4 CPU in all" in house.ray.away[WorkerId("decode-1")]
        next(one for one in house.ray.living() if one.kind == "SchedulerActor").die()
        house.ray.away = {}
        await asyncio.sleep(10)
        assert list(house.ray.away) == ["decode-1"], "the next scheduler knows, too"
        house.ray.add_node(NEW, 2.0)
        await until(lambda: bool(part.info), 120)
        assert house.ray.away == {}

    play(scenario, cpus(a=2.0, b=2.0, c=2.0), pools__decode__workers=2, cluster__max_deaths=2)


def test_room_is_not_waited_for_for_ever_where_nobody_decodes(play: Play) -> None:
    async def scenario(house: House) -> None:
        broken = house.broken()
        house.ray.lose_node(house.ray.worker("decode-0").node)
        why = await asyncio.wait_for(broken, 3 * 60 + 60)
        assert "no worker that decodes is left: Ray had no room for decode-0 within 60 s" in why

    play(scenario, cpus(a=2.0, b=2.0), cluster__max_deaths=2)


def test_a_worker_that_crashes_again_and_again_is_given_up(play: Play) -> None:
    async def scenario(house: House) -> None:
        house.ray.crashes = lambda spec: spec.id == "decode-1"
        house.ray.worker("decode-1").die()
        await until(lambda: house.pools.workers[WorkerId("decode-1")].lost, 120)
        assert ("error", "decode-1 died 3 times within 10 minutes and is not replaced") in house.said
        await asyncio.sleep(1)
        assert house.ray.away == {"decode-1": "died 3 times within 10 minutes and is not replaced"}

    play(scenario, cpus(a=2.0, b=2.0, c=2.0), pools__decode__workers=2, cluster__max_deaths=2)


def test_a_large_model_has_its_whole_time_to_load_however_late_its_room_came(play: Play) -> None:
    async def scenario(house: House) -> None:
        house.ray.load_seconds = 500.0
        house.ray.lose_node(house.ray.worker("decode-1").node)
        await asyncio.sleep(400)
        house.ray.add_node(NEW, 2.0)
        await until(lambda: (WorkerId("decode-1"), 1, NEW) in house.registered(), 520)

    settings = {"pools__decode__workers": 2, "cluster__room_seconds": 600.0}
    play(scenario, cpus(a=2.0, b=2.0, c=2.0), **settings)


def test_a_worker_that_is_frozen_while_it_loads_is_replaced_before_its_time_is_over(play: Play) -> None:
    async def scenario(house: House) -> None:
        house.ray.worker("decode-1").die()
        await until(lambda: not house.pools.workers[WorkerId("decode-1")].info)
        await asyncio.sleep(2)
        house.ray.worker("decode-1").frozen = True
        await until(lambda: ("decode-1", 2) in [(who, epoch) for who, epoch, _ in house.registered()], 300)
        assert any("its process is frozen" in line for _, line in house.said)

    play(scenario, cpus(a=2.0, b=2.0, c=2.0), pools__decode__workers=2)


# ---- parts that are away --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation",
    [DrainWorker(worker="decode-0", replace=True), SetWorkerRole(worker="decode-0", role="mixed")],
    ids=["drain", "role"],
)
def test_a_change_is_done_though_the_scheduler_has_just_died(play: Play, operation: Operation) -> None:
    async def scenario(house: House) -> None:
        scheduler = next(one for one in house.ray.living() if one.kind == "SchedulerActor")
        scheduler.die()
        await house.perform(operation)
        await asyncio.sleep(60)
        assert house.ray.workers() == house.registered()
        assert len(house.registered()) == 3
        if isinstance(operation, SetWorkerRole):
            assert house.pools.workers[WorkerId("decode-0")].spec.role == "mixed"

    play(scenario, cpus(a=4.0, b=4.0), pools__decode__workers=2)


def test_growth_goes_on_when_the_head_is_back_and_an_operator_hears_that_it_was_away(play: Play) -> None:
    async def scenario(house: House) -> None:
        house.ray.head_is_away = True
        house.ray.add_node(NEW, 2.0)
        with pytest.raises(Internal, match="the head is away"):
            await house.perform(DrainNode(node=NEW))
        await asyncio.sleep(60)
        assert len(house.registered()) == 2
        house.ray.head_is_away = False
        await until(lambda: len(house.registered()) == 3, 60)

    play(scenario, cpus(a=2.0, b=2.0), pools__decode__max_workers=2)


# ---- what the dead leave --------------------------------------------------------------------------


def test_a_hundred_lives_leave_no_more_behind_than_one(play: Play) -> None:
    async def scenario(house: House) -> None:
        async def another() -> None:
            before = house.pools.workers[WorkerId("decode-0")].spec.epoch
            house.ray.worker("decode-0").die()
            await until(lambda: ("decode-0", before + 1) in [(who, epoch) for who, epoch, _ in house.registered()])
            await asyncio.sleep(5)

        await another()
        once = left_behind(house)
        for _ in range(100):
            await another()
        assert left_behind(house) == once
        assert house.pools.workers[WorkerId("decode-0")].spec.epoch == 101

    play(scenario, cpus(a=2.0, b=2.0), cluster__max_deaths=1000)


def left_behind(house: House) -> dict[str, int]:
    gc.collect()
    things = gc.get_objects()
    kinds = (Handle, WorkerPart, WorkerSpec, WorkerInfo, asyncio.Task)
    counts = {kind.__name__: sum(type(one) is kind for one in things) for kind in kinds}
    # Those of the small Ray itself, whose dead processes are listed.
    counts["WorkerSpec"] -= len([one for one in house.ray.processes if one.kind == "WorkerActor"])
    return {**counts, "classes": len(house.ray.classes)}
