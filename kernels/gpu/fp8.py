"""A cache's numbers on a GPU, as `kernels.reference.fp8` rounds them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrowed(numbers: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Rounded once. In fp8 what is too large is the largest, and what isn't finite NaN."""
    wide = numbers.to(tl.float32)
    if tl.float8e4nv == KIND:
        cut = tl.minimum(tl.maximum(wide, -448.0), 448.0)
        wide = tl.where(tl.abs(wide) < float("inf"), cut, float("nan"))
    return wide.to(KIND)
