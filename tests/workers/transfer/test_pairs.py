"""The bookkeeping of a worker's pairs, with a real pair under it: what comes from two threads at once is not lost."""

from __future__ import annotations

import queue
import sys
from types import FrameType
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from diptych.types import (
    BlockId,
    KvLayout,
    KvOffer,
    KvParcel,
    KvSource,
    ModelSource,
    PairAddress,
    TransferId,
    WorkerId,
    WorkerSpec,
)
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


def parcel(sequence: int, address: PairAddress) -> KvParcel:
    where = KvSource(blocks=(BlockId(0),), generations=(0,), skip=0, first_head=0, heads=1, wire="fp32")
    size = granule_bytes(1, 1, 4, "fp32")
    return KvParcel(
        transfer=TransferId("t"),
        leg=0,
        pair=address.key,
        epoch=address.epoch,
        sequence=sequence,
        first=0,
        count=1,
        nbytes=size,
        source=where,
    )


Landed: TypeAlias = "queue.Queue[tuple[KvParcel, Tensor | None]]"


def receiver_pairs(landed: Landed) -> ReceiverPairs:
    return ReceiverPairs(
        SPEC,
        MeetingPlace(HOST, WAIT_SECONDS),
        lambda what, *arguments: what(*arguments),
        Buffers(),
        landed=lambda parcel, packed: landed.put((parcel, packed)),
        void=lambda _, reason: pytest.fail(reason),
        in_use=set,
    )


def sender(epoch: int, content: float) -> Source:
    """An incarnation of the sender, whose one block is full of a number."""
    memory = private_memory(LAYOUT, 1, torch.device("cpu"))
    memory.arena.fill_(content)
    offer = KvOffer(worker=SENDER, epoch=epoch, layout=LAYOUT, device="cpu")
    view = ArenaView(memory.arena, memory.generations)
    return Source(offer=offer, link="loopback", wire="fp32", legs=match_legs(LAYOUT, LAYOUT), view=view)


def test_a_parcel_is_read_from_the_incarnation_that_announced_it() -> None:
    landed: Landed = queue.Queue()
    pairs = receiver_pairs(landed)
    [before], [after] = pairs.addresses(sender(epoch=0, content=1.0)), pairs.addresses(sender(epoch=1, content=2.0))
    assert before.epoch == after.epoch, "each is its pair's first"
    for address, content in ((after, 2.0), (before, 1.0)):
        pairs.expect(SENDER, parcel(0, address))
        came, packed = landed.get(timeout=WAIT_SECONDS)
        assert came.pair == address.key
        assert packed is not None
        assert set(packed.view(torch.float32).tolist()) == {content}
    pairs.close()
    assert landed.empty(), "nobody else received them, too"


def test_a_parcel_announced_at_any_moment_while_a_ticket_is_written_is_received() -> None:
    landed: Landed = queue.Queue()
    pairs, source = receiver_pairs(landed), sender(epoch=0, content=0.0)
    [address] = pairs.addresses(source)
    announced = 0

    def announce(frame: FrameType, event: str, _: Any) -> Any:
        """Another thread's announcement, before each line of the bookkeeping."""
        nonlocal announced
        if frame.f_code.co_filename != sys.modules[ReceiverPairs.__module__].__file__:
            return None
        if event == "line":
            sys.settrace(None)
            pairs.expect(SENDER, parcel(announced, address))
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
    assert [landed.get(timeout=WAIT_SECONDS)[0].sequence for _ in range(announced)] == list(range(announced))
    pairs.close()
