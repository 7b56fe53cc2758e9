"""A Ray that is not ours: no room, a refused token, the driver's death, and clusters that outlive their launcher."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.e2e.ray_jobs.conftest import Head

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.full]

KILLED_SECONDS = 10
TAKEN = "a cluster named twin runs on this Ray already: `diptych stop --name twin`"


@pytest.mark.parametrize("who", ["keeper", "launcher"])
def test_a_killed_launcher_takes_its_cluster_with_it(head: Head, who: str) -> None:
    with head.serve() as command:
        [served] = command.until_serves()
        served.check_answers()
        os.kill(command.process.pid if who == "keeper" else command.launcher.pid, signal.SIGKILL)
        head.until_gone(KILLED_SECONDS)
    assert not served.listens


def test_a_worker_larger_than_every_node_is_refused_with_what_is_missing(head: Head) -> None:
    with head.serve("--set", "engine.threads=64", "--set", "cluster.room_seconds=2") as command:
        status, said = command.ended()
    assert status == 1
    assert "it needs 64 CPU on one node, the most that one has is 4 CPU" in said
    head.until_gone(KILLED_SECONDS)


def test_more_workers_than_there_is_room_for_are_refused_with_what_is_missing(head: Head) -> None:
    with head.serve("--prefill", "2", "--set", "engine.threads=2", "--set", "cluster.room_seconds=20") as command:
        status, said = command.ended()
    assert status == 1
    assert "it needs 2 CPU, free are 0 CPU of 4 CPU in all" in said
    head.until_gone(KILLED_SECONDS)


def test_a_worker_that_cannot_start_ends_the_start_with_its_error(head: Head) -> None:
    with head.serve("--set", "kv.memory=1KiB") as command:
        status, said = command.ended()
    assert status == 1
    assert "at least 2 are needed" in said.splitlines()[-1]
    head.until_gone(KILLED_SECONDS)


def test_another_token_is_refused_at_once(head: Head) -> None:
    with head.serve(RAY_AUTH_TOKEN="0" * 64) as command:
        status, said = command.ended()
    assert (status, said.count("\n")) == (1, 1)
    assert "asks for a token and the one given here is not its own" in said


def test_no_token_is_refused_at_once(head: Head) -> None:
    with head.serve(RAY_AUTH_MODE="") as command:
        status, said = command.ended()
    assert (status, said.count("\n")) == (1, 1)
    assert "set RAY_AUTH_MODE=token" in said


def test_a_detached_cluster_outlives_its_launcher_and_is_stopped_by_name(head: Head) -> None:
    with head.serve("--detach", "--set", "cluster.name=twin") as command:
        status, said = command.ended()
        assert status == 0, said
        [served] = command.until_serves()
    served.check_answers()

    with head.serve("--detach", "--set", "cluster.name=twin") as command:
        status, said = command.ended()
    assert status == 1
    assert TAKEN in said
    served.check_answers()

    with head.diptych("status", "--name", "twin") as command:
        status, said = command.ended()
    assert status == 0, said
    assert "decode-0" in said
    with head.diptych("stop", "--name", "other") as command:
        status, said = command.ended()
    assert status == 1
    assert "no detached cluster named other; it has twin" in said

    with head.diptych("stop", "--name", "twin") as command:
        status, said = command.ended()
    assert status == 0, said
    head.until_gone(KILLED_SECONDS)
    assert not served.listens


def test_a_detached_job_is_over_and_its_cluster_serves_on_from_the_jobs_files(head: Head, clone: Path) -> None:
    head.submit("detached", "--working-dir", str(clone), command=("python", "-m", "cluster"), more=("--detach",))
    [served] = head.until_job_serves("detached")
    head.until_job_is_over("detached")
    assert head.status_of("detached") == "SUCCEEDED"
    served.check_answers()

    before = head.workers("diptych")
    for worker in head.processes("ray::WorkerActor"):
        worker.kill()  # their successors find the job's files too
    head.until_workers("diptych", {worker: epoch + 1 for worker, epoch in before.items()})
    served.check_answers()
    with head.diptych("stop", "--name", "diptych") as command:
        status, said = command.ended()
    assert status == 0, said
    head.until_gone(KILLED_SECONDS)


def test_an_owner_that_is_killed_takes_its_cluster_with_it(head: Head) -> None:
    with head.serve("--detach") as command:
        status, said = command.ended()
    assert status == 0, said
    [owner] = head.processes("ray::OwnerActor")
    owner.kill()
    head.until_gone(KILLED_SECONDS)
