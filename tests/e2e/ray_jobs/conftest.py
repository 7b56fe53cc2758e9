"""A Ray that isn't ours: `ray start --head` on ports of its own, and jobs submitted to it."""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import urllib3

from diptych import Client

TREE = Path(__file__).resolve().parents[3]
MARK = "RAY_JOBS_TEST"
"""Inherited by every process that the head starts, so that none can hide."""
HOST = "127.0.0.2"
"""Ray replaces 127.0.0.1 by the machine's own address."""
CPUS = 4
WAIT_SECONDS = 120
SERVE = ("serve", "--model", "random:tiny", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
SMALL = ("--set", "engine.threads=1", "--set", "kv.memory=32MiB")
NOT_OURS = ("__pycache__", ".venv", ".git", ".bench", ".clients", "*.egg-info", ".*_cache")


LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def end_with_us() -> None:
    """In the child: it is asked to end when the tests are killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Venv:
    """A fresh interpreter without diptych, that borrows everything else from the one running the tests."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        # A .pth file inside the borrowed folder is not read: an editable install there stays unseen.
        (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))

    def install(self, wheel: Path) -> None:
        # Isolated: a checkout on PYTHONPATH would count as installed.
        pip = [self.python, "-I", "-m", "pip", "install", "--no-deps", "--no-index", wheel]
        subprocess.run(pip, check=True, timeout=60, capture_output=True)

    def uninstall(self) -> None:
        pip = [self.python, "-m", "pip", "uninstall", "-y", "diptych"]
        subprocess.run(pip, check=True, timeout=60, capture_output=True)


class Command:
    """A running `diptych …` and what it says."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=TREE,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_us,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self._reader.join(20)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            self._lines.extend(iter(output.readline, ""))

    @property
    def said(self) -> str:
        return "".join(self._lines)

    def ended(self) -> tuple[int, str]:
        """Its exit status and all that it said."""
        status = self.process.wait(WAIT_SECONDS)
        self._reader.join(20)
        return status, self.said

    def until_serves(self, fronts: int = 1) -> list[Served]:
        def found() -> list[Served]:
            assert self.process.poll() in (None, 0), self.said
            return there if len(there := addresses(self.said)) == fronts else []

        return until(found, "it serves", told=lambda: self.said)

    @property
    def launcher(self) -> psutil.Process:
        """The driver; the process that was started is its keeper."""
        [child] = psutil.Process(self.process.pid).children()
        return child


@dataclass
class Head:
    """A Ray head node, and what is done with it from outside."""

    venv: Venv
    folder: Path
    token: str
    mark: str
    ports: list[int]
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
        agents = ("dashboard-agent-grpc-port", "metrics-export-port")
        chosen = [f"--{name}={port}" for name, port in zip((*names, *agents), self.ports, strict=True)]
        size = (f"--num-cpus={CPUS}", "--object-store-memory=100000000", "--disable-usage-stats")
        where = (f"--temp-dir={self.folder}", f"--node-ip-address={HOST}", "--dashboard-host=127.0.0.1")
        self.temporary.mkdir()
        with (self.folder / "head.log").open("w") as log:
            self.process = subprocess.Popen(
                [*self.ray, "start", "--head", "--block", *where, *chosen, *size],
                cwd=self.folder,
                env=self.environment() | {MARK: self.mark},
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_us,
            )

    # ---- where -------------------------------------------------------------------------------------

    @property
    def ray(self) -> list[str]:
        return [str(self.venv.python), "-m", "ray.scripts.scripts"]

    @property
    def address(self) -> str:
        return f"{HOST}:{self.ports[0]}"

    @property
    def temporary(self) -> Path:
        """Where its processes, and jobs on it, put temporary files."""
        return self.folder / "temporary"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    def environment(self, **more: str) -> dict[str, str]:
        """Of any process that has to do with this Ray. pip may install the one wheel and nothing of the network."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "XDG_CACHE_HOME") if name in os.environ}
        path = f"{self.venv.bin}{os.pathsep}{os.defpath}"
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        pip = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1"}
        return {**kept, **auth, **pip, "PATH": path, "TMPDIR": str(self.temporary), **more}

    # ---- jobs --------------------------------------------------------------------------------------

    def job(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        """`ray job …`, which has to succeed; what it printed."""
        told = subprocess.run(
            [*self.ray, "job", *arguments],
            cwd=cwd or self.folder,
            env=self.environment(RAY_API_SERVER_ADDRESS=self.dashboard),
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        assert told.returncode == 0, f"{arguments}:\n{told.stdout}\n{told.stderr}"
        return told.stdout + told.stderr

    def get(self, path: str) -> Any:
        """Of the dashboard's API."""
        with urllib3.PoolManager(retries=False, timeout=30) as pool:
            answer = pool.request("GET", f"{self.dashboard}{path}", headers={"Authorization": f"Bearer {self.token}"})
        assert answer.status == 200, answer.data
        return json.loads(answer.data)

    def log_of(self, job: str) -> str:
        return self.get(f"/api/jobs/{job}/logs")["logs"]

    def status_of(self, job: str) -> str:
        return self.get(f"/api/jobs/{job}")["status"]

    def until_job_serves(self, job: str) -> list[Served]:
        def found() -> list[Served]:
            assert self.status_of(job) in ("PENDING", "RUNNING", "SUCCEEDED"), self.log_of(job)
            return addresses(self.log_of(job))

        return until(found, "the job serves", told=lambda: self.log_of(job))

    def until_job_is_over(self, job: str) -> None:
        until(lambda: self.status_of(job) not in ("PENDING", "RUNNING"), "the job is over")

    def actors(self) -> list[str]:
        """The classes of all that live; the supervisor of a job is Ray's own."""
        told = self.get("/api/v0/actors?limit=1000")["data"]["result"]["result"]
        return sorted(actor["class_name"] for actor in told if actor["state"] != "DEAD")

    def submit(
        self,
        job: str,
        *how: str | Path,
        command: Sequence[str],
        cwd: Path | None = None,
        more: Sequence[str] = (),
    ) -> None:
        """A job that serves."""
        serve = (*command, *SERVE, *SMALL, *more)
        self.job("submit", "--no-wait", "--submission-id", job, *how, "--", *serve, cwd=cwd)

    # ---- commands of ours, run beside it -----------------------------------------------------------

    @contextmanager
    def diptych(self, *arguments: str, **environment: str) -> Iterator[Command]:
        """`diptych …` from a source tree, told where the Ray is. Killed at the end."""
        command = [str(self.venv.python), "-m", "cluster", *arguments]
        told = self.environment(RAY_ADDRESS=self.address, **environment) | {MARK: self.mark}
        with Command(command, told) as running:
            yield running

    def serve(self, *arguments: str, **environment: str) -> AbstractContextManager[Command]:
        return self.diptych(*SERVE, *SMALL, *arguments, **environment)

    def workers(self, name: str) -> dict[str, int]:
        """Of a detached cluster: the epochs of those that are up."""
        with self.diptych("status", "--name", name, "--json") as command:
            status, said = command.ended()
        assert status == 0, said
        return {worker["info"]["id"]: int(worker["info"]["epoch"]) for worker in json.loads(said)["workers"]}

    def until_workers(self, name: str, wanted: dict[str, int]) -> None:
        until(lambda: self.workers(name) == wanted, f"{name} has {wanted}", told=lambda: str(self.workers(name)))

    def until_gone(self, seconds: float) -> None:
        """All of ours, the whole cluster."""
        until(lambda: not self.ours(), "all processes are gone", seconds, lambda: str(self.ours()))
        until(lambda: not self.actors(), "all actors are gone", seconds, lambda: str(self.actors()))

    def temporary_files(self) -> list[Path]:
        return sorted(self.temporary.rglob("*"))

    def processes(self, name: str = "") -> list[psutil.Process]:
        """All that it started whose name or command contains this."""
        return [process for process in psutil.process_iter() if has_mark(process, self.mark) and name in named(process)]

    def ours(self) -> list[str]:
        """Processes of diptych on this Ray: actors, keepers and launchers."""
        own = re.compile(r"ray::(Worker|Front|Scheduler|Owner)Actor|diptych serve|cluster serve")
        return [told for process in self.processes() if own.search(told := named(process))]

    def end(self) -> None:
        """SIGTERM ends a blocking `ray start` and what it started."""
        self.process.terminate()
        _, left = psutil.wait_procs([*self.processes(), psutil.Process(self.process.pid)], timeout=15)
        for process in left:
            process.kill()
        self.process.wait(15)


def has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False  # gone meanwhile, or the kernel's


def named(process: psutil.Process) -> str:
    """A Ray worker's name is all of its command line."""
    try:
        return f"{process.name()} {' '.join(process.cmdline())}"
    except psutil.Error:
        return ""


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def until(true: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS, told: Callable[[], str] = str) -> Any:
    """The first value that is true."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"waited {seconds} s until {what}\n{told()}"
        threading.Event().wait(0.2)
    return value


@dataclass(frozen=True)
class Served:
    """A cluster's addresses, as it printed them."""

    http: str
    grpc: str

    def check_answers(self) -> None:
        """Over both protocols."""
        with Client(self.grpc, timeout_seconds=WAIT_SECONDS) as client:
            *_, last = client.generate(tokens=list(range(40)), max_tokens=5, ignore_eos=True)
        assert last.complete.usage.completion_tokens == 5
        body = json.dumps({"model": "random:tiny", "prompt": "hinge", "max_tokens": 5, "ignore_eos": True})
        headers = {"Content-Type": "application/json"}
        with urllib3.PoolManager(timeout=WAIT_SECONDS) as pool:
            answer = pool.request("POST", f"http://{self.http}/v1/completions", body=body, headers=headers)
        assert answer.status == 200, answer.data
        assert json.loads(answer.data)["usage"]["completion_tokens"] == 5

    @property
    def listens(self) -> bool:
        return any(socket_answers(address) for address in (self.http, self.grpc))


def socket_answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def addresses(text: str) -> list[Served]:
    """Of each front."""
    http = re.findall(r"OpenAI API +http://(\S+)/v1", text)
    grpc = re.findall(r"gRPC +(\S+)", text)
    return [Served(*pair) for pair in zip(http, grpc, strict=False)]


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Of a Ray whose interpreter has all but diptych."""
    venv = Venv(tmp_path_factory.mktemp("venv") / "venv")
    # The paths of Ray's sockets may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="rayhead-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = Head(venv, Path(folder), secrets.token_hex(32), uuid.uuid4().hex, free_ports(6))
        try:
            until(lambda: socket_answers(f"127.0.0.1:{head.ports[1]}"), "the dashboard answers")
            yield head
        finally:
            head.end()


@pytest.fixture(scope="session")
def unused_ports() -> Iterator[int]:
    """One after the other, none twice."""
    return iter(free_ports(60))


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    return until


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a clone holds."""
    copy = tmp_path_factory.mktemp("clone") / "diptych"
    shutil.copytree(TREE, copy, ignore=shutil.ignore_patterns(*NOT_OURS))
    return copy


@pytest.fixture(scope="session")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is built in this tree."""
    source, into = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(clone, source, dirs_exist_ok=True)
    script = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", script, into], cwd=source, capture_output=True, text=True, timeout=120, check=True
    )
    return into / made.stdout.splitlines()[-1]
