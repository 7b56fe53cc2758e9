"""The forward pass in Triton and cuBLAS, for bf16 on GPUs. Same call as `model.Model`; knows no sequence.

Decode batches run as CUDA graphs. Rows are rounded to bf16 between kernels, as torch rounds them.
Unlike fp32 on CPUs, a row's bits may depend on the batch: on how cuBLAS cuts its products, and on
how many programs share a row's keys.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import kernels
from kernels.gpu import gates, low_bits, norms, rope
from kernels.gpu.attention import Attention
from kernels.gpu.paged import Look, tile_rows
from kernels.gpu.triton_attention import triton_attention
from workers.engine.batch import Batch, looked_at
from workers.engine.decode_graphs import BUCKETS, DecodeGraphs
from workers.engine.layers import Layer, MakeProduct, Product, TakenWeights
from workers.engine.model_memory import available_bytes, check_room
from workers.engine.rope import rope_table
from workers.engine.row_numbers import DeviceBatch, device_batch, longest_chunk, row_numbers
from workers.engine.weights import Weights


class TritonModel:
    """A decoder on one GPU. `arena` is passed in: the cache owns it."""

    def __init__(
        self,
        weights: Weights,
        *,
        max_context: int,
        device: torch.device,
        bits: low_bits.Bits | None = None,
        graphs: bool = True,
        attention: Attention | None = None,
    ) -> None:
        """bits: of the layers' products; the head keeps its own. `graphs` needs a CUDA device, and with them
        decoding by `attention` must be capturable. None: Triton's."""
        self.config = config = weights.config
        self._device, self._max_context, self._with_graphs = device, max_context, graphs
        dtype = weights.tensors["model.norm.weight"].dtype
        if device.type == "cuda":
            source = config.architecture.model_type
            check_room(config, dtype, available_bytes(device), source=source, where=str(device))
        taken = TakenWeights(weights, device, _maker(bits))
        self._layers = [taken.layer(index) for index in range(config.layers)]
        self._embedding = taken.tensor("model.embed_tokens.weight")
        self._head = self._embedding if config.tied else taken.tensor("lm_head.weight")
        self._norm = taken.norm("model.norm.weight")
        # Rounded to the weights' type before it multiplies, as their authors do.
        scale = config.hidden**0.5 if config.architecture.scaled_embedding else None
        self._embedding_scale = None if scale is None else torch.tensor(scale, dtype=dtype, device=device)
        ropes = [config.rope, *([config.local_rope] if config.local_rope else [])]
        self._ropes = [rope_table(each, max_context, config.head_dim).to(device) for each in ropes]
        self._attention = attention or triton_attention(device)
        self._graphs: DecodeGraphs | None = None
        self._graphs_of: tuple[int, torch.Size] | None = None

    @torch.inference_mode()
    def forward(self, batch: Batch, arena: Tensor) -> kernels.Logits:
        """Writes the batch's KV into `arena` and returns the wanted rows' logits, which the next call may overwrite."""
        rows = len(batch.tokens)
        if self._with_graphs and batch.decode_rows == rows <= BUCKETS[-1] and sorted(batch.wanted) == [*range(rows)]:
            # In the order in which they are wanted: the kernels care for none.
            tokens = [batch.tokens[row] for row in batch.wanted]
            segments = [batch.segments[row] for row in batch.wanted]
            return self._captured(arena).run(row_numbers(tokens, segments, arena.shape[4]))
        tile = tile_rows(longest_chunk(batch), self.config.head_dim, self._embedding.dtype)
        return looked_at(self._forward(device_batch(batch, arena.shape[4], tile, self._device), arena))

    def _captured(self, arena: Tensor) -> DecodeGraphs:
        """The graphs of this arena: another one lies elsewhere."""
        at = (arena.data_ptr(), arena.shape)
        if self._graphs is None or self._graphs_of != at:
            table_blocks = -(-self._max_context // arena.shape[4])
            self._graphs = DecodeGraphs(partial(self._forward, arena=arena), table_blocks, self._device)
            self._graphs_of = at
        return self._graphs

    def _forward(self, batch: DeviceBatch, arena: Tensor) -> Tensor:
        """[wanted, vocabulary] fp32"""
        epsilon = self.config.norm_epsilon
        hidden = functional.embedding(batch.tokens, self._embedding)
        if self._embedding_scale is not None:
            hidden = hidden * self._embedding_scale
        normed = norms.rms_norm(hidden, self._layers[0].attention_norm, epsilon)
        after = [*(layer.attention_norm for layer in self._layers[1:]), self._norm]
        for index, layer in enumerate(self._layers):
            found = self._attend(normed, layer, arena[:, index], batch)
            if batch.wanted is not None and index == len(self._layers) - 1:
                # Nothing but these rows' logits comes after the last layer's keys.
                found, hidden = (each.index_select(0, batch.wanted) for each in (found, hidden))
            mixed = layer.output(found)
            hidden, normed = norms.add_rms_norm(hidden, mixed, layer.mlp_norm, epsilon, layer.attention_end_norm)
            product = layer.down(gates.gated(layer.gate_up(normed), self.config.activation))
            hidden, normed = norms.add_rms_norm(hidden, product, after[index], epsilon, layer.mlp_end_norm)
        logits = functional.linear(normed, self._head).float()
        cap = self.config.logit_soft_cap
        return logits if cap is None else kernels.soft_cap(logits, cap)

    def _attend(self, normed: Tensor, layer: Layer, cache: Tensor, batch: DeviceBatch) -> Tensor:
        config = self.config
        each_head = None
        if layer.query_norm is not None and layer.key_norm is not None:
            each_head = rope.HeadNorms(layer.query_norm, layer.key_norm, config.norm_epsilon)
        query = rope.turn_and_write(layer.qkv(normed), cache, batch.rows, self._ropes[layer.rope], each_head)
        look = Look(config.attention_scale, layer.window, config.attention_soft_cap)
        out = torch.empty_like(query)
        if batch.decode_rows:
            self._attention.decode(query, cache, batch, look, out)
        if batch.tiles is not None:
            self._attention.prefill(query, cache, batch, look, out)
        return out.flatten(1)


def _maker(bits: low_bits.Bits | None) -> MakeProduct:
    def make(weight: Tensor, bias: Tensor | None) -> Product:
        if bits is None or not low_bits.can_multiply(weight):
            return partial(functional.linear, weight=weight, bias=bias)
        return partial(low_bits.linear, weight=low_bits.narrow_rows(weight.contiguous(), bits), bias=bias)

    return make
