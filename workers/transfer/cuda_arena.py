"""GPU memory that other processes of this machine may map, by CUDA IPC through CuPy. Knows no file and no peer.

One plain allocation each: an IPC handle is of a whole one, and torch's allocator hands out parts.
Mapped memory stays valid for as long as its owner lives; who reads after that gets an error, not
another's bytes.
"""

from __future__ import annotations

from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, bytes]:
    """Zeros of this shape, and the handle by which another process opens them."""
    cupy: Any = import_module("cupy")  # untyped, and only where there is a GPU
    nbytes = prod(shape) * dtype.itemsize
    with cupy.cuda.Device(device.index or 0):
        pointer = cupy.cuda.MemoryPointer(cupy.cuda.Memory(nbytes), 0)
        handle: bytes = cupy.cuda.runtime.ipcGetMemHandle(pointer.ptr)
        arena = _tensor(cupy, pointer, shape, dtype)
    return arena.zero_(), handle


def opened(handle: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Somebody's allocation; closed when no tensor uses it any more."""
    cupy: Any = import_module("cupy")
    address: int = cupy.cuda.runtime.ipcOpenMemHandle(handle)
    owner = cupy.cuda.UnownedMemory(address, prod(shape) * dtype.itemsize, _Opened(cupy, address))
    return _tensor(cupy, cupy.cuda.MemoryPointer(owner, 0), shape, dtype)


def _tensor(cupy: Any, pointer: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:  # noqa: ANN401
    # As bytes: CuPy has no bf16.
    flat = cupy.ndarray((prod(shape) * dtype.itemsize,), dtype=cupy.uint8, memptr=pointer)
    as_bytes: Tensor = torch.from_dlpack(flat)  # pyright: ignore[reportPrivateImportUsage]
    return as_bytes.view(dtype).view(shape)


class _Opened:
    def __init__(self, cupy: Any, address: int) -> None:  # noqa: ANN401
        self._cupy = cupy
        self._address = address

    def __del__(self) -> None:
        self._cupy.cuda.runtime.ipcCloseMemHandle(self._address)
