"""What a configuration makes of the workers, before any process exists."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import Config, Override, load
from cluster.pools.members import Site, device_of, first_members, front_addresses, gpu_share
from cluster.pools.processes import Processes
from diptych.types import ModelSource


def config(**values: Any) -> Config:
    """`pools__decode__workers=2` is `pools.decode.workers = 2`."""
    return load(None, {}, [Override(name.replace("__", "."), value, "--set") for name, value in values.items()])


def site(gpus: float = 0.0, cpus: float = 8.0, *, joined: bool = False) -> Site:
    return Site(
        model=ModelSource(name="m", path="random:tiny", digest="d"),
        secret=b"s",
        cache="/c",
        cpus=cpus,
        gpus=gpus,
        host="10.0.0.1",
        node="n",
        joined=joined,
        grace_seconds=3,
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
    assert {each.threads for each in first_members(config(), site(cpus=8.0))} == {4}
    assert {each.threads for each in first_members(config(), site(cpus=0.0))} == {1}
    crowd = config(pools__decode__workers=8)
    assert {each.threads for each in first_members(crowd, site(cpus=8.0))} == {1}
    assert {each.threads for each in first_members(config(engine__threads=7), site())} == {7}


@pytest.mark.parametrize(
    ("workers", "gpus", "share"),
    [(2, 8.0, 1.0), (2, 2.0, 1.0), (3, 2.0, 0.5), (2, 1.0, 0.5), (5, 2.0, 1 / 3)],
)
def test_as_many_workers_share_a_gpu_as_must(workers: int, gpus: float, share: float) -> None:
    wanted = config(pools__decode__workers=workers - 1)
    assert gpu_share(wanted, site(gpus)) == share
    assert int(1 / share) * gpus >= workers, "each has a place on one GPU"


def test_without_a_gpu_none_is_asked_for_but_of_a_ray_that_may_grow() -> None:
    assert gpu_share(config(), site()) == 0.0
    assert gpu_share(config(device="cuda"), site()) == 0.0
    assert gpu_share(config(device="cuda"), site(joined=True)) > 0.0


def test_a_gpu_share_that_is_set_is_not_worked_out() -> None:
    told = config(engine__gpus=0.5, device="cuda")
    assert gpu_share(told, site(8.0)) == gpu_share(told, site(joined=True)) == 0.5
    assert gpu_share(config(engine__gpus=0.5, device="cpu"), site(8.0)) == 0.0


def test_a_pools_labels_are_asked_of_a_ray_that_is_joined_and_of_none_of_our_own() -> None:
    labelled = config(pools__decode__labels=" role=decode, zone=a")
    [prefill, decode] = first_members(labelled, site())
    joined = Processes(labelled, site(joined=True))
    assert joined.labels(decode) == {"role": "decode", "zone": "a"}
    assert joined.labels(prefill) == {}
    assert Processes(labelled, site()).labels(decode) == {}


def test_several_fronts_have_the_ports_that_follow_and_free_ones_stay_free() -> None:
    wanted = config(front__count=3, front__http="127.0.0.1:8000", front__grpc="[::1]:0")
    assert [(str(http), str(grpc)) for http, grpc in front_addresses(wanted)] == [
        ("127.0.0.1:8000", "[::1]:0"),
        ("127.0.0.1:8001", "[::1]:0"),
        ("127.0.0.1:8002", "[::1]:0"),
    ]


def test_what_is_set_reaches_every_worker() -> None:
    wanted = config(
        model__dtype="fp32", kv__block_size=32, kv__memory="64MiB", kv__verify="all", kv__lease_seconds=3,
        kv__dtype="fp8", engine__max_batch_tokens=128, engine__max_running=5,
    )  # fmt: skip
    for each in first_members(wanted, site()):
        assert (each.kv, each.kv_dtype) == ("fp8", "fp8")
        assert (each.dtype, each.block_size, each.memory_bytes) == ("fp32", 32, 64 << 20)
        assert (each.verify, each.lease_seconds) == ("all", 3.0)
        assert (each.max_batch_tokens, each.max_running) == (128, 5)
        assert (each.model.digest, each.secret, each.cache, each.host) == ("d", b"s", "/c", "10.0.0.1")
    assert {each.kv_dtype for each in first_members(config(), site())} == {"bf16"}
    assert {each.memory_bytes for each in first_members(config(), site())} == {0}  # each measures what is free


@pytest.mark.parametrize(
    ("values", "gpus", "device"),
    [({}, 0.0, "cpu"), ({}, 2.0, "cuda"), ({"device": "cpu"}, 2.0, "cpu"), ({"device": "cuda"}, 0.0, "cuda")],
)
def test_the_device_follows_from_the_machine(values: dict[str, Any], gpus: float, device: str) -> None:
    wanted = config(**values)
    assert device_of(wanted, site(gpus)) == device
    assert {each.device for each in first_members(wanted, site(gpus))} == {device}
