"""`diptych serve`, behind the command line: Ray, the cluster, the signals, the end.

The launcher is the driver: everything it started ends with it, but for what is detached.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
from collections.abc import Coroutine, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.cache import cache_folder
from cluster.config import Config
from cluster.config.values import Address
from cluster.journal import Journal
from cluster.keeper import keep
from cluster.models import resolve
from cluster.pools.members import Site, front_addresses
from cluster.ray_address import RayUnusable, ray_address
from cluster.ray_session import RaySession, open_ray, sweep
from cluster.terminal import Terminal
from diptych import __version__
from diptych.errors import ServingError
from diptych.types import ModelSource

if TYPE_CHECKING:
    from cluster.front.actor import Ports

T = TypeVar("T")
_UNDO_SECONDS = 3
_JOB_GRACE_SECONDS = 1
"""`ray job stop` kills after 3 s, and stopping takes some of them."""
_WILDCARDS = ("0.0.0.0", "::")


class Stopped(Exception):
    """A signal came first."""


def serve(config: Config, *, detach: bool = False) -> int:
    """Runs until SIGTERM or SIGINT, or with `detach` until the cluster is up. The process's exit status."""
    status = keep(lambda: _launch(config, detach=detach))
    sweep()
    return status


def _launch(config: Config, *, detach: bool) -> int:
    with Terminal(bars=config.log.format == "text") as terminal:
        return _launch_told(config, Journal(config.log, terminal), detach=detach)


def _launch_told(config: Config, journal: Journal, *, detach: bool) -> int:
    try:
        address = ray_address()
        if detach and address is None:
            raise RayUnusable(
                "--detach needs a Ray that outlives this command, and RAY_ADDRESS names none: start one with "
                "`ray start --head` and set RAY_ADDRESS, or use `ray job submit`; without, let systemd or tmux keep "
                "a plain `diptych serve`"
            )
        if not detach:  # a detached one of the same name is the better reason
            _check_free(front_addresses(config))
        journal.say(f"diptych {__version__}, model {config.model.name}")
        source = resolve(config.model.name, progress=journal.say)
        return asyncio.run(_with_ray(config, address, source, journal, detach=detach))
    except (ServingError, OSError) as error:
        journal.fail(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


async def _with_ray(config: Config, address: str | None, source: ModelSource, journal: Journal, *, detach: bool) -> int:
    session = open_ray(address, debug=config.log.level == "debug")
    stopping = _on_signals()  # after Ray, which sets its own
    journal.say(f"joined the Ray at {session.address}" if session.joined else "Ray is up")
    site = _site(config, session, source)
    try:
        return await (_detach if detach else _serve)(config, site, session, stopping, journal)
    except Stopped:
        journal.say("stopped while starting")
        return 0
    finally:
        session.close()
        journal.say("left Ray" if session.joined else "stopped")


async def _serve(config: Config, site: Site, session: RaySession, stopping: asyncio.Event, journal: Journal) -> int:
    from cluster.pools.pools import Pools

    pools = Pools(config, site, journal.say, journal.add)
    try:
        _announce(config, session, await _unless(stopping, pools.start()))
        try:
            why = await _unless(stopping, pools.wait_broken())
        except Stopped:
            journal.say("stopping")
            return 0
        journal.fail(why)
        return 1
    finally:
        await pools.stop()


async def _detach(config: Config, site: Site, session: RaySession, stopping: asyncio.Event, journal: Journal) -> int:
    from cluster import detached

    detached.check_absent(config.cluster.name)
    _check_free(front_addresses(config))
    _announce(config, session, await _unless(stopping, detached.start(config, site, journal.say)))
    name = config.cluster.name
    sys.stdout.write(f"detached    diptych status --name {name} · diptych stop --name {name}\n")
    return 0


def _site(config: Config, session: RaySession, source: ModelSource) -> Site:
    grace = config.cluster.grace_seconds
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return Site(
        model=source,
        secret=secrets.token_bytes(32),
        cache=str(cache_folder() / "weights"),
        cpus=session.cpus,
        gpus=session.gpus,
        host="" if session.joined else "127.0.0.1",
        node=session.node,
        joined=session.joined,
        grace_seconds=min(grace, _JOB_GRACE_SECONDS) if in_job else grace,
    )


async def _unless(stopping: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises; Stopped when the signal comes first."""
    working, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({working, stop}, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            raise Stopped
        return working.result()
    finally:
        working.cancel()
        stop.cancel()
        await asyncio.wait({working, stop}, timeout=_UNDO_SECONDS)  # it may have something to undo


def _announce(config: Config, session: RaySession, fronts: Iterable[Ports]) -> None:
    """Where clients reach the cluster: for programs too, so on stdout."""

    def shown(address: Address, port: int) -> Address:
        return Address(session.host if address.host in _WILDCARDS else address.host, port)

    for ports in fronts:
        http, grpc = shown(config.front.http_address, ports.http), shown(config.front.grpc_address, ports.grpc)
        sys.stdout.write(f"OpenAI API  http://{http}/v1\ngRPC        {grpc}\n")
    sys.stdout.flush()


def _on_signals() -> asyncio.Event:
    """Once to stop in order; what comes on top (make forwards a second SIGTERM) changes nothing."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


def _check_free(addresses: Iterable[tuple[Address, Address]]) -> None:
    """Before anything is started: a taken port is the commonest mistake."""
    for http, grpc in addresses:
        for what, address in (("http", http), ("grpc", grpc)):
            _check_can_listen(what, address)


def _check_can_listen(what: str, address: Address) -> None:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(f"can't listen on {address}: {reason}; choose another --{what} HOST:PORT") from error
