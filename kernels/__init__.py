"""Maths: tensor in, tensor out. Knows no request, no model, no worker.

Every operation has a meaning (`kernels.reference`, plain torch) and, where it pays, an
implementation per device with the same name and signature; this module picks one by the tensor's
device. Nobody passes a backend name.
"""

from kernels.cpu.decoder import Logits, Segment
from kernels.granules import pack_granules, unpack_granules
from kernels.reference.attention import DecodeTable, decode_attention, prefill_attention
from kernels.reference.blocks import write_kv
from kernels.reference.elementwise import (
    apply_rope,
    geglu,
    rms_norm,
    rope_frequencies,
    rope_table,
    soft_cap,
    swiglu,
    tanh_geglu,
    turn_table,
)
from kernels.reference.granules import GRANULE, Granules, granule_bytes
from kernels.reference.linear import linear, row_tile
from kernels.reference.logits import Penalties, Places, Scores, allow_, ban_, bias_, penalise_, score
from kernels.reference.sampling import Sampling, sample_tokens

__all__ = [
    "GRANULE",
    "DecodeTable",
    "Granules",
    "Logits",
    "Penalties",
    "Places",
    "Sampling",
    "Scores",
    "Segment",
    "allow_",
    "apply_rope",
    "ban_",
    "bias_",
    "decode_attention",
    "geglu",
    "granule_bytes",
    "linear",
    "pack_granules",
    "penalise_",
    "prefill_attention",
    "rms_norm",
    "rope_frequencies",
    "rope_table",
    "row_tile",
    "sample_tokens",
    "score",
    "soft_cap",
    "swiglu",
    "tanh_geglu",
    "turn_table",
    "unpack_granules",
    "write_kv",
]
