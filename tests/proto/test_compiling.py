"""C++ compiled once on a machine, whoever else compiles, is frozen or was killed meanwhile."""

from __future__ import annotations

import fcntl
import shutil
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from diptych import compiling
from diptych.compiling import NoLibrary, compiled_library

if TYPE_CHECKING:
    from pathlib import Path

HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print(1, flush=True)
time.sleep(600)
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("no C++ compiler")
    folder = tmp_path / "answers" / "native"
    folder.mkdir(parents=True)
    (folder / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    return folder


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Those of this process, from now on."""
    made: list[Path] = []
    real = compiling._compile

    def counted(compiler: tuple[str, ...], files: list[str], to: Path) -> None:
        made.append(to)
        real(compiler, files, to)

    monkeypatch.setattr(compiling, "_compile", counted)
    return made


def test_a_machine_compiles_once(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compilations(monkeypatch)
    assert compiled_library(sources, tmp_path / "cache").answer() == 42
    assert compiled_library(sources, tmp_path / "cache").answer() == 42
    assert len(made) == 1
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".so"]


def test_who_starts_meanwhile_waits_for_the_one_that_compiles(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, said = compilations(monkeypatch), list[int]()
    threads = [
        threading.Thread(target=lambda: said.append(compiled_library(sources, tmp_path / "cache").answer()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [42] * 4
    assert len(made) == 1


def test_one_that_is_frozen_while_it_compiles_holds_up_nobody_for_ever(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, cache = compilations(monkeypatch), tmp_path / "cache"
    cache.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, cache / "answers.lock"], stdout=subprocess.PIPE) as frozen:
        try:
            assert frozen.stdout is not None
            assert frozen.stdout.readline() == b"1\n"
            with (cache / "answers.lock").open("w") as ours, pytest.raises(BlockingIOError):
                fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
            monkeypatch.setattr(compiling, "_COMPILE_SECONDS", 30.0)
            monkeypatch.setattr(compiling, "_SPARE_SECONDS", -29.8)
            assert compiled_library(sources, cache).answer() == 42
        finally:
            frozen.kill()
    assert len(made) == 1


def test_a_library_that_others_may_have_written_is_not_run(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    compiled_library(sources, cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o755
    [library] = cache.glob("*.so")
    library.chmod(0o666)
    before = library.stat().st_ino
    compiled_library(sources, cache)
    assert library.stat().st_ino != before
    assert stat.S_IMODE(library.stat().st_mode) == 0o755


def test_what_does_not_compile_says_why_and_leaves_nothing(sources: Path, tmp_path: Path) -> None:
    (sources / "answer.cpp").write_text("int answer( {")
    with pytest.raises(NoLibrary, match="error"):
        compiled_library(sources, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_where_the_folder_can_not_be_written_a_process_compiles_for_itself(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert compiled_library(sources, tmp_path / "file" / "cache").answer() == 42
    assert compiled_library(sources, None).answer() == 42


def test_a_machine_without_a_compiler_says_what_would_help(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiling.reason_against() == ""
    monkeypatch.setattr(compiling, "_compiler", tuple)
    assert "install g++" in compiling.reason_against()
    for folder in (tmp_path / "cache", None):
        with pytest.raises(NoLibrary, match="install g\\+\\+"):
            compiled_library(sources, folder)
