"""bf16 or int8: what a CPU multiplies weights of 4 and 8 bits with. Knows products, no layer and no worker.

`auto` measures the first layer's products in both, for many rows and for one, with the thread's own
processor time. The result is kept: workers of one machine choose alike, and later starts measure nothing.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, NamedTuple

import torch

from diptych.types import Activations, WeightFormat
from kernels.cpu import products
from kernels.cpu.panels import Panels
from kernels.cpu.products import multiply, reason_against_int8
from workers.engine.model_config import UnsupportedModel
from workers.engine.packed_weights import PackedWeights

_MANY_ROWS: Final = 60
_MOST_WORK: Final = 5e9
"""Multiply-adds of one measurement: some 25 ms."""
_LEAST_WORK: Final = 1e8
_ROUNDS: Final = 4
_SECONDS: Final = 0.4
"""No round begins later."""
_PATIENCE_SECONDS: Final = 10 * _SECONDS
"""With another worker that measures."""
_LOOK_SECONDS: Final = 0.02
_WORTH_IT: Final = 1.1
"""How much faster many rows must be."""
_AT_LEAST: Final = 0.95
_TICK: Final = 1e-9
"""And one row no slower than this: a worker has one way for both, or chunks would change the result."""


class Choice(NamedTuple):
    """What a model multiplies."""

    activations: products.Activations
    how: str
    """As the end of a sentence; empty for bf16 where nothing else was asked for."""


class Pace(NamedTuple):
    """Of int8, as a multiple of bf16's."""

    many: float
    single: float


def chosen(library: ctypes.CDLL, packed: PackedWeights, asked: Activations, kept: Path | None) -> Choice:
    """`kept` is a file for what was measured. Raises UnsupportedModel for int8 that can't be had."""
    if asked == "bf16":
        return Choice("bf16", "")
    reason = reason_against_int8(library) or _reason_against(packed)
    if asked == "int8":
        if reason:
            raise UnsupportedModel(f"activations = int8: {reason}; set it to auto or bf16")
        return Choice("int8", ", activations int8")
    if reason:
        return Choice("bf16", f", activations bf16 (auto: {reason})")
    pace = _kept(library, packed, kept)
    better = "int8" if pace.many >= _WORTH_IT and pace.single >= _AT_LEAST else "bf16"
    told = f"{pace.many:.2f}x the pace of bf16 for {_MANY_ROWS} rows, {pace.single:.2f}x for one"
    return Choice(better, f", activations {better} (auto: int8 has {told})")


def kept_pace(folder: Path, library: ctypes.CDLL, digest: str, form: WeightFormat) -> Path:
    """Where a measurement is kept: of this model, this code and this processor."""
    # The library's name says its sources and what the processor can do, but not which processor it is.
    names = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    code = Path(__file__).read_bytes() + f"{Path(str(library._name)).stem}\x1f{next(names, '')}".encode()
    return folder / f"{digest}.{form}.{hashlib.sha256(code).hexdigest()[:12]}.pace"


def measured(library: ctypes.CDLL, layer: Sequence[Panels]) -> Pace:
    """Of these products, in well under a second."""
    work = float(sum(panels.inputs * panels.columns for panels in layer))
    rows = max(1, min(_MANY_ROWS, int(_MOST_WORK / work)))
    end = time.monotonic() + _SECONDS
    seconds: dict[tuple[int, products.Activations], list[float]] = {}
    ways: tuple[products.Activations, ...] = ("bf16", "int8")
    for _ in range(_ROUNDS):
        for count in (rows, 1):
            for way in ways:
                spent = _seconds(library, layer, count, way, max(1, int(_LEAST_WORK / work / count)))
                seconds.setdefault((count, way), []).append(spent)
        if time.monotonic() > end:
            break
    # A coarse clock may have seen nothing.
    many, single = (
        max(min(seconds[count, "bf16"]), _TICK) / max(min(seconds[count, "int8"]), _TICK) for count in (rows, 1)
    )
    return Pace(many, single)


def _seconds(library: ctypes.CDLL, layer: Sequence[Panels], rows: int, way: products.Activations, times: int) -> float:
    inputs = [torch.ones((rows, panels.inputs), dtype=torch.bfloat16) for panels in layer]
    begin = time.thread_time()
    for _ in range(times):
        for x, panels in zip(inputs, layer, strict=True):
            multiply(library, x, panels, way)
    return time.thread_time() - begin


def _first_layer(packed: PackedWeights) -> list[Panels]:
    """The first that has products which int8 is for: some files keep their first layers in more bits."""
    narrow = {name: panels for name, panels in packed.items() if name != "head" and panels.format != "bf16"}
    layers = [name.split(".")[:3] for name in narrow]
    return [panels for panels, layer in zip(narrow.values(), layers, strict=True) if layer == layers[0]]


def _reason_against(packed: PackedWeights) -> str:
    if _first_layer(packed):
        return ""
    return "the weights lie in bf16, which is multiplied in bf16: int8 is for weights in int8 or int4"


def _kept(library: ctypes.CDLL, packed: PackedWeights, kept: Path | None) -> Pace:
    if not kept:
        return measured(library, _first_layer(packed))
    if found := _read(kept):
        return found
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with (kept.parent / "pace.lock").open("w") as lock:
            _wait_for(lock, kept)  # workers start together: one measures, the others read
            if found := _read(kept):
                return found
            pace = measured(library, _first_layer(packed))
            part = kept.with_name(f"{kept.name}.{os.getpid()}.part")
            part.write_text(json.dumps(pace._asdict()))
            part.replace(kept)
            return pace
    except OSError:
        return measured(library, _first_layer(packed))


def _wait_for(lock: IO[str], kept: Path) -> None:
    """Until it is ours or `kept` is there, at most for some seconds: who holds it may be frozen."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end and not kept.exists():
        with suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_LOOK_SECONDS)


def _read(kept: Path) -> Pace | None:
    with suppress(OSError, ValueError, TypeError):
        pace = Pace(**json.loads(kept.read_text()))
        return Pace(float(pace.many), float(pace.single))
    return None
