"""A pair over NCCL: two processes on one GPU, which NCCL allows from 2.30.3 on."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

import pytest
import torch

from diptych.types import KvParcel, PairAddress, TransferId
from workers.transfer.link import MeetingPlace, PairLink

pytestmark = pytest.mark.gpu

NBYTES = 8 << 20
FIRST_WITH_SHARED_GPU = (2, 30, 3)


def _parcel(sequence: int) -> KvParcel:
    return KvParcel(
        transfer=TransferId("t"), leg=0, pair="p>d", epoch=1, sequence=sequence, first=0, count=1, nbytes=NBYTES
    )


def _receive(pipe: Connection) -> None:
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    device = torch.device("cuda", 0)
    place = MeetingPlace("127.0.0.1", 30.0)
    address = PairAddress(host=place.host, port=place.port, key="p>d", epoch=1)
    pipe.send(address)
    link = PairLink("nccl", "receiver", "127.0.0.1", device, 30.0)
    link.open(address, place)
    for sequence in range(3):
        pipe.send(int(link.receive(_parcel(sequence)).long().sum()))
    link.close()


def test_bytes_cross_in_order_and_an_abort_ends_the_pair(cuda: torch.device) -> None:
    if torch.cuda.nccl.version() < FIRST_WITH_SHARED_GPU:
        pytest.skip(f"NCCL {torch.cuda.nccl.version()} refuses two ranks on one GPU; 2.30.3 accepts them")
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=_receive, args=(theirs,))
    receiver.start()
    try:
        assert ours.poll(60)
        address = ours.recv()
        link = PairLink("nccl", "sender", "127.0.0.1", cuda, 30.0)
        link.open(address)
        for value in (1, 2, 3):
            link.send(lambda value=value: torch.full((NBYTES,), value, dtype=torch.uint8, device=cuda))
        sums: list[int] = []
        for _ in range(3):
            assert ours.poll(60)
            sums.append(ours.recv())
        assert sums == [NBYTES, 2 * NBYTES, 3 * NBYTES]
        link.close()
    finally:
        receiver.join(30)
        if receiver.is_alive():
            receiver.kill()
