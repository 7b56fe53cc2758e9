"""SIGKILL and SIGSTOP of either side at each fail point, with real processes: the other side ends the ticket within
the lease, no block is lost, no other pair notices, and every answer is the clean run's."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from diptych.errors import WorkerLost
from diptych.types import Request
from tests.workers.crashes.steady import Steady

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.workers.conftest import Token
    from tests.workers.crashes.conftest import Member, Society

Make = Callable[..., Any]
LEASE_SECONDS = 2.5
SLACK_SECONDS = 6.0
"""For a busy machine, and for a sender that still computes when its receiver stops: its lease begins after that."""
"""An idle engine looks at its leases four times a second, on cores shared with many."""
LINKS = ("gloo", "mapped")
SENDER = (
    "new>granted",
    "granted>packing",
    "packing>sending",
    "sending>packing",
    "sending>landed",
    "granted>landed",
    "landed>committed",
    "committed>released",
    "*>aborted",
)
RECEIVER = (
    "new>granted",
    "granted>sending",
    "sending>landed",
    "granted>landed",
    "landed>committed",
    "committed>released",
    "*>aborted",
)
LONG, USUAL, SHORT = 4000, 700, 32
STEADY_AT_LEAST = 3
MEMORY_BYTES = 2048 * 8192
"""What was sent once is still cached when it is asked for again."""


@dataclass(eq=False)
class Case:
    """A fail point, and the worker that has it."""

    point: str
    victim: Member
    prefill: Member
    decode: Member
    survivor: Member
    request: Request
    stopped_at: float = 0.0
    ended_after: float = 0.0
    cancelling: asyncio.Future[None] | None = None

    @property
    def is_cancelled(self) -> bool:
        return self.point == "*>aborted"

    def __str__(self) -> str:
        return f"{self.victim.id} at {self.point}"


@pytest.fixture
def requests(prompt: Make, request_for: Make) -> Callable[[str, int], Request]:
    """(fail point, number) → a request whose hand-off passes it."""

    def make(point: str, number: int) -> Request:
        length = {"*>aborted": LONG, "granted>landed": SHORT}.get(point, USUAL)
        return request_for(prompt(length, seed=number))

    return make


async def cancel(case: Case) -> None:
    """A victim may stop before it answers: it answers when it goes on."""
    with suppress(WorkerLost):  # it may die of it
        await case.decode.line.cancel(case.request.id, 0)


async def strike(society: Society, case: Case, action: str, warm: Request | None) -> None:
    """Until the victim is dead or stopped."""
    if warm:
        await society.answer(await society.submit(warm, case.decode, case.prefill))
    await society.submit(case.request, case.decode, case.prefill)
    if case.is_cancelled:
        await case.survivor.until(lambda look: case.request.id in look.handing)
        await case.prefill.until(lambda look: ("granted", "packing") in look.sender)
        case.cancelling = asyncio.ensure_future(cancel(case))
    if action == "kill":
        await case.victim.wait_dead()
        assert case.victim.process.exitcode == -signal.SIGKILL
    else:
        await case.victim.wait_stopped()
    case.stopped_at = time.monotonic()
    await case.survivor.until(lambda look: case.request.id not in look.handing)
    case.ended_after = time.monotonic() - case.stopped_at


@dataclass(eq=False)
class Drill:
    """One surviving worker, a steady pair of its, and a victim for each fail point of one side."""

    society: Society
    side: str
    action: str
    survivor: Member
    other: Member
    cases: list[Case]
    requests: Callable[[str, int], Request]

    def roles(self, member: Member) -> tuple[Member, Member]:
        """(prefill, decode) of its hand-offs with the survivor."""
        return (member, self.survivor) if self.side == "sender" else (self.survivor, member)

    async def strike(self) -> None:
        """Until every victim is dead or stopped, and the survivor has ended its hand-off."""
        await asyncio.gather(*(strike(self.society, case, self.action, self.warm(at)) for at, case in self.numbered))
        for case in self.cases:
            print(f"{self.action} {case}: the other side had ended it after {case.ended_after:.2f} s")

    def warm(self, at: int) -> Request | None:
        """What has to be cached for the fail point to be passed."""
        point = self.cases[at].point
        return self.requests(point, at) if point == "granted>landed" else None

    @property
    def numbered(self) -> list[tuple[int, Case]]:
        return list(enumerate(self.cases))

    async def recover(self) -> None:
        """Those who were stopped go on; those who were killed have successors."""
        for case in self.cases:
            if self.action == "stop":
                case.victim.send_signal(signal.SIGCONT)
            else:
                case.victim = await self.society.start(case.victim.id, epoch=1)
            if case.cancelling:
                await case.cancelling
        if self.action == "kill":
            await self.society.meet(self.survivor, self.other)
            await self.society.meet(self.survivor, self.other, *(case.victim for case in self.cases))
            await asyncio.gather(*(self.society.meet(case.victim, self.survivor) for case in self.cases))

    async def struck_answers(self) -> list[tuple[Request, list[Token]]]:
        """Of requests whose owner lives."""
        owned = self.action == "stop" or self.side == "sender"
        return [
            (case.request, await self.society.answer(case.request))
            for case in self.cases
            if owned and not case.is_cancelled
        ]

    async def later_answers(self, first: int, how: str | None) -> list[tuple[Request, list[Token]]]:
        """One by every pair that was struck."""
        later = [
            await self.society.submit(self.requests("", first + at), *reversed(self.roles(case.victim)))
            for at, case in self.numbered
        ]
        answers = [(request, await self.society.answer(request)) for request in later]
        for case, (request, _) in zip(self.cases, answers, strict=True):
            if how and self.society.front.served(request.id).how != how:
                looks = await asyncio.gather(self.survivor.look(), case.victim.look())
                ends = [end for look in looks for end in look.ends if request.id in end]
                raise AssertionError(f"{case}: {request.id} is not {how}: {ends}")
        return answers


@pytest.fixture
def drill(society: Make, requests: Make) -> Make:
    """(link, side, action) → an async context with a `Drill`; at its end every worker that lives is whole."""

    @asynccontextmanager
    async def make(link: str, side: str, action: str) -> AsyncIterator[Drill]:
        async with society(link=link, lease_seconds=LEASE_SECONDS, memory_bytes=MEMORY_BYTES) as s:
            points = SENDER if side == "sender" else RECEIVER
            survivor, other, *victims = await asyncio.gather(
                s.start("survivor"),
                s.start("other"),
                *(s.start(f"v{at}", fail_at=f"{side}:{point}:{action}") for at, point in enumerate(points)),
            )
            await s.meet(survivor, other, *victims)
            await asyncio.gather(*(s.meet(each, survivor) for each in (other, *victims)))
            drill = Drill(s, side, action, survivor, other, [], requests)
            drill.cases = [
                Case(point, victim, *drill.roles(victim), survivor, requests(point, at))
                for at, (point, victim) in enumerate(zip(points, victims, strict=True))
            ]
            yield drill
            for member in (survivor, other, *(case.victim for case in drill.cases)):
                await member.settle()

    return make


@pytest.mark.parametrize("action", ["kill", "stop"])
@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("link", LINKS)
def test_either_side_at_each_fail_point(
    run_long: Make, drill: Make, bench: Make, prompt: Make, request_for: Make, link: str, side: str, action: str
) -> None:
    async def test() -> None:
        async with drill(link, side, action) as d:
            steady = Steady(
                d.society, *d.roles(d.other), lambda number: request_for(prompt(80, seed=1000 + number), max_tokens=4)
            )
            async with steady.at_work():
                before = len(steady.answers)
                await d.strike()
                meanwhile = len(steady.answers) - before
                print(f"{meanwhile} hand-offs of the other pair meanwhile")
                if action == "stop" or side == "receiver":  # else the other side hears of it at once
                    assert meanwhile >= STEADY_AT_LEAST
                await steady.go_on(STEADY_AT_LEAST)
                await d.recover()
                answers = await d.struck_answers()
                if action == "stop":  # the first may find out that the pair is void: it costs no wait
                    answers += await d.later_answers(100, None)
                answers += await d.later_answers(200, "remote")
        answers += steady.answers
        assert bench().answers(*(request for request, _ in answers)) == [said for _, said in answers]
        assert max(case.ended_after for case in d.cases) <= LEASE_SECONDS + SLACK_SECONDS

    run_long(test())
