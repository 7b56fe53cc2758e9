"""Our four top-level names in every form of installation, each beside proto-plus, which owns the name `proto`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import urllib3

if TYPE_CHECKING:
    from collections.abc import Generator

TREE = Path(__file__).resolve().parents[2]
SOURCES = ("cluster", "workers", "kernels", "proto", "pyproject.toml", "README.md")
PROBE = """
import json, proto, cluster, workers, kernels, diptych
from diptych.v1 import inference_pb2
from proto.marshal import Marshal
homes = {module.__name__: module.__file__ for module in (cluster, workers, kernels, diptych, inference_pb2)}
told = json.dumps(homes | {"proto": proto.__file__})
print(told)
"""
TOKEN = "f" * 64

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone holds of our code, in a folder of its own, so that nothing is built in this one."""
    copy = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        if (TREE / name).is_dir():
            shutil.copytree(TREE / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(TREE / name, copy / name)
    return copy


class Venv:
    """A fresh interpreter without diptych, that borrows everything else from the one running the tests."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))

    def install(self, wheel: Path) -> None:
        """Before `borrow`, and without a PYTHONPATH, so that pip can't meet the diptych installed elsewhere."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "--no-index", wheel]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(pip, check=True, timeout=60, capture_output=True, env=environment)

    def borrow(self) -> None:
        """A .pth file inside the borrowed folder is not read: an editable install there stays unseen."""
        (self.packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))

    def run(self, *command: str | Path, cwd: Path, **environment: str) -> str:
        told = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert told.returncode == 0, f"{command} ended with {told.returncode}:\n{told.stdout}\n{told.stderr}"
        return told.stdout

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        return {**kept, "PATH": f"{self.bin}{os.pathsep}{os.defpath}", **more}


def build(source: Path, into: Path, hook: str) -> Path:
    """The wheel that setuptools makes of the tree: `build_wheel`, or `build_editable`, which only points there."""
    script = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    into.mkdir()
    made = subprocess.run(
        [sys.executable, "-c", script, into], cwd=source, capture_output=True, text=True, timeout=120, check=True
    )
    return into / made.stdout.splitlines()[-1]


def assert_homes(told: str, home: Path) -> None:
    homes = json.loads(told)
    assert homes.pop("proto") == str(Path(sysconfig.get_path("purelib")) / "proto" / "__init__.py")
    assert len(homes) == 5
    assert not [where for where in homes.values() if not Path(where).is_relative_to(home)]


def test_a_wheel_brings_the_command_and_all_our_names(source: Path, tmp_path: Path) -> None:
    venv = Venv(tmp_path / "venv")
    venv.install(build(source, tmp_path / "wheel", "build_wheel"))
    venv.borrow()
    assert venv.run(venv.bin / "diptych", "--version", cwd=tmp_path) == "diptych 0.1.0\n"
    assert_homes(venv.run(venv.python, "-c", PROBE, cwd=tmp_path), venv.packages)
    roots = "from cluster.source_tree import source_roots; print(source_roots())"
    assert venv.run(venv.python, "-c", roots, cwd=tmp_path) == "()\n"


def test_a_wheel_holds_every_module_stub_and_marker_of_the_tree(source: Path, tmp_path: Path) -> None:
    venv = Venv(tmp_path / "venv")
    venv.install(build(source, tmp_path / "wheel", "build_wheel"))
    homes = dict.fromkeys(("cluster", "workers", "kernels"), source) | {"diptych": source / "proto"}
    for name, home in homes.items():
        wanted = {
            str(file.relative_to(home))
            for pattern in ("*.py", "*.pyi", "*.proto", "py.typed", "*.cpp", "*.h")
            for file in (home / name).rglob(pattern)
        }
        assert wanted <= {str(file.relative_to(venv.packages)) for file in (venv.packages / name).rglob("*")}


def test_an_editable_install_points_into_the_tree(source: Path, tmp_path: Path) -> None:
    venv = Venv(tmp_path / "venv")
    venv.install(build(source, tmp_path / "wheel", "build_editable"))
    venv.borrow()
    assert venv.run(venv.bin / "diptych", "--version", cwd=tmp_path) == "diptych 0.1.0\n"
    assert_homes(venv.run(venv.python, "-c", PROBE, cwd=tmp_path), source)


def test_a_clone_runs_without_being_installed(source: Path, tmp_path: Path) -> None:
    venv = Venv(tmp_path / "venv")
    venv.borrow()
    assert venv.run(venv.python, "-m", "cluster", "--version", cwd=source) == "diptych 0.1.0\n"
    enter = "from cluster.source_tree import enter_source_tree; enter_source_tree()\n"
    assert_homes(venv.run(venv.python, "-c", enter + PROBE, cwd=source), source)


@pytest.mark.full
def test_ray_job_submit_runs_the_tree_on_a_ray_without_diptych(source: Path, tmp_path: Path) -> None:
    """The driver gets the tree as its working directory; an actor finds all of it through `source_roots`."""
    venv = Venv(tmp_path / "venv")
    venv.borrow()
    absent = "import importlib.util as u; print([u.find_spec(name) for name in ('diptych', 'cluster', 'workers')])"
    assert venv.run(venv.python, "-c", absent, cwd=tmp_path) == "[None, None, None]\n"
    (source / "job.py").write_text(JOB)
    (source / "probe.py").write_text(PROBE)
    with tempfile.TemporaryDirectory(prefix="diptych-ray-") as folder:
        told = submit(venv, source, Path(folder))
    assert "diptych 0.1.0" in told
    homes = next(line for line in told.splitlines() if line.startswith("{"))
    assert_homes(homes, Path(folder))


JOB = """
from cluster.source_tree import enter_source_tree, source_roots
enter_source_tree()
import os, ray

@ray.remote(num_cpus=0)
class Actor:
    def homes(self):
        import probe
        return probe.told

ray.init(runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(source_roots())}}, log_to_driver=False)
print(ray.get(Actor.remote().homes.remote(), timeout=60))
"""


def submit(venv: Venv, source: Path, folder: Path) -> str:
    """Starts a Ray of its own, runs the job on it and ends it."""
    ray = [venv.python, "-m", "ray.scripts.scripts"]
    ports = free_ports(6)
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    agents = ("dashboard-agent-grpc-port", "metrics-export-port")
    chosen = [f"--{name}={port}" for name, port in zip((*names, *agents), ports, strict=True)]
    size = ("--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats", f"--temp-dir={folder}")
    hosts = ("--node-ip-address=127.0.0.2", "--dashboard-host=127.0.0.1")
    head = subprocess.Popen(
        [*ray, "start", "--head", "--block", *hosts, *chosen, *size],
        cwd=folder,
        env=venv.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with ending(head):
        dashboard = f"http://127.0.0.1:{ports[1]}"
        wait_until_answering(dashboard)
        return venv.run(
            *[*ray, "job", "submit", f"--working-dir={source}", "--"],
            *["sh", "-c", "python -m cluster --version && python job.py"],
            cwd=source,
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=TOKEN,
            RAY_API_SERVER_ADDRESS=dashboard,
        )


@contextmanager
def ending(head: subprocess.Popen[bytes]) -> Generator[None]:
    """SIGTERM ends a blocking `ray start` and what it started; what is left after ten seconds is killed."""
    try:
        yield
    finally:
        started = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        _, left = psutil.wait_procs([*started, psutil.Process(head.pid)], timeout=10)
        for process in left:
            process.kill()
        head.wait(timeout=10)


def wait_until_answering(dashboard: str) -> None:
    """Bounded by the number of connections tried, with a pause of at most a second before each."""
    patience = urllib3.Retry(total=60, backoff_factor=0.1, backoff_max=1)
    with urllib3.PoolManager(retries=patience, timeout=5) as pool:
        answer = pool.request("GET", f"{dashboard}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status == 200, answer.data


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
