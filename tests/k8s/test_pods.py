"""The manifests' pods run as they stand: commands, variables, ports, probes, configuration, and how they end."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from diptych import Client
from tests.k8s.dockerfile import stages
from tests.k8s.kubelet import TREE_INSIDE, Machine, Pod, why_not
from tests.k8s.manifests import TREE, Doc, of_kind, pods, render
from tests.k8s.operator import head_name, made
from tests.k8s.pod_network import Network

if TYPE_CHECKING:
    from diptych.types import ModelSource

pytestmark = [
    pytest.mark.full,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=f"pods: {why_not()}"),
]

WAIT_SECONDS = 120
LOST_SECONDS = 30
LONG = 1500
"""Tokens of an answer that is still under way when a pod has come up."""
FRONT_SERVICE = "diptych"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Cluster:
    """The pods of one overlay."""

    def __init__(self, docs: list[Doc], machine: Machine) -> None:
        self.machine = machine
        [self.spec] = of_kind(docs, "RayCluster")
        self.docs = docs
        self.pods: dict[str, Pod] = {}

    def start(self, name: str) -> Pod:
        """Of the group; the head's address is known to all that come after."""
        [group] = [each for each in pods(self.docs) if each.labels["ray.io/group"] == name]
        by = made(group)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.machine.secrets["diptych"]["auth_token"]}
        pod = self.pods[name] = Pod(group, self.machine, by.variables | token, by.command)
        self.machine.hosts.setdefault(head_name(self.spec), pod.address)
        if name == "front":
            self.machine.hosts.setdefault(FRONT_SERVICE, pod.address)
        pod.start()
        return pod

    @property
    def front(self) -> Pod:
        return self.pods["front"]

    def client(self) -> Client:
        return Client(f"{self.front.address}:50051", timeout_seconds=WAIT_SECONDS)

    def ask(self, tokens: int = 8) -> list[int]:
        return self.stream(tokens, threading.Event())

    def stream(self, tokens: int, begun: threading.Event) -> list[int]:
        """One greedy answer; `begun` at its first token."""
        told: list[int] = []
        with self.client() as client:
            for event in client.generate(messages=QUESTION, max_tokens=tokens, temperature=0, ignore_eos=True):
                told.extend(event.chunk.token_ids)
                begun.set()
        return told

    def workers(self) -> dict[str, Any]:
        with self.client() as client:
            return {worker.info.id: worker for worker in client.status().workers}

    def close(self) -> None:
        for pod in reversed(self.pods.values()):
            pod.close()


def until(true: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS, told: Callable[[], str] = str) -> Any:
    """The first value that is true."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"waited {seconds} s until {what}\n{told()}"
        threading.Event().wait(0.5)
    return value


def image() -> dict[str, str]:
    """The Dockerfile's variables, with this interpreter's folder instead of the image's."""
    variables = stages(TREE / "images/cpu.dockerfile")[-1].variables()
    path = f"{Path(sys.executable).parent}:{os.defpath}:/usr/sbin:/sbin"
    return {**variables, "PATH": path, "PYTHONPATH": f"{TREE_INSIDE}:{TREE_INSIDE}/proto", "LANG": "C.UTF-8"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, default_model: ModelSource) -> Iterator[Cluster]:
    docs = render(TREE / "k8s/overlays/cpu-dev")
    seed = tmp_path_factory.mktemp("seed")
    for name in ("models", "digests"):  # `diptych pull` finds it there
        shutil.copytree(Path(default_model.path).parents[1] / name, seed / name)
    token = secrets.token_hex(32)
    with Network() as network:
        machine = Machine(
            network=network,
            folder=tmp_path_factory.mktemp("pods"),
            hosts={},
            image=image(),
            configs={doc["metadata"]["name"]: doc["data"] for doc in of_kind(docs, "ConfigMap")},
            secrets={"diptych": {"auth_token": token}},
            seeds={"models": seed},
        )
        it = Cluster(docs, machine)
        try:
            it.start("headgroup").wait_started()
            for name in ("front", "prefill", "decode"):
                it.start(name)
            yield it
        finally:
            it.close()


def test_every_pod_starts_and_is_ready_and_lives(cluster: Cluster) -> None:
    for name, pod in cluster.pods.items():
        asked = pod.wait_started()
        print(f"{name}: started at startup probe {asked}")
        assert pod.passes("readinessProbe"), f"{name}\n{pod.tail()}"
        assert pod.passes("livenessProbe"), f"{name}\n{pod.tail()}"


def test_it_answers_at_the_services_ports_with_workers_in_their_roles_pods(cluster: Cluster) -> None:
    assert len(cluster.ask()) == 8
    hosts = {name: worker.info.host for name, worker in cluster.workers().items()}
    assert hosts == {f"{name}-0": cluster.pods[name].address for name in ("prefill", "decode")}


def test_a_machine_that_is_cut_off_is_lost_in_seconds_and_its_pods_successor_takes_over(cluster: Cluster) -> None:
    """Nobody is told: packets stop. The front stays alive, and is ready again when a decoding worker is back."""
    before, epoch = cluster.ask(400), cluster.workers()["decode-0"].info.epoch
    decode = cluster.pods.pop("decode")
    with ThreadPoolExecutor(1) as threads:
        begun = threading.Event()
        answer = threads.submit(cluster.stream, 400, begun)
        assert begun.wait(WAIT_SECONDS)
        cut = time.monotonic()
        cluster.machine.network.cut(decode.name)
        until(lambda: not cluster.front.passes("readinessProbe"), "the front isn't ready", LOST_SECONDS)
        print(f"not ready {time.monotonic() - cut:.1f} s after its machine was cut off")
        assert cluster.front.passes("livenessProbe")
        cluster.machine.network.heal(decode.name)
        until(lambda: decode.process.poll() is not None, "the node that was given up has ended", told=decode.tail)
        decode.close()
        cluster.start("decode").wait_started()
        until(lambda: cluster.front.passes("readinessProbe"), "the front is ready", told=cluster.front.tail)
        print(f"ready again {time.monotonic() - cut:.1f} s after the cut")
        assert len(answer.result(WAIT_SECONDS)) == len(before), "it went on where it was; bf16 may say it otherwise"
    assert cluster.workers()["decode-0"].info.epoch > epoch
    assert cluster.ask(400) == before


def test_a_worker_pod_that_ends_hands_on_what_it_does(cluster: Cluster) -> None:
    """preStop drains it: the only one that decodes stays until its successor, which comes meanwhile, serves."""
    whole, leaving = cluster.ask(LONG), cluster.pods["decode"]
    with ThreadPoolExecutor(2) as threads:
        begun = threading.Event()
        answer = threads.submit(cluster.stream, LONG, begun)
        assert begun.wait(WAIT_SECONDS)
        end = threads.submit(leaving.terminate)
        successor = cluster.start("decode")
        status, seconds = end.result(leaving.pods.spec["terminationGracePeriodSeconds"])
        assert cluster.front.passes("readinessProbe")
        assert len(answer.result(WAIT_SECONDS)) == len(whole), "bf16 may say it otherwise"
    assert leaving.hook
    print(f"decode: {leaving.hook.stdout.strip()}; exit status {status} after {seconds:.1f} s")
    assert leaving.hook.returncode == 0, leaving.hook.stderr
    assert "ended, " in leaving.hook.stdout
    leaving.close()
    decoding = [worker.info.host for worker in cluster.workers().values() if "decode" in worker.info.id]
    assert decoding == [successor.address]
    assert cluster.ask(LONG) == whole


def test_a_front_that_ends_lets_answers_under_way_end(cluster: Cluster) -> None:
    """preStop, SIGTERM, all within the grace; then a new front pod serves on the same nodes."""
    whole = cluster.ask(120)
    begun = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(cluster.stream, 120, begun)
        assert begun.wait(WAIT_SECONDS)
        status, seconds = cluster.front.terminate()
        assert answer.result(1) == whole
    grace = cluster.front.pods.spec["terminationGracePeriodSeconds"]
    print(f"front: exit status {status} after {seconds:.1f} of {grace} s")
    assert status == 0, cluster.front.tail()
    assert seconds < grace

    cluster.pods.pop("front").close()
    cluster.start("front").wait_started()
    assert cluster.ask(120) == whole


def test_every_other_pod_ends_within_its_grace(cluster: Cluster) -> None:
    cluster.front.terminate()
    for name in ("prefill", "decode", "headgroup"):
        status, seconds = cluster.pods[name].terminate()
        grace = cluster.pods[name].pods.spec["terminationGracePeriodSeconds"]
        print(f"{name}: exit status {status} after {seconds:.1f} of {grace} s")
        assert seconds < grace
