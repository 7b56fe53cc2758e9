"""The workers of a simulated cluster as they introduce themselves. Knows no policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diptych.types import KvLayout, ModelSource, Role, WorkerId, WorkerInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.simulate.constants import Constants

BUILD = "virtual"
MODEL = ModelSource(name="virtual", path="", digest="virtual")
_LAYERS, _KV_HEADS, _KV_BYTES = 1, 1, 2
_ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed")


def worker_info(constants: Constants, block_tokens: int) -> Iterator[WorkerInfo]:
    """prefill-0, …, decode-0, …, mixed-0, …"""
    for role in _ROLES:
        for number in range(getattr(constants.workers, role)):
            yield make_info(WorkerId(f"{role}-{number}"), role, constants, block_tokens)


def make_info(id_: WorkerId, role: Role, constants: Constants, block_tokens: int) -> WorkerInfo:
    """A layout whose blocks have the bytes that the constants give a token's KV."""
    blocks = max(1, constants.kv_tokens_per_worker // block_tokens)
    width = 2 * _LAYERS * _KV_HEADS * _KV_BYTES
    layout = KvLayout(
        layers=_LAYERS,
        kv_heads=_KV_HEADS,
        block_size=block_tokens,
        head_dim=max(1, constants.kv_bytes_per_token // width),
        dtype="bf16",
    )
    return WorkerInfo(
        id=id_,
        role=role,
        epoch=1,
        build=BUILD,
        model_digest=MODEL.digest,
        layout=layout,
        blocks=blocks,
        max_context=blocks * block_tokens,
        device="virtual",
        host="virtual",
        pid=0,
        threads=1,
    )
