"""Which Ray is joined, and what a person is told when it can't be: each within seconds, before Ray is asked."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.ray_address import RayUnusable, check_version, ray_address

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}


def refusal(**environ: str) -> str:
    with pytest.raises(RayUnusable) as caught:
        ray_address(environ)
    return str(caught.value)


@contextmanager
def answering(method: str, answer: Callable[[bytes, Any], bytes]) -> Iterator[str]:
    """A server with this one method."""
    service, name = method.strip("/").split("/")
    server = grpc.server(futures.ThreadPoolExecutor(1))
    handlers = {name: grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def alive(token: str = "") -> Callable[[bytes, Any], bytes]:
    """A head's answer to whoever has the token."""

    def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
        if token and ("authorization", f"Bearer {token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    return answer


CHECK = "/ray.rpc.NodeInfoGcsService/CheckAlive"


# ---- the address -------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["", "local"])
def test_without_an_address_a_ray_of_our_own_is_started(said: str) -> None:
    assert ray_address({"RAY_ADDRESS": said}) is None
    assert ray_address({}) is None


def test_ray_client_is_refused_with_both_ways_out() -> None:
    told = refusal(RAY_ADDRESS="ray://head:10001")
    assert "HOST:PORT" in told
    assert "ray job submit" in told


def test_where_jobs_are_submitted_is_no_address_to_join() -> None:
    assert "ray job submit --address http://head:8265" in refusal(RAY_ADDRESS="http://head:8265")


@pytest.mark.parametrize("said", ["head", "head:", ":6379", "head:port"])
def test_what_is_no_address_is_refused_by_its_form(said: str) -> None:
    assert "should be HOST:PORT" in refusal(RAY_ADDRESS=said)


def test_auto_is_the_ray_that_was_started_last_on_this_machine(tmp_path: Path) -> None:
    assert "no Ray runs on this machine" in refusal(RAY_ADDRESS="auto", RAY_TMPDIR=str(tmp_path))
    (tmp_path / "ray").mkdir()
    with answering(CHECK, alive()) as address:
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        assert ray_address({"RAY_ADDRESS": "auto", "RAY_TMPDIR": str(tmp_path)}) == address


# ---- what answers there -------------------------------------------------------------------------------


def test_a_head_that_answers_is_joined() -> None:
    with answering(CHECK, alive()) as address:
        assert ray_address({"RAY_ADDRESS": address}) == address


def test_a_head_that_asks_for_a_token_is_joined_with_it_and_refused_without(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret\n")
    with answering(CHECK, alive("secret")) as address:
        assert ray_address({"RAY_ADDRESS": address, **TOKEN}) == address
        in_file = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
        assert ray_address({"RAY_ADDRESS": address, **in_file}) == address
        assert "not its own" in refusal(RAY_ADDRESS=address, **(TOKEN | {"RAY_AUTH_TOKEN": "other"}))
        without_mode = refusal(RAY_ADDRESS=address, RAY_AUTH_TOKEN="secret")  # Ray itself would send none
        assert "set RAY_AUTH_MODE=token" in without_mode


def test_a_server_that_is_no_ray_is_named_as_such() -> None:
    with answering("/diptych.v1.AdminService/GetStatus", alive()) as address:
        assert "is not a Ray head (UNIMPLEMENTED)" in refusal(RAY_ADDRESS=address)


@pytest.mark.slow
def test_where_nobody_answers_that_is_said_within_seconds() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and doesn't listen
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert f"no Ray answers at RAY_ADDRESS={address} within 5 s" in refusal(RAY_ADDRESS=address)


@pytest.mark.slow
def test_a_listener_that_says_nothing_is_given_up_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert f"no Ray answers at RAY_ADDRESS={address} within 5 s" in refusal(RAY_ADDRESS=address)


# ---- its version --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.52.0", "2.60.0", "2.61.0rc1", "2.100.3"])
def test_a_ray_in_the_range_is_used(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["1.13.0", "2.9.3", "2.51.2", "3.0.0", "nightly"])
def test_a_ray_outside_of_it_is_refused_with_the_range(version: str) -> None:
    with pytest.raises(RayUnusable) as caught:
        check_version(version)
    assert f"Ray {version} is installed here; diptych needs 2.52 or newer and older than 3.0" in str(caught.value)
