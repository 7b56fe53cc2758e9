"""Owns the processes of a cluster: introduces them, replaces those that died or are stuck, ends them.

a worker dies      its requests are placed again or fail; it comes back under the next epoch
a front dies       its clients are cut off, their requests are cancelled; it comes back on its ports
the scheduler dies running requests don't notice; the workers tell the next one everything
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray

from cluster.config import Config
from cluster.front.actor import Ports
from cluster.journal import Entry, Say
from cluster.models.progress import Step
from cluster.pools.changes import Changes
from cluster.pools.growth import Growth
from cluster.pools.listeners import Listeners
from cluster.pools.members import Site, device_of, first_members, front_addresses, member
from cluster.pools.parts import FrontPart, WorkerPart
from cluster.pools.processes import Processes
from cluster.pools.rescaling import rescale
from cluster.pools.room import QUIET_SECONDS, NoRoom, Room, wait_room
from cluster.pools.watch import Deaths, end, progress_of, pulse_of, silence_of, wait_end, wait_start
from diptych.errors import Internal, InvalidRequest, ServingError, WorkerLost
from diptych.types import ClusterStatus, Role, WorkerId, WorkerInfo, WorkerSpec
from workers.actors import answer

_START_SECONDS = 600.0
"""Loading a large model takes minutes; forever it may not take."""
_CALL_SECONDS = 30.0
_SCHEDULER = "scheduler"
_END_SECONDS = 2.0
"""How long killed processes may take to be gone."""


class Pools:
    """A running cluster, from its owner's side. Lives on the owner's event loop."""

    def __init__(self, config: Config, site: Site, say: Say, add: Callable[[Entry], None]) -> None:
        """`say` gets a line for a person at each step and at each death, `add` what the fronts log."""
        self._config = config
        self._site = site
        self._say = say
        self._make = Processes(config, site)
        self._patience_seconds = config.kv.lease_seconds
        self._workers: dict[WorkerId, WorkerPart] = {}
        self._fronts: list[FrontPart] = []
        self._scheduler: Any = None
        self._scheduler_deaths = self._deaths()
        self._watches: set[asyncio.Task[None]] = set()
        self._listeners = Listeners(add)
        self._growth = Growth(config, self, joined=site.joined)
        self._changes = Changes(config, self, self._growth)
        self._arrived = asyncio.Event()
        """Set when a worker is up; then there is another."""
        self._returning: set[WorkerId] = set()
        """Names of who is made again, and is nobody meanwhile."""
        self._told_away: dict[WorkerId, str] = {}
        self._epochs: dict[WorkerId, int] = {}
        """The next of each name that is free again: what a lost process still says must not pass for its heir's."""
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> tuple[Ports, ...]:
        """Everything up and introduced; where each front listens. Raises what a part raised, within a bound."""
        specs = first_members(self._config, self._site)
        kinds = ", ".join(spec.id for spec in specs)
        self._say(f"starting {kinds}: {device_of(self._config, self._site)}, {specs[0].threads} thread(s) each")
        self._scheduler = self._make.scheduler()
        addresses = front_addresses(self._config)
        self._fronts = [FrontPart(number, http, grpc, self._deaths()) for number, (http, grpc) in enumerate(addresses)]
        self._workers = {spec.id: self._part(spec) for spec in specs}
        self._say_loading()
        seconds = _START_SECONDS + (self._config.cluster.room_seconds if self._site.joined else 0.0)
        try:
            ports = await asyncio.wait_for(self._start_all(), seconds)
        except TimeoutError:
            missing = ", ".join(who for who, worker in self._workers.items() if not worker.info) or "a front"
            raise Internal(f"{missing} did not come up within {seconds:g} s") from None
        self._watch(self._keep_scheduler())
        for worker in self._workers.values():
            self._watch(self._keep_worker(worker))
        for front in self._fronts:
            self._watch(self._keep_front(front))
        if self._config.autoscale.enabled:
            self._watch(rescale(self._config.autoscale, self, self._changes, self._say))
        self._watch(self._growth.run())
        return ports

    async def _start_all(self) -> tuple[Ports, ...]:
        starts = [self._start_first(worker) for worker in self._workers.values()]
        await asyncio.gather(*(self._prepare_front(front) for front in self._fronts), *starts)
        await self._introduce()
        await asyncio.gather(*(self._join(worker) for worker in self._workers.values()))
        return tuple(await asyncio.gather(*(self._open_front(front) for front in self._fronts)))

    async def wait_broken(self) -> str:
        """Until the cluster can't answer any more and won't by itself; says why."""
        return await self._broken

    async def status(self) -> ClusterStatus:
        """The scheduler's view."""
        return await asyncio.wait_for(answer(self._scheduler.status.remote(), "the scheduler"), _CALL_SECONDS)

    async def stop(self) -> None:
        """In order: fronts first, so that nobody is cut off who could have ended."""
        self._changes.close()
        for watch in self._watches:
            watch.cancel()
        grace = self._site.grace_seconds
        closes = [front.handle.close.remote() for front in self._fronts if front.prepared]
        await self._all_bounded(closes, "a front", 2 * grace + 1)
        await self._listeners.wait_last_words(_END_SECONDS)
        stops = [worker.handle.stop.remote(grace) for worker in self._workers.values() if worker.info]
        await self._all_bounded(stops, "a worker", grace + 1)
        handles = [self._scheduler, *(part.handle for part in [*self._fronts, *self._workers.values()])]
        ends = [self._bounded(end(handle), "a process", _END_SECONDS) for handle in handles if handle is not None]
        await asyncio.gather(*ends)

    # ---- changes (cluster.pools.changes.House) -------------------------------------------------------------

    @property
    def workers(self) -> Mapping[WorkerId, WorkerPart]:
        return self._workers

    @property
    def scheduler(self) -> Any:  # noqa: ANN401
        return self._scheduler

    def part(self, role: Role, number: int, node: str = "") -> WorkerPart:
        spec = member(self._config, self._site, role, number)
        return self._part(replace(spec, epoch=self._epochs.get(spec.id, 0)), node)

    def _part(self, spec: WorkerSpec, node: str = "") -> WorkerPart:
        return WorkerPart(spec, self._make.worker(spec, node), self._deaths(), node=node)

    def _forget(self, part: WorkerPart) -> None:
        if self._workers.get(part.spec.id) is part:
            del self._workers[part.spec.id]
        self._tell_away()
        self._epochs[part.spec.id] = max(self._epochs.get(part.spec.id, 0), part.spec.epoch + 1)

    def room(self, role: Role) -> Room:
        return self._make.room(member(self._config, self._site, role, 0))

    @property
    def changing(self) -> bool:
        return self._changes.busy

    @property
    def avoided(self) -> frozenset[str]:
        return self._make.avoided

    def avoid(self, node: str, alive: Iterable[str]) -> None:
        self._make.avoid(node, alive)

    def welcome(self, node: str) -> None:
        self._make.welcome(node)

    @property
    def names(self) -> Container[WorkerId]:
        return self._workers.keys() | self._returning

    async def arrival(self) -> None:
        await self._arrived.wait()

    def bring(self, part: WorkerPart) -> None:
        self._workers[part.spec.id] = part
        self._watch(self._bring(part))

    async def _bring(self, part: WorkerPart) -> None:
        if error := await self._try_begin(part):
            if not self._growth.needs(part):
                return self._forget(part)
            await self._replace_worker(part, error)
        await self._keep_worker(part)

    def dismiss(self, part: WorkerPart) -> None:
        part.retiring = True
        self._forget(part)
        ray.kill(part.handle)  # pyright: ignore[reportUnknownMemberType]

    def _deaths(self) -> Deaths:
        return Deaths(self._config.cluster.max_deaths)

    async def add(self, part: WorkerPart) -> None:
        self._workers[part.spec.id], part.retiring = part, False
        self._returning.discard(part.spec.id)
        try:
            await self._begin(part)
        except (ServingError, TimeoutError) as error:
            part.info = None
            self._forget(part)
            ray.kill(part.handle)  # pyright: ignore[reportUnknownMemberType]
            raise Internal(f"{part.spec.id} did not start: {error!r}") from error
        self._watch(self._keep_worker(part))

    async def renew(self, part: WorkerPart) -> None:
        part.spec = replace(part.spec, epoch=part.spec.epoch + 1)
        part.leaving, part.node = False, ""
        part.handle = self._make.worker(part.spec)
        await self.add(part)

    async def retire(self, part: WorkerPart, *, returns: bool = False) -> None:
        part.retiring, part.info = True, None
        if returns:
            self._returning.add(part.spec.id)
        self._forget(part)
        leave = self._scheduler.leave.remote(part.spec.id, part.spec.epoch)
        await self._bounded(leave, "the scheduler", _CALL_SECONDS)
        await self.reintroduce()
        grace = self._site.grace_seconds
        await self._bounded(part.handle.stop.remote(grace), part.spec.id, grace + 1)
        await self._bounded(end(part.handle), part.spec.id, _END_SECONDS)
        self._say(f"{part.spec.id} was drained and has ended")

    @property
    def others(self) -> tuple[str, ...]:
        return (_SCHEDULER, *(front.place for front in self._fronts))

    async def renew_other(self, who: str) -> None:
        if who == _SCHEDULER:
            before, self._scheduler = self._scheduler, self._make.scheduler()
            await self._install_scheduler()
            await self._bounded(end(before), who, _END_SECONDS)
            self._say(f"{who} was replaced")
            return
        [front] = (front for front in self._fronts if front.place == who)
        if not front.prepared:
            raise InvalidRequest(f"{who} is not up: it is starting or lost", param="worker")
        await self._renew_front(front)

    async def _renew_front(self, front: FrontPart) -> None:
        before = replace(front)
        front.incarnation += 1
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._prepare_front(front)
                await asyncio.wait_for(answer(front.handle.meet.remote(self._up()), front.id), _CALL_SECONDS)
                await answer(front.handle.open.remote(beside=True), front.id)
        except (ServingError, TimeoutError) as error:
            ray.kill(front.handle)  # pyright: ignore[reportUnknownMemberType]
            front.handle, front.pid, front.prepared = before.handle, before.pid, True
            raise Internal(f"{front.id} did not start: {error}") from error
        self._watch(self._retire_front(before))
        self._say(f"{front.id} takes over from {before.id}, which ends its answers")

    async def _retire_front(self, front: FrontPart) -> None:
        grace = round(self._config.cluster.drain_seconds)
        await self._bounded(front.handle.retire.remote(grace), front.id, grace + _CALL_SECONDS)
        await self._bounded(end(front.handle), front.id, _END_SECONDS)
        leaves = [worker.handle.front_left.remote(front.id) for worker in self._workers.values() if worker.info]
        await self._all_bounded(leaves, "a worker", _CALL_SECONDS)
        self._say(f"{front.id} has ended")

    async def _begin(self, part: WorkerPart) -> None:
        await self._start_worker(part)
        async with asyncio.timeout(_START_SECONDS):
            await self.reintroduce()
            self._check_wanted(part)
            await self._join(part)
        arrived, self._arrived = self._arrived, asyncio.Event()
        arrived.set()

    def _check_wanted(self, part: WorkerPart) -> None:
        """Raises WorkerLost when it was to go before it came: nobody has to hear of it any more."""
        if part.retiring:
            raise WorkerLost(f"{part.spec.id} is not wanted any more")

    # ---- workers ------------------------------------------------------------------------------------------

    async def _start_worker(self, worker: WorkerPart) -> None:
        await self._find_room(worker)
        async with asyncio.timeout(_START_SECONDS):
            handle, who = worker.handle, worker.spec.id
            starting: asyncio.Future[WorkerInfo] = asyncio.ensure_future(answer(handle.start.remote(), who))
            seen = None if self._site.joined else progress_of
            info = await wait_start(starting, lambda: answer(handle.pid.remote(), who), self._patience_seconds, seen)
        worker.info = info
        size = info.blocks * info.layout.block_bytes / 2**20
        tokens = info.blocks * info.layout.block_size
        self._say(f"{info.id} is up: {tokens} tokens of KV in {size:.0f} MiB ({info.layout.dtype}); {info.computes}")

    async def _find_room(self, worker: WorkerPart) -> None:
        """Raises NoRoom."""

        def say(line: str) -> None:
            worker.lacks = line.removeprefix(f"{worker.spec.id} ")
            self._tell_away()
            (self._whisper if worker.node else self._say)(line)

        worker.placed = False
        seconds = QUIET_SECONDS if worker.node else self._room_seconds
        try:
            await wait_room(worker.handle, worker.spec.id, self._make.room(worker.spec), seconds, say)
        except NoRoom as error:
            worker.lacks, worker.refusals = str(error), worker.refusals + 1
            self._tell_away()
            raise
        worker.placed, worker.lacks, worker.refusals = True, "", 0
        self._tell_away()

    async def _start_first(self, worker: WorkerPart) -> None:
        await self._start_worker(worker)
        self._say_loading()

    def _say_loading(self) -> None:
        up, all_of_them = len(self._up()), len(self._workers)
        if up < all_of_them:
            self._say(Step(f"loading the model: {up} of {all_of_them} workers are up", up, all_of_them))

    async def _join(self, worker: WorkerPart) -> None:
        """Requests are placed on it from now on: everyone knows it already."""
        await answer(self._scheduler.join.remote(worker.info), "the scheduler")
        # Frozen since it is up, it would hold up its own watch.
        await self._bounded(worker.handle.report_to.remote(self._scheduler), worker.spec.id, self._patience_seconds)

    async def _keep_worker(self, worker: WorkerPart) -> None:
        """Its life and its next lives."""
        while worker.info is not None:
            handle, who = worker.handle, worker.spec.id
            pid = None if self._site.joined else worker.info.pid
            how = await wait_end(handle, who, silence_of(handle, who), self._patience_seconds, pid)
            if worker.retiring or worker.handle is not handle:
                return  # it was to end, and has a successor perhaps, which is watched
            self._say(f"{worker.spec.id} {how}", "warning")
            where, worker.info = worker.where, None
            leave = self._scheduler.leave.remote(worker.spec.id, worker.spec.epoch)
            await self._bounded(leave, "the scheduler", _CALL_SECONDS)
            await self.reintroduce()
            if not self._growth.needs(worker):
                self._growth.died(where)
                return self._forget(worker)
            await self._replace_worker(worker, WorkerLost(how))

    async def _replace_worker(self, worker: WorkerPart, error: Exception | None) -> None:
        """`error` is why it isn't there. Waiting for room is no death: it goes on while others serve."""
        while error is not None and not worker.retiring:
            if isinstance(error, NoRoom):
                self._check_hope(worker, error)
            else:
                worker.deaths.add(time.monotonic())
            if worker.deaths.too_many:
                worker.lost = True
                return self._give_up(worker.spec.id, worker.deaths)
            worker.spec, worker.node = replace(worker.spec, epoch=worker.spec.epoch + 1), ""
            worker.leaving = False  # it comes back elsewhere
            worker.handle = self._make.worker(worker.spec)
            error = await self._try_begin(worker)

    def _check_hope(self, worker: WorkerPart, error: NoRoom) -> None:
        """Where nobody decodes, room is waited for as often as deaths are made good, and no longer."""
        serving = any(part.info and part.spec.role != "prefill" for part in self._workers.values())
        if worker.refusals > self._config.cluster.max_deaths and not serving and worker.spec.role != "prefill":
            self._break(f"no worker that decodes is left: {error}")

    async def _try_begin(self, worker: WorkerPart) -> Exception | None:
        """What went wrong; then nothing of it is left."""
        try:
            await self._begin(worker)
        except (ServingError, TimeoutError) as error:
            worker.info = None
            ray.kill(worker.handle)  # pyright: ignore[reportUnknownMemberType]
            if worker.node:
                full = isinstance(error, NoRoom)
                (self._growth.refused if full else self._growth.died)(worker.node)
            if not worker.retiring:
                self._say(f"{worker.spec.id} did not start: {error!r}", "debug" if worker.node else "warning")
            return error
        return None

    def _whisper(self, line: str | Step) -> None:
        """Of what may fail, and is tried again."""
        self._say(line, "debug")

    @property
    def _room_seconds(self) -> float:
        """Nobody else takes room in a Ray of our own."""
        return self._config.cluster.room_seconds if self._site.joined else _START_SECONDS

    # ---- fronts -------------------------------------------------------------------------------------------

    async def _prepare_front(self, front: FrontPart) -> None:
        front.handle = self._make.front(front.id, front.http, front.grpc)
        front.pid = await answer(front.handle.prepare.remote(self._scheduler), front.id)
        front.prepared = True
        self._listeners.hear(front.handle)
        self._changes.hear(front.handle)

    async def _open_front(self, front: FrontPart) -> Ports:
        ports: Ports = await answer(front.handle.open.remote(), front.id)
        # Whoever replaces it listens where clients were told to look.
        front.http, front.grpc = front.http._replace(port=ports.http), front.grpc._replace(port=ports.grpc)
        return ports

    async def _keep_front(self, front: FrontPart) -> None:
        while front.prepared:
            handle, who = front.handle, front.id
            how = await wait_end(handle, who, pulse_of(handle, who), self._patience_seconds, front.pid)
            if front.handle is not handle:
                continue  # it has a successor
            front.prepared = False
            self._say(f"{front.id} {how}; its requests are cancelled", "warning")
            leaves = [worker.handle.front_left.remote(front.id) for worker in self._workers.values() if worker.info]
            await self._all_bounded(leaves, "a worker", _CALL_SECONDS)
            await self._replace_front(front)

    async def _replace_front(self, front: FrontPart) -> None:
        while not front.prepared:
            front.deaths.add(time.monotonic())
            if front.deaths.too_many:
                front.lost = True
                return self._give_up(front.id, front.deaths)
            front.incarnation += 1
            try:
                async with asyncio.timeout(_START_SECONDS):
                    await self._prepare_front(front)
                    await asyncio.wait_for(answer(front.handle.meet.remote(self._up()), front.id), _CALL_SECONDS)
                    await self._open_front(front)
            except (ServingError, TimeoutError) as error:
                front.prepared = False
                ray.kill(front.handle)  # pyright: ignore[reportUnknownMemberType]
                self._say(f"{front.id} did not come back: {error!r}", "warning")
            else:
                self._say(f"{front.id} is up: HTTP {front.http}, gRPC {front.grpc}")

    # ---- the scheduler ------------------------------------------------------------------------------------

    async def _keep_scheduler(self) -> None:
        while True:
            who, handle = "the scheduler", self._scheduler
            how = await wait_end(handle, who, pulse_of(handle, who), self._patience_seconds, None)
            if self._scheduler is not handle:
                continue  # it has a successor
            self._say(f"{who} {how}; requests under way go on", "warning")
            self._scheduler_deaths.add(time.monotonic())
            if self._scheduler_deaths.too_many:
                return self._break(f"{who} died {self._scheduler_deaths}")
            self._scheduler = self._make.scheduler()
            await self._install_scheduler()
            self._say(f"{who} is up again")

    async def _install_scheduler(self) -> None:
        """It knows all workers before anybody asks it; who waited at the one before asks again."""
        self._told_away = {}
        self._tell_away()
        joins = [self._join(worker) for worker in self._workers.values() if worker.info and not worker.retiring]
        await self._all_bounded(joins, "the scheduler", _CALL_SECONDS)
        tells = [front.handle.use_scheduler.remote(self._scheduler) for front in self._fronts if front.prepared]
        await self._all_bounded(tells, "a front", _CALL_SECONDS)

    # ---- everyone -----------------------------------------------------------------------------------------

    def _up(self) -> dict[WorkerId, tuple[WorkerInfo, Any]]:
        return {who: (worker.info, worker.handle) for who, worker in self._workers.items() if worker.info}

    async def _introduce(self) -> None:
        """Everyone learns of everyone who is up."""
        up = self._up()
        calls = [answer(front.handle.meet.remote(up), front.id) for front in self._fronts if front.prepared]
        for worker, (_, handle) in up.items():
            peers = {peer: other for peer, (_, other) in up.items() if peer != worker}
            calls.append(answer(handle.meet.remote(peers), worker))
        await asyncio.gather(*calls)

    async def reintroduce(self) -> None:
        """After a change. A member that dies meanwhile has its own watch."""
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                await self._introduce()
        except (ServingError, TimeoutError) as error:
            self._say(f"not everyone heard of the change: {error!r}", "warning")

    def _tell_away(self) -> None:
        """Whoever asks for the cluster's status hears it from the scheduler."""
        away = {who: why for who, part in self._workers.items() if (why := part.absence)}
        if away != self._told_away:
            self._told_away = away
            self._watch(self._hear_away(away))

    async def _hear_away(self, away: dict[WorkerId, str]) -> None:
        with suppress(ServingError):  # its successor is told anew
            await answer(self._scheduler.away.remote(away), "the scheduler")

    def _give_up(self, who: str, deaths: Deaths) -> None:
        self._tell_away()
        self._say(f"{who} died {deaths} and is not replaced", "error")
        decoding = [worker for worker in self._workers.values() if worker.spec.role != "prefill"]
        for kind, parts in (("worker that decodes", decoding), ("front", self._fronts)):
            if all(part.lost for part in parts):
                self._break(f"no {kind} is left: {who} died {deaths}")

    def _break(self, why: str) -> None:
        if not self._broken.done():
            self._broken.set_result(why)

    def _watch(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(what)
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    async def _all_bounded(self, calls: Iterable[Awaitable[Any]], who: str, seconds: float) -> None:
        await asyncio.gather(*(self._bounded(call, who, seconds) for call in calls))

    async def _bounded(self, call: Awaitable[Any], who: str, seconds: float) -> None:
        """A call whose failure changes nothing: the other side is gone or ends anyway."""
        try:
            await asyncio.wait_for(answer(call, who), seconds)
        except (ServingError, TimeoutError) as error:
            self._say(f"{who}: {error!r}", "warning")
