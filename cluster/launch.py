"""`diptych serve`, behind the command line: Ray, the cluster, the signals, the end.

The launcher is the driver: everything it started ends with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.keeper import keep
from cluster.models import resolve
from cluster.models.cache import cache_folder
from diptych import __version__
from diptych.errors import ServingError
from diptych.types import ModelSource

_OBJECT_STORE_BYTES = 100 << 20
"""Tokens and tickets are small; KV never passes through Ray's store."""


def serve(config: Config) -> int:
    """Runs until SIGTERM or SIGINT. The process's exit status."""
    status = keep(lambda: _launch(config))
    _sweep()
    return status


def _launch(config: Config) -> int:
    say = _narrator(time.monotonic())
    try:
        _check_free(config)
        say(f"diptych {__version__}, model {config.model.name}")
        source = resolve(config.model.name, progress=say)
        return asyncio.run(_serve(config, source, say))
    except (ServingError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


async def _serve(config: Config, source: ModelSource, say: Callable[[str], None]) -> int:
    stop = asyncio.Event()
    folder = _start_ray(config)
    _on_signals(stop.set)  # after Ray, which sets its own
    say("Ray is up" if folder else "joined the running Ray")
    import ray

    from cluster.pools.members import Site
    from cluster.pools.pools import Pools

    site = Site(
        model=source,
        secret=secrets.token_bytes(32),
        cache=str(cache_folder() / "weights"),
        gpus=float(ray.cluster_resources().get("GPU", 0.0)),  # pyright: ignore
        host="127.0.0.1" if folder else "",
    )
    pools = Pools(config, site, say)
    starting = asyncio.ensure_future(pools.start())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            say("stopped while starting")
            return 0
        ports = starting.result()
        http, grpc = config.front.http_address.host, config.front.grpc_address.host
        sys.stdout.write(f"OpenAI API  http://{http}:{ports.http}/v1\ngRPC        {grpc}:{ports.grpc}\n")
        sys.stdout.flush()
        broken = asyncio.ensure_future(pools.wait_broken())
        await asyncio.wait({broken, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            sys.stderr.write(f"error: {broken.result()}\n")
            return 1
        say("stopping")
        return 0
    finally:
        starting.cancel()
        await pools.stop()
        _stop_ray(folder, say)


def _start_ray(config: Config) -> Path | None:
    """Joins the Ray that RAY_ADDRESS names, or starts one that ends with this process: its folder."""
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise OSError(f"RAY_ADDRESS={address}: Ray Client can't hold a cluster; use HOST:PORT or `ray job submit`")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:
        # Ray listens on all interfaces: without a token anyone could run code here.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    debug = config.log.level == "debug"
    options: dict[str, Any] = {
        "logging_level": logging.DEBUG if debug else logging.ERROR,
        "log_to_driver": debug,
    }
    if address:
        ray.init(address=address, **options)  # pyright: ignore
        return None
    # Ray keeps its sockets and logs there; the paths of sockets may have 107 bytes.
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"diptych-{os.getpid()}-", dir="/tmp"))
    ray.init(  # pyright: ignore
        address="local",
        num_cpus=0,  # Ray would start an idle Python for each, and our actors ask for none
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=str(folder),
        **options,
    )
    return folder


def _sweep() -> None:
    """Folders of launchers that were killed with their keeper."""
    for folder in Path("/tmp").glob("diptych-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _stop_ray(folder: Path | None, say: Callable[[str], None]) -> None:
    import ray

    ray.shutdown()  # pyright: ignore[reportUnknownMemberType]
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    say("stopped")


def _on_signals(stop: Callable[[], None]) -> None:
    """Once to stop in order; what comes on top (make forwards a second SIGTERM) changes nothing."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def _check_free(config: Config) -> None:
    """Before anything is started: a taken port is the commonest mistake."""
    for what, address in (("http", config.front.http_address), ("grpc", config.front.grpc_address)):
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address.host, address.port))
            except OSError as error:
                reason = error.strerror or str(error)
                raise OSError(f"can't listen on {address}: {reason}; choose another --{what} HOST:PORT") from error


def _narrator(began: float) -> Callable[[str], None]:
    """Lines for a person, on stderr, with the seconds since the start."""

    def say(line: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - began:5.1f} s] {line}\n")
        sys.stderr.flush()

    return say
