"""Servers to be compared, each started as its users start it: ours in its forms, and `vllm serve`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.error import URLError

from results import ROOT
from serving import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS = 600
OURS = {
    # Both cores for one worker that does all, as vLLM has them.
    "aggregated": ("--prefill", "0", "--decode", "0", "--mixed", "1", "--set", "engine.threads=2"),
    # One worker on one core: what a role has when there are two.
    "aggregated on one core": ("--prefill", "0", "--decode", "0", "--mixed", "1", "--set", "engine.threads=1"),
    "disaggregated": ("--set", "engine.threads=1"),
    "disaggregated, remote": ("--set", "engine.threads=1", "--set", "placement.how=remote"),
}


@contextmanager
def endpoint(name: str, *more: str) -> Iterator[str]:
    """HOST:PORT of its OpenAI API, up and answering."""
    if name == "vllm":
        with vllm(2) as server:
            yield server.http
        return
    with serving(*OURS[name], *more) as cluster:
        yield cluster.http


@dataclass(frozen=True)
class Vllm:
    """`vllm serve`, up and answering."""

    http: str
    process: subprocess.Popen[bytes]

    @contextmanager
    def alone(self) -> Iterator[str]:
        """Frozen outside of it: starting it again would take a minute, and idling it would take from others."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield self.http
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)


@contextmanager
def vllm(threads: int) -> Iterator[Vllm]:
    from tests.bench.peers.__main__ import MODEL, bf16_folder, resolve
    from tests.clients.clients import vllm_environment

    folder = bf16_folder(resolve(MODEL, progress=print))
    port = free_port()
    command = [
        *(str(vllm_environment() / "vllm"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--max-model-len", "4096", "--skip-tokenizer-init", "--no-enable-prefix-caching"),
    ]
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    with (ROOT / ".bench" / "vllm-serve.log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **variables}, start_new_session=True
        )
        try:
            wait_until_up(server, f"http://127.0.0.1:{port}/v1/models")
            yield Vllm(f"127.0.0.1:{port}", server)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_until_up(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, f"it ended with {server.returncode}: see .bench/vllm-serve.log"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.25)
    raise SystemExit(f"not up within {START_SECONDS} s: see .bench/vllm-serve.log")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
