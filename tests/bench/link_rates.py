"""How fast a link moves a chunk's KV, beside the plainest way to move the same bytes. Knows links, no worker.

The blocks lie apart from each other, as in a cache that has been in use; the plain ways have one
contiguous piece. Both sides are processes of their own, and both ways take turns.
"""

from __future__ import annotations

import multiprocessing
import queue
import random
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from diptych.types import BlockId, KvLayout, KvParcel, KvSource, PairAddress, TransferId
from tests.bench.results import Figure, figure
from workers.engine.kv_memory import read_granules
from workers.transfer.buffers import Buffers
from workers.transfer.checksum import Verifier
from workers.transfer.doorway import Doorway, enter
from workers.transfer.link import MeetingPlace, PairLink
from workers.transfer.pair import ReceiverPair, SenderPair, Shipment
from workers.transfer.read_link import ReadLink
from workers.transfer.shared_arena import SharedArena

if TYPE_CHECKING:
    from torch import Tensor

LAYOUT = KvLayout(layers=30, kv_heads=3, block_size=16, head_dim=64, dtype="bf16")
"""Of the default model."""
ARENA_BLOCKS, CHUNK_BLOCKS = 512, 32
"""A chunk of 512 tokens is 11.8 MB."""
SECRET = b"s" * 16
HOST, TIMEOUT_SECONDS = "127.0.0.1", 60.0
CPU = torch.device("cpu")
WARM, RUNS = 4, 45
IN_A_ROW = 8
"""Chunks over gloo, as of a prompt of 4,096 tokens."""
UNDER_WAY = 2
"""One is packed while another is sent."""


def chunk(number: int) -> KvParcel:
    """Another one each time: nothing of it is in a processor's cache by luck."""
    blocks = tuple(map(BlockId, random.Random(number).sample(range(ARENA_BLOCKS), CHUNK_BLOCKS)))
    source = KvSource(
        blocks=blocks,
        generations=(0,) * CHUNK_BLOCKS,
        skip=0,
        first_head=0,
        heads=LAYOUT.kv_heads,
        wire="bf16",
    )
    return KvParcel(
        transfer=TransferId("t"),
        leg=0,
        pair="p>d",
        epoch=1,
        sequence=number,
        first=0,
        count=CHUNK_BLOCKS,
        nbytes=CHUNK_BLOCKS * LAYOUT.block_bytes,
        source=source,
    )


def rates() -> list[Figure]:
    """Mapped beside a plain copy, gloo beside one raw send."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_sender, args=(theirs,), daemon=True)
    process.start()
    try:
        return [*_mapped(ours), *_gloo(ours)]
    finally:
        ours.close()
        process.join(TIMEOUT_SECONDS)


def _mapped(pipe: Connection) -> list[Figure]:
    door = pipe.recv()
    view, buffers = enter(door, SECRET, LAYOUT), Buffers()
    link = ReadLink(lambda: view, buffers)
    link.open(PairAddress(host=HOST, port=1, key="k", epoch=1), MeetingPlace(HOST, TIMEOUT_SECONDS))
    same = view.arena.view(-1).view(torch.uint8)
    assert same.sum() > 0  # every page is there, as in a mapping that has been in use
    landing = torch.zeros(chunk(0).nbytes, dtype=torch.uint8)
    parcels = [chunk(number) for number in range(RUNS)]
    nbytes = parcels[0].nbytes
    ends = [random.Random(number).randrange(nbytes, len(same)) for number in range(RUNS)]

    def plain(number: int) -> Tensor:
        return landing.copy_(same[ends[number] - nbytes : ends[number]])

    def ours(number: int) -> None:
        packed = link.receive(parcels[number])
        assert packed is not None
        buffers.give(packed)  # as a worker does when it has landed

    return _compared("mapped / plain copy", nbytes, plain, ours)


def _gloo(pipe: Connection) -> list[Figure]:
    place = MeetingPlace(HOST, TIMEOUT_SECONDS)
    address = PairAddress(host=HOST, port=place.port, key="k", epoch=1)
    pipe.send((place.port, address))
    raw = _raw_group(place.join(), 1)
    landed: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
    buffers = Buffers()
    link = PairLink("gloo", "receiver", HOST, CPU, TIMEOUT_SECONDS, buffers)
    pair = ReceiverPair(link, address, 0, place, lambda _, packed: landed.put(packed), _fail)
    landing = torch.empty(chunk(0).nbytes, dtype=torch.uint8)

    def raw_sends(number: int) -> None:
        pipe.send(("raw", number))
        for _ in range(IN_A_ROW):
            raw.recv([landing], 0, 0).wait()

    def ours(number: int) -> None:
        pipe.send(("link", number))
        for _ in range(IN_A_ROW):
            pair.expect(pipe.recv())
        for _ in range(IN_A_ROW):
            packed = landed.get(timeout=TIMEOUT_SECONDS)
            assert packed is not None
            buffers.give(packed)

    found = _compared("gloo / raw gloo sends", IN_A_ROW * len(landing), raw_sends, ours)
    pipe.send(("end", 0))
    return found


def _compared(case: str, nbytes: int, plain: Callable[[int], Any], ours: Callable[[int], Any]) -> list[Figure]:
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for number in range(RUNS):
        for name, move in (("plain", plain), ("ours", ours)) if number % 2 else (("ours", ours), ("plain", plain)):
            begun = time.perf_counter()
            move(number)
            if number >= WARM:
                seconds[name].append(time.perf_counter() - begun)
    rate = {name: [nbytes / each / 1e9 for each in measured] for name, measured in seconds.items()}
    ratios = [plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"], strict=True)]
    return [
        figure(case, "plain", "GB/s", rate["plain"]),
        figure(case, "link", "GB/s", rate["ours"]),
        figure(case, "ratio of rates, at least 0.85", "", ratios),
    ]


def _sender(pipe: Connection) -> None:
    torch.set_num_threads(1)
    owned = SharedArena(LAYOUT, ARENA_BLOCKS, CPU)
    owned.memory.arena.fill_(1.0)
    door = Doorway(owned, SECRET)
    pipe.send(door.address)
    port, address = pipe.recv()
    raw = _raw_group(TCPStore(HOST, port, is_master=False), 0)
    link = PairLink("gloo", "sender", HOST, CPU, TIMEOUT_SECONDS)
    pair = SenderPair(link, address, Verifier("off", SECRET), _fail)
    buffers = Buffers()
    contiguous = torch.ones(chunk(0).nbytes, dtype=torch.uint8)
    room = threading.Semaphore(UNDER_WAY)
    while True:
        what, number = pipe.recv()
        if what == "end":
            break
        for each in range(IN_A_ROW):
            if what == "raw":
                raw.send([contiguous], 1, 0).wait()
            else:
                room.acquire()
                pair.ship(_shipment(owned, IN_A_ROW * number + each, pipe, room, buffers))
    pair.close()
    door.close()


def _shipment(
    owned: SharedArena, number: int, pipe: Connection, room: threading.Semaphore, buffers: Buffers
) -> Shipment:
    parcel = chunk(number)
    assert parcel.source is not None
    # As the engine's thread does.
    packed = read_granules(owned.memory.arena, parcel.source, parcel.count, buffers.take(parcel.nbytes))

    def sent(_: KvParcel) -> None:
        buffers.give(packed)
        room.release()

    return Shipment(parcel=parcel, content=lambda: packed, announce=pipe.send, sent=sent)


def _fail(error: Exception) -> None:
    raise error


def _raw_group(store: Any, rank: int) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    return gloo(PrefixStore("raw", store), rank, 2)


if __name__ == "__main__":
    from tests.bench.results import report

    report("link_rates", rates())
