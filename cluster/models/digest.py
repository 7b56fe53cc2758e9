"""The name of a model's content: SHA-256 over its files. Knows no file format.

Up to 2 GiB the digest covers every byte. Above, it covers sizes and 1 MiB in every 64 MiB: its job
is to keep the KV caches of different models apart, and any training step or conversion touches
every tensor, while reading 16 GB at each first start would take a minute. It isn't proof against
a damaged download; safetensors and the hub have their own checks for that.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import BinaryIO

from cluster.models.progress import EVERY_SECONDS, Step, megabytes, percent

WHOLE_LIMIT_BYTES = 2 << 30
SAMPLE_BYTES = 1 << 20
SAMPLE_EVERY_BYTES = 64 << 20


def content_digest(files: Sequence[Path], cache: Path, *, progress: Callable[[str], None]) -> str:
    """SHA-256, hexadecimal, of `files` in their order; of a lone file, its own plain SHA-256.

    Remembered in `cache` under the files' paths, sizes and modification times.
    """
    note = cache / "digests" / _identity(files)
    if note.is_file():
        return note.read_text()
    total = sum(path.stat().st_size for path in files)
    step = _Progress(progress, total if total <= WHOLE_LIMIT_BYTES else total * SAMPLE_BYTES // SAMPLE_EVERY_BYTES)
    digest = hashlib.sha256()
    for path in files:
        if len(files) > 1 or total > WHOLE_LIMIT_BYTES:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        for piece in _pieces(path, whole=total <= WHOLE_LIMIT_BYTES):
            digest.update(piece)
            step.advance(len(piece))
    _remember(note, digest.hexdigest(), progress)
    return digest.hexdigest()


class _Progress:
    def __init__(self, say: Callable[[str], None], total: int) -> None:
        self._say = say
        self._total = total
        self._done = 0
        self._said = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._said >= EVERY_SECONDS:
            self._said = time.monotonic()
            line = f"Naming the model's content: {megabytes(self._done)}, {percent(self._done, self._total)}"
            self._say(Step(line, self._done, self._total))


def _identity(files: Sequence[Path]) -> str:
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _pieces(path: Path, *, whole: bool) -> Generator[bytes]:
    with path.open("rb") as file:
        if whole:
            yield from iter(lambda: file.read(SAMPLE_BYTES), b"")
        else:
            yield from _samples(file, path.stat().st_size)


def _samples(file: BinaryIO, size_bytes: int) -> Generator[bytes]:
    for at in (*range(0, size_bytes, SAMPLE_EVERY_BYTES), max(0, size_bytes - SAMPLE_BYTES)):
        file.seek(at)
        yield file.read(SAMPLE_BYTES)


def _remember(note: Path, digest: str, progress: Callable[[str], None]) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        fresh = note.with_suffix(f".{time.monotonic_ns()}")
        fresh.write_text(digest)
        fresh.replace(note)
    except OSError as error:  # a read-only cache costs time at every start, and no answer
        progress(f"The model's digest can't be kept ({error}); the next start computes it again")
