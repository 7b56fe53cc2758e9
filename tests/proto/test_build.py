"""One build, one name: the same wherever the same sources lie, another when one byte differs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diptych
from diptych.build import build_identity

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """This tree's packages, somewhere else."""
    for package in ("cluster", "kernels", "workers", "proto"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def identity_in(tree: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'proto'}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", "from diptych.build import build_identity; print(build_identity())"]
    ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=50, check=True)
    return ran.stdout.strip()


def test_it_names_the_version_and_the_sources() -> None:
    assert re.fullmatch(re.escape(diptych.__version__) + r"\+[0-9a-f]{12}", build_identity())
    assert build_identity() == build_identity()


def test_the_same_sources_elsewhere_are_the_same_build(copy: Path) -> None:
    assert identity_in(copy) == identity_in(ROOT)


@pytest.mark.parametrize("file", ["workers/engine/noise.py", "proto/diptych/types.py", "kernels/__init__.py"])
def test_a_changed_a_new_and_a_moved_file_are_another_build(copy: Path, file: str) -> None:
    before = identity_in(copy)
    source = (copy / file).read_text(encoding="utf-8")
    (copy / file).write_text(source + "\n", encoding="utf-8")
    changed = identity_in(copy)
    (copy / file).write_text(source, encoding="utf-8")
    assert identity_in(copy) == before
    (copy / file).with_name("another.py").write_text("", encoding="utf-8")
    assert len({before, changed, identity_in(copy)}) == 3


def test_what_is_no_source_is_no_part_of_it(copy: Path) -> None:
    before = identity_in(copy)
    (copy / "workers" / "notes.txt").write_text("anything", encoding="utf-8")
    assert identity_in(copy) == before
