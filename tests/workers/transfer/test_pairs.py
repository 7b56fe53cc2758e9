"""The bookkeeping of a worker's pairs, with a real pair under it: what comes from two threads at once is not lost."""

from __future__ import annotations

import queue
import sys
from types import FrameType
from typing import Any

import pytest
import torch

from diptych.types import BlockId, KvLayout, KvOffer, KvParcel, KvSource, ModelSource, TransferId, WorkerId, WorkerSpec
from kernels import granule_bytes
from workers.engine.kv_memory import private_memory
from workers.transfer.buffers import Buffers
from workers.transfer.legs import match_legs
from workers.transfer.link import MeetingPlace
from workers.transfer.pairs import ReceiverPairs, Source
from workers.transfer.shared_arena import ArenaView

HOST = "127.0.0.1"
WAIT_SECONDS = 20.0
LAYOUT = KvLayout(layers=1, kv_heads=1, block_size=16, head_dim=4, dtype="fp32")
SENDER = WorkerId("p")
SPEC = WorkerSpec(
    id=WorkerId("d"),
    role="decode",
    epoch=0,
    model=ModelSource(name="tiny", path="random:tiny", digest="d"),
    dtype="fp32",
    block_size=16,
    memory_bytes=1,
    max_batch_tokens=16,
    max_running=1,
    threads=1,
    device="cpu",
    host=HOST,
    link="loopback",
    wire="native",
    verify="off",
    secret=b"s",
    lease_seconds=WAIT_SECONDS,
    cache="",
)


def parcel(sequence: int, epoch: int) -> KvParcel:
    where = KvSource(blocks=(BlockId(0),), generations=(0,), skip=0, first_head=0, heads=1, wire="fp32")
    size = granule_bytes(1, 1, 4, "fp32")
    return KvParcel(
        transfer=TransferId("t"), leg=0, epoch=epoch, sequence=sequence, first=0, count=1, nbytes=size, source=where
    )


def test_a_parcel_announced_at_any_moment_while_a_ticket_is_written_is_received() -> None:
    landed: queue.Queue[KvParcel] = queue.Queue()
    pairs = ReceiverPairs(
        SPEC,
        MeetingPlace(HOST, WAIT_SECONDS),
        lambda what, *arguments: what(*arguments),
        Buffers(),
        landed=lambda parcel, _: landed.put(parcel),
        void=lambda _, reason: pytest.fail(reason),
        in_use=set,
    )
    memory = private_memory(LAYOUT, 1, torch.device("cpu"))
    offer = KvOffer(worker=SENDER, epoch=0, layout=LAYOUT, device="cpu")
    view = ArenaView(memory.arena, memory.generations)
    source = Source(offer=offer, link="loopback", wire="fp32", legs=match_legs(LAYOUT, LAYOUT), view=view)
    [address] = pairs.addresses(source)
    announced = 0

    def announce(frame: FrameType, event: str, _: Any) -> Any:
        """Another thread's announcement, before each line of the bookkeeping."""
        nonlocal announced
        if frame.f_code.co_filename != sys.modules[ReceiverPairs.__module__].__file__:
            return None
        if event == "line":
            sys.settrace(None)
            pairs.expect(SENDER, parcel(announced, address.epoch))
            announced += 1
            sys.settrace(announce)
        return announce

    before = sys.gettrace()
    sys.settrace(announce)
    try:
        pairs.addresses(source)
    finally:
        sys.settrace(before)
    assert announced > 3
    assert [landed.get(timeout=WAIT_SECONDS).sequence for _ in range(announced)] == list(range(announced))
    pairs.close()
