"""Converted weights kept in a file that later starts map. Knows safetensors, no GGUF.

The file's name says what it was made from and by which code: the model's digest, the type, and a
digest of the sources that decide what is in it. So no start reads what other code has made.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.engine.layout import laid_out
from workers.engine.model_config import ModelConfig

_TYPES: dict[torch.dtype, str] = {torch.float32: "F32", torch.bfloat16: "BF16"}
_MAKERS = (
    "architectures",
    "config_json",
    "conversion",
    "gguf_config",
    "gguf_files",
    "layout",
    "model_config",
    "model_fields",
    "rope",
)
_ALIGNMENT = 64
"""Of the first weight, in bytes: vector code is fastest, and its sums the same, on whole lines."""
_MOST_HEADER = 100_000_000
"""As in the format's own reader."""
_ABANDONED_SECONDS = 24 * 3600


class Conversion:
    """One model in one type, in a folder of such files."""

    def __init__(self, folder: Path, digest: str, label: str, dtype: torch.dtype) -> None:
        self._stem = f"{digest}.{label}"
        self._dtype = dtype
        self.path = folder / f"{self._stem}.{_maker()}.safetensors"

    def load(self) -> tuple[ModelConfig, dict[str, Tensor]] | None:
        """What is kept, mapped; None if it isn't there or not whole: then it is made again."""
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > min(size, _MOST_HEADER):
                    return None
                header: dict[str, Any] = json.loads(file.read(length))
            config = ModelConfig.from_json(header["__metadata__"]["config"])
        except (OSError, ValueError, KeyError, TypeError, AssertionError):
            return None
        if header != _header(config, self._dtype) or size != 8 + length + _bytes(config, self._dtype):
            return None
        return config, self._mapped(config, 8 + length, shared=False, path=self.path)

    def keep(self, config: ModelConfig, fill: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor] | None:
        """`fill` gets tensors that lie in the file. None when the disk is full or can't be written to:
        that costs the next start some seconds, nothing else."""
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        head = _encoded(_header(config, self._dtype))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("w+b") as file:
                # Reserved, not only sized: a page that finds no room when it is written kills the process.
                os.posix_fallocate(file.fileno(), 0, len(head) + _bytes(config, self._dtype))
                file.write(head)
                file.flush()
                fill(self._mapped(config, len(head), shared=True, path=part))
                os.fsync(file.fileno())
            part.replace(self.path)
        except OSError:
            return None
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        self._sweep()
        kept = self.load()
        return kept and kept[1]

    def _mapped(self, config: ModelConfig, start: int, *, shared: bool, path: Path) -> dict[str, Tensor]:
        width = self._dtype.itemsize
        size = (start + _bytes(config, self._dtype)) // width
        flat = torch.from_file(str(path), shared=shared, size=size, dtype=self._dtype)
        return laid_out(config.shapes, self._dtype, flat[start // width :])

    def _sweep(self) -> None:
        """What other code made of this model, and what a killed process left."""
        for path in self.path.parent.glob(f"{self._stem}.*"):
            with suppress(OSError):
                is_old = time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
                if path != self.path and (path.suffix == ".safetensors" or is_old):
                    path.unlink()


def _maker() -> str:
    """Of the code that decides what is in a file."""
    digest = hashlib.sha256(f"gguf {version('gguf')}".encode())
    for name in _MAKERS:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


def _bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    return config.parameters * dtype.itemsize


def _header(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"config": config.to_json()}}
    at = 0
    for name, shape in config.shapes.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return header


def _encoded(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
