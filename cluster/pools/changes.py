"""What operators change in a running cluster: a part drained, another role, a pool's size. One change at a time.

Decides what may be done and in which order; the processes are its pools' to make, introduce and end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, assert_never

from cluster.pools.members import free_numbers
from cluster.pools.served import unserved
from cluster.pools.vacating import Vacating
from diptych.errors import Internal, InvalidRequest, ServingError, WorkerLost
from diptych.types import Changed, DrainNode, DrainWorker, Operation, Role, ScalePool, SetWorkerRole, WorkerId
from workers.actors import answer

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from cluster.config import Config
    from cluster.pools.growth import Growth
    from cluster.pools.nodes import Node
    from cluster.pools.parts import WorkerPart
    from cluster.pools.room import Room

_log = logging.getLogger(__name__)


class House(Protocol):
    """What a change needs of the pools."""

    @property
    def workers(self) -> Mapping[WorkerId, WorkerPart]: ...

    @property
    def scheduler(self) -> Any: ...  # noqa: ANN401 (handles are untyped)

    async def add(self, part: WorkerPart) -> None:
        """Start it, introduce it, watch it. Raises what it raised; then nothing of it is left."""
        ...

    async def retire(self, part: WorkerPart, *, returns: bool = False) -> None:
        """Nobody places on it or knows it any more, and its process has ended. Who `returns` keeps its name."""
        ...

    async def renew(self, part: WorkerPart) -> None:
        """As `add`, under its next epoch, of one that is retired."""
        ...

    def part(self, role: Role, number: int, node: str = "") -> WorkerPart:
        """One that has not started; `node` is where it has to be."""
        ...

    def bring(self, part: WorkerPart) -> None:
        """As `add`, in its own time: it may wait for room. With a node of its own it doesn't wait."""
        ...

    def dismiss(self, part: WorkerPart) -> None:
        """It was brought, has no process yet, and is not wanted any more."""
        ...

    @property
    def names(self) -> Container[WorkerId]:
        """Of who is there, on the way, or about to return: nobody else may have them."""
        ...

    async def arrival(self) -> None:
        """Until the next worker is up, whichever it is."""
        ...

    def room(self, role: Role) -> Room:
        """What each worker of it asks of its node."""
        ...

    @property
    def changing(self) -> bool:
        """Whether an operation is under way: who isn't there may be about to come back."""
        ...

    @property
    def avoided(self) -> frozenset[str]:
        """Nodes where nothing starts any more."""
        ...

    def avoid(self, node: str, alive: Iterable[str]) -> None:
        """From now on; `alive` are all nodes there are."""
        ...

    def welcome(self, node: str) -> None:
        """It isn't avoided any more."""
        ...

    async def reintroduce(self) -> None:
        """Everyone learns of everyone as they are now."""
        ...

    @property
    def others(self) -> tuple[str, ...]:
        """Parts that are no workers."""
        ...

    async def renew_other(self, who: str) -> None:
        """Its successor serves before it ends, and it ends when nobody needs it any more."""
        ...


class Changes:
    """Of one cluster. Lives on its pools' event loop."""

    def __init__(self, config: Config, house: House, growth: Growth) -> None:
        self._config = config
        self._house = house
        self._growth = growth
        self._vacating = Vacating(config, house, growth)
        self._one_at_a_time = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        return self._one_at_a_time.locked()

    def hear(self, front: Any) -> None:  # noqa: ANN401
        """Do what is asked of this front, until it closes or dies."""
        self._spawn(self._hear(front))

    def close(self) -> None:
        """What is under way is left as it is."""
        for task in self._tasks:
            task.cancel()

    async def perform(self, operation: Operation) -> Changed:
        """Raises ServingError, and says then what there is."""
        began = time.monotonic()
        try:
            if isinstance(operation, DrainNode):
                changed = await self._vacate(operation, began + self._config.cluster.drain_seconds)
            else:
                async with self._one_at_a_time:
                    changed = await self._change(operation)
        except (ServingError, asyncio.CancelledError):
            raise
        except Exception as error:  # whoever asked would wait for its answer until nobody answers any more
            _log.exception("%s was not done", operation)
            raise Internal(f"{operation}: {error!r}") from error
        return replace(changed, seconds=time.monotonic() - began)

    async def _change(self, operation: DrainWorker | SetWorkerRole | ScalePool) -> Changed:
        match operation:
            case DrainWorker():
                return await self._drain(operation)
            case SetWorkerRole():
                return await self._set_role(operation)
            case ScalePool():
                return await self._scale(operation)
            case _:
                assert_never(operation)

    async def _vacate(self, wanted: DrainNode, deadline: float) -> Changed:
        """`deadline` is monotonic seconds."""
        async with self._vacating.node(wanted.node) as node, self._one_at_a_time:
            return await self._drain_node(node, deadline)

    # ---- listening ----------------------------------------------------------------------------------------

    async def _hear(self, front: Any) -> None:  # noqa: ANN401
        with suppress(ServingError):
            async for wanted in front.operations.remote():
                number, operation = await answer(wanted, "a front")
                self._spawn(self._settle(front, number, operation))

    async def _settle(self, front: Any, number: int, operation: Operation) -> None:  # noqa: ANN401
        outcome: Changed | ServingError
        try:
            outcome = await self.perform(operation)
        except ServingError as error:
            outcome = error
        with suppress(ServingError):  # it died: whoever asked knows
            await answer(front.settle.remote(number, outcome), "a front")

    def _spawn(self, what: Any) -> None:  # noqa: ANN401 (a coroutine)
        task = asyncio.ensure_future(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- the changes --------------------------------------------------------------------------------------

    async def _drain(self, wanted: DrainWorker) -> Changed:
        if wanted.worker in self._house.others:
            return await self._renew_other(wanted)
        part = self._part(wanted.worker)
        if not wanted.replace:
            self._check_served(_roles(self._others(part)), f"without {part.spec.id}")
            self._growth.hold(part.spec.role)
        moved = await self._empty(part, self._config.cluster.drain_seconds)
        await self._house.retire(part, returns=wanted.replace)
        if wanted.replace:
            await self._house.renew(part)
        return Changed(seconds=0, moved=moved, ended=(part.spec.id,), started=(part.spec.id,) if wanted.replace else ())

    async def _drain_node(self, node: Node, deadline: float) -> Changed:
        """`deadline` is monotonic seconds. Raises InvalidRequest when somebody there can't be done without."""
        going, staying = self._vacating.leaving(node)
        seconds = max(1.0, deadline - time.monotonic())
        moved = await asyncio.gather(*(self._empty(part, seconds) for part in going))
        for part in going:
            await self._house.retire(part)
        ended = tuple(part.spec.id for part in going)
        if not staying:
            return Changed(seconds=0, moved=sum(moved), ended=ended)
        named = ", ".join(part.spec.id for part in staying)
        why = self._vacating.lacking_without(staying)
        gone = f" {', '.join(ended)} could go, and ended." if ended else ""
        raise InvalidRequest(
            f"without {named} {why}: no successor was up in time, so {node.address} stays in use.{gone} Add a node "
            f"with room and drain again; if this one goes all the same, {named} comes back where there is room",
            param="node",
        )

    async def _renew_other(self, wanted: DrainWorker) -> Changed:
        if not wanted.replace:
            raise InvalidRequest(
                f"{wanted.worker} can't be done without: give it a successor (--replace)", param="worker"
            )
        await self._house.renew_other(wanted.worker)
        return Changed(seconds=0, started=(wanted.worker,))

    async def _empty(self, part: WorkerPart, seconds: float) -> int:
        """Its answers go on elsewhere; how many. One that dies meanwhile has none any more."""
        part.retiring = True
        worker, epoch = part.spec.id, part.spec.epoch
        with suppress(ServingError):  # its successor doesn't learn of one that retires
            await answer(self._house.scheduler.drain.remote(worker, epoch), "the scheduler")
        with suppress(ServingError):
            return int(await answer(part.handle.drain.remote(seconds), worker))
        return 0

    async def _set_role(self, wanted: SetWorkerRole) -> Changed:
        part = self._part(wanted.worker)
        assert part.info is not None, "it is up"
        self._check_served(
            {**_roles(self._others(part)), part.spec.id: wanted.role}, f"with {part.spec.id} as {wanted.role} worker"
        )
        part.spec, part.info = replace(part.spec, role=wanted.role), replace(part.info, role=wanted.role)
        call = self._house.scheduler.set_role.remote(part.spec.id, part.spec.epoch, wanted.role)
        with suppress(WorkerLost):  # its successor hears of the role when the worker joins
            await answer(call, "the scheduler")
        await self._house.reintroduce()
        return Changed(seconds=0)

    async def _scale(self, wanted: ScalePool) -> Changed:
        pool = [part for part in self._house.workers.values() if part.spec.role == wanted.role and not part.lost]
        # Who is up stays before who is not: it may be all there is.
        leaving = sorted(pool, key=lambda part: (part.info is None, _number(part.spec.id)))[wanted.workers :]
        kept = {
            who: part
            for who, part in self._house.workers.items()
            if part not in leaving and part.info and not part.retiring
        }
        if any(part.info for part in leaving):
            self._check_served(_roles(kept), f"with {wanted.workers} {wanted.role} workers")
        self._growth.hold(wanted.role)
        for part in reversed(leaving):
            await self._empty(part, self._config.cluster.drain_seconds)
            await self._house.retire(part)
        numbers = free_numbers(wanted.role, self._house.names, max(0, wanted.workers - len(pool)))
        new = [self._house.part(wanted.role, number) for number in numbers]
        results = await asyncio.gather(*map(self._house.add, new), return_exceptions=True)
        if failed := next(filter(None, results), None):
            raise failed
        return Changed(
            seconds=0, started=tuple(part.spec.id for part in new), ended=tuple(part.spec.id for part in leaving)
        )

    # ---- what may be done ---------------------------------------------------------------------------------

    def _part(self, worker: WorkerId) -> WorkerPart:
        part = self._house.workers.get(worker)
        if part is None:
            known = ", ".join([*self._house.workers, *self._house.others])
            raise InvalidRequest(f"no worker {worker!r} here, but {known}", param="worker")
        if part.info is None or part.retiring:
            raise InvalidRequest(f"{worker} is not up: it is starting, draining or lost", param="worker")
        return part

    def _others(self, part: WorkerPart) -> dict[WorkerId, WorkerPart]:
        workers = self._house.workers.items()
        return {who: each for who, each in workers if each is not part and each.info and not each.retiring}

    def _check_served(self, roles: Mapping[WorkerId, Role], when: str) -> None:
        """Raises InvalidRequest when requests could not be served by workers of these roles."""
        if missing := unserved(self._config, roles.values()):
            raise InvalidRequest(f"{when} {missing}: start another worker first (diptych scale)", param="worker")


def _roles(parts: Mapping[WorkerId, WorkerPart]) -> dict[WorkerId, Role]:
    return {who: part.spec.role for who, part in parts.items()}


def _number(worker: WorkerId) -> int:
    return int(worker.rpartition("-")[2])
