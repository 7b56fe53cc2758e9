"""The owner of a detached cluster: the one detached actor, whose death ends all others. Decides nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray.actor import exit_actor

from cluster.config import Config
from cluster.front.actor import Ports
from cluster.journal import Journal, Level
from cluster.pools.members import Site, stop_seconds
from cluster.pools.pools import Pools
from cluster.terminal import Terminal

if TYPE_CHECKING:
    from diptych.types import ClusterStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What a detached cluster says of itself."""

    name: str
    model: str
    since: float
    """Seconds since 1970."""
    http: tuple[str, ...]
    """HOST:PORT of each front; none while it starts."""
    grpc: tuple[str, ...]
    stop_seconds: int
    """The longest that `stop` may take."""


class OwnerActor:
    """Pools, where no launcher's death reaches them."""

    def __init__(self, config: Config, site: Site) -> None:
        self._config = config
        self._site = site
        self._since = time.time()
        self._journal = Journal(config.log, Terminal(), config.cluster.name)
        self._news: asyncio.Queue[str | Exception | tuple[Ports, ...]] = asyncio.Queue()
        self._ports: tuple[Ports, ...] = ()
        self._pools: Pools | None = None
        self._life: asyncio.Task[None] | None = None

    async def start(self) -> AsyncGenerator[str | tuple[Ports, ...]]:
        """Lines for a person while it starts, then where its fronts listen. Raises what a part raised."""
        self._pools = Pools(self._config, self._site, self._say, self._journal.add)
        self._life = asyncio.ensure_future(self._live(self._pools))
        while True:
            news = await self._news.get()
            if isinstance(news, Exception):
                raise news
            yield news
            if not isinstance(news, str):
                return

    async def describe(self) -> Lease:
        front = self._config.front
        return Lease(
            name=self._config.cluster.name,
            model=self._config.model.name,
            since=self._since,
            http=tuple(str(front.http_address._replace(port=ports.http)) for ports in self._ports),
            grpc=tuple(str(front.grpc_address._replace(port=ports.grpc)) for ports in self._ports),
            stop_seconds=stop_seconds(self._site.grace_seconds),
        )

    async def status(self) -> ClusterStatus:
        """The scheduler's view."""
        assert self._pools is not None, "start comes first"
        return await self._pools.status()

    async def wait_dead(self) -> None:
        """Never returns: the call fails when the process dies."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """Everything ends in order; then this process, so that the call itself fails."""
        if self._life:
            self._life.cancel()
        if self._pools:
            await self._pools.stop()
        exit_actor()

    async def _live(self, pools: Pools) -> None:
        try:
            self._ports = await pools.start()
        except Exception as error:
            self._news.put_nowait(error)  # the launcher hears it and ends us
            return
        self._news.put_nowait(self._ports)
        why = await pools.wait_broken()
        self._say(f"ends: {why}", "error")
        await pools.stop()
        ray.kill(ray.get_runtime_context().current_actor)  # pyright: ignore

    def _say(self, message: str, level: Level = "info") -> None:
        """To Ray's log of this process, and to the launcher while it listens."""
        self._journal.say(message, level)
        if not self._ports:
            self._news.put_nowait(message)
