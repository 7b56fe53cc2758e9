"""A process that owns an arena others map, and does to it what it is told. Knows no test."""

from __future__ import annotations

from multiprocessing.connection import Connection

import torch

from diptych.types import KvLayout
from workers.transfer.doorway import Doorway
from workers.transfer.shared_arena import SharedArena

SECRET = b"s" * 16


def own(pipe: Connection, layout: KvLayout, blocks: int) -> None:
    """Says where its door is; then (block, value, generation) rewrites a block. Until the pipe ends."""
    torch.set_num_threads(1)
    arena = SharedArena(layout, blocks, torch.device("cpu"))
    for block in range(blocks):
        arena.memory.arena[block] = block
    door = Doorway(arena, SECRET)
    pipe.send(door.address)
    try:
        while True:
            block, value, generation = pipe.recv()
            arena.memory.generations[block] = generation
            arena.memory.arena[block] = value
            pipe.send("done")
    except EOFError:
        door.close()
