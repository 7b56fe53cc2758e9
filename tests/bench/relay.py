"""`make bench-relay`: what it costs to bring a token from the engine to a client, against what the engine needs.

CPU seconds of every process of a real cluster, while a client in a process of its own reads many streams: the engine
threads on one side; the front, Ray's processes, the launcher and all other threads of the workers on the other.
Knows processes, not what they do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil
from results import ROOT, figure, report
from serving import Cluster, serving

from diptych import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

IDLE_SECONDS = 15
PARTS = ("front", "workers' other threads", "scheduler", "launcher", "raylet", "gcs", "Ray, the rest")


def spent(cluster: Cluster, workers: dict[int, str]) -> Counter[str]:
    """CPU seconds so far, by part."""
    seconds: Counter[str] = Counter()
    for process in [psutil.Process(cluster.pid), *psutil.Process(cluster.pid).children(recursive=True)]:
        times = process.cpu_times()
        whole = times.user + times.system
        if process.pid in workers:
            # With one thread per engine, the engine's is the thread that has worked most.
            engine = max(thread.user_time + thread.system_time for thread in process.threads())
            seconds[f"engine {workers[process.pid]}"] += engine
            seconds["workers' other threads"] += whole - engine
        else:
            seconds[part_of(process)] += whole
    return seconds


def part_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    if "FrontActor" in line:
        return "front"
    if "SchedulerActor" in line:
        return "scheduler"
    if " serve " in line:
        return "launcher"
    if "raylet/raylet" in line:
        return "raylet"
    return "gcs" if "gcs_server" in line else "Ray, the rest"


@contextmanager
def streaming(protocol: str, target: str, streams: int, tokens: int) -> Iterator[subprocess.Popen[str]]:
    """The client, connected and waiting for the word."""
    command = [sys.executable, str(Path(__file__).with_name("streams.py")), protocol, target, str(streams), str(tokens)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "proto")}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert line_of(client.stdout) == "ready"
        yield client
        say(client.stdin, "")


def line_of(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()


def say(stream: IO[str] | None, word: str) -> None:
    assert stream is not None
    stream.write(word + "\n")
    stream.flush()


def idle(cluster: Cluster) -> float:
    """CPU seconds a second of everything but the engines, while nobody asks: Ray's heartbeats, ours, and timers."""
    workers = worker_names(cluster)
    before = spent(cluster, workers)
    time.sleep(IDLE_SECONDS)
    used = spent(cluster, workers)
    used.subtract(before)
    return sum(used[part] for part in PARTS) / IDLE_SECONDS


def worker_names(cluster: Cluster) -> dict[int, str]:
    """By process id."""
    with Client(cluster.grpc) as client:
        return {worker.info.pid: worker.info.id for worker in client.status().workers}


def measure(cluster: Cluster, protocol: str, streams: int, tokens: int, rounds: int) -> list[Counter[str]]:
    """CPU microseconds per output token, by part, for each round; one more comes first, to warm up."""
    workers = worker_names(cluster)
    measured: list[Counter[str]] = []
    target = cluster.grpc if protocol == "grpc" else cluster.http
    with streaming(protocol, target, streams, tokens) as client:
        for _ in range(rounds + 1):
            before = spent(cluster, workers)
            say(client.stdin, "go")
            told = json.loads(line_of(client.stdout))
            used = spent(cluster, workers)
            used.subtract(before)
            assert told["tokens"] == streams * tokens, f"{told['tokens']} tokens came of {streams * tokens}"
            costs = Counter({part: 1e6 * seconds / told["tokens"] for part, seconds in used.items()})
            costs["tokens per second"] = told["tokens"] / told["seconds"]
            measured.append(costs)
    return measured[1:]


def relay(costs: Counter[str]) -> float:
    return sum(costs[part] for part in PARTS)


def beyond_idle(costs: Counter[str], idle_seconds: float) -> float:
    """What tokens cost, without what the time costs that the engine takes for them."""
    return relay(costs) - 1e6 * idle_seconds / costs["tokens per second"]


def engine(costs: Counter[str]) -> float:
    return sum(cost for part, cost in costs.items() if part.startswith("engine "))


def main() -> None:
    """Prints the table and writes .bench/relay.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--protocols", default="grpc,http")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args()
    figures = []
    with serving("--model", options.model, "--set", "engine.threads=1") as cluster:
        resting = idle(cluster)
        figures.append(figure("nobody asks", "all but the engines", "CPU ms/s", [1e3 * resting]))
        for protocol in options.protocols.split(","):
            costs = measure(cluster, protocol, options.streams, options.tokens, options.rounds)
            case = f"{protocol}, {options.streams} streams"
            engines = sorted(part for part in costs[0] if part.startswith("engine "))
            figures += [figure(case, part, "CPU µs/token", [one[part] for one in costs]) for part in (*engines, *PARTS)]
            figures.append(figure(case, "relay, all of it", "CPU µs/token", [relay(one) for one in costs]))
            marginal = [beyond_idle(one, resting) for one in costs]
            figures.append(figure(case, "relay beyond idle", "CPU µs/token", marginal))
            figures.append(figure(case, "relay / engines", "%", [100 * relay(one) / engine(one) for one in costs]))
            shares = [100 * cost / engine(one) for cost, one in zip(marginal, costs, strict=True)]
            figures.append(figure(case, "relay beyond idle / engines", "%", shares))
            figures.append(figure(case, "speed", "tokens/s", [one["tokens per second"] for one in costs]))
    report("relay", figures)


if __name__ == "__main__":
    main()
