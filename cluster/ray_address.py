"""Which Ray a process uses, checked before Ray itself is asked. Starts nothing and joins nothing.

`ray.init` with an address that nobody answers ends the whole process after two minutes, and with a
wrong token after twenty seconds; one small call to the address tells all of it within five.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import grpc

from diptych.errors import ServingError

OLDEST_RAY = (2, 52)
"""The first with token authentication; CI runs the newest."""
NEXT_RAY = (3, 0)
_PROBE_SECONDS = 5.0
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"


class RayUnusable(ServingError):
    """This Ray can't hold a cluster; the message says why and what to do."""


def check_version(version: str) -> None:
    """Raises RayUnusable for a Ray that diptych doesn't know."""
    known = re.match(r"(\d+)\.(\d+)", version)
    if known and OLDEST_RAY <= (int(known[1]), int(known[2])) < NEXT_RAY:
        return
    oldest, following = (".".join(map(str, limit)) for limit in (OLDEST_RAY, NEXT_RAY))
    raise RayUnusable(
        f"Ray {version} is installed here; diptych needs {oldest} or newer and older than {following}: "
        f"pip install 'ray[default]>={oldest},<{following}'"
    )


def ray_address(environ: Mapping[str, str] = os.environ) -> str | None:
    """HOST:PORT of the Ray to join, as RAY_ADDRESS says; None to start one.

    Raises RayUnusable for what can't be joined, or when nothing answers there.
    """
    said = environ.get("RAY_ADDRESS", "")
    if said in ("", "local"):
        return None
    if said.startswith("ray://"):
        raise RayUnusable(
            f"RAY_ADDRESS={said}: Ray Client can't hold a cluster; set RAY_ADDRESS to the head's HOST:PORT (6379, "
            "not 10001) or use `ray job submit`"
        )
    if "://" in said:
        raise RayUnusable(
            f"RAY_ADDRESS={said} is where jobs are submitted: `ray job submit --address {said} -- diptych serve`, or "
            "set RAY_ADDRESS to the head's HOST:PORT"
        )
    address = _current(environ) if said == "auto" else said
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise RayUnusable(f"RAY_ADDRESS={said} should be HOST:PORT of a Ray head, like 10.0.0.5:6379")
    _check_answers(address, environ)
    return address


def _current(environ: Mapping[str, str]) -> str:
    """The Ray that was last started on this machine, by Ray's own note of it."""
    note = Path(environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    try:
        return note.read_text().strip()
    except OSError as error:
        raise RayUnusable(
            "RAY_ADDRESS=auto, but no Ray runs on this machine: `ray start --head`, or unset RAY_ADDRESS to let "
            "diptych start its own"
        ) from error


def _check_answers(address: str, environ: Mapping[str, str]) -> None:
    """One call that a Ray head answers at once."""
    if environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # its certificates are Ray's own business
    token = _token(environ)
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        alive = cast("Any", channel.unary_unary(_ALIVE))  # bytes in, bytes out
        try:
            alive(b"", timeout=_PROBE_SECONDS, metadata=metadata, wait_for_ready=True)
        except grpc.RpcError as error:
            raise RayUnusable(_meaning(address, cast("grpc.Call", error), token, environ)) from error


def _meaning(address: str, error: grpc.Call, token: str, environ: Mapping[str, str]) -> str:
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.UNAVAILABLE:
            return (
                f"no Ray answers at RAY_ADDRESS={address} within {_PROBE_SECONDS:.0f} s: start one with "
                "`ray start --head`, correct the address, or unset RAY_ADDRESS to let diptych start its own"
            )
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            mode = environ.get("RAY_AUTH_MODE", "")
            have = "the one given here is not its own" if token else f"RAY_AUTH_MODE={mode!r} sends none"
            return (
                f"the Ray at {address} asks for a token and {have}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
                "RAY_AUTH_TOKEN_PATH) as on its head node"
            )
        case code:
            return f"what answers at RAY_ADDRESS={address} is not a Ray head ({code.name}): correct the address"


def _token(environ: Mapping[str, str]) -> str:
    """As Ray itself looks for it."""
    if environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return ""
    if token := environ.get("RAY_AUTH_TOKEN"):
        return token
    path = environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
