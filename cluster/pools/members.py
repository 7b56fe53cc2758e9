"""What each worker is made with, from the configuration. Knows no Ray and no process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from cluster.config import Config
from cluster.config.values import Address
from diptych.types import ModelSource, Role, WorkerId, WorkerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where the cluster runs."""

    model: ModelSource
    secret: bytes
    cache: str
    cpus: float
    """CPUs that workers share."""
    gpus: float
    """GPUs that Ray has."""
    host: str
    """Every node's address when it is known before (one machine); empty to ask each node."""
    node: str
    """Ray's id of the machine that clients reach: fronts run there."""
    joined: bool
    """The Ray is not ours: workers ask it for CPUs."""
    grace_seconds: int
    """How long answers under way may go on when the cluster is told to stop."""


def stop_seconds(grace_seconds: int) -> int:
    """The longest that a stop in order takes: fronts, workers, then their processes. Most take the grace or less."""
    return 3 * grace_seconds + 10


def device_of(config: Config, site: Site) -> Literal["cpu", "cuda"]:
    """`device`, with `auto` decided."""
    if config.device == "auto":
        return "cuda" if site.gpus else "cpu"
    return config.device


def gpu_share(config: Config, site: Site) -> float:
    """The part of a GPU that each worker has: as many share one as must."""
    if device_of(config, site) == "cpu" or not (site.gpus or site.joined):
        return 0.0
    if config.engine.gpus:
        return config.engine.gpus
    pools = config.pools
    workers = pools.prefill.workers + pools.decode.workers + pools.mixed.workers
    return 1.0 / max(1, math.ceil(workers / max(1.0, site.gpus)))


def front_addresses(config: Config) -> list[tuple[Address, Address]]:
    """HTTP and gRPC of each front: the configured ports and those that follow; 0 stays 0."""

    def nth(first: Address, number: int) -> Address:
        return first._replace(port=first.port + number if first.port else 0)

    front = config.front
    return [(nth(front.http_address, number), nth(front.grpc_address, number)) for number in range(front.count)]


def first_members(config: Config, site: Site) -> list[WorkerSpec]:
    """The workers a cluster starts with."""
    pools = config.pools
    counts: list[tuple[Role, int]] = [
        ("prefill", pools.prefill.workers),
        ("decode", pools.decode.workers),
        ("mixed", pools.mixed.workers),
    ]
    return [member(config, site, role, number) for role, count in counts for number in range(count)]


def free_numbers(role: Role, taken: Container[WorkerId], count: int) -> list[int]:
    """The lowest that no worker of this name has."""
    free = (number for number in itertools.count() if WorkerId(f"{role}-{number}") not in taken)
    return list(itertools.islice(free, count))


def member(config: Config, site: Site, role: Role, number: int) -> WorkerSpec:
    """A worker of a pool, in its first life."""
    pools = config.pools
    total = pools.prefill.workers + pools.decode.workers + pools.mixed.workers
    return WorkerSpec(
        id=WorkerId(f"{role}-{number}"),
        role=role,
        epoch=0,
        model=site.model,
        dtype=config.model.served_dtype,
        block_size=config.kv.block_size,
        memory_bytes=0 if config.kv.memory == "auto" else config.kv.memory,
        max_batch_tokens=config.engine.max_batch_tokens,
        max_running=config.engine.max_running,
        # Two busy OpenMP teams on the same cores collapse: the cores are shared out.
        threads=config.engine.threads or max(1, int(site.cpus) // total),
        device=device_of(config, site),
        host=site.host,
        link=config.kv.link,
        wire=config.kv.wire,
        verify=config.kv.verify,
        secret=site.secret,
        lease_seconds=config.kv.lease_seconds,
        cache=site.cache,
        weights=config.weights_of(role),
        activations=config.activations_of(role),
        kernels=config.engine.kernels,
        cuda_graphs=config.engine.cuda_graphs,
        attention=config.engine.attention,
        eviction=config.kv.eviction,
        kv=config.kv.dtype,
    )
