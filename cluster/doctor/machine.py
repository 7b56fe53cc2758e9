"""This machine: ports, processors, memory, files. Knows the configuration and the system; no Ray, no torch."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from cluster.config import Config
from cluster.config.values import Address
from cluster.doctor.finding import Finding, ok, problem, warning

GIB = 2**30
CONTROL_BYTES = GIB
"""Ray's processes, the front, the scheduler and the launcher together."""
WORKER_BYTES = 600 << 20
"""Python, torch and a small model's weights; a large model's come on top."""
SHARED_BYTES = 100 << 20
"""Of Ray's object store."""
SPARE_BYTES = 500 << 20
"""What a model, Ray's logs and a cache of converted weights may need on disk."""
FILES = 4096


def check_machine(config: Config, environ: Mapping[str, str], cache: Path) -> Iterator[Finding]:
    """Everything but Ray and torch."""
    yield check_system(sys.platform)
    for name, address in (("http", config.front.http_address), ("grpc", config.front.grpc_address)):
        yield check_port(name, address)
    yield check_processors(_workers(config), processors(), config.engine.threads)
    yield check_threads(environ)
    yield check_memory(memory_bytes(), _workers(config), config.kv.memory)
    yield check_shared_memory(Path("/dev/shm"))
    yield check_cache(cache)
    yield check_disk("temporary files", Path(tempfile.gettempdir()))
    yield check_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _workers(config: Config) -> int:
    pools = config.pools
    return pools.prefill.workers + pools.decode.workers + pools.mixed.workers


def check_system(platform: str) -> Finding:
    """Anything but Linux is nobody's test bed."""
    found = f"{platform}, Python {sys.version.split()[0]}"
    if platform.startswith("linux"):
        return ok("system", found)
    return warning("system", found, "diptych is tested on Linux only; use a container or a virtual machine")


def check_port(name: str, address: Address) -> Finding:
    """Whether `serve` could listen there."""
    about = f"port {name}"
    if address.port == 0:
        return ok(about, f"{address}: any free one")
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            reason = error.strerror or str(error)
            mend = f"end what listens there (ss -ltnp 'sport = :{address.port}'), or choose another --{name} HOST:PORT"
            return problem(about, f"{address}: {reason}", mend)
    return ok(about, f"{address} is free")


def processors() -> float:
    """Processors this process may use, a container's quota included."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdecimal():
        return min(allowed, int(quota[0]) / int(quota[1]))
    return allowed


def check_processors(workers: int, available: float, threads: int) -> Finding:
    """Two busy teams of threads on the same cores slow each other down many times over."""
    found = f"{available:g} for {workers} workers"
    asked = workers * max(1, threads)
    if asked <= available:
        return ok("processors", found)
    if threads > 1:
        found += f" of {threads} threads"
        return warning("processors", found, f"set engine.threads to {max(1, int(available / workers))}, or to 0")
    return warning("processors", found, "have fewer workers: busy ones on the same core slow each other down")


def check_threads(environ: Mapping[str, str]) -> Finding:
    """Workers get thread counts of their own; a spinning wait set for all would still reach them."""
    policy = environ.get("OMP_WAIT_POLICY", "").upper()
    bound = environ.get("OMP_PROC_BIND", "").lower()
    if bound in ("true", "close", "spread", "master", "primary"):
        mend = "unset OMP_PROC_BIND: every worker would bind its threads to the same first cores"
        return warning("OpenMP", f"OMP_PROC_BIND={bound}", mend)
    if policy == "ACTIVE":
        return ok("OpenMP", "OMP_WAIT_POLICY=ACTIVE here; workers run with PASSIVE")
    return ok("OpenMP", "set for each worker by diptych")


def memory_bytes() -> int:
    """Free for new processes, a container's limit included."""
    available = psutil.virtual_memory().available
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdecimal() and used.isdecimal():
        return min(available, max(0, int(limit) - int(used)))
    return available


def check_memory(available: int, workers: int, kv: object) -> Finding:
    """The least that a cluster of small models takes."""
    cache = kv if isinstance(kv, int) else 0
    needed = CONTROL_BYTES + workers * (WORKER_BYTES + cache)
    found = f"{available / GIB:.1f} GiB available, at least {needed / GIB:.1f} GiB needed for {workers} workers"
    if available >= needed:
        return ok("memory", found)
    kv_said = ", lower kv.memory" if cache else ""
    return problem("memory", found, f"end other programs{kv_said}, or have fewer workers")


def check_shared_memory(folder: Path) -> Finding:
    """Ray's object store lies there; in containers it is often 64 MB."""
    if not folder.is_dir():
        return warning("shared memory", f"no {folder}", "Ray uses /tmp instead, which is slower; mount a tmpfs there")
    free = shutil.disk_usage(folder).free
    found = f"{folder} has {free / 2**20:.0f} MiB free"
    if free >= SHARED_BYTES:
        return ok("shared memory", found)
    mend = (
        f"make room for {SHARED_BYTES >> 20} MiB: docker run --shm-size=1g; in Kubernetes an emptyDir of medium Memory"
    )
    return warning("shared memory", found, mend)


def check_cache(folder: Path) -> Finding:
    """Models and converted weights are kept there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        mend = "set DIPTYCH_CACHE to a folder that you may write to"
        return problem("cache", f"{folder}: {error.strerror or error}", mend)
    return check_disk("cache", folder)


def check_disk(about: str, folder: Path) -> Finding:
    """Room for what is kept there."""
    free = shutil.disk_usage(folder).free
    found = f"{folder} is writable, {free / GIB:.1f} GiB free"
    if free >= SPARE_BYTES:
        return ok(about, found)
    variable = "DIPTYCH_CACHE" if about == "cache" else "TMPDIR"
    return problem(about, found, f"make room for {SPARE_BYTES >> 20} MiB, or set {variable} to another folder")


def check_files(limit: int) -> Finding:
    """Each stream, link and Ray process holds some open."""
    found = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} a process"
    if limit == resource.RLIM_INFINITY or limit >= FILES:
        return ok("open files", found)
    return warning("open files", found, f"ulimit -n {FILES}, or LimitNOFILE= of the systemd unit")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:  # no cgroups of version 2 here
        return ""
