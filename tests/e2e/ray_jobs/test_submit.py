"""`ray job submit -- diptych serve` in its three forms, to a Ray that has nothing to do with us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.e2e.ray_jobs.conftest import Head

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.full]

FROM_TREE = ("python", "-m", "cluster")
PACKAGES = {"cluster", "kernels", "proto", "workers"}
CLONE_BYTES = 2 << 20


def serve_and_stop(head: Head, job: str, *how: str | Path, command: Sequence[str], cwd: Path | None = None) -> None:
    """Submits, asks, stops, and looks at what is left."""
    before = head.temporary_files()
    head.submit(job, *how, command=command, cwd=cwd)
    [served] = head.until_job_serves(job)
    served.check_answers()
    assert {"WorkerActor", "FrontActor", "SchedulerActor"} < set(head.actors())

    head.job("stop", job)
    assert head.status_of(job) == "STOPPED"
    assert "stopping" in head.log_of(job), "it was told before it was killed"
    assert head.log_of(job).rstrip().endswith("left Ray"), "it stopped in the time that Ray gives"
    head.until_gone(10)
    assert not served.listens
    assert head.temporary_files() == before


def test_a_clone_as_working_directory(head: Head, clone: Path) -> None:
    serve_and_stop(head, "clone", "--working-dir", ".", command=FROM_TREE, cwd=clone)
    [unpacked] = head.folder.glob("session_latest/runtime_resources/working_dir_files/_ray_pkg_*/")
    uploaded = [file for file in unpacked.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert {file.relative_to(unpacked).parts[0] for file in uploaded if file.parent != unpacked} == PACKAGES
    assert sum(file.stat().st_size for file in uploaded) < CLONE_BYTES


def test_the_wheel_as_py_module(head: Head, wheel: Path) -> None:
    environment = json.dumps({"py_modules": [str(wheel)]})
    serve_and_stop(head, "wheel", "--runtime-env-json", environment, command=FROM_TREE)


def test_installed_in_the_clusters_environment(head: Head, wheel: Path) -> None:
    head.venv.install(wheel)
    try:
        serve_and_stop(head, "installed", command=["diptych"])
    finally:
        head.venv.uninstall()
