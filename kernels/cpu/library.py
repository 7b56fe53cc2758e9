"""The kernels written in C++, compiled on the machine that runs them. Knows no tensor.

Compiled there, because that compiler knows that processor, and because a package built once would
have to bring every variant. The result is kept in a folder under a name that says what it was made
from, so a machine compiles once (6 s); without a compiler, or on another processor, there is none,
and `kernels.reference` does the work.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).with_name("native")
_NEEDED = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "f16c", "fma"})
# gcc 12 takes the intrinsics' own undefined operands for mistakes.
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-w")
_COMPILERS = ("g++", "clang++", "c++")
_COMPILE_SECONDS = 300.0


class NoLibrary(Exception):
    """There is none on this machine; the message says why and what would change that."""


def load_library(folder: Path | None) -> ctypes.CDLL:
    """The library, from `folder` or compiled into it (None: into a folder that goes with the process's end).

    Raises NoLibrary."""
    processor = _processor()
    if missing := sorted(_NEEDED - processor):
        raise NoLibrary(f"this processor lacks {', '.join(missing)}")
    compiler = _compiler()
    if folder is None:
        with tempfile.TemporaryDirectory() as passing:
            return _opened(_compiled(compiler, Path(passing), processor))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _opened(_compiled(compiler, folder, processor))
    except OSError as error:
        raise NoLibrary(f"{folder}: {error}") from error


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


def _compiled(compiler: tuple[str, ...], folder: Path, processor: frozenset[str]) -> Path:
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    digest = hashlib.sha256(repr((_FLAGS, sorted(processor))).encode())
    for source in sources:
        digest.update(source.read_bytes())
    made = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    if made.exists():
        return made
    if not compiler:
        raise NoLibrary("there is no C++ compiler: install g++, or `pip install ziglang`, which brings one")
    with (folder / "kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers start together: one compiles, the others wait
        if not made.exists():
            _compile(compiler, [str(source) for source in sources if source.suffix == ".cpp"], made)
    return made


def _compile(compiler: tuple[str, ...], sources: list[str], made: Path) -> None:
    part = made.with_suffix(f".{os.getpid()}.part")
    command = [*compiler, *_FLAGS, *sources, "-o", str(part)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
        if done.returncode:
            raise NoLibrary(f"{compiler[0]} failed: {done.stderr[-2000:]}")
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
