"""The dispatcher with real workers and a real scheduler, and no Ray: text, stops, retries, and what a hang-up frees."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.front.dispatcher import Dispatcher, FrontIdentity
from cluster.front.service import Ask, Delta
from cluster.front.tokenizer import TextModel
from cluster.scheduler.costs import Policy, RequestShape, Rule
from cluster.scheduler.scheduler import Scheduler, SchedulerSpec
from diptych.build import build_identity
from diptych.errors import Internal, NoWorker, Overloaded, PromptTooLong, WorkerLost
from diptych.hashing import KvIdentity
from diptych.types import (
    ClusterStatus,
    Explanation,
    FrontId,
    ModelSource,
    Outcome,
    Placement,
    Report,
    Request,
    RequestId,
    Role,
    SamplingParams,
    WorkerId,
    WorkerSpec,
)
from workers.engine.batching import StepPlan
from workers.engine.engine import StepResult
from workers.engine_thread import Roles
from workers.worker import Worker

TINY = ModelSource(name="tiny", path="random:tiny", digest="abcdef0123456789")
ROOT = KvIdentity(model_digest=TINY.digest, weight_format="fp32", kv_dtype="fp32").root()
WAIT_SECONDS = 30.0
PATIENCE_SECONDS = 0.3
RECOVERY_SECONDS = 2.0

Hook = Callable[..., Coroutine[Any, Any, None]]


class Port:
    """A worker as a front sees it, through a wire that a test can tamper with."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.calls: Counter[str] = Counter()
        self.before_submit: Hook | None = None
        self.after_submit: Hook | None = None
        self.owned: bool | None = None
        self.cut = asyncio.Event()
        self.line_cut = asyncio.Event()
        self.cancelled: list[tuple[RequestId, int]] = []

    async def submit(self, request: Request, attempt: int, placement: Placement) -> None:
        self.calls["submit"] += 1
        if self.before_submit:
            await self.before_submit()
        await self.worker.submit(request, attempt, placement)
        if self.after_submit:
            await self.after_submit()

    async def cancel(self, request: RequestId, attempt: int) -> None:
        self.cancelled.append((request, attempt))
        await self.worker.cancel(request, attempt)

    async def owns(self, request: RequestId, attempt: int) -> bool:
        self.calls["owns"] += 1
        return self.worker.owns(request, attempt) if self.owned is None else self.owned

    async def outbox(self, front: FrontId) -> AsyncIterator[Any]:
        stream = self.worker.outbox(front)
        cut, line_cut = (asyncio.ensure_future(event.wait()) for event in (self.cut, self.line_cut))
        while True:
            following = asyncio.ensure_future(anext(stream, None))
            await asyncio.wait({following, cut, line_cut}, return_when=asyncio.FIRST_COMPLETED)
            if line_cut.done():
                self.line_cut.clear()
                following.cancel()
                return
            if cut.done():
                following.cancel()
                raise WorkerLost(f"{self.worker.spec.id} died")
            items = following.result()
            if items is None:
                cut.cancel()
                return
            yield items


class Peer:
    """A worker as another one sees it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)


class SchedulerHere:
    """A scheduler in this process, with this process's clock."""

    def __init__(self, how: Rule) -> None:
        spec = SchedulerSpec(model=TINY, build=build_identity(), policy=Policy(how=how), stale_seconds=WAIT_SECONDS)
        self.it = Scheduler(spec)

    async def place(self, shape: RequestShape) -> Placement:
        return self.it.place(shape, time.monotonic())

    async def withdraw(self, request: RequestId) -> None:
        self.it.withdraw(request, time.monotonic())

    async def status(self) -> ClusterStatus:
        return self.it.status(time.monotonic())

    async def finished(self, outcomes: tuple[Outcome, ...]) -> None:
        for outcome in outcomes:
            self.it.finished(outcome, time.monotonic())

    async def explain(self, request: str) -> tuple[Explanation, ...]:
        return self.it.explain(request, time.monotonic())

    async def report(self, report: Report) -> bool:
        return self.it.report(report, time.monotonic())


class House:
    """Workers by name, the dispatcher before them, and the ports between."""

    def __init__(self, how: Rule, text: TextModel) -> None:
        self.scheduler = SchedulerHere(how)
        self.text = text
        identity = FrontIdentity(
            id=FrontId("front"),
            model="tiny",
            root=ROOT,
            patience_seconds=PATIENCE_SECONDS,
            recovery_seconds=RECOVERY_SECONDS,
        )
        self.dispatcher = Dispatcher(identity, text, self.scheduler)
        self.workers: dict[str, Worker] = {}
        self.ports: dict[str, Port] = {}

    async def start(self, **roles: Role) -> None:
        self.workers = {name: Worker(_spec(name, role)) for name, role in roles.items()}
        infos = await asyncio.gather(*(worker.start() for worker in self.workers.values()))
        self.ports = {name: Port(worker) for name, worker in self.workers.items()}
        for info, worker in zip(infos, self.workers.values(), strict=True):
            self.scheduler.it.join(info, time.monotonic())
            worker.report_to(self.scheduler.report)
            await worker.meet(
                {WorkerId(name): Peer(other) for name, other in self.workers.items() if other is not worker}
            )
        await self.meet(*self.workers)

    async def meet(self, *names: str) -> None:
        await self.dispatcher.meet({WorkerId(name): (self.workers[name].info, self.ports[name]) for name in names})

    def ask(self, answer: str = "", *, id: str = "r", prompt: str = "hello", **values: Any) -> Ask:  # noqa: A002
        """With an `answer` the workers are made to say it."""
        stop = values.pop("stop", ())
        forced = tuple(self.text.encode(answer)) if answer else ()
        given = {"max_tokens": len(forced) or 8, "temperature": 0.0, "forced": forced, **values}
        return Ask(id=RequestId(id), tokens=tuple(self.text.encode(prompt)), params=SamplingParams(**given), stop=stop)

    async def said(self, ask: Ask) -> list[Delta]:
        return [delta async for delta in self.dispatcher.generate(ask)]

    async def text_of(self, ask: Ask) -> str:
        return "".join(delta.text for delta in await self.said(ask))

    async def until(self, name: str, is_so: Callable[[Roles], bool]) -> None:
        loop, worker = asyncio.get_running_loop(), self.workers[name]
        while True:
            seen: asyncio.Future[bool] = loop.create_future()

            def look(seen: asyncio.Future[bool] = seen) -> None:
                loop.call_soon_threadsafe(seen.set_result, is_so(worker._roles))

            worker._engine.post(look)
            if await seen:
                return
            await asyncio.sleep(0.002)

    def lose(self, name: str) -> None:
        """As its death looks to the front and the scheduler."""
        self.ports[name].cut.set()
        self.scheduler.it.leave(WorkerId(name), 0)

    async def leave_when_broken(self, name: str) -> None:
        """What pools do."""
        await self.workers[name].wait_broken()
        self.lose(name)

    async def bury(self, *names: str) -> None:
        """Nobody expects their blocks back."""
        await asyncio.gather(*(self.workers.pop(name).stop() for name in names))

    async def computed(self) -> int:
        """Prompt tokens, by all workers."""
        counted: list[int] = []
        for name in self.workers:
            await self.until(name, lambda roles: counted.append(roles.engine.counters().prompt_tokens_computed) is None)
        return sum(counted)

    async def free(self) -> None:
        """Until no worker holds a block."""
        for name in self.workers:
            await self.until(name, lambda roles: not roles.engine.pool.owners())

    async def stop(self) -> None:
        await self.dispatcher.close()
        await asyncio.gather(*(worker.stop() for worker in self.workers.values()))


def _spec(name: str, role: Role) -> WorkerSpec:
    return WorkerSpec(
        id=WorkerId(name),
        role=role,
        epoch=0,
        model=TINY,
        dtype="fp32",
        block_size=16,
        memory_bytes=256 * 8192,
        max_batch_tokens=256,
        max_running=16,
        threads=1,
        device="cpu",
        host="127.0.0.1",
        link="gloo",
        wire="native",
        verify="all",
        secret=b"s",
        lease_seconds=10.0,
        cache="",
    )


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def house(byte_text: TextModel) -> Callable[..., Any]:
    """(how, name=role, …) → an async context with a `House`; at its end no worker holds a block."""

    @asynccontextmanager
    async def make(how: Rule = "remote", **roles: Role) -> AsyncIterator[House]:
        built = House(how, byte_text)
        await built.start(**(roles or {"p": "prefill", "d": "decode"}))
        try:
            yield built
            await built.free()
        finally:
            await built.stop()

    return make


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work, WAIT_SECONDS)

    asyncio.run(bounded())


House_ = Callable[..., Any]


def test_an_answer_streams_whole_characters_and_ends_with_its_usage(house: House_) -> None:
    async def test() -> None:
        async with house() as here:
            answer = "Grüß Gott, 日本 🙂!"
            deltas = await here.said(here.ask(answer))
            assert "".join(delta.text for delta in deltas) == answer
            assert all("\ufffd" not in delta.text for delta in deltas)
            assert [token for delta in deltas for token in delta.tokens] == here.text.encode(answer)
            assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
            usage = deltas[-1].usage
            assert usage is not None
            assert (deltas[-1].finish, usage.prompt_tokens) == ("length", 5)
            assert usage.completion_tokens == len(answer.encode())
            assert (usage.served.how, usage.served.prefill_worker, usage.served.decode_worker) == ("remote", "p", "d")

    run(test())


def test_a_prompt_is_found_cached_by_the_tenant_that_sent_it_only(house: House_) -> None:
    async def test() -> None:
        async with house() as here:

            async def cached(id: str, tenant: str) -> tuple[int, str]:  # noqa: A002
                ask = replace(here.ask(id=id, prompt="p" * 64), tenant=tenant)
                deltas = await here.said(ask)
                assert deltas[-1].usage is not None
                return deltas[-1].usage.served.cached_tokens, "".join(delta.text for delta in deltas)

            first, text = await cached("a", "red")
            assert first == 0
            again, same = await cached("b", "red")
            assert (again >= 48, same) == (True, text)
            assert await cached("d", "blue") == (0, text)
            assert await cached("e", "") == (0, text)
            assert (await cached("f", ""))[0] > 0

    run(test())


@pytest.mark.parametrize(
    ("answer", "stop", "shown"),
    [
        ("abcSTOPxyz", ("STOP",), "abc"),
        ("STOPxyz", ("STOP",), ""),
        ("abcSTxyz", ("STOP",), None),
        ("abcST", ("STOP",), None),
        ("aabaabaac", ("aabaac",), "aab"),
        ("one two three", ("three", "two"), "one "),
        ("x" * 40 + "é" + "yz", ("éy",), "x" * 40),
    ],
)
def test_no_part_of_a_stop_string_is_ever_shown(
    house: House_, answer: str, stop: tuple[str, ...], shown: str | None
) -> None:
    async def test() -> None:
        async with house() as here:
            deltas = await here.said(here.ask(answer, stop=stop))
            assert "".join(delta.text for delta in deltas) == (answer if shown is None else shown)
            assert deltas[-1].finish == ("length" if shown is None else "stop")
            usage = deltas[-1].usage
            assert usage is not None
            if shown is not None:
                stopped_at = len(shown.encode()) + min(len(each.encode()) for each in stop if each in answer)
                assert usage.completion_tokens == stopped_at

    run(test())


def test_a_found_stop_string_ends_the_request_at_its_worker(house: House_) -> None:
    async def test() -> None:
        async with house() as here:
            ask = here.ask("abcSTOP", stop=("STOP",), max_tokens=200)
            assert await here.text_of(ask) == "abc"
            await here.until("d", lambda roles: roles.decode.counters.cancelled == 1)
            [(cancelled, attempt)] = here.ports["d"].cancelled
            assert (cancelled.startswith(ask.id), attempt) == (True, 0)

    run(test())


def test_an_answer_that_ended_by_itself_is_not_cancelled(house: House_) -> None:
    async def test() -> None:
        async with house() as here:
            await here.said(here.ask("done"))
            await here.said(here.ask("x", id="r2"))  # at its first token
            assert here.ports["d"].cancelled == []

    run(test())


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_client_that_hangs_up_frees_the_blocks_on_both_sides(house: House_, after: int) -> None:
    async def test() -> None:
        async with house() as here:
            stream = here.dispatcher.generate(here.ask(prompt="a" * 100, max_tokens=1500))
            if after:
                for _ in range(after):
                    await anext(stream)
            else:
                first = asyncio.ensure_future(anext(stream))
                await here.until("d", lambda roles: bool(roles.decode._answers))
                first.cancel()
                await asyncio.wait({first})
            await stream.aclose()  # the first token may have been faster than the cancel
            await here.until("d", lambda roles: roles.decode.counters.cancelled == 1)
            await here.free()

    run(test())


def test_a_worker_lost_before_the_first_token_costs_a_pause(house: House_) -> None:
    async def test() -> None:
        async with house("local", d="decode", e="decode") as here:
            expected = await here.text_of(here.ask(id="clean", max_tokens=20))
            chosen: list[Port] = []

            def dies(port: Port) -> Hook:
                async def lost() -> None:
                    chosen.append(port)
                    for each in here.ports.values():
                        each.before_submit = None
                    here.lose(port.worker.spec.id)
                    raise WorkerLost("it died")

                return lost

            for port in here.ports.values():
                port.before_submit = dies(port)
            assert await here.text_of(here.ask(max_tokens=20)) == expected
            (dead,) = chosen
            (other,) = (port for port in here.ports.values() if port is not dead)
            assert other.calls["submit"] >= 1

    run(test())


def test_a_worker_that_dies_with_the_request_in_its_queue_costs_a_pause(house: House_) -> None:
    async def test() -> None:
        async with house("local", d="decode", e="decode") as here:
            expected = await here.text_of(here.ask(id="clean", max_tokens=20))
            for port in here.ports.values():
                submit = port.worker.submit

                async def never_done(*_: Any, port: Port = port, submit: Any = submit) -> None:
                    for each in here.ports.values():
                        each.worker.submit = type(each.worker).submit.__get__(each.worker)
                    here.lose(port.worker.spec.id)  # nothing of it is heard any more

                port.worker.submit = never_done
            assert await here.text_of(here.ask(max_tokens=20)) == expected

    run(test())


WISHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    "biased": {"logit_bias": ((70, 5.0), (80, 4.0)), "bad_words": ((70, 80), (90,)), "temperature": 0.7},
    "scored": {"logprobs": 3, "prompt_logprobs": 2, "temperature": 1.0, "seed": 3},
    "at least": {"min_tokens": 30, "stop_token_ids": tuple(range(3, 120)), "temperature": 1.0, "seed": 1},
}


@pytest.mark.parametrize("how", ["remote", "local"])
@pytest.mark.parametrize("wish", WISHES)
def test_an_answer_whose_worker_is_lost_goes_on_elsewhere_bit_by_bit(house: House_, how: Rule, wish: str) -> None:
    """Tokens, text, log-probabilities and the bits of the logits are those of an undisturbed run."""

    async def test() -> None:
        async with house(how, p="prefill", d="decode", e="decode") as here:
            wanted = {"max_tokens": 40, "fingerprint": True, **WISHES[wish]}
            clean = await here.said(here.ask(id="clean", prompt="Once upon a time there was", **wanted))
            cut_at = len([token for delta in clean for token in delta.tokens]) // 2
            heard: list[Delta] = []
            async for delta in here.dispatcher.generate(here.ask(prompt="Once upon a time there was", **wanted)):
                heard.append(delta)
                if cut_at and sum(len(each.tokens) for each in heard) >= cut_at:
                    cut_at = 0
                    here.lose(next(iter(here.dispatcher._placed_on.values())).decode)
            assert _whole(heard) == _whole(clean)
            assert sum(port.cut.is_set() for port in here.ports.values()) == 1

    run(test())


def _whole(deltas: list[Delta]) -> dict[str, Any]:
    return {
        "text": "".join(delta.text for delta in deltas),
        "tokens": [token for delta in deltas for token in delta.tokens],
        "fingerprints": [bits for delta in deltas for bits in delta.fingerprints],
        "logprobs": [score for delta in deltas for score in delta.logprobs],
        "prompt_logprobs": [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs],
        "finish": deltas[-1].finish,
        "counts": (deltas[-1].usage.prompt_tokens, deltas[-1].usage.completion_tokens) if deltas[-1].usage else None,
    }


def test_what_prefill_still_has_is_not_computed_again(house: House_) -> None:
    async def test() -> None:
        async with house(p="prefill", d="decode", e="decode") as here:
            prompt = "x" * 1000
            stream = here.dispatcher.generate(here.ask(prompt=prompt, max_tokens=120))
            said = 0
            while said < 100:
                said += len((await anext(stream)).tokens)
            computed = await here.computed()
            here.lose(next(iter(here.dispatcher._placed_on.values())).decode)
            async for _ in stream:
                pass
            again = await here.computed() - computed
            assert 0 < again <= 1000 // 5, f"{again} tokens were computed again"

    run(test())


def test_a_worker_that_drains_hands_its_answers_over(house: House_) -> None:
    async def test() -> None:
        async with house("local", d="decode", e="decode") as here:
            prompts = [f"{place} " + "x" * 400 for place in range(4)]
            clean = [await here.text_of(here.ask(id="clean", prompt=each, max_tokens=300)) for each in prompts]
            streams = [
                here.dispatcher.generate(here.ask(id=f"r{i}", prompt=each, max_tokens=300))
                for i, each in enumerate(prompts)
            ]
            heard = [(await anext(stream)).text for stream in streams]
            rests = [asyncio.ensure_future(_rest(stream)) for stream in streams]
            placed = [placement.decode for placement in here.dispatcher._placed_on.values()]
            leaving = placed[0]
            here.scheduler.it.drain(leaving, 0)
            assert await here.workers[leaving].drain(20.0) == placed.count(leaving)
            assert [text + await rest for text, rest in zip(heard, rests, strict=True)] == clean

    run(test())


def test_an_answer_waits_for_a_worker_to_come_back(house: House_) -> None:
    async def test() -> None:
        async with house() as here:
            expected = await here.text_of(here.ask(id="clean", max_tokens=200))
            stream = here.dispatcher.generate(here.ask(max_tokens=200))
            heard = [(await anext(stream)).text]
            here.lose("d")
            rest = asyncio.ensure_future(_rest(stream))
            while "d" in here.dispatcher._members:  # noqa: ASYNC110
                await asyncio.sleep(0)
            here.ports["d"] = Port(here.workers["d"])
            here.scheduler.it.join(here.workers["d"].info, time.monotonic())
            await here.meet("p", "d")
            assert "".join(heard) + await rest == expected

    run(test())


async def _rest(stream: AsyncIterator[Delta]) -> str:
    return "".join([delta.text async for delta in stream])


def test_an_answer_that_nobody_can_go_on_with_ends_in_words(house: House_) -> None:
    async def test() -> None:
        async with house() as here:
            stream = here.dispatcher.generate(here.ask(max_tokens=1500))
            await anext(stream)
            here.lose("d")
            with pytest.raises(Overloaded, match="no pair of workers"):
                await _rest(stream)

    run(test())


def test_a_request_that_costs_one_worker_after_the_other_is_given_up(house: House_) -> None:
    async def test() -> None:
        async with house("local", d="decode", e="decode") as here:

            async def lost() -> None:
                raise WorkerLost("it died of this")

            for port in here.ports.values():
                port.before_submit = lost
            with pytest.raises(WorkerLost, match="it died of this"):
                await here.said(here.ask())
            assert sum(port.calls["submit"] for port in here.ports.values()) == 4

    run(test())


POISON = 666


def poison(roles: Roles) -> bool:
    """A step with the poisonous request breaks this engine, but only after a few."""
    execute, taken = roles.engine.execute, Counter[str]()

    def poisoned(plan: StepPlan) -> StepResult:
        for sequence in plan.computing:
            taken[sequence.request.id] += 1
            if sequence.request.params.seed == POISON and taken[sequence.request.id] > 3:
                raise RuntimeError("poison")
        return execute(plan)

    roles.engine.execute = poisoned
    return True


def test_an_engine_that_breaks_costs_a_pause(house: House_) -> None:
    async def test() -> None:
        async with house("local", d="decode", e="decode") as here:
            expected = await here.text_of(here.ask(id="clean", max_tokens=20, seed=POISON))
            await here.until("d", poison)
            here.scheduler.it.leave(WorkerId("e"), 0)
            stream = here.dispatcher.generate(here.ask(max_tokens=20, seed=POISON))
            first = await anext(stream)
            here.scheduler.it.join(here.workers["e"].info, time.monotonic())
            await here.workers["d"].wait_broken()
            here.lose("d")
            assert first.text + await _rest(stream) == expected
            await here.bury("d")

    run(test())


def test_a_request_that_breaks_three_engines_is_given_up_whatever_it_says_in_between(house: House_) -> None:
    async def test() -> None:
        names = ("d", "e", "f", "g")
        async with house("local", **dict.fromkeys(names, "decode")) as here:
            expected = await here.text_of(here.ask(id="clean", max_tokens=20))
            for name in names:
                await here.until(name, poison)
                asyncio.ensure_future(here.leave_when_broken(name))  # noqa: RUF006 (ends with the loop)
            with pytest.raises(Internal, match=r"3 engines broke.*poison"):
                await here.said(here.ask(max_tokens=200, seed=POISON))
            assert await here.text_of(here.ask(id="after", max_tokens=20)) == expected
            while len(broken := [name for name in names if here.workers[name]._broken.done()]) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # a front may hear before the worker itself
            assert len(broken) == 3
            await here.bury(*broken)

    run(test())


def test_a_prefill_worker_that_is_lost_is_decodes_to_save(house: House_) -> None:
    async def test() -> None:
        async with house() as here:
            stream = here.dispatcher.generate(here.ask("abcdefghij"))
            first = await anext(stream)
            here.ports["p"].cut.set()
            rest = [delta.text async for delta in stream]
            assert first.text + "".join(rest) == "abcdefghij"

    run(test())


@pytest.mark.parametrize("spoke", [False, True])
def test_a_submission_whose_answer_was_lost_speaks_once(house: House_, spoke: bool) -> None:
    async def test() -> None:
        async with house() as here:
            port = here.ports["d"]

            async def lost() -> None:
                port.after_submit = None
                if spoke:
                    await here.until("d", lambda roles: roles.decode.counters.finished == 1)
                raise WorkerLost("did not answer")

            port.after_submit = lost
            ask = here.ask("abcdef")
            assert await here.text_of(ask) == "abcdef"
            assert port.calls["submit"] == (1 if spoke else 2)
            assert [attempt for _, attempt in port.cancelled] == ([] if spoke else [0])

    run(test())


def test_a_silent_worker_is_asked_and_left_when_it_knows_nothing(house: House_) -> None:
    async def test() -> None:
        async with house() as here:
            port = here.ports["d"]
            submit = port.worker.submit

            async def swallow(*_: object) -> None:
                port.worker.submit = submit

            port.worker.submit = swallow
            assert await here.text_of(here.ask("abcdef")) == "abcdef"
            assert port.calls["submit"] == 2
            assert port.calls["owns"] >= 1

    run(test())


def test_a_silent_worker_that_has_the_request_is_waited_for(house: House_) -> None:
    async def test() -> None:
        async with house("local", d="decode") as here:
            port = here.ports["d"]
            asked = asyncio.Event()
            submit, owns = port.worker.submit, port.owns
            late: list[Any] = []

            async def queue(*arguments: Any) -> None:
                late.append(arguments)

            async def owned(request: RequestId, attempt: int) -> bool:
                await owns(request, attempt)
                if port.calls["owns"] == 2:
                    asked.set()
                return True

            port.worker.submit, port.owns = queue, owned
            answer = asyncio.ensure_future(here.text_of(here.ask("abcdef")))
            await asked.wait()
            await submit(*late[0])
            assert await answer == "abcdef"
            assert len(late) == 1

    run(test())


def test_a_worker_that_is_not_heard_any_more_is_not_asked_either(house: House_) -> None:
    async def test() -> None:
        async with house() as here:
            here.ports["d"].cut.set()
            while here.dispatcher.ready:  # noqa: ASYNC110
                await asyncio.sleep(0)
            with pytest.raises(WorkerLost, match="d is gone"):
                await here.said(here.ask("abc"))
            here.ports["d"] = Port(here.workers["d"])
            await here.meet("p", "d")
            assert await here.text_of(here.ask("abc")) == "abc"

    run(test())


def test_a_line_that_is_cut_costs_a_pause(house: House_) -> None:
    async def test() -> None:
        async with house() as here:
            expected = await here.text_of(here.ask(id="clean", max_tokens=200))
            stream = here.dispatcher.generate(here.ask(max_tokens=200))
            heard = [(await anext(stream)).text]
            here.ports["d"].line_cut.set()
            assert "".join(heard) + await _rest(stream) == expected

    run(test())


def test_what_a_worker_refuses_or_fails_at_reaches_the_client(house: House_) -> None:
    async def test() -> None:
        async with house() as here:
            with pytest.raises(PromptTooLong):
                await here.said(here.ask(max_tokens=5000))
            stream = here.dispatcher.generate(here.ask(id="poisoned", prompt="a" * 40, max_tokens=1500))
            await anext(stream)

            def poison(roles: Roles) -> bool:
                if not roles.engine.batcher.running:
                    return False
                roles.engine.arena[roles.engine.batcher.running[0].blocks] = float("nan")
                return True

            await here.until("d", poison)
            with pytest.raises(Internal, match="not finite"):
                async for _ in stream:
                    pass

    run(test())


def test_two_requests_of_one_id_do_not_mix(house: House_) -> None:
    async def test() -> None:
        async with house() as here:
            stream = here.dispatcher.generate(here.ask("abcdef"))
            first = await anext(stream)
            assert await here.text_of(here.ask("ghi")) == "ghi"
            assert first.text + "".join([delta.text async for delta in stream]) == "abcdef"

    run(test())


def test_an_id_given_again_gets_nothing_of_the_request_that_had_it(house: House_) -> None:
    """The worker has not heard of the hang-up yet when the next one comes."""

    async def test() -> None:
        async with house() as here:
            port, held = here.ports["d"], asyncio.Event()
            cancel = port.worker.cancel

            async def late(request: RequestId, attempt: int) -> None:
                await held.wait()
                await cancel(request, attempt)

            port.worker.cancel = late
            before = here.dispatcher.generate(here.ask("x" * 400))
            await anext(before)
            await before.aclose()
            stream = here.dispatcher.generate(here.ask("abcdef"))
            first = await anext(stream)
            held.set()
            assert first.text + "".join([delta.text async for delta in stream]) == "abcdef"

    run(test())


def test_without_a_worker_the_client_hears_it(house: House_) -> None:
    async def test() -> None:
        async with house() as here:
            await here.meet()
            assert not here.dispatcher.ready
            here.scheduler.it.leave(WorkerId("d"), 0)
            with pytest.raises(NoWorker):
                await here.said(here.ask())

    run(test())


def test_a_new_request_waits_for_workers_whose_reports_are_late(house: House_) -> None:
    async def test() -> None:
        async with house("local", d="decode") as here:
            here.scheduler.it.leave(WorkerId("d"), 0)
            answer = asyncio.ensure_future(here.text_of(here.ask("abc")))
            await asyncio.sleep(0.05)
            assert not answer.done()
            here.scheduler.it.join(here.workers["d"].info, time.monotonic())
            assert await answer == "abc"
            here.scheduler.it.leave(WorkerId("d"), 0)
            with pytest.raises(NoWorker):  # but not for ever
                await here.said(here.ask())

    run(test())


def test_many_at_once_each_get_their_own(house: House_) -> None:
    async def test() -> None:
        async with house("auto", p="prefill", d="decode", m="mixed") as here:
            answers = [f"answer number {number} " * (1 + number % 3) for number in range(24)]
            asks = [here.ask(answer, id=f"r{at}", prompt=f"question {at}") for at, answer in enumerate(answers)]
            assert await asyncio.gather(*map(here.text_of, asks)) == answers

    run(test())


def test_the_scheduler_hears_how_every_request_ended(house: House_) -> None:
    async def test() -> None:
        async with house("remote", p="prefill", d="decode") as here:
            finished = asyncio.Event()
            tell = here.scheduler.finished

            async def hear(outcomes: tuple[Outcome, ...]) -> None:
                await tell(outcomes)
                finished.set()

            here.scheduler.finished = hear
            await here.text_of(here.ask("abcdef", id="whole"))
            stream = here.dispatcher.generate(here.ask("x" * 400, id="cancelled"))
            await anext(stream)
            await stream.aclose()
            with pytest.raises(PromptTooLong):
                await here.said(here.ask(id="long", max_tokens=100_000))
            await here.text_of(here.ask("abSTOPcd", id="stopped", stop=("STOP",)))
            await asyncio.wait_for(finished.wait(), WAIT_SECONDS)
            told = {name: await here.dispatcher.explain(name) for name in ("whole", "cancelled", "long", "stopped")}
            assert all(len(each) == 1 for each in told.values())
            ends = {name: (each.outcome.tokens, each.outcome.error) for name, [each] in told.items() if each.outcome}
            assert ends["whole"] == (6, "")
            assert ends["cancelled"][0] >= 1
            assert ends["cancelled"][1] == "cancelled"
            assert ends["long"] == (0, "PromptTooLong")
            assert ends["stopped"][1] == ""
            [whole], [long] = told["whole"], told["long"]
            assert whole.outcome is not None
            assert whole.outcome.served is not None
            assert whole.ended_seconds is not None
            assert whole.outcome.served.kv_bytes_sent == 8192
            [placed] = whole.placements
            assert placed.placement.how == "remote"
            assert 0 < placed.seconds + whole.outcome.ttft_seconds <= whole.ended_seconds <= whole.age_seconds
            assert whole.outcome.served.kv_seconds > 0
            assert not long.placements
            assert long.refusal.startswith("PromptTooLong: ")

    run(test())


class Mortal:
    """A worker's line, until it is cut."""

    def __init__(self) -> None:
        self.dead = asyncio.Event()

    async def outbox(self, _: FrontId) -> AsyncIterator[Any]:
        yield ()
        await self.dead.wait()
        raise WorkerLost("it died")


@pytest.mark.parametrize("heard", [True, False], ids=["the line is cut first", "it is forgotten first"])
def test_a_hundred_lives_of_a_worker_leave_no_more_behind_than_one(house: House_, heard: bool) -> None:
    async def test() -> None:
        async with house() as here:
            dispatcher = here.dispatcher
            others = {WorkerId(name): (worker.info, here.ports[name]) for name, worker in here.workers.items()}

            async def live(epoch: int) -> None:
                port = Mortal()
                info = replace(here.workers["d"].info, id=WorkerId("x"), epoch=epoch)
                await dispatcher.meet({**others, info.id: (info, port)})
                if heard:
                    port.dead.set()
                    await asyncio.sleep(0.01)
                await dispatcher.meet(others)
                await asyncio.sleep(0)

            def left() -> tuple[dict[str, int], int, int]:
                gc.collect()
                sizes = {name: len(held) for name, held in vars(dispatcher).items() if isinstance(held, dict | set)}
                return sizes, len(asyncio.all_tasks()), sum(type(one) is Mortal for one in gc.get_objects())

            await live(1)
            once = left()
            for epoch in range(2, 102):
                await live(epoch)
            assert left() == once
            assert once[0]["_members"] == 2

    run(test())
