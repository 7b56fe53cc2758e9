"""Small traces and clusters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.simulate.constants import Constants, Workers
from cluster.simulate.readers import read_trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.simulate.trace import Trace

SHARED = Path(__file__).resolve().parents[4] / "shared"


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """A file beside the tree, or a skip that says which is missing."""

    def find(name: str) -> Path:
        for root in (SHARED, *(Path(text) for text in _roots())):
            if (root / name).exists():
                return root / name
        pytest.skip(f"MISSING ../shared/{name}: the reference numbers are not checked")

    return find


def _roots() -> list[str]:
    return [os.environ["DIPTYCH_SHARED"]] if "DIPTYCH_SHARED" in os.environ else []


@pytest.fixture
def small() -> Constants:
    """2 prefill and 2 decode workers of 40 blocks of 512 tokens each."""
    return Constants(workers=Workers(prefill=2, decode=2), kv_tokens_per_worker=40 * 512)


@pytest.fixture
def conversations(tmp_path: Path) -> Trace:
    """Twenty conversations of four turns, all with one system prompt, 0.2 s apart."""
    lines: list[str] = []
    fresh = iter(range(1, 10_000))
    histories: dict[int, list[int]] = {chat: [0, next(fresh)] for chat in range(20)}
    for turn in range(80):
        chat = turn % 20
        blocks = histories[chat]
        told = {
            "timestamp": 200 * turn,
            "input_length": 512 * len(blocks) + 100,
            "output_length": 600,
            "hash_ids": [*blocks, next(fresh)],
        }
        lines.append(json.dumps(told))
        blocks += [next(fresh), next(fresh)]
    file = tmp_path / "conversations.jsonl"
    file.write_text("\n".join(lines))
    return read_trace(str(file))
