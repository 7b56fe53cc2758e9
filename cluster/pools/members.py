"""What each worker is made with, from the configuration. Knows no Ray and no process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from cluster.config import Config
from diptych.types import ModelSource, Role, WorkerId, WorkerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where the cluster runs."""

    model: ModelSource
    secret: bytes
    cache: str
    gpus: float
    """GPUs that Ray has."""
    host: str
    """Every node's address when it is known before (one machine); empty to ask each node."""


def device_of(config: Config, site: Site) -> Literal["cpu", "cuda"]:
    """`device`, with `auto` decided."""
    if config.device == "auto":
        return "cuda" if site.gpus else "cpu"
    return config.device


def first_members(config: Config, site: Site) -> list[WorkerSpec]:
    """The workers a cluster starts with."""
    pools = config.pools
    counts: list[tuple[Role, int]] = [
        ("prefill", pools.prefill.workers),
        ("decode", pools.decode.workers),
        ("mixed", pools.mixed.workers),
    ]
    total = sum(count for _, count in counts)
    # Two busy OpenMP teams on the same cores collapse: the cores are shared out.
    threads = config.engine.threads or max(1, len(os.sched_getaffinity(0)) // total)
    return [
        WorkerSpec(
            id=WorkerId(f"{role}-{number}"),
            role=role,
            epoch=0,
            model=site.model,
            dtype=config.model.served_dtype,
            block_size=config.kv.block_size,
            memory_bytes=0 if config.kv.memory == "auto" else config.kv.memory,
            max_batch_tokens=config.engine.max_batch_tokens,
            max_running=config.engine.max_running,
            threads=threads,
            device=device_of(config, site),
            host=site.host,
            link=config.kv.link,
            wire=config.kv.wire,
            verify=config.kv.verify,
            secret=site.secret,
            lease_seconds=config.kv.lease_seconds,
            cache=site.cache,
        )
        for role, count in counts
        for number in range(count)
    ]
