"""Does what the scheduler's autoscaler wants, one change after the other. Knows no load and decides nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from diptych.errors import ServingError, WorkerLost
from workers.actors import answer

if TYPE_CHECKING:
    from cluster.config.schema import AutoscaleSection
    from cluster.journal import Say
    from cluster.pools.changes import Changes, House
    from cluster.scheduler.autoscaler import Decision

_ANSWER_SECONDS: Final = 30.0


async def rescale(told: AutoscaleSection, house: House, changes: Changes, say: Say) -> None:
    """As long as it is left running. Of a scheduler that is away, nothing is done until it is back."""
    while True:
        await asyncio.sleep(told.interval_seconds)
        try:
            asked = answer(house.scheduler.rescale.remote(), "the scheduler")
            decision: Decision = await asyncio.wait_for(asked, _ANSWER_SECONDS)
        except (WorkerLost, TimeoutError):
            continue
        except ServingError as error:
            say(f"the autoscaler could not decide: {error}", "warning")
            continue
        if decision.operations:
            say(f"autoscaler{' (dry run)' if told.dry_run else ''}: {decision.words}")
        for operation in () if told.dry_run else decision.operations:
            try:
                await changes.perform(operation)
            except ServingError as error:
                say(f"autoscaler: {operation} was refused: {error}", "warning")
