"""Workers to schedule on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from diptych.types import KvDtype, KvLayout, Role, WorkerId, WorkerInfo

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def info() -> Callable[..., WorkerInfo]:
    """`info("p0", role="prefill", …)`: a worker with 1,000 blocks of 16 tokens."""

    def make(
        id_: str,
        *,
        role: Role = "decode",
        epoch: int = 1,
        build: str = "b1",
        digest: str = "d1",
        block_size: int = 16,
        layers: int = 2,
        dtype: KvDtype = "fp32",
        max_context: int = 8192,
        host: str = "here",
    ) -> WorkerInfo:
        return WorkerInfo(
            id=WorkerId(id_),
            role=role,
            epoch=epoch,
            build=build,
            model_digest=digest,
            layout=KvLayout(layers=layers, kv_heads=2, block_size=block_size, head_dim=8, dtype=dtype),
            blocks=1000,
            max_context=max_context,
            device="cpu",
            host=host,
            pid=1,
            threads=1,
        )

    return make
