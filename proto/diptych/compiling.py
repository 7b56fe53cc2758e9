"""C++ compiled on the machine that runs it. Knows neither what it computes nor for whom.

Compiled there, because that compiler knows that processor, and because a package built once would
have to bring every variant. The result is kept in a folder under a name that says what it was made
from, so a machine compiles once; without a compiler there is none, and Python does the work.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

# gcc 12 takes the intrinsics' own undefined operands for mistakes.
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-w")
_COMPILERS = ("g++", "clang++", "c++")
_COMPILE_SECONDS = 300.0
_SPARE_SECONDS = 10.0
_LOOK_SECONDS = 0.05
_NOT_HERE = f"this is {platform.system()} on {platform.machine()}; C++ is compiled on Linux on x86"
_NO_COMPILER = "there is no C++ compiler: install g++, or `pip install ziglang`, which brings one"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NoLibrary(Exception):
    """There is none on this machine; the message says why and what would change that."""


def compiled_library(sources: Path, folder: Path | None, *, needed: frozenset[str] = frozenset()) -> ctypes.CDLL:
    """All C++ files of `sources` as one library, from `folder` or compiled into it. Where that can't be written, and
    for None, it is compiled for this process alone. `needed`: what the processor must be able to do, as Linux names it.

    Raises NoLibrary.
    """
    processor = _processor()
    if not processor:
        raise NoLibrary(_NOT_HERE)
    if missing := sorted(needed - processor):
        raise NoLibrary(f"this processor lacks {', '.join(missing)}")
    compiler = _compiler()
    if folder is not None:
        with suppress(OSError):  # a volume of models is often read-only
            folder.mkdir(parents=True, exist_ok=True)
            _take(folder)
            return _opened(_compiled(sources, compiler, folder, processor))
    try:
        with tempfile.TemporaryDirectory() as passing:
            return _opened(_compiled(sources, compiler, Path(passing), processor))
    except OSError as error:
        raise NoLibrary(f"nothing can be written here: {error}") from error


def reason_against() -> str:
    """Why nothing can be compiled on this machine; empty when it can."""
    if not _processor():
        return _NOT_HERE
    return "" if _compiler() else _NO_COMPILER


def _take(folder: Path) -> None:
    """Code that others could put there must not run here. Raises NoLibrary."""
    state = folder.stat()
    if state.st_uid not in (os.getuid(), 0):
        raise NoLibrary(f"{folder} belongs to user {state.st_uid}: set DIPTYCH_CACHE to a folder of your own")
    if state.st_mode & _OTHERS_WRITE:
        folder.chmod(stat.S_IMODE(state.st_mode) & ~_OTHERS_WRITE)


def _is_ours(library: Path) -> bool:
    """False for one that is not there, or that somebody else may have written."""
    try:
        state = library.stat()
    except FileNotFoundError:
        return False
    return state.st_uid in (os.getuid(), 0) and not state.st_mode & _OTHERS_WRITE


def _processor() -> frozenset[str]:
    """What it can do, as Linux names it."""
    if platform.machine() not in ("x86_64", "AMD64") or not Path("/proc/cpuinfo").exists():
        return frozenset()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _compiler() -> tuple[str, ...]:
    if chosen := os.environ.get("CXX"):
        return tuple(chosen.split())
    if found := next(filter(None, map(shutil.which, _COMPILERS)), None):
        return (found,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    return ()


def _compiled(sources: Path, compiler: tuple[str, ...], folder: Path, processor: frozenset[str]) -> Path:
    files = sorted(path for path in sources.iterdir() if path.suffix in (".cpp", ".h"))
    digest = hashlib.sha256(repr((_FLAGS, sorted(processor))).encode())
    for file in files:
        digest.update(file.read_bytes())
    name = sources.parent.name
    made = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    if _is_ours(made):
        return made
    if not compiler:
        raise NoLibrary(_NO_COMPILER)
    with (folder / f"{name}.lock").open("w") as lock:
        # Processes start together: one compiles, the others wait. One that is frozen meanwhile holds up nobody for
        # ever: then each compiles for itself, and what is there last is as good as the first.
        _lock(lock, made, _COMPILE_SECONDS + _SPARE_SECONDS)
        if not _is_ours(made):
            _compile(compiler, [str(file) for file in files if file.suffix == ".cpp"], made)
    return made


def _lock(lock: IO[str], made: Path, seconds: float) -> None:
    """Until it is ours, `made` is there, or so long. It goes when the file is closed."""
    end = time.monotonic() + seconds
    while not _is_ours(made):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return  # a file system without locks
        else:
            return
        if time.monotonic() >= end:
            return
        time.sleep(_LOOK_SECONDS)


def _compile(compiler: tuple[str, ...], files: list[str], made: Path) -> None:
    part = made.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
    command = [*compiler, *_FLAGS, *files, "-o", str(part)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
        if done.returncode:
            raise NoLibrary(f"{compiler[0]} failed: {done.stderr[-2000:]}")
        part.chmod(0o755)
        with part.open("rb") as written:  # a half-written library would end whoever loads it
            os.fsync(written.fileno())
        part.replace(made)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoLibrary(f"{compiler[0]} failed: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _opened(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoLibrary(f"{path} can't be loaded ({error}): remove it") from error
