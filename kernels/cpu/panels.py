"""Weights as the C++ kernels want them: panels of 32 columns. Knows rows and formats, no layer."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

RowFormat: TypeAlias = Literal["bf16", "Q8_0", "Q4_1", "Q4_0"]
"""The last three are llama.cpp's, in blocks of 32."""
PanelFormat: TypeAlias = Literal["bf16", "q8", "q4"]

COLUMNS: Final = 32
PANEL_OF: dict[RowFormat, PanelFormat] = {"bf16": "bf16", "Q8_0": "q8", "Q4_1": "q4", "Q4_0": "q4"}
FORMAT_NUMBER: dict[PanelFormat, int] = {"bf16": 0, "q8": 1, "q4": 2}
_SOURCE_NUMBER: dict[RowFormat, int] = {"bf16": 0, "Q8_0": 1, "Q4_1": 2, "Q4_0": 3}
_GROUP_BYTES: dict[PanelFormat, int] = {"bf16": 2048, "q8": 64 + 1024, "q4": 128 + 512}


class Rows(NamedTuple):
    """Some weights, one row a column of the product. data: [rows, bytes]"""

    format: RowFormat
    data: NDArray[np.uint8]

    def addresses(self) -> NDArray[np.uint64]:
        """Where each row lies."""
        steps = np.arange(len(self.data), dtype=np.uint64) * np.uint64(self.data.strides[0])
        return steps + np.uint64(self.data.ctypes.data)


class Panels(NamedTuple):
    """Packed weights. data: [bytes] uint8, its first on a cache line."""

    format: PanelFormat
    inputs: int
    columns: int
    data: Tensor


def rows_of(weight: Tensor) -> Rows:
    """weight: [out, in] bf16, in memory as it stands."""
    assert weight.dtype == torch.bfloat16, "the kernels read bf16"
    assert weight.is_contiguous(), "rows are read as they lie"
    return Rows("bf16", weight.view(torch.uint8).numpy())


def panel_bytes(form: PanelFormat, inputs: int, columns: int) -> int:
    """Of all panels of a product."""
    return -(-columns // COLUMNS) * (inputs // 32) * _GROUP_BYTES[form]


def in_order(parts: Sequence[Rows]) -> NDArray[np.uint64]:
    """One part's rows after the other's."""
    return np.concatenate([part.addresses() for part in parts])


def interleaved(gate: Rows, up: Rows) -> NDArray[np.uint64]:
    """Sixteen of one, sixteen of the other: a panel has both factors of its results."""
    both = np.stack((gate.addresses().reshape(-1, 16), up.addresses().reshape(-1, 16)), axis=1)
    return both.reshape(-1)


def pack(library: ctypes.CDLL, form: RowFormat, rows: NDArray[np.uint64], inputs: int, to: Tensor) -> Panels:
    """rows: [columns] addresses  to: [panel_bytes] uint8"""
    panel, columns = PANEL_OF[form], len(rows)
    assert len(to) == panel_bytes(panel, inputs, columns), "the memory is exactly what the panels need"
    padded = np.zeros(-(-columns // COLUMNS) * COLUMNS, dtype=np.uint64)
    padded[:columns] = rows
    library.diptych_pack(
        ctypes.c_int64(_SOURCE_NUMBER[form]),
        ctypes.c_void_p(padded.ctypes.data),
        ctypes.c_int64(len(padded) // COLUMNS),
        ctypes.c_int64(inputs),
        ctypes.c_void_p(to.data_ptr()),
    )
    return Panels(panel, inputs, columns, to)
