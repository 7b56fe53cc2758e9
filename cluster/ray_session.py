"""This process's time with Ray: one of its own that ends with it, or a running one that it leaves as it found it."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import tempfile
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.ray_address import RayUnusable, check_version
from cluster.ray_processes import fewer_processes

_OBJECT_STORE_BYTES = 100 << 20
"""Tokens and tickets are small; KV never passes through Ray's store."""
_UNWATCHED = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_event_stats": "0",
}
"""What a Ray of our own measures for its dashboard, which we don't start, and for its own developers."""
_LESS_OFTEN = {
    "RAY_memory_monitor_refresh_ms": "1000",  # 250
    "RAY_raylet_report_resources_period_milliseconds": "1000",  # 100
}
"""With Ray's defaults beside: on one machine nobody else waits for the news. A wake costs up to 70 µs of CPU."""
_FORGOTTEN = {
    "RAY_maximum_gcs_destroyed_actor_cached_count": "32",  # 100,000
    "RAY_maximum_gcs_dead_worker_cached_count": "32",  # 1,000
}
"""How many of the dead the GCS remembers: workers die and are replaced for as long as the cluster lives."""
_PREFIX = "diptych-ray-"
_LOCK = "in-use"
NAMESPACE = "diptych"
"""Of named actors: one for each detached cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySession:
    """`close` it."""

    address: str
    """HOST:PORT of the Ray that was joined; empty for one of our own."""
    folder: _Folder | None
    node: str
    """This machine's id in the Ray."""
    host: str
    """This machine's address as other nodes see it."""
    cpus: float
    """Free for workers when the session began."""
    gpus: float

    @property
    def joined(self) -> bool:
        """Whether others use this Ray too."""
        return self.folder is None

    def close(self) -> None:
        """Everything started in this session ends, but for what is detached."""
        import ray

        ray.shutdown()  # pyright: ignore[reportUnknownMemberType]
        if self.folder is not None:
            self.folder.remove()


def open_ray(address: str | None, *, debug: bool = False) -> RaySession:
    """Joins the Ray at the address, or starts one. Raises RayUnusable."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not debug:
        # Ray prints a paragraph on each death to stdout, whatever its options say; pools say it in a line.
        os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = ".*"
    if address is None:
        # Ray listens on all interfaces: without a token anyone could run code here.
        # Read when Ray is imported, so before that.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        for name, value in (_UNWATCHED | _LESS_OFTEN | _FORGOTTEN).items():
            os.environ.setdefault(name, value)
    import ray

    check_version(ray.__version__)
    options: dict[str, Any] = {
        "namespace": NAMESPACE,
        "logging_level": logging.DEBUG if debug else logging.ERROR,
        "log_to_driver": debug,
    }
    folder = None if address else _Folder()
    if folder:
        options |= {
            "address": "local",
            "num_cpus": 0,  # Ray would start an idle Python for each, and our actors ask for none
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_temp_dir": str(folder.path),
        }
    else:
        options["address"] = address
    # What Ray's log monitor reads is shown at the level "debug" only.
    own = folder is not None and not debug
    try:
        with fewer_processes() if own else nullcontext():
            ray.init(**options)  # pyright: ignore[reportUnknownMemberType]
    except (RuntimeError, ConnectionError, ValueError) as error:
        if folder:
            folder.remove()
        raise RayUnusable(f"Ray {ray.__version__} at {address or 'of our own'}: {error}") from error
    return _describe(address or "", folder)


def _describe(address: str, folder: _Folder | None) -> RaySession:
    import ray
    from ray.util import get_node_ip_address  # pyright: ignore[reportUnknownVariableType]

    free: dict[str, float] = ray.available_resources()  # pyright: ignore
    every: dict[str, float] = ray.cluster_resources()  # pyright: ignore
    return RaySession(
        address=address,
        folder=folder,
        node=ray.get_runtime_context().get_node_id(),
        host=str(get_node_ip_address()),  # pyright: ignore[reportUnknownArgumentType]
        cpus=float(len(os.sched_getaffinity(0))) if folder else free.get("CPU", 0.0),
        gpus=every.get("GPU", 0.0),
    )


class _Folder:
    """Where a Ray of our own keeps its sockets and logs, marked as in use by a lock that ends with this process.

    Not by a process id, which means something else in another container that shares /tmp.
    """

    def __init__(self) -> None:
        sweep()
        # The paths of sockets may have 107 bytes.
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
        self._lock = (self.path / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Nothing of it is left."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def sweep() -> None:
    """Remove folders of launchers that were killed."""
    for lock in Path("/tmp").glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
