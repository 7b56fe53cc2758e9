"""`diptych doctor`: each usual fault is found, named, and comes with a way out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.config import Config, Override, load
from cluster.config.values import Address
from cluster.doctor import machine, software
from cluster.doctor.software import Torch, check_names, check_ray_address, check_ray_token, judge_torch

if TYPE_CHECKING:
    from cluster.doctor.finding import Finding

TREE = Path(__file__).parents[3]
GIB = 2**30
HERE: Torch = {"torch": "2.13.0", "built": None, "devices": [], "nccl": None, "gloo": True}


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def told(finding: Finding) -> str:
    return f"{finding.found} {finding.mend}"


def test_a_taken_port_is_a_problem_and_a_free_one_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        taken = machine.check_port("http", Address("127.0.0.1", port))
    assert taken.level == "problem"
    assert str(port) in taken.found
    assert "--http" in taken.mend
    assert machine.check_port("http", Address("127.0.0.1", port)).level == "ok"
    assert machine.check_port("grpc", Address("127.0.0.1", 0)).level == "ok"
    assert machine.check_port("grpc", Address("192.0.2.1", 80)).level == "problem"


@pytest.mark.parametrize(
    ("workers", "available", "threads", "level", "mend"),
    [
        (2, 2, 0, "ok", ""),
        (2, 2, 1, "ok", ""),
        (3, 2, 0, "warning", "fewer workers"),
        (2, 1.5, 0, "warning", "fewer workers"),
        (2, 8, 8, "warning", "engine.threads to 4"),
    ],
)
def test_workers_want_a_processor_each(workers: int, available: float, threads: int, level: str, mend: str) -> None:
    finding = machine.check_processors(workers, available, threads)
    assert finding.level == level
    assert mend in finding.mend


def test_a_cluster_that_does_not_fit_into_memory_is_a_problem() -> None:
    assert machine.check_memory(8 * GIB, 2, "auto").level == "ok"
    assert machine.check_memory(1 * GIB, 2, "auto").level == "problem"
    assert "kv.memory" in machine.check_memory(8 * GIB, 2, 4 * GIB).mend


def test_small_shared_memory_and_few_files_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_shared_memory(tmp_path).level == "ok"
    assert machine.check_shared_memory(tmp_path / "none").level == "warning"
    monkeypatch.setattr(machine, "SHARED_BYTES", 2**60)
    assert "--shm-size" in machine.check_shared_memory(tmp_path).mend
    assert (machine.check_files(1024).level, machine.check_files(20_000).level) == ("warning", "ok")


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_cache(tmp_path / "new").level == "ok"
    (tmp_path / "file").write_text("")
    assert "DIPTYCH_CACHE" in machine.check_cache(tmp_path / "file").mend
    monkeypatch.setattr(machine, "SPARE_BYTES", 2**60)
    full = machine.check_cache(tmp_path / "new")
    assert (full.level, "DIPTYCH_CACHE" in full.mend) == ("problem", True)


def test_a_machine_that_can_not_compile_is_slower_and_hears_what_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(software, "reason_against", lambda: "")
    assert software.check_compiler(tmp_path / "new" / "cache").level == "ok"
    monkeypatch.setattr(software.os, "access", lambda *_: False)
    read_only = software.check_compiler(tmp_path / "new" / "cache")
    assert (read_only.level, "DIPTYCH_CACHE" in read_only.mend) == ("warning", True)
    monkeypatch.setattr(software, "reason_against", lambda: "there is no C++ compiler: install g++")
    without = software.check_compiler(tmp_path)
    assert (without.level, "install g++" in without.found) == ("warning", True)
    assert "in torch" in without.mend
    assert "in numpy" in without.mend


def test_bound_threads_are_a_warning() -> None:
    assert machine.check_threads({}).level == "ok"
    assert machine.check_threads({"OMP_PROC_BIND": "close"}).level == "warning"
    assert machine.check_threads({"OMP_WAIT_POLICY": "active"}).level == "ok"


def test_a_ray_that_cannot_be_joined_is_a_problem_that_says_why() -> None:
    assert check_ray_address({}).level == "ok"
    client = check_ray_address({"RAY_ADDRESS": "ray://127.0.0.1:10001"})
    assert (client.level, "ray job submit" in client.mend) == ("problem", True)


@pytest.mark.parametrize(
    ("environ", "file", "level", "words"),
    [
        ({}, False, "ok", "a new one"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab"}, False, "ok", "token"),
        ({"RAY_AUTH_MODE": "token"}, True, "ok", "token"),
        ({"RAY_AUTH_MODE": "token"}, False, "problem", "RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_MODE": "disabled"}, False, "warning", "anyone"),
        ({"RAY_AUTH_MODE": "maybe"}, False, "problem", "token and disabled"),
        ({}, True, "warning", "401"),
    ],
)
def test_the_traps_of_rays_token_are_known(
    tmp_path: Path, environ: dict[str, str], file: bool, level: str, words: str
) -> None:
    if file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("ab")
    [finding] = check_ray_token(environ, tmp_path)
    assert finding.level == level
    assert words in told(finding)


def test_a_stranger_under_one_of_our_names_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(list(check_names())) == ["ok"]
    monkeypatch.setattr(software, "packages_distributions", lambda: {"kernels": ["diptych", "kernels"]})
    [taken] = check_names()
    assert (taken.level, "pip uninstall kernels" in taken.mend) == ("problem", True)


@pytest.mark.parametrize(
    ("change", "device", "has_nvidia", "expected"),
    [
        ({}, "auto", False, ["ok", "ok"]),
        ({}, "cuda", False, ["ok", "problem"]),
        ({}, "auto", True, ["ok", "warning"]),
        ({"built": "13.0", "devices": ["H200"], "nccl": "2.30.3"}, "cuda", True, ["ok", "ok"]),
        ({"gloo": False}, "cpu", False, ["problem", "ok"]),
    ],
)
def test_torch_is_judged_by_what_it_is_asked_to_do(
    change: dict[str, object], device: str, has_nvidia: bool, expected: list[str]
) -> None:
    findings = list(judge_torch({**HERE, **change}, device, has_nvidia=has_nvidia))
    assert levels(findings) == expected
    assert all(finding.mend for finding in findings if finding.level != "ok")


def doctor(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{TREE}{os.pathsep}{TREE / 'proto'}", **environ}
    command = [sys.executable, "-m", "cluster", "doctor", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_the_command_ends_with_0_where_serve_would_start_and_with_1_where_it_would_not() -> None:
    free = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
    well = doctor(*free, RAY_ADDRESS="")
    assert well.returncode == 0, well.stdout
    assert "diptych serve would start here" in well.stdout
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ill = doctor("--http", f"127.0.0.1:{port}", "--grpc", "127.0.0.1:0", "--json")
    assert ill.returncode == 1
    assert [one["about"] for one in json.loads(ill.stdout) if one["level"] == "problem"] == ["port http"]


def test_every_check_of_the_machine_answers_for_any_configuration(tmp_path: Path) -> None:
    many = load(None, {}, [Override("pools.decode.workers", "500", "--decode")])
    for config in (Config(), many):
        for finding in machine.check_machine(config, {}, tmp_path):
            assert finding.found
            assert bool(finding.mend) == (finding.level != "ok")
