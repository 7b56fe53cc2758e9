"""fp8 in a KV cache: e4m3, no scales. Knows numbers, not whose.

It has no infinity: what is larger than 448 becomes 448, and what isn't finite NaN, so that its
sequence fails as it would have in wider numbers.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FP8: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In a cache's numbers, rounded once: to the nearest, ties to even."""
    if dtype != FP8:
        return values.to(dtype)
    # What a cast makes of too large numbers differs between versions of torch.
    return values.clamp(-LARGEST, LARGEST).masked_fill(values.isinf(), torch.nan).to(FP8)


def moved(values: Tensor) -> Tensor:
    """The same memory, as what every device can index: fp8 as bytes."""
    return values.view(torch.uint8) if values.dtype == FP8 else values
