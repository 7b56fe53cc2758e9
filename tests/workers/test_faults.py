"""Whatever breaks between two workers, the answer is the clean run's and no block is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from diptych.errors import WorkerLost
from workers.worker import Worker

Make = Callable[..., Any]
LEASE_SECONDS = 1.5
LENGTH = 300


async def dies(*_: object) -> None:
    raise WorkerLost("gone")


async def is_lost(*_: object) -> None:
    """Nothing arrives and nobody says so."""
    await asyncio.Event().wait()


def only_link(side: Any) -> Any:
    """The link of a side's one pair."""
    [pair] = side._pairs._pairs.values()
    return pair._link


@pytest.fixture
def faulty(pair: Make, bench: Make, prompt: Make, request_for: Make) -> Make:
    """(break_it, **pair) → runs one request between workers that `break_it` has prepared, then a good one.

    Returns the pair's last counters (prefill's, decode's).
    """

    async def runs(break_it: Callable[[Any], None], **both: Any) -> tuple[Any, Any]:
        request, after = request_for(prompt(LENGTH)), request_for(prompt(90, seed=7))
        clean = bench().answers(request_for(prompt(LENGTH)), request_for(prompt(90, seed=7)))
        async with pair(lease_seconds=LEASE_SECONDS, **both) as two:
            break_it(two)
            answers = await two.answers(request)
            await two.settle()
            for wire in (two.to_p, two.to_d):
                wire.before.clear()
                wire.after.clear()
            assert answers + await two.answers(after) == clean
            await two.settle()
            return await two.counters(two.p), await two.counters(two.d)

    return runs


@pytest.mark.parametrize("fault", [dies, is_lost])
@pytest.mark.parametrize(
    ("side", "name"),
    [("to_p", "run"), ("to_p", "committed"), ("to_d", "grant"), ("to_d", "expect")],
)
def test_a_call_that_fails_or_is_lost(run: Make, faulty: Make, side: str, name: str, fault: Any) -> None:
    async def test() -> None:
        p, d = await faulty(lambda two: getattr(two, side).before.__setitem__(name, fault))
        assert name == "expect" or p.transfers_failed == (name != "run")
        assert d.transfers_failed == (name != "committed")

    run(test())


@pytest.mark.parametrize("fault", [dies, is_lost])
@pytest.mark.parametrize(("side", "name"), [("to_p", "run"), ("to_d", "grant")])
def test_an_answer_to_a_call_that_is_lost(run: Make, faulty: Make, side: str, name: str, fault: Any) -> None:
    async def test() -> None:
        _, d = await faulty(lambda two: getattr(two, side).after.__setitem__(name, fault))
        assert (d.transfers_failed, d.transfers_committed) == (1, 1)

    run(test())


@pytest.mark.parametrize(
    "names",
    [("expect", "transfer_failed"), ("grant", "transfer_failed")],
)
def test_the_word_that_a_hand_off_failed_is_lost_too(run: Make, faulty: Make, names: tuple[str, ...]) -> None:
    async def test() -> None:
        def breaks(two: Any) -> None:
            two.to_d.before.update(dict.fromkeys(names, is_lost))
            two.to_p.before["withdraw"] = is_lost

        _, d = await faulty(breaks)
        assert d.transfers_failed == 1

    run(test())


def test_a_prefill_worker_that_answers_nothing_any_more(run: Make, faulty: Make) -> None:
    async def test() -> None:
        def breaks(two: Any) -> None:
            for name in ("run", "is_pending", "committed", "withdraw"):
                two.to_p.after[name] = is_lost
            for name in ("grant", "expect", "transfer_failed"):
                two.to_d.before[name] = is_lost

        await faulty(breaks)

    run(test())


@pytest.mark.parametrize("end", ["p", "d"])
def test_a_link_that_closes_under_a_parcel(run: Make, faulty: Make, end: str) -> None:
    async def test() -> None:
        def breaks(two: Any) -> None:
            async def close(*_: object) -> None:
                if end == "p":
                    await two.see(two.p, lambda roles: only_link(roles.sender).close())
                else:
                    await two.see(two.d, lambda roles: only_link(roles.receiver).close())

            two.to_d.before["expect"] = close

        _, d = await faulty(breaks)
        assert (d.transfers_failed, d.transfers_committed) == (1, 1)

    run(test())


@pytest.mark.parametrize("verify", ["sample", "all"])
def test_a_parcel_that_is_corrupted_on_its_way(run: Make, faulty: Make, verify: str) -> None:
    async def test() -> None:
        seen: list[Any] = []

        def breaks(two: Any) -> None:
            async def corrupt(*_: object) -> None:
                link = await two.see(two.d, lambda roles: only_link(roles.receiver))
                receive = link.receive

                def receive_corrupt(parcel: Any) -> Any:
                    packed = receive(parcel)
                    packed[parcel.nbytes // 2] ^= 1
                    return packed

                if not seen:
                    link.receive = receive_corrupt
                    seen.append((link, receive))

            two.to_d.before["expect"] = corrupt

            async def mend(*_: object) -> None:
                link, receive = seen[0]
                link.receive = receive

            two.to_p.after["withdraw"] = mend

        _, d = await faulty(breaks, verify=verify)
        assert (d.transfers_failed, d.transfers_committed) == (1, 1)

    run(test())


def test_a_parcel_announced_twice_lands_once(run: Make, faulty: Make) -> None:
    async def test() -> None:
        def breaks(two: Any) -> None:
            landed = asyncio.Event()

            async def again(sender: Any, parcel: Any) -> None:
                await two.until(two.d, lambda roles: roles.receiver.counters.blocks > 0)
                await two.d.expect(sender, parcel)
                landed.set()

            async def hold(*_: object) -> None:
                await landed.wait()

            two.to_d.after["expect"] = again
            two.to_p.after["run"] = hold

        _, d = await faulty(breaks, max_batch_tokens=512)
        assert (d.transfers_failed, d.transfers_committed) == (0, 2)

    run(test())


def test_a_commit_that_overtakes_its_ticket(run: Make, pair: Make, prompt: Make, request_for: Make) -> None:
    async def test() -> None:
        async with pair() as two:
            await two.answers(request_for(prompt(32)))
            prefilled, committed = asyncio.Event(), asyncio.Event()

            async def note(event: asyncio.Event) -> None:
                event.set()

            two.to_p.after = {"run": lambda *_: note(prefilled), "committed": lambda *_: note(committed)}
            two.to_d.before["grant"] = lambda *_: prefilled.wait()
            two.to_d.after["grant"] = lambda *_: committed.wait()
            request = request_for(prompt(32))
            await two.answers(request)
            assert two.front.served(request.id).kv_blocks_sent == 0
            await two.settle()
            assert (await two.counters(two.p)).transfers_failed == 0
            assert (await two.transitions(two.p))["committed", "released"] == 2

    run(test())


def test_a_stale_ticket_does_not_harm_the_pair_that_replaced_its_own(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair() as two:
            stale, good = request_for(prompt(100)), request_for(prompt(120, seed=1))
            granted, late, announced, on = (asyncio.Event() for _ in range(4))

            async def hold_stale(request: str, _: int) -> None:
                if request == stale.id:
                    granted.set()
                    await late.wait()

            async def hold_good(*_: object) -> None:
                announced.set()
                await on.wait()

            two.to_d.after["grant"] = hold_stale
            two.to_d.before["expect"] = hold_good
            two.to_p.before["withdraw"] = is_lost
            await two.submit(stale)
            await granted.wait()
            await two.see(two.d, lambda roles: roles.receiver._pairs.retire_sender("p", "a test wants it"))
            await two.submit(good)
            await announced.wait()
            late.set()
            await two.until(two.p, lambda roles: (stale.id, 0) not in roles.prefill._jobs)
            on.set()
            await two.front.wait_for(lambda: two.front.is_over(stale.id) and two.front.is_over(good.id))
            assert [two.front.served(each.id).how for each in (stale, good)] == ["local", "remote"]

    run(test())


def test_a_pair_that_only_the_sender_gave_up_is_rebuilt_without_waiting(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    """As after a stop: the announcement of its last parcel was answered too late, and by then nothing was under way."""

    async def test() -> None:
        async with pair(lease_seconds=600.0) as two:
            requests = [request_for(prompt(100, seed=seed)) for seed in range(3)]
            await two.answers(requests[0])
            await two.settle()
            await two.see(two.p, lambda roles: roles.sender._pairs.retire_receiver("d", "a test wants it"))
            for request in requests[1:]:
                await two.answers(request)
            assert [two.front.served(each.id).how for each in requests] == ["remote", "local", "remote"]

    run(test())


@pytest.mark.parametrize("overtaken", ["transfer_failed", "run"])
def test_a_pair_that_only_the_sender_knows_to_be_void_costs_one_hand_off(
    run: Make, pair: Make, prompt: Make, request_for: Make, overtaken: str
) -> None:
    """Whichever of the two words of that comes first."""

    async def test() -> None:
        async with pair() as two:
            await two.answers(request_for(prompt(100)))
            await two.see(two.p, lambda roles: roles.sender._pairs.retire_receiver("d", "a test wants it"))
            wire = two.to_d.before if overtaken == "transfer_failed" else two.to_p.after
            wire[overtaken] = is_lost
            first = request_for(prompt(120, seed=1))
            await two.answers(first)
            wire.clear()
            second = request_for(prompt(140, seed=2))
            await two.answers(second)
            assert [two.front.served(each.id).how for each in (first, second)] == ["local", "remote"]

    run(test())


def test_no_room_for_one_hand_off_does_not_cost_another_its_pair(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair() as two:
            refused, good = request_for(prompt(100)), request_for(prompt(120, seed=1))
            announced, on = asyncio.Event(), asyncio.Event()

            async def refuse(request: str, _: int) -> None:
                if request == refused.id:
                    raise WorkerLost("did not answer")

            async def hold(*_: object) -> None:
                announced.set()
                await on.wait()

            two.to_d.before = {"grant": refuse, "expect": hold}
            await two.submit(good)
            await announced.wait()
            await two.answers(refused)
            on.set()
            await two.front.wait_for(lambda: two.front.is_over(good.id))
            assert [two.front.served(each.id).how for each in (refused, good)] == ["local", "remote"]

    run(test())


def test_a_prompt_that_prefill_can_never_hold_does_not_block_its_queue(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair(prefill={"memory_bytes": 10 * 8192}) as two:
            large, small = request_for(prompt(300)), request_for(prompt(100, seed=1))
            await two.answers(large, small)
            assert [two.front.served(each.id).how for each in (large, small)] == ["local", "remote"]

    run(test())


def test_hand_offs_of_a_prefill_worker_that_left_go_on_at_once(
    run: Make, pair: Make, bench: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair(lease_seconds=600.0) as two:
            clean = bench().answers(request_for(prompt(LENGTH)))
            reached = asyncio.Event()

            async def hold(*_: object) -> None:
                reached.set()
                await asyncio.Event().wait()

            two.to_d.before["expect"] = hold
            request = request_for(prompt(LENGTH))
            await two.submit(request)
            await reached.wait()
            await two.d.meet({})
            await two.p.meet({})
            await two.front.wait_for(lambda: two.front.is_over(request.id))
            assert [two.front.answer(request.id)] == clean
            assert two.front.served(request.id).how == "local"

    run(test())


def test_the_next_worker_of_the_same_name_gets_a_new_pair(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair() as two:
            await two.answers(request_for(prompt(100)))
            await two.d.meet({})
            await two.p.stop()
            two.p = two.to_p.worker = Worker(replace(two.p.spec, epoch=1))
            await two.p.start()
            await two.p.meet({"d": two.to_d})
            await two.d.meet({"p": two.to_p})
            reader = asyncio.ensure_future(two.front.read(two.p, "front"))
            request = request_for(prompt(120, seed=1))
            await two.answers(request)
            assert two.front.served(request.id).how == "remote"
            await two.settle()
            await two.p.stop()
            await reader
            two.p = Worker(two.p.spec)
            await two.p.start()

    run(test())
