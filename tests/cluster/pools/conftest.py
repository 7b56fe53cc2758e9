"""The real pools over a small Ray: only `ray` itself stands aside."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import ray
from ray.actor import ActorClass

from cluster.config import Override, load
from cluster.pools.members import Site
from cluster.pools.pools import Pools
from diptych.types import ModelSource
from tests.cluster.pools.small_ray import SkippingLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from cluster.journal import Level
    from diptych.types import Changed, Operation, WorkerId
    from tests.cluster.pools.small_ray import SmallRay


@dataclass
class House:
    """A cluster that is up."""

    pools: Pools
    ray: SmallRay
    said: list[tuple[Level, str]]

    async def perform(self, operation: Operation) -> Changed:
        return await self.ray.front().perform(operation)

    def registered(self) -> list[tuple[WorkerId, int, str]]:
        """As `SmallRay.workers`: who is up as the pools know it."""
        parts = self.pools.workers.items()
        return sorted((who, part.spec.epoch, part.where) for who, part in parts if part.info)

    def broken(self) -> asyncio.Future[str]:
        return asyncio.ensure_future(self.pools.wait_broken())


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`play(scenario, small_ray, pools__decode__workers=2, …)`: the cluster starts, then the scenario is played."""

    def run(scenario: Callable[[House], Coroutine[Any, Any, None]], small: SmallRay, **values: Any) -> None:
        values = {"engine__threads": 2, **values}
        config = load(None, {}, [Override(name.replace("__", "."), value, "--set") for name, value in values.items()])
        model = ModelSource(name="m", path="random:tiny", digest="d")
        site = Site(
            model=model, secret=b"s", cache="", cpus=4, gpus=0, host="", node=next(iter(small.cpus)), joined=True,
            grace_seconds=3,
        )  # fmt: skip

        async def main() -> None:
            monkeypatch.setattr(time, "monotonic", asyncio.get_running_loop().time)
            said: list[tuple[Level, str]] = []
            pools = Pools(config, site, lambda line, level="info": said.append((level, str(line))), lambda _: None)
            await pools.start()
            await scenario(House(pools, small, said))
            await pools.stop()

        monkeypatch.setattr(ActorClass, "_remote", lambda kind, **options: small.make(kind, **options))
        for name in ("kill", "nodes"):
            monkeypatch.setattr(ray, name, getattr(small, name))
        monkeypatch.setattr(ray, "available_resources", small.free)
        monkeypatch.setattr(ray, "cluster_resources", small.resources)
        with asyncio.Runner(loop_factory=SkippingLoop) as runner:
            runner.run(main())
        monkeypatch.undo()

    return run
