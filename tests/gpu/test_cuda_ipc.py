"""A GPU arena mapped by another process: the same bytes, read-only by convention and checked by generations."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch

from diptych.types import KvLayout, KvParcel, KvSource, PairAddress, TransferId
from workers.transfer.doorway import Doorway, enter
from workers.transfer.link import MeetingPlace
from workers.transfer.read_link import ReadLink
from workers.transfer.shared_arena import SharedArena

pytestmark = pytest.mark.gpu

LAYOUT = KvLayout(layers=4, kv_heads=2, block_size=16, head_dim=64, dtype="bf16")
BLOCKS = 256
SECRET = b"secret"
READ = (3, 200, 17)


def _parcel(sequence: int, generations: tuple[int, ...]) -> KvParcel:
    source = KvSource(blocks=READ, generations=generations, skip=0, first_head=0, heads=2, wire="bf16")
    return KvParcel(
        transfer=TransferId("t"),
        leg=0,
        pair="p>d",
        epoch=1,
        sequence=sequence,
        first=0,
        count=len(READ),
        nbytes=len(READ) * LAYOUT.block_bytes,
        source=source,
    )


def _read(pipe: Connection, address: str) -> None:
    torch.cuda.set_device(0)
    link = ReadLink(lambda: enter(address, SECRET, LAYOUT))
    place = MeetingPlace("127.0.0.1", 5.0)
    link.open(PairAddress(host=place.host, port=place.port, key="k", epoch=1), place)
    for sequence in range(2):
        pipe.recv()
        packed = link.receive(_parcel(sequence, (1,) * len(READ)))
        pipe.send(None if packed is None else bytes(packed.cpu().numpy()))
    link.close()


def test_another_process_reads_what_lies_in_the_arena_and_notices_when_it_is_given_away(cuda: torch.device) -> None:
    arena = SharedArena(LAYOUT, BLOCKS, cuda)
    doorway = Doorway(arena, SECRET)
    arena.memory.arena.copy_(torch.randn(BLOCKS, *LAYOUT.block_shape, device=cuda))
    for block in READ:
        arena.memory.generations[block] = 1
    torch.cuda.synchronize()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    reader = context.Process(target=_read, args=(theirs, doorway.address))
    reader.start()
    try:
        ours.send("read")
        assert ours.poll(120)
        wanted = arena.memory.arena[list(READ)].view(-1).view(torch.uint8).cpu().numpy()
        assert ours.recv() == bytes(wanted)
        arena.memory.generations[READ[1]] += 1
        ours.send("read")
        assert ours.poll(60)
        assert ours.recv() is None
        reader.join(60)
        assert reader.exitcode == 0
    finally:
        doorway.close()
        arena.close()
        if reader.is_alive():
            reader.kill()


def test_packing_is_near_the_rate_of_a_plain_copy(cuda: torch.device) -> None:
    """Prints the share; the bar is 80 % of a device copy of the same bytes."""
    from kernels import Granules, pack_granules, unpack_granules

    layout = KvLayout(layers=36, kv_heads=8, block_size=16, head_dim=128, dtype="bf16")
    blocks = 512
    arena = torch.randn(2 * blocks, *layout.block_shape, device=cuda).to(torch.bfloat16)
    at = torch.randperm(2 * blocks, device=cuda)[:blocks]
    granules = Granules(at, torch.zeros_like(at))
    heads = slice(0, layout.kv_heads)
    packed = pack_granules(arena, granules, heads, "bf16")
    other = torch.empty_like(packed)

    def milliseconds(what: object) -> float:
        assert callable(what)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times: list[float] = []
        for _ in range(30):
            start.record()
            what()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times)[len(times) // 2]

    copy = milliseconds(lambda: other.copy_(packed))
    pack = milliseconds(lambda: pack_granules(arena, granules, heads, "bf16"))
    unpack = milliseconds(lambda: unpack_granules(arena, granules, heads, "bf16", packed))
    print(f"\n{packed.numel() / 2**20:.0f} MiB: copy {copy:.3f} ms, pack {copy / pack:.0%}, unpack {copy / unpack:.0%}")
    assert copy / pack >= 0.8
    assert copy / unpack >= 0.8
