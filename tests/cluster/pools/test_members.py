"""What a configuration makes of the workers, before any process exists."""

from __future__ import annotations

import os
from typing import Any

import pytest

from cluster.config import Config, Override, load
from cluster.pools.members import Site, device_of, first_members
from diptych.types import ModelSource


def config(**values: Any) -> Config:
    """`pools__decode__workers=2` is `pools.decode.workers = 2`."""
    return load(None, {}, [Override(name.replace("__", "."), value, "--set") for name, value in values.items()])


def site(gpus: float = 0.0) -> Site:
    return Site(
        model=ModelSource(name="m", path="random:tiny", digest="d"), secret=b"s", cache="/c", gpus=gpus, host="10.0.0.1"
    )


def test_each_pool_has_its_workers_named_by_role_and_number() -> None:
    members = first_members(
        config(pools__prefill__workers=2, pools__decode__workers=1, pools__mixed__workers=1), site()
    )
    assert [(each.id, each.role, each.epoch) for each in members] == [
        ("prefill-0", "prefill", 0),
        ("prefill-1", "prefill", 0),
        ("decode-0", "decode", 0),
        ("mixed-0", "mixed", 0),
    ]


def test_the_cores_are_shared_out_and_everyone_has_one() -> None:
    cores = len(os.sched_getaffinity(0))
    assert {each.threads for each in first_members(config(), site())} == {max(1, cores // 2)}
    crowd = config(pools__decode__workers=cores + 1)
    assert {each.threads for each in first_members(crowd, site())} == {1}
    assert {each.threads for each in first_members(config(engine__threads=7), site())} == {7}


def test_what_is_set_reaches_every_worker() -> None:
    wanted = config(
        model__dtype="fp32", kv__block_size=32, kv__memory="64MiB", kv__verify="all", kv__lease_seconds=3,
        engine__max_batch_tokens=128, engine__max_running=5,
    )  # fmt: skip
    for each in first_members(wanted, site()):
        assert (each.dtype, each.block_size, each.memory_bytes) == ("fp32", 32, 64 << 20)
        assert (each.verify, each.lease_seconds) == ("all", 3.0)
        assert (each.max_batch_tokens, each.max_running) == (128, 5)
        assert (each.model.digest, each.secret, each.cache, each.host) == ("d", b"s", "/c", "10.0.0.1")
    assert {each.memory_bytes for each in first_members(config(), site())} == {0}  # each measures what is free


@pytest.mark.parametrize(
    ("values", "gpus", "device"),
    [({}, 0.0, "cpu"), ({}, 2.0, "cuda"), ({"device": "cpu"}, 2.0, "cpu"), ({"device": "cuda"}, 0.0, "cuda")],
)
def test_the_device_follows_from_the_machine(values: dict[str, Any], gpus: float, device: str) -> None:
    wanted = config(**values)
    assert device_of(wanted, site(gpus)) == device
    assert {each.device for each in first_members(wanted, site(gpus))} == {device}
