"""Owns the processes of a cluster: makes them, introduces them, replaces dead workers, ends them.

The one place that creates actors: an actor dies with the process that created it, so nothing that
may be killed does. Ray never restarts anything; this does.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import ray

from cluster.config import Config
from cluster.front.actor import FrontActor, FrontSpec, Ports
from cluster.front.dispatcher import FrontIdentity
from cluster.pools.members import Site, device_of, first_members
from cluster.scheduler.actor import SchedulerActor
from cluster.scheduler.costs import Policy
from cluster.scheduler.scheduler import SchedulerSpec
from cluster.source_tree import source_roots
from diptych.build import build_identity
from diptych.errors import ServingError
from diptych.hashing import KvIdentity
from diptych.types import FrontId, WorkerId, WorkerInfo, WorkerSpec
from workers.actors import CONTROL, WorkerActor, answer

_START_SECONDS = 600.0
"""Loading a large model takes minutes; forever it may not take."""
_STOP_SECONDS = 5.0
_CALL_SECONDS = 30.0
_MAX_DEATHS = 5
"""A worker that dies more often than this, in a row, is not replaced: it would die for ever."""
_MANY_CALLS = 100_000
"""A waiting grant holds a call open: they must not use up an actor's concurrency."""


@dataclass(slots=True)
class _Member:
    spec: WorkerSpec
    handle: Any
    info: WorkerInfo | None = None
    deaths: int = 0


class Pools:
    """A running cluster, from its owner's side. Lives on the launcher's event loop."""

    def __init__(self, config: Config, site: Site, say: Callable[[str], None]) -> None:
        """`say` gets a line for a person at each step and at each death."""
        self._config = config
        self._site = site
        self._say = say
        self._members: dict[WorkerId, _Member] = {}
        self._size = 0
        self._scheduler: Any = None
        self._front: Any = None
        self._is_open = False
        self._watches: set[asyncio.Task[None]] = set()
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> Ports:
        """Everything up and introduced. Raises what a part raised, within a bound."""
        specs = first_members(self._config, self._site)
        self._size = len(specs)
        kinds = ", ".join(spec.id for spec in specs)
        self._say(f"starting {kinds}: {device_of(self._config, self._site)}, {specs[0].threads} thread(s) each")
        self._scheduler = _actor(SchedulerActor).remote(self._scheduler_spec())
        self._front = _actor(FrontActor).remote(self._front_spec())
        for spec in specs:
            self._members[spec.id] = _Member(spec, self._new_worker(spec))
        async with asyncio.timeout(_START_SECONDS):
            starts = [self._start_worker(member) for member in self._members.values()]
            await asyncio.gather(answer(self._front.prepare.remote(self._scheduler), "the front"), *starts)
            await self._introduce()
            ports = await answer(self._front.open.remote(), "the front")
            self._is_open = True
        self._watch(self._wait_broken(self._front, "the front"))
        self._watch(self._wait_broken(self._scheduler, "the scheduler"))
        return ports

    async def wait_broken(self) -> str:
        """Until a part died that is not replaced; says which."""
        return await self._broken

    async def stop(self) -> None:
        """In order: fronts first, so that nobody is cut off who could have ended.

        What is still starting has nobody to cut off, and would answer only when it is up.
        """
        for watch in self._watches:
            watch.cancel()
        if self._is_open:
            await self._bounded(self._front.close.remote(), "the front", 2 * _STOP_SECONDS)
        stops = [member.handle.stop.remote(_STOP_SECONDS) for member in self._members.values() if member.info]
        await asyncio.gather(*(self._bounded(stop, "a worker", _STOP_SECONDS + 1) for stop in stops))

    # ---- members ------------------------------------------------------------------------------------------

    async def _start_worker(self, member: _Member) -> None:
        info: WorkerInfo = await answer(member.handle.start.remote(), member.spec.id)
        member.info = info
        size = info.blocks * info.layout.block_bytes / 2**20
        tokens = info.blocks * info.layout.block_size
        self._say(f"{info.id} is up: {tokens} tokens of KV in {size:.0f} MiB ({info.layout.dtype})")
        await answer(self._scheduler.join.remote(info), "the scheduler")
        await answer(member.handle.report_to.remote(self._scheduler), info.id)
        self._watch(self._wait_dead(member))

    async def _introduce(self) -> None:
        """Everyone learns of everyone who is up."""
        up = {worker: (member.info, member.handle) for worker, member in self._members.items() if member.info}
        calls = [
            (member.handle.meet.remote({peer: handle for peer, (_, handle) in up.items() if peer != worker}), worker)
            for worker, (_, _) in up.items()
            if (member := self._members[worker])
        ]
        await asyncio.gather(
            *(answer(call, worker) for call, worker in calls), answer(self._front.meet.remote(up), "the front")
        )

    async def _wait_dead(self, member: _Member) -> None:
        worker, epoch = member.spec.id, member.spec.epoch
        try:
            await answer(member.handle.wait_dead.remote(), worker)
        except ServingError as error:
            self._say(f"{worker} died: {error.__cause__ or error}")
        member.info = None
        member.deaths += 1
        await self._bounded(self._scheduler.leave.remote(worker, epoch), "the scheduler", _CALL_SECONDS)
        await self._reintroduce()
        if member.deaths > _MAX_DEATHS:
            self._say(f"{worker} died {member.deaths} times and is not replaced")
            return
        member.spec = replace(member.spec, epoch=epoch + 1)
        member.handle = self._new_worker(member.spec)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._start_worker(member)
                await self._reintroduce()
        except (ServingError, TimeoutError) as error:
            self._say(f"{worker} did not come back: {error!r}")

    async def _reintroduce(self) -> None:
        """After a change. A member that dies meanwhile has its own watch."""
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                await self._introduce()
        except (ServingError, TimeoutError) as error:
            self._say(f"not everyone heard of the change: {error!r}")

    async def _wait_broken(self, handle: Any, who: str) -> None:  # noqa: ANN401 (handles are untyped)
        try:
            await answer(handle.wait_dead.remote(), who)
        except ServingError as error:
            if not self._broken.done():
                self._broken.set_result(f"{who} died: {error}")

    def _watch(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(what)
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    async def _bounded(self, call: Any, who: str, seconds: float) -> None:  # noqa: ANN401
        """A call whose failure changes nothing: the other side is gone or ends anyway."""
        try:
            await asyncio.wait_for(answer(call, who), seconds)
        except (ServingError, TimeoutError) as error:
            self._say(f"{who}: {error!r}")

    # ---- what they are told ---------------------------------------------------------------------------------

    def _new_worker(self, spec: WorkerSpec) -> Any:  # noqa: ANN401
        gpus = min(1.0, self._site.gpus / self._size) if spec.device == "cuda" else 0.0
        environment = {
            "OMP_NUM_THREADS": str(spec.threads),
            "MKL_NUM_THREADS": str(spec.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        }
        return _actor(WorkerActor, environment, gpus=gpus, groups={CONTROL: _MANY_CALLS}).remote(spec)

    def _scheduler_spec(self) -> SchedulerSpec:
        return SchedulerSpec(
            model=self._site.model,
            build=build_identity(),
            policy=Policy(how=self._config.placement.how),
            stale_seconds=self._config.kv.lease_seconds,
        )

    def _front_spec(self) -> FrontSpec:
        dtype = self._config.model.served_dtype
        identity = KvIdentity(model_digest=self._site.model.digest, weight_format=dtype, kv_dtype=dtype)
        return FrontSpec(
            identity=FrontIdentity(
                id=FrontId("front-0"),
                model=self._site.model.name,
                root=identity.root(),
                patience_seconds=self._config.kv.lease_seconds,
            ),
            model=self._site.model,
            http=self._config.front.http,
            grpc=self._config.front.grpc,
        )


def _actor(
    kind: type, environment: dict[str, str] | None = None, *, gpus: float = 0.0, groups: dict[str, int] | None = None
) -> Any:  # noqa: ANN401
    """The actor class, with what all our actors share."""
    roots = [*source_roots(), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**(environment or {}), **({"PYTHONPATH": os.pathsep.join(roots)} if roots else {})}
    options: dict[str, Any] = {
        "num_cpus": 0,
        "num_gpus": gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": _MANY_CALLS,
        "max_pending_calls": _MANY_CALLS,
        "concurrency_groups": groups or {},
        "runtime_env": {"env_vars": variables},
    }
    return ray.remote(**options)(kind)  # pyright: ignore[reportUnknownVariableType]
