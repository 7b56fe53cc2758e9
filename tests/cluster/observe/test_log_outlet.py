"""From `logging` in a front to whoever reads it: nothing is lost that should be told, nothing told that should not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.journal import FIELDS, Entry
from cluster.observe.log_outlet import LogOutlet

SECRET = "the duck flies at midnight"
WAIT_SECONDS = 20


@asynccontextmanager
async def outlet(*, quotes: bool = False) -> AsyncIterator[LogOutlet]:
    """Installed at info, and afterwards nowhere."""
    ours, before = logging.getLogger("cluster"), logging.getLogger("cluster").level
    made = LogOutlet("front-0", quotes=quotes)
    made.install("info")
    try:
        yield made
    finally:
        logging.getLogger().removeHandler(made)
        ours.setLevel(before)


async def all_of(outlet: LogOutlet) -> list[Entry]:
    outlet.end()
    return [entry async for batch in outlet.batches() for entry in batch]


def test_a_line_comes_with_its_level_and_fields_from_any_thread() -> None:
    async def run() -> Entry:
        async with outlet() as out:
            log = logging.getLogger("cluster.front.request_log")
            await asyncio.to_thread(log.warning, "request %s", "ends", extra={FIELDS: {"status": 502}})
            [entry] = await asyncio.wait_for(anext(out.batches()), WAIT_SECONDS)
            return entry

    entry = asyncio.run(run())
    assert entry[1:] == ("warning", "front-0", "request ends", {"status": 502})


def test_ray_and_chatty_libraries_are_not_heard() -> None:
    async def run() -> list[Entry]:
        async with outlet() as out:
            logging.getLogger("ray.worker").error("a paragraph")
            logging.getLogger("uvicorn.error").info("Started server process")
            logging.getLogger("cluster.front").debug("a detail")
            logging.getLogger("uvicorn.error").error("Exception in ASGI application\n")
            return await all_of(out)

    assert [entry.message for entry in asyncio.run(run())] == ["Exception in ASGI application"]


def raised() -> BaseException:
    try:
        raise ValueError(SECRET)
    except ValueError as error:
        return error


def test_an_exceptions_own_words_are_told_only_where_prompts_are() -> None:
    async def run(*, quotes: bool) -> str:
        async with outlet(quotes=quotes) as out:
            logging.getLogger("cluster.front").error("request x failed", exc_info=raised())
            [entry] = await all_of(out)
            return str(entry.fields["traceback"])

    kept = asyncio.run(run(quotes=False))
    assert "in raised" in kept
    assert kept.endswith("ValueError")
    assert f"ValueError: {SECRET}" not in kept
    assert f"ValueError: {SECRET}" in asyncio.run(run(quotes=True))


def test_what_nobody_reads_is_bounded() -> None:
    async def run() -> list[Entry]:
        async with outlet() as out:
            for number in range(10_500):
                logging.getLogger("cluster.front").info("line %d", number)
            return await all_of(out)

    entries = asyncio.run(run())
    assert len(entries) == 10_000
    assert entries[-1].message == "line 10499"
