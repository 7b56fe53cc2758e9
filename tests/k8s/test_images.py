"""The images' recipes: what they promise, and their steps as far as they can be done without an engine."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import click
import pytest

from tests.k8s.dockerfile import stages
from tests.k8s.manifests import TREE

IMAGES = sorted((TREE / "images").glob("*.dockerfile"))
BROUGHT = ("cluster", "workers", "kernels", "proto", "pyproject.toml", "constraints.txt", "README.md")


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.stem)
def test_an_image_is_built_in_stages_and_runs_as_nobody_special(file: Path) -> None:
    *before, image = stages(file)
    names = {stage.name for stage in before}
    assert all(f"--from={name}" in file.read_text() for name in names), "no stage is for nothing"
    assert image.all("USER") == ["1000:1000"]
    assert image.steps[-1].word == "CMD", "the user is chosen before anything runs"
    assert not any("pip install" in text for text in image.all("RUN")), "the image has no build's leftovers"
    assert image.variables()["HOME"] == "/tmp", "the root filesystem is read-only"
    assert image.variables()["PATH"].startswith("/opt/diptych/bin:")
    assert "ADD" not in {step.word for stage in stages(file) for step in stage.steps}


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.stem)
def test_an_image_can_compile_for_the_processor_that_it_runs_on(file: Path) -> None:
    """Without a compiler its workers would compute in torch: the volume of models has no libraries."""
    [installed] = [text for text in stages(file)[-1].all("RUN") if "apt-get install" in text]
    assert {"g++", "libc6-dev"} <= set(installed.split())


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.stem)
def test_every_base_is_one_argument_that_can_be_a_digest(file: Path) -> None:
    bases = [stage.steps[0].text.split()[0] for stage in stages(file)]
    assert set(bases) == {"${BASE}"}
    assert "ARG BASE=python:3.11-slim-bookworm" in file.read_text().splitlines()
    assert ":latest" not in file.read_text()


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.stem)
def test_an_image_runs_a_command_that_there_is_on_the_ports_it_names(file: Path) -> None:
    from cluster.cli.main import diptych

    image = stages(file)[-1]
    program, command, *arguments = image.command()
    assert program == "diptych"
    found = diptych.get_command(click.Context(diptych), command)
    assert found is not None
    found.make_context(command, list(arguments))
    assert image.all("EXPOSE") == [" ".join(part.rpartition(":")[2] for part in arguments if ":" in part)]


def test_what_docker_is_given_is_enough_for_the_wheel_and_has_all_packages(tmp_path: Path) -> None:
    """The first stage, and the last one's `diptych`, in a folder with what .dockerignore lets through."""
    allowed = [line[1:] for line in (TREE / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(allowed) == sorted(BROUGHT)
    source, wheels, venv = tmp_path / "source", tmp_path / "wheels", tmp_path / "venv"
    source.mkdir()
    for name in allowed:
        copy = shutil.copytree if (TREE / name).is_dir() else shutil.copy
        copy(TREE / name, source / name)
    # --no-build-isolation: no network here.
    pip = [sys.executable, "-m", "pip", "--no-cache-dir", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", wheels, "."], cwd=source, check=True, capture_output=True, timeout=120)
    [wheel] = wheels.iterdir()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=60)
    install = [venv / "bin/python", "-I", "-m", "pip", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=60)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    told = subprocess.run(
        [venv / "bin/diptych", "config", "--json"], cwd=tmp_path, env={}, check=True, capture_output=True, timeout=60
    )
    assert b"pools.decode.labels" in told.stdout
