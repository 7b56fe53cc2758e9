"""Drives the answers of one request from the service to whoever writes them. Knows no protocol.

Whatever ends it (the last token, an error, a cancel), every answer's generator is closed before it returns: that is
what frees the request's blocks.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from diptych.errors import DeadlineExceeded, Internal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from cluster.front.request_log import Record
    from cluster.front.service import Ask, Delta, Service


async def answer(service: Service, ask: Ask, record: Record, handle: Callable[[Delta], Awaitable[None]]) -> None:
    """Every piece of one answer, in order. Raises what the service or `handle` raises."""
    finished = False
    try:
        async with aclosing(service.generate(ask)) as deltas:
            async for delta in deltas:
                finished = delta.finish is not None
                record.take(delta)
                await handle(delta)
        if not finished:
            raise Internal(f"request {ask.id} ended without a finish")
    except BaseException as error:
        record.fail(error)
        raise


async def answer_all(
    service: Service, asks: Sequence[Ask], record: Record, handle: Callable[[int, Delta], Awaitable[None]]
) -> None:
    """Several answers at once, each piece with its answer's place in `asks`; the first error ends them all."""
    record.begin(asks)
    try:
        async with asyncio.TaskGroup() as group:
            for place, ask in enumerate(asks):
                group.create_task(answer(service, ask, record, _placed(place, handle)))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures


def _placed(place: int, handle: Callable[[int, Delta], Awaitable[None]]) -> Callable[[Delta], Awaitable[None]]:
    return lambda delta: handle(place, delta)


@asynccontextmanager
async def within(seconds: float | None) -> AsyncGenerator[None]:
    """The caller's own deadline; None is none. Raises DeadlineExceeded when it passes."""
    timeout = asyncio.timeout(seconds)
    try:
        async with timeout:
            yield
    except TimeoutError as error:
        if not timeout.expired():
            raise
        raise DeadlineExceeded("the request's own deadline passed") from error
