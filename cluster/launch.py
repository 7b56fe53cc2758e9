"""`diptych serve`, behind the command line: Ray, the cluster, the signals, the end.

The launcher is the driver: everything it started ends with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable

from cluster.config import Config
from cluster.models import resolve
from cluster.models.cache import cache_folder
from diptych import __version__
from diptych.errors import ServingError
from diptych.types import ModelSource

_OBJECT_STORE_BYTES = 100 << 20
"""Tokens and tickets are small; KV never passes through Ray's store."""


def serve(config: Config) -> int:
    """Runs until SIGTERM or SIGINT. The process's exit status."""
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
    own = _start_ray(config)
    _on_signals(stop.set)  # after Ray, which sets its own
    say("Ray is up" if own else "joined the running Ray")
    import ray

    from cluster.pools.members import Site
    from cluster.pools.pools import Pools

    site = Site(
        model=source,
        secret=secrets.token_bytes(32),
        cache=str(cache_folder() / "weights"),
        gpus=float(ray.cluster_resources().get("GPU", 0.0)),
        host="127.0.0.1" if own else "",
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
        ray.shutdown()
        say("stopped")


def _start_ray(config: Config) -> bool:
    """Joins the Ray that RAY_ADDRESS names, or starts one that ends with this process. Whether it is ours."""
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise OSError(f"RAY_ADDRESS={address}: Ray Client can't hold a cluster; use HOST:PORT or `ray job submit`")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:
        # Ray listens on all interfaces: without a token anyone could run code here.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    level = logging.DEBUG if config.log.level == "debug" else logging.ERROR
    if address:
        ray.init(address=address, logging_level=level, log_to_driver=False)
        return False
    # No CPUs: Ray would start an idle Python for each. Our actors ask for none.
    ray.init(
        address="local",
        num_cpus=0,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=level,
        log_to_driver=config.log.level == "debug",
    )
    return True


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
