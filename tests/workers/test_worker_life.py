"""How a worker ends: when it is told to, and when its engine breaks. Nobody is left waiting."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from diptych.errors import Draining, EngineBroke, WorkerLost
from diptych.types import FrontId, PrefillOrder

Make = Callable[..., Any]


def breaks(roles: Any) -> None:
    def execute(_: object) -> None:
        raise RuntimeError("a kernel went wrong")

    roles.engine.execute = execute


@pytest.fixture
def two_workers(pair: Make) -> Make:
    """As `pair`, but only one of the two has to be whole at the end: (whose name) → a context."""

    class Context:
        def __init__(self, dead: str, **both: Any) -> None:
            self._dead, self._context = dead, pair(**both)

        async def __aenter__(self) -> Any:
            self._two = await self._context.__aenter__()
            return self._two

        async def __aexit__(self, *error: object) -> None:
            two, other = self._two, "p" if self._dead == "d" else "d"
            dead = getattr(two, self._dead)
            setattr(two, self._dead, getattr(two, other))
            try:
                await self._context.__aexit__(*error)
            finally:
                await dead.stop()

    return Context


def test_a_broken_engine_is_heard_by_everyone_who_waits_or_runs(
    run: Make, two_workers: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with two_workers("d", max_running=1) as two:
            running, waiting = request_for(prompt(10), max_tokens=5000), request_for(prompt(20, seed=1))
            await two.submit(running, two.local)
            await two.submit(waiting, two.local)
            await two.until(two.d, lambda roles: len(roles.engine.batcher.waiting) == 1)
            await two.see(two.d, breaks)
            assert "a kernel went wrong" in str(await two.d.wait_broken())
            await two.front.wait_for(lambda: len(two.front.failures) == 2)
            for request, kind in ((running, EngineBroke), (waiting, WorkerLost)):
                error = two.front.failures[request.id]
                assert type(error) is kind
                assert request.id in str(error)
                assert "a kernel went wrong" in str(error)
            assert not two.d.owns(running.id, 0)
            assert two.d.silent_seconds() == float("inf")
            with pytest.raises(Draining):
                await two.submit(request_for(prompt(5)), two.local)
            assert [items async for items in two.d.outbox(FrontId("late"))] == [()]

    run(test())


def test_decode_goes_on_when_the_engine_of_prefill_breaks(
    run: Make, two_workers: Make, bench: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with two_workers("p", lease_seconds=600.0) as two:
            clean = bench().answers(request_for(prompt(100)))
            await two.see(two.p, breaks)
            request = request_for(prompt(100))
            assert await two.answers(request) == clean
            assert two.front.served(request.id).how == "local"
            assert not await two.p.is_pending(request.id, 0)

    run(test())


def test_a_front_hears_in_whose_step_an_engine_of_prefill_broke(
    run: Make, two_workers: Make, prompt: Make, request_for: Make
) -> None:
    def breaks_at_work(roles: Any) -> None:
        execute = roles.engine.execute

        def poisoned(plan: Any) -> Any:
            if plan.computing:
                raise RuntimeError("a kernel went wrong")
            return execute(plan)

        roles.engine.execute = poisoned

    async def test() -> None:
        async with two_workers("p", lease_seconds=600.0) as two:
            await two.see(two.p, breaks_at_work)
            request = request_for(prompt(100))
            await two.submit(request)
            await two.front.wait_for(lambda: type(two.front.failures.get(request.id)) is EngineBroke)
            await two.d.cancel(request.id, 0)

    run(test())


def test_a_stopped_worker_answers_whoever_waits_for_it(
    run: Make, two_workers: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with two_workers("p") as two:
            reached = asyncio.Event()

            async def hold(*_: object) -> None:
                reached.set()
                await asyncio.Event().wait()

            two.to_d.before["grant"] = hold
            order = PrefillOrder(request=request_for(prompt(7000)), attempt=0, decode="d")
            ordered = asyncio.ensure_future(two.p.run(order))
            await reached.wait()
            assert await two.p.stop()
            with pytest.raises(WorkerLost, match="p stopped"):
                await ordered
            with pytest.raises(WorkerLost, match="stopping"):
                await two.p.run(order)
            assert not await two.p.is_pending(order.request.id, 0)

    run(test())


@pytest.mark.slow
def test_the_process_of_a_broken_engine_ends() -> None:
    script = f"""
import asyncio
from dataclasses import replace
from diptych.types import ModelSource, WorkerSpec
from workers.actors import WorkerActor

async def main():
    actor = WorkerActor(WorkerSpec(
        id="d", role="decode", epoch=0, model=ModelSource(name="t", path="random:tiny", digest="ab" * 8), dtype="fp32",
        block_size=16, memory_bytes=1 << 20, max_batch_tokens=64, max_running=4, threads=1, device="cpu",
        host="127.0.0.1", link="gloo", wire="native", verify="off", secret=b"", lease_seconds=5.0, cache=""))
    await actor.start()
    def breaks(): raise RuntimeError("a kernel went wrong")
    actor._worker._engine.post(breaks)
    await asyncio.sleep({60.0})

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150, check=False)
    assert ended.returncode == 1
    assert "RuntimeError: a kernel went wrong" in ended.stderr


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair(memory_bytes=10 * 8192) as two:
            with pytest.raises(Exception, match=r"150 prompt tokens and 11 to generate are 161, d holds 160"):
                await two.submit(request_for(prompt(150), max_tokens=11), two.local)
            await two.answers(request_for(prompt(150), max_tokens=10), placement=two.local)

    run(test())
