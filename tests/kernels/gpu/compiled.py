"""Compiles every kernel for an H200, in the shapes of an 8B model and in odd ones; needs Triton, no GPU.

python -m tests.kernels.gpu.compiled   prints what each takes of a processor, one JSON object a line
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels.gpu import gates, granules, low_bits, norms, rope
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.paged import Look, PagedRows, RowTiles
from kernels.gpu.prefill_attention import prefill_attention
from kernels.reference.granules import Granules

BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel in one shape."""

    case: str
    kernel: str
    shared_bytes: int
    registers: int
    stack_bytes: int
    """More than none: registers spill to memory."""


class _Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compiled() -> Iterator[Compiled]:
    """What `cases` launch, one after the other, each compiled and none run."""
    driver.set_active(_Hopper())
    made: list[Any] = []
    run: Any = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        assert all(size > 0 for size in grid)
        assert all(size <= 65_535 for size in grid[1:]), "more than a GPU takes in these directions"
        made.append(run(self, *arguments, grid=grid, warmup=True, **named))

    JITFunction.run = compile_only
    try:
        for case, launch in cases():
            made.clear()
            launch()
            for kernel in made:
                yield Compiled(case, kernel.metadata.name, kernel.metadata.shared, *_resources(kernel.asm["cubin"]))
    finally:
        JITFunction.run = run


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype, cache, dim, group in (
        (BF16, BF16, 128, 4),
        (BF16, FP8, 128, 4),
        (BF16, BF16, 256, 2),
        (FP32, FP32, 80, 1),
    ):
        for look in (Look(0.1), Look(0.1, window=100, soft_cap=30.0)):
            yield f"{dtype} {cache} {dim} {look}", _attention(dtype, cache, dim, group, look)
    for size, dtype in ((4096, BF16), (2304, BF16), (64, FP32)):
        x, weight = torch.zeros(3, size, dtype=dtype), torch.zeros(size, dtype=FP32)
        yield f"norm {size}", lambda x=x, weight=weight: norms.rms_norm(x, weight, 1e-5)
        yield f"sum, norm {size}", lambda x=x, weight=weight: norms.add_rms_norm(x, x, weight, 1e-5, weight)
    for gate in ("silu", "gelu", "gelu_tanh"):
        yield gate, lambda gate=gate: gates.gated(torch.zeros(3, 2 * 14336, dtype=BF16), gate)
    for wire in ("bf16", "fp32", "int8", "fp8_e4m3"):
        for dtype in (BF16, FP32):
            yield f"{wire} of {dtype}", lambda wire=wire, dtype=dtype: _packed(wire, dtype)
    for wire in ("bf16", "fp8"):
        yield f"{wire} of {FP8}", lambda wire=wire: _packed(wire, FP8)
    for bits in ("int8", "fp8"):
        yield bits, lambda bits=bits: low_bits.narrow_rows(torch.zeros(3, 4096, dtype=BF16), bits, 32)
    yield "int8 product", lambda: low_bits.linear(torch.zeros(3, 64, dtype=BF16), _narrow(torch.int8), torch.zeros(64))


def _attention(dtype: torch.dtype, cache: torch.dtype, dim: int, group: int, look: Look) -> Callable[[], None]:
    def launch() -> None:
        layer = torch.zeros(4, 3, 2, 8, 16, dim).to(cache)[:, 1]
        query = torch.zeros(64, 8 * group, dim, dtype=dtype)
        rows = PagedRows(*(torch.zeros(64, dtype=torch.int32) for _ in range(3)))
        for splits in (1, 16):
            decode_attention(query, layer, rows, look, splits)
        for tile in (64, 128):
            tiles = RowTiles(torch.zeros(1, 2, dtype=torch.int32), tile)
            if not (tile == 128 and (dim > 128 or dtype == FP32)):
                prefill_attention(query, layer, rows, tiles, look, torch.empty_like(query))
        qkv = torch.zeros(64, (8 * group + 16) * dim, dtype=dtype)
        weight = torch.zeros(dim, dtype=dtype)
        for head_norms in (None, rope.HeadNorms(weight, weight, 1e-6)):
            rope.turn_and_write(qkv, layer, rows, torch.zeros(64, 2, dim), head_norms)

    return launch


def _packed(wire: Any, dtype: torch.dtype) -> None:
    at = Granules(torch.tensor([1, 2]), torch.tensor([0, 0]))
    for block, heads in ((16, slice(0, 8)), (32, slice(1, 3))):
        arena = torch.zeros(4, 2, 2, 8, block, 128).to(dtype)
        granules.unpack_granules(arena, at, heads, wire, granules.pack_granules(arena, at, heads, wire))


def _narrow(kind: torch.dtype) -> low_bits.Narrow:
    numbers: Tensor = torch.zeros(64, 64, dtype=kind)
    return low_bits.Narrow(numbers, torch.zeros(64))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    for each in compiled():
        print(json.dumps(asdict(each)), flush=True)
