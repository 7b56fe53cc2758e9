"""A mapping between two real processes: who gets it, that it only reads, and that its owner may die at any time."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch

from diptych.errors import TransferFailed
from diptych.types import BlockId, KvLayout, KvParcel, KvSource, PairAddress, TransferId
from tests.workers.transfer.owner_process import SECRET, own
from workers.transfer.doorway import Doorway, enter
from workers.transfer.link import MeetingPlace
from workers.transfer.read_link import ReadLink
from workers.transfer.shared_arena import ArenaView, SharedArena

LAYOUT = KvLayout(layers=4, kv_heads=4, block_size=16, head_dim=64, dtype="fp32")
BLOCKS = 256
"""Of 128 KiB."""
WAIT_SECONDS = 20.0
STALLED = 3
CROWD = 70
COPIES = 20


class Neighbour:
    """Another process that owns an arena; block i is full of i."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=own, args=(theirs, LAYOUT, BLOCKS))
        self.process.start()
        theirs.close()
        self.address: str = hear(self._pipe)

    def rewrite(self, block: int, value: float, generation: int) -> None:
        self._pipe.send((block, value, generation))
        hear(self._pipe)

    def kill(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join(WAIT_SECONDS)
        assert self.process.exitcode == -signal.SIGKILL

    def close(self) -> None:
        self._pipe.close()
        self.process.join(WAIT_SECONDS)


def hear(pipe: Connection) -> str:
    assert pipe.poll(WAIT_SECONDS * 3)
    return pipe.recv()


@pytest.fixture(scope="module")
def neighbour() -> Iterator[Neighbour]:
    neighbour = Neighbour()
    yield neighbour
    neighbour.close()


@pytest.fixture
def file(neighbour: Neighbour, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """What a visitor is handed."""
    kept: list[int] = []
    of_file = ArenaView.of_file

    def keep(file: int, *arguments: object) -> ArenaView:
        kept.append(os.dup(file))
        return of_file(file, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ArenaView, "of_file", keep)
    enter(neighbour.address, SECRET, LAYOUT)
    yield kept[0]
    os.close(kept[0])


def parcel_of(blocks: range, generation: int = 0) -> KvParcel:
    names = tuple(map(BlockId, blocks))
    source = KvSource(
        blocks=names, generations=(generation,) * len(names), skip=0, first_head=0, heads=LAYOUT.kv_heads, wire="fp32"
    )
    count = len(names)
    return KvParcel(
        transfer=TransferId("t"),
        leg=0,
        pair="p>d",
        epoch=1,
        sequence=0,
        first=0,
        count=count,
        nbytes=count * LAYOUT.block_bytes,
        source=source,
    )


def test_what_the_owner_writes_is_what_is_read(neighbour: Neighbour) -> None:
    view = enter(neighbour.address, SECRET, LAYOUT)
    assert view.arena[9].unique().tolist() == [9.0]
    neighbour.rewrite(9, 0.5, 1)
    assert view.generations[9] == 1
    assert view.arena[9].unique().tolist() == [0.5]


def test_another_clusters_secret_opens_no_door(neighbour: Neighbour) -> None:
    with pytest.raises(TransferFailed, match="another cluster's secret"):
        enter(neighbour.address, b"o" * 16, LAYOUT)
    enter(neighbour.address, SECRET, LAYOUT)


def test_another_layout_is_refused_by_both_names(neighbour: Neighbour) -> None:
    other = KvLayout(layers=5, kv_heads=4, block_size=16, head_dim=64, dtype="fp32")
    with pytest.raises(TransferFailed, match=r"layers=4.*layers=5"):
        enter(neighbour.address, SECRET, other)


WRITES: dict[str, Callable[[int], object]] = {
    "through the descriptor": lambda file: os.pwrite(file, b"x", 0),
    "through its name in /proc": lambda file: os.write(os.open(f"/proc/self/fd/{file}", os.O_RDWR), b"x"),
    "through a shared mapping": lambda file: mmap.mmap(file, 4096),
    "through a shared mapping of its name in /proc": lambda file: mmap.mmap(
        os.open(f"/proc/self/fd/{file}", os.O_RDWR), 4096
    ),
    "through a shared mapping made writable later": lambda file: protect(
        mmap.mmap(file, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
    ),
    "by making it smaller": lambda file: os.truncate(f"/proc/self/fd/{file}", 4096),
    "by making it larger": lambda file: os.truncate(f"/proc/self/fd/{file}", 1 << 30),
    "by a hole in it": lambda file: os.posix_fallocate(os.open(f"/proc/self/fd/{file}", os.O_RDWR), 0, 1 << 30),
    "by other seals": lambda file: fcntl.fcntl(
        os.open(f"/proc/self/fd/{file}", os.O_RDWR), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE
    ),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_reader_can_not_change_it(neighbour: Neighbour, file: int, how: str) -> None:
    view = enter(neighbour.address, SECRET, LAYOUT)
    size = os.fstat(file).st_size
    with pytest.raises(OSError):  # noqa: PT011 (EPERM, EACCES or EBADF: whichever door it stands before)
        WRITES[how](file)
    assert os.fstat(file).st_size == size
    assert view.generations[0] == 0


def protect(memory: mmap.mmap) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    # Its address: a read-only mapping gives no writable buffer, so it is asked of the kernel's list.
    with open("/proc/self/maps") as maps:
        shared = [line for line in maps if "diptych-kv" in line and line.split()[1] == "r--s"]
    start = int(shared[-1].split("-")[0], 16)
    if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_WRITE):
        number = ctypes.get_errno()
        memory.close()
        raise OSError(number, os.strerror(number))


def test_what_a_reader_writes_stays_its_own(neighbour: Neighbour) -> None:
    mine, others = (enter(neighbour.address, SECRET, LAYOUT) for _ in range(2))
    mine.arena[11] = -1.0
    assert others.arena[11].unique().tolist() == [11.0]


def test_an_owner_that_is_killed_during_a_copy_spoils_nothing() -> None:
    neighbour = Neighbour()
    before = mappings()
    link = ReadLink(lambda: enter(neighbour.address, SECRET, LAYOUT))
    link.open(PairAddress(host="127.0.0.1", port=1, key="k", epoch=1), MeetingPlace("127.0.0.1", WAIT_SECONDS))
    begun, killed = threading.Event(), threading.Event()
    copies: list[bool] = []
    clean = torch.arange(BLOCKS, dtype=torch.float32).unsqueeze(1)

    def copy() -> None:
        after = 0
        while after < COPIES:
            after += killed.is_set()
            packed = link.receive(parcel_of(range(BLOCKS)))
            assert packed is not None
            copies.append(bool((packed.view(torch.float32).view(BLOCKS, -1) == clean).all()))
            begun.set()

    reader = threading.Thread(target=copy)
    reader.start()
    assert begun.wait(WAIT_SECONDS)
    neighbour.kill()
    killed.set()
    reader.join(WAIT_SECONDS)
    assert not reader.is_alive()
    assert len(copies) > COPIES
    assert all(copies)
    link.close()
    assert mappings() == before
    with pytest.raises(TransferFailed, match="can't be mapped"):
        enter(neighbour.address, SECRET, LAYOUT)


@pytest.mark.parametrize("visitors", [STALLED, CROWD])
def test_visitors_that_stall_keep_nobody_out(neighbour: Neighbour, visitors: int) -> None:
    with ExitStack() as stack:
        stalled = [stack.enter_context(visitor(neighbour)) for _ in range(visitors)]
        first = stalled[-1].recv(16)
        assert len(first) == 16
        enter(neighbour.address, SECRET, LAYOUT)
        stalled[-1].setblocking(False)
        with pytest.raises(BlockingIOError):  # it still stands in the door: nobody waited for it to leave
            stalled[-1].recv(16)
        stalled[-1].settimeout(WAIT_SECONDS)
        assert stalled[-1].recv(16) == b"", "a visitor that stalls is shown out"


def test_a_door_that_closes_shows_its_visitors_out() -> None:
    arena = SharedArena(LAYOUT, 1, torch.device("cpu"))
    door = Doorway(arena, SECRET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stalled:
        stalled.settimeout(WAIT_SECONDS)
        stalled.connect(f"\0{door.address}")
        assert len(stalled.recv(16)) == 16
        door.close()
        assert stalled.recv(16) == b""
    arena.close()


def visitor(neighbour: Neighbour) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.connect(f"\0{neighbour.address}")
    end.settimeout(WAIT_SECONDS)
    return end


def mappings() -> int:
    gc.collect()
    with open("/proc/self/maps") as maps:
        return sum("diptych-kv" in line for line in maps)
