"""Packets stop and nobody is told: between two workers, a worker and everybody, a worker and scheduler and fronts.

The matrix's column for partitions. Workers on Ray nodes with network namespaces of their own, gloo between them, fp32.
Every answer ends in time, with the undisturbed run's tokens; when the network is whole again, so is the cluster. The
scheduler and the fronts are on one node with Ray's head: to be parted from them is one and the same.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from diptych import Client
from tests.e2e.conftest import check_at_rest, is_idle
from tests.e2e.faults.lan import WAIT_SECONDS, Lan, until
from tests.e2e.faults.phases import PHASES, RUNNING, TRIES, Seen, Stream, asks
from tests.k8s.kubelet import why_not

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from diptych.v1.admin_pb2 import WorkerStatus

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=f"several machines: {why_not()}"),
]

LEASE_SECONDS = 3.0
HEALTH_FAILURES = 5
"""Ray gives a node up after 5 to 7.5 s, well after we call its worker lost: some are to be heard again in between."""
GIVEN_UP_SECONDS = 12.0
NODES = {"prefill": "prefill", "prefill-too": "prefill", "decode": "decode", "decode-too": "decode"}
CUTS = [
    *(("prefill", "everybody", phase) for phase in PHASES),
    *(("decode", "everybody", phase) for phase in PHASES),
    *(("decode", "head", phase) for phase in ("transferring", "decoding")),
]
KEYS = (
    "model.dtype=fp32",
    "placement.how=remote",
    "kv.link=gloo",
    "kv.memory=16MiB",
    f"kv.lease_seconds={LEASE_SECONDS}",
    "engine.threads=1",
    f"engine.max_running={RUNNING}",
    "engine.max_batch_tokens=32",
    "pools.prefill.labels=role=prefill",
    "pools.decode.labels=role=decode",
    "cluster.max_deaths=1000",
    "cluster.room_seconds=600",
)


MANY = 4 * RUNNING
"""Requests at once: more than one decode worker takes."""


@dataclass
class Site:
    """The cluster, and what undisturbed runs said."""

    lan: Lan
    client: Client
    log: Path
    rows: list[str] = field(default_factory=list[str])
    expected: dict[str, list[list[int]]] = field(default_factory=dict[str, list[list[int]]])

    def workers(self) -> dict[str, WorkerStatus]:
        """By node."""
        nodes = {address: node for node, address in self.lan.addresses.items()}
        return {nodes[worker.info.host]: worker for worker in self.client.status().workers if worker.alive}

    def undisturbed(self, name: str) -> list[list[int]]:
        if name not in self.expected:
            with ThreadPoolExecutor(PHASES[name].requests) as threads:
                streams = [Stream(self.client, ask, threads) for ask in asks(name, "undisturbed")]
                assert [stream.wait() for stream in streams] == [None] * len(streams)
            self.expected[name] = [stream.heard for stream in streams]
        return self.expected[name]

    def saw_phase(self, name: str, who: str, streams: list[Stream]) -> bool:
        """Of requests that the blow meets. False when all were over before anybody looked."""
        # Either prefill worker may hold what goes to the struck decode worker.
        struck = ("prefill", "decode", *(["prefill-too"] if who.startswith("decode") else []))
        while not all(stream.is_over for stream in streams):
            workers = self.workers()
            seen = Seen({node: workers[node] for node in struck}, [len(each.heard) for each in streams])
            if self.is_on(name, seen):
                return True
            time.sleep(0.02)
        return False

    def until_lost(self, node: str) -> None:
        until(lambda: node not in self.workers(), lambda: f"{node} counts as alive\n{self.log.read_text()[-3000:]}")

    def is_on(self, name: str, seen: Seen) -> bool:
        if name == "queued":  # at fewer workers than the matrix has
            return seen.total("", "waiting_requests") > 1
        return PHASES[name].is_on(seen) and (name != "decoding" or seen.total("decode", "running_requests") > 0)

    @contextmanager
    def strikes(self, who: str, phase: str) -> Generator[None]:
        """What is done inside strikes requests in the phase; every answer has ended exactly before it returns."""
        expected, asked = self.undisturbed(phase), asks(phase, who)
        with ThreadPoolExecutor(len(asked)) as threads:
            for attempt in range(TRIES):
                streams = [Stream(self.client, ask, threads) for ask in asks(phase, f"{who} {attempt}")]
                if self.saw_phase(phase, who, streams):
                    break
            else:
                raise AssertionError(f"nobody was seen {phase}")
            began = time.monotonic()
            yield
            errors = [stream.wait() for stream in streams]
        assert errors == [None] * len(errors), self.log.read_text()[-3000:]
        wrong = [place for place, stream in enumerate(streams) if stream.heard != expected[place]]
        assert not wrong, f"requests {wrong} got other tokens"
        self.rows.append(f"{who:<28}{phase:<14}{len(asked):>7}{time.monotonic() - began:>11.1f}")
        print(self.rows[-1], flush=True)

    def wait_whole(self) -> None:
        """All workers are back, and rest: what they say of themselves is younger than this call."""
        began = time.monotonic()

        def rests() -> bool:
            workers, age = self.workers(), time.monotonic() - began - 0.5
            return set(workers) == set(NODES) and all(
                is_idle(worker) and worker.report_age_seconds < age for worker in workers.values()
            )

        until(rests, lambda: f"{self.workers()}\n{self.log.read_text()[-3000:]}")
        for worker in self.workers().values():
            check_at_rest(worker)

    def hands_off(self) -> bool:
        """Whether KV gets to the node `decode` again."""
        before = self.workers()["decode"].counters.transfers_committed
        with ThreadPoolExecutor(MANY) as threads:
            tenant = str(time.monotonic())
            asked = [{"tokens": [7, place, *range(3, 60)], "max_tokens": 20, "tenant": tenant} for place in range(MANY)]
            streams = [Stream(self.client, ask, threads) for ask in asked]
            assert [stream.wait() for stream in streams] == [None] * len(asked)
        time.sleep(1.5)  # reports, and the status that fronts serve again
        return self.workers()["decode"].counters.transfers_committed > before


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    log = tmp_path_factory.mktemp("site") / "log"
    with Lan(HEALTH_FAILURES) as lan:
        for node, role in {"head": "", **NODES}.items():
            lan.start(node, role)
        address = lan.addresses["head"]
        where = ("--http", f"{address}:0", "--grpc", f"{address}:0", "--prefill", "2", "--decode", "2")
        keys = [part for key in KEYS for part in ("--set", key)]
        command = [sys.executable, "-m", "cluster", "serve", "--model", "random:tiny", *where, *keys]
        with log.open("w") as output:
            serving = lan.popen("head", command, stdout=subprocess.PIPE, stderr=output, text=True)
        assert serving.stdout is not None
        said = [serving.stdout.readline() for _ in range(2)]
        found = re.search(r"\d+\.\d+\.\d+\.\d+:\d+", said[1])
        assert found, log.read_text()
        with Client(found[0], timeout_seconds=WAIT_SECONDS) as client:
            built = Site(lan, client, log)
            yield built
        print("\n" + "\n".join([f"{'parted':<28}{'phase':<14}{'exact':>7}{'slowest s':>11}", *built.rows]))
        serving.terminate()
        serving.wait(WAIT_SECONDS)
        serving.stdout.close()


@pytest.mark.parametrize("phase", PHASES)
def test_two_workers_that_do_not_hear_each_other_cost_no_answer(site: Site, phase: str) -> None:
    try:
        with site.strikes("prefill | decode", phase):
            site.lan.sever("prefill", "decode")
        assert set(site.workers()) == set(NODES), "nobody is lost: all hear the scheduler"
    finally:
        site.lan.mend("prefill", "decode")
    site.wait_whole()
    until(site.hands_off, lambda: f"they don't send again\n{site.log.read_text()[-3000:]}")


@pytest.mark.parametrize(("node", "others", "phase"), CUTS)
def test_a_worker_that_is_not_heard_costs_no_answer(site: Site, node: str, others: str, phase: str) -> None:
    """Ray gives its node up, which ends itself then; a node in its place takes its work up again."""
    epoch = site.workers()[node].info.epoch
    with site.strikes(f"{node} | {others}", phase):
        site.lan.sever(node, others)
        began = time.monotonic()
        site.until_lost(node)
    time.sleep(max(0.0, began + GIVEN_UP_SECONDS - time.monotonic()))
    site.lan.mend(node, others)
    site.lan.wait_ended(node)
    site.lan.start(node, NODES[node])
    site.wait_whole()
    assert site.workers()[node].info.epoch > epoch


@pytest.mark.parametrize(("node", "phase"), [("prefill", "transferring"), ("decode", "decoding")])
def test_a_worker_that_is_heard_again_soon_serves_again(site: Site, node: str, phase: str) -> None:
    """Before Ray gives its node up: nobody starts anything."""
    with site.strikes(f"{node} | everybody, soon", phase):
        site.lan.sever(node, "everybody")
        site.until_lost(node)
        site.lan.mend(node, "everybody")
    site.wait_whole()
