"""What the client does before and without a front."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from diptych import Client
from diptych.client import Unreachable

PROTO = Path(__file__).parents[2] / "proto"


def test_importing_diptych_loads_no_grpc() -> None:
    program = "import sys, diptych, diptych.types, diptych.hashing; assert 'grpc' not in sys.modules; diptych.Client"
    subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(PROTO)}, timeout=60, check=True)


def test_a_refused_connection_says_where_and_what_to_do() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
        with Client(target) as client, pytest.raises(Unreachable, match=f"{target}; is `diptych serve` running"):
            client.status()


def test_a_server_that_never_speaks_is_given_up_in_bounded_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        with Client(target, connect_timeout_seconds=0.2) as client, pytest.raises(Unreachable):
            list(client.generate("hello"))


def test_exactly_one_prompt_is_asked_for() -> None:
    with Client() as client:
        with pytest.raises(ValueError, match="one of"):
            client.generate()
        with pytest.raises(ValueError, match="one of"):
            client.generate("hello", tokens=[1])
        with pytest.raises(ValueError, match="one of"):
            client.tokenize()
