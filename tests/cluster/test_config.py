"""The configuration: what wins, what is refused, and what a person is told."""

from __future__ import annotations

import pickle
import tomllib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Config, ConfigError, Override, load, values

if TYPE_CHECKING:
    from pathlib import Path


def said(*pairs: tuple[str, object]) -> list[Override]:
    return [Override(key, value, "--set") for key, value in pairs]


def problems(file: Path | None = None, *pairs: tuple[str, object], **environment: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(file, environment, said(*pairs))
    return caught.value.problems


def write(folder: Path, text: str) -> Path:
    file = folder / "diptych.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_contracts_keys_and_defaults_are_all_there() -> None:
    contract = {
        "model.name": "smollm2-135m-instruct",
        "model.dtype": "auto",
        "pools.prefill.workers": 1,
        "pools.decode.workers": 1,
        "pools.mixed.workers": 0,
        "front.http": "127.0.0.1:8000",
        "front.grpc": "127.0.0.1:50051",
        "kv.block_size": 16,
        "kv.memory": "auto",
        "kv.link": "auto",
        "kv.wire": "native",
        "kv.verify": "sample",
        "placement.how": "auto",
    }
    assert contract.items() <= values(load()).items()


def test_each_layer_wins_over_the_one_before_and_each_value_says_who_set_it(tmp_path: Path) -> None:
    file = write(tmp_path, '[kv]\nblock_size = 32\nmemory = "1MiB"\nlease_seconds = 3\n')
    environment = {"DIPTYCH_KV__MEMORY": "2MiB", "DIPTYCH_KV__LEASE_SECONDS": "4"}
    config = load(file, environment, [Override("kv.lease_seconds", "5", "--set")])
    assert (config.kv.block_size, config.kv.memory, config.kv.lease_seconds) == (32, 2 * 1024**2, 5.0)
    origins = [config.origin(f"kv.{name}") for name in ("block_size", "memory", "lease_seconds", "wire")]
    assert origins == [str(file), "environment DIPTYCH_KV__MEMORY", "--set", "default"]


def test_weights_of_tenants_come_as_a_table_or_as_text(tmp_path: Path) -> None:
    table = load(write(tmp_path, "[admission.weights]\ngold = 3\nfree = 0.5\n"))
    text = load(environment={"DIPTYCH_ADMISSION__WEIGHTS": "gold=3, free=0.5"})
    assert table.admission.weights == text.admission.weights == {"gold": 3.0, "free": 0.5}


def test_a_key_at_the_top_level_has_a_variable_too() -> None:
    assert load(environment={"DIPTYCH_DEVICE": "cpu"}).device == "cpu"


def test_variables_that_kubernetes_sets_beside_a_service_named_diptych_are_left_alone() -> None:
    kubernetes = {"DIPTYCH_PORT": "tcp://10.0.0.1:50051", "DIPTYCH_SERVICE_HOST": "10.0.0.1"}
    assert values(load(environment=kubernetes)) == values(Config())


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("pools.prefil.workers", "pools.prefill.workers"),
        ("kv.blocksize", "kv.block_size"),
        ("http", "front.http"),
        ("model.nam", "model.name"),
        ("placement.hwo", "placement.how"),
    ],
)
def test_an_unknown_key_names_the_nearest(wrong: str, nearest: str) -> None:
    (problem,) = problems(None, (wrong, 1))
    assert problem == f"{wrong} (--set): is not a key; the nearest is {nearest}"


def test_an_unknown_key_in_a_file_names_the_file_even_when_its_table_is_empty(tmp_path: Path) -> None:
    file = write(tmp_path, "[kvv]\n")
    assert problems(file) == (f"kvv ({file}): is not a key; the nearest is kv",)


def test_an_unknown_variable_of_ours_names_itself() -> None:
    (problem,) = problems(DIPTYCH_MODEL__NAM="x")
    assert problem == "model.nam (environment DIPTYCH_MODEL__NAM): is not a key; the nearest is model.name"


def test_a_section_given_a_value_says_which_keys_it_has(tmp_path: Path) -> None:
    file = write(tmp_path, 'model = "smollm2-135m-instruct"\n')
    assert problems(file) == (f"model ({file}): is a section; set model.name, model.dtype",)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("kv.block_size", 20, "20 is not a multiple of 16"),
        ("kv.block_size", 0, "greater than 0"),
        ("kv.memory", "512QB", "a size like 512MiB"),
        ("kv.memory", "-1", "a size like 512MiB"),
        ("kv.memory", 0, "more than 0 bytes"),
        ("kv.verify", "always", "'off', 'sample' or 'all'"),
        ("kv.lease_seconds", 0, "greater than 0"),
        ("kv.lease_seconds", "inf", "finite"),
        ("kv.block_size", 48, "16, 32, 64, 128 or 256"),
        ("kv.link", "loopback", "auto, mapped, nixl, gloo or nccl works"),
        ("kv.wire", "int4", "'native', 'int8' or 'fp8_e4m3'"),
        ("kv.dtype", "int8", "'auto' or 'fp8'"),
        ("kv.dtype", "bf16", "'auto' or 'fp8'"),
        ("admission.queue.high", 0, "greater than 0"),
        ("admission.queue.low", 30_001, "less than or equal to 30000"),
        ("admission.least_share.low", 0.6, "less than or equal to 0.5"),
        ("admission.weights", "gold", "TENANT=WEIGHT, like gold=3"),
        ("admission.weights", "gold=0", "greater than 0"),
        ("admission.give_up", -1, "greater than or equal to 0"),
        ("front.http", "localhost", "HOST:PORT"),
        ("front.http", "localhost:http", "HOST:PORT"),
        ("front.grpc", "127.0.0.1:65536", "from 0 to 65535"),
        ("front.grpc", "::1:50051", "[::1]:50051"),
        ("pools.prefill.workers", -1, "greater than or equal to 0"),
        ("pools.prefill.workers", "two", "valid integer"),
        ("pools.prefill.labels", "role", "KEY=VALUE"),
        ("pools.decode.labels", "role=a=b", "KEY=VALUE"),
        ("engine.gpus", -0.5, "greater than or equal to 0"),
        ("cluster.grace_seconds", -1, "greater than or equal to 0"),
        ("engine.threads", True, "a number"),
        ("engine.max_batch_tokens", 0, "greater than 0"),
        ("model.name", "", "at least 1 character"),
        ("model.name", {"a": 1}, "valid string"),
        ("model.dtype", "fp16", "'auto', 'bf16' or 'fp32'"),
        ("device", "gpu", "'auto', 'cpu' or 'cuda'"),
    ],
)
def test_a_wrong_value_names_its_key_its_origin_and_what_is_allowed(key: str, value: object, told: str) -> None:
    (problem,) = problems(None, (key, value))
    assert problem.startswith(f"{key} = {value!r} (--set): ")
    assert told in problem


@pytest.mark.parametrize("wire", ["int8", "fp8_e4m3"])
def test_a_cache_in_fp8_is_not_rounded_again_on_its_way(wire: str) -> None:
    (problem,) = problems(None, ("kv.dtype", "fp8"), ("kv.wire", wire))
    assert f"kv.wire = '{wire}' would round what kv.dtype = 'fp8' has in 8 bits already" in problem
    assert "leave kv.wire native" in problem


@pytest.mark.parametrize(
    ("dtype", "kv", "kept"), [("auto", "auto", "bf16"), ("fp32", "auto", "fp32"), ("fp32", "fp8", "fp8")]
)
def test_the_cache_has_the_models_numbers_unless_it_is_told_others(dtype: str, kv: str, kept: str) -> None:
    assert load(overrides=said(("model.dtype", dtype), ("kv.dtype", kv))).kv_dtype == kept


def test_every_problem_is_told_at_once() -> None:
    assert len(problems(None, ("kv.wire", "int4"), ("kv.block_size", 7), ("device", "tpu"))) == 3


@pytest.mark.parametrize(
    ("prefill", "decode", "mixed", "serves"), [(1, 1, 0, True), (0, 0, 1, True), (1, 0, 0, False), (0, 2, 0, False)]
)
def test_a_cluster_needs_both_halves_or_a_whole(prefill: int, decode: int, mixed: int, serves: bool) -> None:
    pools = {"prefill": prefill, "decode": decode, "mixed": mixed}
    pairs = [(f"pools.{role}.workers", count) for role, count in pools.items()]
    if serves:
        assert load(overrides=said(*pairs)).pools.mixed.workers == mixed
    else:
        (problem,) = problems(None, *pairs)
        assert "1 prefill and 1 decode worker, or 1 mixed" in problem
        assert f"pools.decode.workers = {decode} (--set)" in problem


def test_forcing_remote_needs_two_roles() -> None:
    (problem,) = problems(None, ("pools.prefill.workers", 0), ("pools.mixed.workers", 1), ("placement.how", "remote"))
    assert "needs prefill and decode workers, not 0 and 1" in problem


def test_nccl_on_cpu_is_refused() -> None:
    (problem,) = problems(None, ("kv.link", "nccl"), ("device", "cpu"))
    assert "set kv.link to auto" in problem


@pytest.mark.parametrize(
    ("key", "value", "device", "way_out"),
    [
        ("engine.weights", "fp8", "cpu", "int8 works on both"),
        ("engine.weights", "int4", "cuda", "int8 works on both"),
        ("pools.prefill.weights", "fp8", "cpu", "int8 works on both"),
        ("pools.decode.weights", "int4", "cuda", "int8 works on both"),
        ("engine.activations", "int8", "cuda", "leave it bf16"),
        ("pools.mixed.activations", "int8", "cuda", "leave it bf16"),
        ("engine.kernels", "triton", "cpu", "set it to auto"),
        ("engine.attention", "flashinfer", "cpu", "set it to auto"),
        ("engine.attention", "triton", "cpu", "set it to auto"),
    ],
)
def test_what_a_device_lacks_is_refused(key: str, value: str, device: str, way_out: str) -> None:
    (problem,) = problems(None, (key, value), ("device", device))
    assert key in problem
    assert way_out in problem


def test_flashinfer_goes_with_tritons_kernels() -> None:
    (problem,) = problems(None, ("engine.attention", "flashinfer"), ("engine.kernels", "reference"))
    assert "engine.attention = 'flashinfer' goes with Triton's kernels" in problem
    assert "set one of them to auto" in problem
    assert load(overrides=said(("engine.kernels", "reference"))).engine.attention == "auto"


def test_a_pools_numbers_are_its_own_or_the_engines() -> None:
    mixed = load(
        overrides=said(
            ("engine.weights", "int8"), ("pools.decode.weights", "int4"), ("pools.prefill.activations", "int8")
        )
    )
    assert [mixed.weights_of(role) for role in ("prefill", "decode", "mixed")] == ["int8", "int4", "int8"]
    assert [mixed.activations_of(role) for role in ("prefill", "decode", "mixed")] == ["int8", "bf16", "bf16"]


def test_weights_of_bf16_are_not_multiplied_in_int8() -> None:
    (problem,) = problems(None, ("engine.activations", "int8"), ("pools.decode.weights", "bf16"))
    assert problem.startswith("decode workers would multiply activations of int8 with weights of bf16")
    assert "pools.decode.weights" in problem


def test_a_missing_file_and_broken_toml_name_the_file(tmp_path: Path) -> None:
    missing = tmp_path / "no.toml"
    assert problems(missing)[0].startswith(f"{missing} can't be read: ")
    broken = write(tmp_path, "kv = \n")
    (problem,) = problems(broken)
    assert problem.startswith(f"{broken} is not valid TOML: ")
    assert "line 1" in problem


@pytest.mark.parametrize(
    ("text", "expected"), [("auto", "auto"), (4096, 4096), ("4096", 4096), ("1.5 KiB", 1536), ("2gb", 2 * 10**9)]
)
def test_memory_is_auto_or_bytes_or_a_size(text: object, expected: object) -> None:
    assert load(overrides=said(("kv.memory", text))).kv.memory == expected


def test_addresses_come_apart() -> None:
    front = load(overrides=said(("front.http", "[::1]:0"), ("front.grpc", "localhost:50051"))).front
    assert front.http_address == ("::1", 0)
    assert front.grpc_address == ("localhost", 50051)
    assert front.http == "[::1]:0"


def test_auto_is_bf16() -> None:
    assert load().model.served_dtype == "bf16"
    assert load(overrides=said(("model.dtype", "fp32"))).model.served_dtype == "fp32"


def test_a_configuration_keeps_its_origins_across_processes() -> None:
    config = load(overrides=said(("kv.block_size", "32")))
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.origin("kv.block_size") == "--set"


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().kv.block_size = 32  # pyright: ignore[reportAttributeAccessIssue]


@given(st.sampled_from(sorted(values(Config()))), st.text(max_size=12))
def test_any_text_is_either_accepted_or_refused_by_name(key: str, text: str) -> None:
    told: tuple[str, ...] = ()
    try:
        load(overrides=said((key, text)))
    except ConfigError as error:
        told = error.problems
    assert all(key in problem for problem in told)


def test_defaults_written_as_toml_load_as_themselves(tmp_path: Path) -> None:
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for key, value in values(Config()).items()
    ]
    file = write(tmp_path, "\n".join(lines))
    assert tomllib.loads(file.read_text())["kv"]["block_size"] == 16
    assert values(load(file)) == values(Config())


def test_fronts_whose_ports_would_overlap_are_refused() -> None:
    apart = ("front.http", "127.0.0.1:8000"), ("front.grpc", "127.0.0.1:8002")
    assert load(None, {}, said(*apart, ("front.count", 2))).front.count == 2
    [problem] = problems(None, *apart, ("front.count", 3))
    assert "8000…8002" in problem
    assert "8002…8004" in problem
    other_hosts = ("front.http", "127.0.0.1:8000"), ("front.grpc", "127.0.0.2:8000")
    assert load(None, {}, said(*other_hosts, ("front.count", 3))).front.count == 3


def test_fronts_need_ports_that_there_are() -> None:
    [problem] = problems(None, ("front.count", 3), ("front.http", "127.0.0.1:65534"))
    assert "front.http" in problem


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "x" * 64])
def test_a_clusters_name_is_one_word(name: str) -> None:
    assert "cluster.name" in problems(None, ("cluster.name", name))[0]


def test_an_autoscaler_needs_a_measure_for_prompts() -> None:
    [problem] = problems(None, ("autoscale.enabled", True), ("admission.ttft_seconds", 0))
    assert "admission.ttft_seconds above 0" in problem


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([("least", 5), ("most", 4)], "autoscale.least = 5 is above autoscale.most = 4: set autoscale.most to 5"),
        ([("least", 3)], "autoscale.least = 3 is above 2, which is what the cluster starts with"),
        ([("most", 1)], "autoscale.least = 2 is above autoscale.most = 1"),
        ([("prefill.least", 3), ("most", 3)], "autoscale.decode.least = 4 is above autoscale.most = 3"),
        ([("decode.least", 3), ("decode.most", 2)], "most = 2 is below least = 3"),
        ([("least", 3), ("most", 8)], "autoscale.least = 3 is above the 2 workers that the cluster starts with"),
        ([("prefill.least", 3), ("most", 8)], "autoscale.prefill.least = 3 is above pools.prefill.workers = 1"),
        ([("calm", 0.9)], "calm = 0.9 has to be below busy = 0.85"),
    ],
)
def test_an_autoscalers_bounds_can_be_kept(settings: list[tuple[str, float]], told: str) -> None:
    [problem] = problems(None, ("autoscale.enabled", True), *((f"autoscale.{key}", value) for key, value in settings))
    assert told in problem


def test_an_autoscaler_that_can_keep_its_bounds_is_taken() -> None:
    bounds = ("prefill.least", 2), ("decode.most", 6), ("least", 3), ("most", 8)
    pools = ("pools.prefill.workers", 2), ("autoscale.enabled", True)
    config = load(None, {}, said(*pools, *((f"autoscale.{key}", value) for key, value in bounds)))
    assert config.autoscale.workers(3) == (3, 8)
