"""One matrix product in C++: what it multiplies, and a call of it alone, to measure and to check. Knows no layer."""

from __future__ import annotations

import ctypes
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kernels.cpu.panels import FORMAT_NUMBER, Panels

Activations: TypeAlias = Literal["bf16", "int8"]
"""What a product multiplies its weights with. int8: rounded in groups of 32 of a row, a scale each."""


class ProductStructure(ctypes.Structure):
    """`Product` of product.h."""

    _fields_ = [
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("format", ctypes.c_int64),
    ]


def reason_against_int8(library: ctypes.CDLL) -> str:
    """Why this processor multiplies no int8; empty if it does."""
    return "" if library.diptych_can_multiply_int8() else "this processor lacks avx512_vnni"


def multiply(library: ctypes.CDLL, x: Tensor, panels: Panels, activations: Activations) -> Tensor:
    """x: [rows, inputs] bf16 → [rows, columns] fp32, by the caller's thread. The same bits as in a decoder.

    int8 wants panels of 4 or 8 bits and `reason_against_int8` empty.
    """
    assert x.dtype == torch.bfloat16, "the kernels read bf16"
    assert x.is_contiguous(), "rows are read as they lie"
    assert x.shape[1] == panels.inputs, "a row has a number for each input"
    assert activations == "bf16" or panels.format != "bf16", "bf16 weights are multiplied in bf16"
    result = torch.empty((len(x), panels.columns), dtype=torch.float32)
    number = FORMAT_NUMBER[panels.format]
    library.diptych_multiply(
        ctypes.byref(ProductStructure(panels.data.data_ptr(), None, panels.inputs, panels.columns, number)),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(len(x)),
        ctypes.c_int64(activations == "int8"),
        ctypes.c_void_p(result.data_ptr()),
    )
    return result
