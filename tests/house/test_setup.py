"""tools/setup.sh: what makes .venv, when it does nothing, and what it says when it can't. Installs nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    for name in ("tools/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(TREE / name, tmp_path / name)
    return tmp_path


def setup(tree: Path, *extras: str, python: str = "") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHON": python}
    command = [tree / "tools" / "setup.sh", *extras]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def script(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def pretending_venv(tree: Path) -> Path:
    """A .venv whose pip installs nothing and writes down what it was asked; the file it writes to."""
    log = tree / "log"
    log.touch()
    script(tree / ".venv" / "bin" / "python", f'echo "$@" >> {log}')
    script(tree / ".venv" / "bin" / "diptych", ":")
    return log


def installs(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "pip install" in line]


def test_it_installs_the_tree_with_the_pins_once(tree: Path) -> None:
    log = pretending_venv(tree)
    assert setup(tree).returncode == 0
    assert installs(log) == ["-m pip install --constraint constraints.txt --editable ."]
    again = setup(tree)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert len(installs(log)) == 1


def test_what_is_installed_with_extras_serves_without_them_but_not_the_other_way_round(tree: Path) -> None:
    log = pretending_venv(tree)
    setup(tree, "test,dev")
    setup(tree)
    assert installs(log) == ["-m pip install --constraint constraints.txt --editable .[test,dev]"]
    shutil.rmtree(tree / ".venv")
    log = pretending_venv(tree)
    setup(tree)
    setup(tree, "test,dev")
    assert [line.rpartition(" ")[2] for line in installs(log)][-2:] == [".", ".[test,dev]"]


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_pin_or_project_installs_again(tree: Path, changed: str) -> None:
    log = pretending_venv(tree)
    setup(tree)
    with (tree / changed).open("a") as file:
        file.write("# changed\n")
    setup(tree)
    assert len(installs(log)) == 2


def test_a_failed_install_is_tried_again(tree: Path) -> None:
    log = pretending_venv(tree)
    script(tree / ".venv" / "bin" / "python", f'echo "$@" >> {log}; test "$3" != install')
    assert setup(tree).returncode != 0
    assert setup(tree).returncode != 0
    assert len(installs(log)) == 2


def test_a_missing_python_is_said_in_words(tree: Path) -> None:
    told = setup(tree, python="no-such-python")
    assert told.returncode != 0
    assert "needs Python 3.11 or newer with the venv module, and found none (looked for: no-such-python" in told.stderr
    assert "make PYTHON=/path/to/python3" in told.stderr
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize(
    ("pretence", "told"),
    [
        ("sys.version_info = (3, 9, 2)", "is Python 3.9"),
        ("sys.modules['ensurepip'] = None", "without its ensurepip module (Debian and Ubuntu: apt install python"),
        ("raise SystemExit(1)", "does not run"),
    ],
)
def test_a_python_that_will_not_do_is_named_with_the_reason(tree: Path, pretence: str, told: str) -> None:
    pretender = script(tree / "python", f'exec {sys.executable} -c "import sys; {pretence}; exec(sys.stdin.read())"')
    answer = setup(tree, python=str(pretender))
    assert answer.returncode != 0
    assert f"{pretender} " in answer.stderr
    assert told in answer.stderr
    assert not (tree / ".venv").exists()
