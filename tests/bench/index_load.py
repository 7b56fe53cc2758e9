"""What the index is asked to do in the scheduler's benchmark, in numbers alone: chains, who stores them, what is looked
up. Imports nothing of ours, so that a program in another environment does exactly the same.

Run as a program it does it with `dynamo._core.RadixTree`, of `ai-dynamo-runtime`, and prints what it took as JSON.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Protocol

WORKERS, BLOCKS, CHAIN = 64, 1_000_000, 100
LOOK_UPS = 5_000
EVENT_BLOCKS = (100, 8, 1)
"""Blocks of one event: of a whole prompt, of a chunk, of an answer that grows."""


def holders(chain: int) -> tuple[int, int]:
    """The two workers that store a chain."""
    return chain % WORKERS, (chain + 1 + chain % (WORKERS - 1)) % WORKERS


def events(chains: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """(chain, worker, first, stop) of each event, in order."""
    for chain in range(chains):
        for worker in holders(chain):
            for first in range(0, CHAIN, size):
                yield chain, worker, first, min(first + size, CHAIN)


def looked_up(chains: int) -> list[int]:
    """Chains, each asked for whole."""
    drawn = random.Random(0)
    return [drawn.randrange(chains) for _ in range(LOOK_UPS)]


def name(chain: int, block: int) -> int:
    """64 bits, as the other index wants them."""
    return (chain * CHAIN + block + 1) * 0x9E3779B97F4A7C15 % (1 << 63)


class Tree(Protocol):
    """What is used of `dynamo._core.RadixTree`."""

    def apply_event(self, worker_id: int, kv_cache_event_bytes: bytes) -> None: ...
    def find_matches(self, sequence: list[int]) -> Scores: ...


class Scores(Protocol):
    """Its answer."""

    scores: dict[tuple[int, int], int]


def _radix_tree(size: int) -> dict[str, float]:
    tree: Tree = importlib.import_module("dynamo._core").RadixTree()
    chains = BLOCKS // CHAIN
    stored, removed = _messages(chains, size)
    began = time.process_time()
    _tell(tree, stored)
    stored_seconds = time.process_time() - began
    first, again = (_look_up(tree, chains) for _ in range(2))
    began = time.process_time()
    _tell(tree, removed)
    removed_seconds = time.process_time() - began
    assert not tree.find_matches([name(0, 0)]).scores, "a block is left"
    events_per_second = 4 * BLOCKS / (stored_seconds + removed_seconds)
    return {"block events": events_per_second, "first look-ups": first, "look-ups": again}


def _tell(tree: Tree, messages: list[tuple[int, bytes]]) -> None:
    for worker, message in messages:
        tree.apply_event(worker, message)
    tree.find_matches([name(0, 0)])  # Its thread has done what was asked of it before.


def _look_up(tree: Tree, chains: int) -> float:
    asked = [[name(chain, block) for block in range(CHAIN)] for chain in looked_up(chains)]
    began = time.process_time()
    for names in asked:
        assert len(tree.find_matches(names).scores) == 2, "two workers have each chain"
    return LOOK_UPS / (time.process_time() - began)


def _messages(chains: int, size: int) -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]]:
    stored: list[tuple[int, bytes]] = []
    removed: list[tuple[int, bytes]] = []
    for chain, worker, first, stop in events(chains, size):
        names = [name(chain, block) for block in range(first, stop)]
        parent = name(chain, first - 1) if first else None
        blocks = [{"block_hash": one, "tokens_hash": one} for one in names]
        stored.append((worker, _message({"stored": {"parent_hash": parent, "blocks": blocks}})))
        removed.append((worker, _message({"removed": {"block_hashes": names}})))
    # A chain's end leaves first, as a worker evicts it.
    return stored, removed[::-1]


def _message(data: dict[str, object]) -> bytes:
    return json.dumps({"event_id": 1, "data": data, "dp_rank": 0}).encode()


if __name__ == "__main__":
    print(json.dumps(_radix_tree(int(sys.argv[1]))))
