"""A decoder's layers as one operation: a Python call for each of its parts would cost more than the parts.

Knows tensors in panels and block tables; no file, no request. The maths is in `native/`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.panels import COLUMNS, FORMAT_NUMBER, Panels
from kernels.cpu.products import Activations, ProductStructure
from kernels.reference.fp8 import FP8

if TYPE_CHECKING:
    from numpy.typing import NDArray

Gate: TypeAlias = Literal["silu", "gelu", "gelu_tanh"]
_GATES: dict[Gate, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_SEGMENT = np.dtype([("blocks", "u8"), ("first_row", "i8"), ("start", "i8"), ("count", "i8")])


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes and constants. Sizes are multiples of 32."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    gate: Gate
    epsilon: float
    attention_scale: float
    attention_soft_cap: float | None
    logit_soft_cap: float | None
    embedding_scale: float
    activations: Activations = "bf16"
    """int8: of each row in groups of 32, where a layer's weights lie in 4 or 8 bits."""


class BiasedPanels(NamedTuple):
    """A product's weights and what is added to its result. bias: [columns]"""

    panels: Panels
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """Norms and rope tables are fp32: [size], [positions, 2, head_dim]."""

    attention_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention_end_norm: Tensor | None
    mlp_norm: Tensor
    mlp_end_norm: Tensor | None
    qkv: BiasedPanels
    output: BiasedPanels
    gate_up: BiasedPanels
    """`kernels.cpu.panels.interleaved`."""
    down: BiasedPanels
    rope: Tensor
    window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderEnds:
    """What is before and after the layers."""

    embedding: Tensor
    """[vocabulary, hidden] bf16"""
    norm: Tensor
    head: BiasedPanels


class Logits(NamedTuple):
    """What some rows say of their next token."""

    values: Tensor
    """[rows, vocabulary] fp32"""
    highest: NDArray[np.int64]
    """[rows] the token with the highest one, the first among equals."""
    finite: NDArray[np.bool_]
    """[rows] whether all are."""

    def first(self, rows: int) -> Logits:
        """Of the first rows."""
        return Logits(self.values[:rows], self.highest[:rows], self.finite[:rows])


class Segment(NamedTuple):
    """Some tokens of one sequence, at positions start, start + 1, …"""

    start: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    blocks: Sequence[int]
    """Blocks of all its positions up to the last of these tokens."""


class Decoder:
    """One model on some threads. Calls come from one thread at a time."""

    def __init__(
        self,
        library: ctypes.CDLL,
        shape: DecoderShape,
        layers: Sequence[DecoderLayer],
        ends: DecoderEnds,
        threads: int,
    ) -> None:
        self._library, self._decoder = library, ctypes.c_void_p()
        self._vocabulary = shape.vocabulary
        self._kept: list[Tensor] = []
        library.diptych_decoder.restype = ctypes.c_void_p
        self._decoder = ctypes.c_void_p(
            library.diptych_decoder(
                ctypes.byref(_shape(shape)),
                (_Layer * len(layers))(*(self._layer(layer) for layer in layers)),
                ctypes.byref(_Ends(self._kept_at(ends.embedding), self._kept_at(ends.norm), self._product(ends.head))),
                ctypes.c_int64(threads),
            )
        )

    def close(self) -> None:
        """Ends its threads. No call after it."""
        if self._decoder:
            self._library.diptych_decoder_free(self._decoder)
            self._decoder = ctypes.c_void_p()

    def __del__(self) -> None:
        self.close()

    def step(self, arena: Tensor, tokens: Sequence[int], segments: Sequence[Segment], wanted: Sequence[int]) -> Logits:
        """Writes the tokens' KV into `arena`.

        arena: [blocks, layers, 2, kv_heads, block_size, head_dim] bf16 or fp8
        segments: of `tokens`, in this order  wanted: rows of `tokens`
        """
        return self._called(self._library.diptych_step, arena, tokens, segments, wanted)

    def products(
        self, arena: Tensor, tokens: Sequence[int], segments: Sequence[Segment], wanted: Sequence[int]
    ) -> Logits:
        """A step's matrix products alone, for measuring; the result means nothing."""
        return self._called(self._library.diptych_products, arena, tokens, segments, wanted)

    def _called(
        self,
        function: ctypes._NamedFuncPointer,  # pyright: ignore[reportPrivateUsage]
        arena: Tensor,
        tokens: Sequence[int],
        segments: Sequence[Segment],
        wanted: Sequence[int],
    ) -> Logits:
        assert arena.dtype in (torch.bfloat16, FP8), "the kernels read bf16 and fp8"
        assert arena.is_contiguous(), "blocks are found by their address"
        logits = torch.empty((len(wanted), self._vocabulary), dtype=torch.float32)
        highest, finite = np.empty(len(wanted), dtype=np.int64), np.empty(len(wanted), dtype=np.bool_)
        ids, rows = np.array(tokens, dtype=np.int64), np.array(wanted, dtype=np.int64)
        table, tables = _tables(segments)
        function(
            self._decoder,
            ctypes.byref(
                _Step(
                    arena.data_ptr(),
                    arena.shape[4],
                    arena.element_size(),
                    ids.ctypes.data,
                    len(ids),
                    table.ctypes.data,
                    len(table),
                    rows.ctypes.data,
                    len(rows),
                    logits.data_ptr(),
                    highest.ctypes.data,
                    finite.ctypes.data,
                )
            ),
        )
        del tables  # until here the segments point to it
        return Logits(logits, highest, finite)

    def _kept_at(self, tensor: Tensor | None) -> int | None:
        """Its address; it lives as long as this object."""
        if tensor is None:
            return None
        assert tensor.is_contiguous(), "tensors are read as they lie"
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _product(self, product: BiasedPanels) -> ProductStructure:
        panels, bias = product
        if bias is not None:
            missing = -panels.columns % COLUMNS
            bias = torch.nn.functional.pad(bias.float(), (0, missing)).contiguous()
        number = FORMAT_NUMBER[panels.format]
        return ProductStructure(self._kept_at(panels.data), self._kept_at(bias), panels.inputs, panels.columns, number)

    def _layer(self, layer: DecoderLayer) -> _Layer:
        norms = (
            layer.attention_norm,
            layer.query_norm,
            layer.key_norm,
            layer.attention_end_norm,
            layer.mlp_norm,
            layer.mlp_end_norm,
        )
        products = (layer.qkv, layer.output, layer.gate_up, layer.down)
        return _Layer(
            *map(self._kept_at, norms), *map(self._product, products), self._kept_at(layer.rope), layer.window or 0
        )


def _tables(segments: Sequence[Segment]) -> tuple[NDArray[np.void], NDArray[np.int32]]:
    """The segments as C++ reads them, and the block tables that they point to."""
    lengths = [len(segment.blocks) for segment in segments]
    blocks = np.fromiter((block for segment in segments for block in segment.blocks), np.int32, sum(lengths))
    table = np.empty(len(segments), dtype=_SEGMENT)
    counts = np.array([segment.count for segment in segments], dtype=np.int64)
    table["blocks"] = blocks.ctypes.data + 4 * (np.cumsum(lengths) - lengths)
    table["first_row"] = np.cumsum(counts) - counts
    table["start"] = [segment.start for segment in segments]
    table["count"] = counts
    return table, blocks


# ---- the same structures as in decoder.cpp ---------------------------------------------------------------------

_POINTER, _NUMBER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, _NUMBER) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        *((name, _NUMBER) for name in ("vocabulary", "gate", "int8")),
        *((name, _FLOAT) for name in ("epsilon", "attention_scale", "attention_soft_cap", "logit_soft_cap")),
        ("embedding_scale", _FLOAT),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("attention_norm", "query_norm", "key_norm", "attention_end_norm")),
        *((name, _POINTER) for name in ("mlp_norm", "mlp_end_norm")),
        *((name, ProductStructure) for name in ("qkv", "output", "gate_up", "down")),
        ("rope", _POINTER),
        ("window", _NUMBER),
    ]


class _Ends(ctypes.Structure):
    _fields_ = [("embedding", _POINTER), ("norm", _POINTER), ("head", ProductStructure)]


class _Step(ctypes.Structure):
    _fields_ = [
        ("arena", _POINTER),
        ("block_size", _NUMBER),
        ("width", _NUMBER),
        ("tokens", _POINTER),
        ("rows", _NUMBER),
        ("segments", _POINTER),
        ("segment_count", _NUMBER),
        ("wanted", _POINTER),
        ("wanted_count", _NUMBER),
        ("logits", _POINTER),
        ("highest", _POINTER),
        ("finite", _POINTER),
    ]


def _shape(shape: DecoderShape) -> _Shape:
    return _Shape(
        shape.layers,
        shape.hidden,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.intermediate,
        shape.vocabulary,
        _GATES[shape.gate],
        int(shape.activations == "int8"),
        shape.epsilon,
        shape.attention_scale,
        shape.attention_soft_cap or 0.0,
        shape.logit_soft_cap or 0.0,
        shape.embedding_scale,
    )
