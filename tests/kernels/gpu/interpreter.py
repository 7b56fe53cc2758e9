"""What Triton's interpreter (3.9) lacks, put right: products of bf16, which NumPy doesn't have, and rounding to the
nearest, where it forgets ties and, in fp8, to carry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


def mend() -> None:
    """For this process. Called once, before a kernel runs."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def is_bf16(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def widened(handle: Any) -> Any:
        return interpreter.TensorHandle(_to_fp32(handle.data), tl.float32) if is_bf16(handle) else handle

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if is_bf16(source):
            return cast(self, widened(source), to)
        if to.scalar == tl.bfloat16:
            wide = source if source.dtype.scalar == tl.float32 else cast(self, source, tl.float32)
            return interpreter.TensorHandle(_to_bf16(wide.data), tl.bfloat16)
        return cast(self, source, to)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if to.scalar == tl.float8e4nv:
            wide = cast_impl(self, source, tl.float32)
            return interpreter.TensorHandle(_to_fp8(wide.data), tl.float8e4nv)
        return convert(self, source, to, rounding)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc", "int_cast"):
        setattr(builder, f"create_{name}", lambda self, source, to, *_: self.cast_impl(source, to))


def _to_fp32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To the nearest, ties to even, as the hardware rounds."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def _to_fp8(numbers: NDArray[np.float32]) -> NDArray[np.uint8]:
    narrow = torch.from_numpy(np.ascontiguousarray(numbers)).to(torch.float8_e4m3fn)
    return narrow.view(torch.uint8).numpy().reshape(numbers.shape)
