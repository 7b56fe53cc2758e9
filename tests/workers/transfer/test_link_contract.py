"""What every link between CPUs does: order, ends of waits, refusals, and nothing left behind."""

from __future__ import annotations

import gc
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.errors import TransferFailed
from diptych.types import BlockId, KvLayout, KvParcel, KvSource, PairAddress, TransferId
from kernels import granule_bytes
from workers.engine.kv_memory import read_granules
from workers.transfer.checksum import Verifier
from workers.transfer.doorway import Doorway, enter
from workers.transfer.link import Link, MeetingPlace, PairLink
from workers.transfer.pair import ReceiverPair, SenderPair, Shipment
from workers.transfer.read_link import ReadLink
from workers.transfer.shared_arena import ArenaView, SharedArena

HOST = "127.0.0.1"
CPU = torch.device("cpu")
WAIT_SECONDS = 20.0
SECRET = b"s" * 16
VERIFIER = Verifier("all", SECRET)
LAYOUT = KvLayout(layers=2, kv_heads=2, block_size=16, head_dim=8, dtype="fp32")
BLOCKS = 64
LINKS = ("gloo", "mapped", "loopback")
READS = LINKS[1:]
REBUILDS = 50


class Owner:
    """An arena whose block i is full of i, and the ways to it."""

    def __init__(self) -> None:
        self.arena = SharedArena(LAYOUT, BLOCKS, CPU)
        for block in range(BLOCKS):
            self.arena.memory.arena[block] = block
        self.door = Doorway(self.arena, SECRET)
        self.place = MeetingPlace(HOST, WAIT_SECONDS)

    def source(self, number: int) -> KvSource:
        """Of parcel `number`: one to three blocks, from block `number` on."""
        blocks = tuple(BlockId(number + each) for each in range(1 + number % 3))
        generations = tuple(self.arena.memory.generations[block] for block in blocks)
        return KvSource(
            blocks=blocks, generations=generations, skip=0, first_head=0, heads=LAYOUT.kv_heads, wire=LAYOUT.dtype
        )

    def parcel(self, number: int, sequence: int = 0, *, reads: bool = True) -> KvParcel:
        source = self.source(number)
        count = len(source.blocks)
        return KvParcel(
            transfer=TransferId("t"),
            leg=0,
            pair="p>d",
            epoch=1,
            sequence=sequence,
            first=number,
            count=count,
            nbytes=count * granule_bytes(LAYOUT.layers, LAYOUT.kv_heads, LAYOUT.head_dim, LAYOUT.dtype),
            source=source if reads else None,
        )

    def content(self, number: int) -> Tensor:
        source = self.source(number)
        return read_granules(self.arena.memory.arena, source, len(source.blocks))

    def give_away(self, block: int) -> None:
        self.arena.memory.generations[block] += 1
        self.arena.memory.arena[block] = -1.0

    def close(self) -> None:
        self.door.close()
        self.arena.close()


class Ends:
    """A sender and a receiver over one link; what happened to them, in queues a test can wait on."""

    def __init__(self, owner: Owner, kind: str, key: str, epoch: int, view: Callable[[], ArenaView] | None) -> None:
        self.owner = owner
        self.reads = kind in READS
        self.address = PairAddress(host=HOST, port=owner.place.port, key=key, epoch=epoch)
        self.landed: queue.Queue[tuple[KvParcel, Tensor | None]] = queue.Queue()
        self.sent: queue.Queue[KvParcel] = queue.Queue()
        self.broken: queue.Queue[tuple[str, TransferFailed]] = queue.Queue()
        ways = {
            "mapped": lambda: enter(owner.door.address, SECRET, LAYOUT),
            "loopback": owner.arena.view,
        }

        def link(side: Any) -> Link:
            return ReadLink(view or ways[kind]) if self.reads else PairLink("gloo", side, HOST, CPU, WAIT_SECONDS)

        self.receiver = ReceiverPair(
            link("receiver"),
            self.address,
            0,
            owner.place,
            lambda parcel, packed: self.landed.put((parcel, packed)),
            lambda error: self.broken.put(("receiver", error)),
        )
        self.sender = SenderPair(
            link("sender"), self.address, VERIFIER, lambda error: self.broken.put(("sender", error))
        )

    def ship(self, number: int, announce: Callable[[KvParcel], None] | None = None) -> None:
        self.sender.ship(
            Shipment(
                parcel=self.owner.parcel(number, reads=self.reads),
                content=lambda: self.owner.content(number),
                announce=announce or self.receiver.expect,
                sent=self.sent.put,
            )
        )

    def land(self) -> tuple[KvParcel, Tensor | None]:
        return self.landed.get(timeout=WAIT_SECONDS)

    def close(self) -> None:
        for end in (self.sender, self.receiver):
            end.close()
        for end in (self.sender, self.receiver):
            assert end.wait_closed(WAIT_SECONDS)


@pytest.fixture(scope="module")
def owner() -> Iterator[Owner]:
    owner = Owner()
    yield owner
    owner.close()


@pytest.fixture
def ends(owner: Owner, request: pytest.FixtureRequest) -> Iterator[Callable[..., Ends]]:
    """(kind, epoch) → two ends; closed afterwards."""
    made: list[Ends] = []

    def make(kind: str, epoch: int = 1, view: Callable[[], ArenaView] | None = None) -> Ends:
        made.append(Ends(owner, kind, request.node.name, epoch, view))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("kind", LINKS)
def test_parcels_land_whole_and_in_the_order_they_were_shipped(ends: Callable[..., Ends], kind: str) -> None:
    pair = ends(kind)
    for number in range(20):
        pair.ship(number)
    for number in range(20):
        parcel, packed = pair.land()
        assert (parcel.sequence, parcel.first) == (number, number)
        assert packed is not None
        assert packed.equal(pair.owner.content(number))
        assert VERIFIER.agrees(parcel, packed)
        assert pair.sent.get(timeout=WAIT_SECONDS) == parcel


@pytest.mark.parametrize("kind", LINKS)
def test_announcements_may_come_in_any_order_and_twice(ends: Callable[..., Ends], kind: str) -> None:
    pair = ends(kind)
    announced: queue.Queue[KvParcel] = queue.Queue()
    for number in range(3):
        pair.ship(number, announced.put)
    first = announced.get(timeout=WAIT_SECONDS)
    for sequence in (2, 1, 2):
        pair.receiver.expect(pair.owner.parcel(sequence, sequence, reads=pair.reads))
    assert pair.landed.empty()
    pair.receiver.expect(first)
    pair.receiver.expect(first)
    assert [pair.land()[0].sequence for _ in range(3)] == [0, 1, 2]
    assert [pair.sent.get(timeout=WAIT_SECONDS).sequence for _ in range(3)] == [0, 1, 2]
    pair.close()
    assert pair.landed.empty()
    assert pair.broken.empty()


@pytest.mark.parametrize("kind", LINKS)
def test_what_landed_is_nobody_elses(ends: Callable[..., Ends], owner: Owner, kind: str) -> None:
    """The sender's blocks may be given away as soon as a parcel is here."""
    pair = ends(kind)
    pair.ship(2)
    _, packed = pair.land()
    assert packed is not None
    kept = packed.clone()
    with changed(owner, 2):
        assert packed.equal(kept)
        packed.zero_()
        assert owner.arena.memory.arena[2].unique().tolist() == [-1.0]


@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("kind", LINKS)
def test_close_ends_the_waits_of_either_side(ends: Callable[..., Ends], kind: str, side: str) -> None:
    pair = ends(kind)
    pair.ship(0)
    pair.land()
    end = getattr(pair, side)
    if side == "sender":
        announced = threading.Event()
        pair.ship(1, lambda _: announced.set())  # nobody expects it: gloo waits for a receive
        assert announced.wait(WAIT_SECONDS)
    else:
        pair.receiver.expect(pair.owner.parcel(1, 1 if kind == "gloo" else 2, reads=pair.reads))
    end.close()
    assert end.wait_closed(WAIT_SECONDS / 2)


@pytest.mark.parametrize("kind", LINKS)
def test_a_closed_link_says_so(owner: Owner, kind: str) -> None:
    links = {
        "gloo": lambda: PairLink("gloo", "receiver", HOST, CPU, WAIT_SECONDS),
        "mapped": lambda: ReadLink(lambda: enter(owner.door.address, SECRET, LAYOUT)),
        "loopback": lambda: ReadLink(owner.arena.view),
    }
    link = links[kind]()
    if kind != "gloo":
        link.open(PairAddress(host=HOST, port=1, key="k", epoch=1), owner.place)
    link.close()
    link.close()
    with pytest.raises(TransferFailed, match="closed"):
        link.receive(owner.parcel(0))


@pytest.mark.parametrize("kind", LINKS)
def test_the_death_of_the_sender_is_heard_or_its_parcel_refused(
    ends: Callable[..., Ends], owner: Owner, kind: str
) -> None:
    pair = ends(kind)
    pair.ship(0)
    pair.land()
    pair.sent.get(timeout=WAIT_SECONDS)  # or it breaks too, in the middle of that
    parcel = owner.parcel(5, 1, reads=pair.reads)
    pair.sender.close()
    with changed(owner, 6):  # its blocks are another's
        pair.receiver.expect(parcel)
        if pair.reads:
            assert pair.land() == (parcel, None)
        else:
            side, error = pair.broken.get(timeout=WAIT_SECONDS)
            assert (side, type(error)) == ("receiver", TransferFailed)


@pytest.mark.parametrize("kind", LINKS)
def test_the_death_of_the_receiver_lets_the_sender_go_on(ends: Callable[..., Ends], kind: str) -> None:
    pair = ends(kind)
    pair.ship(0)
    pair.land()
    pair.sent.get(timeout=WAIT_SECONDS)
    pair.receiver.close()
    assert pair.receiver.wait_closed(WAIT_SECONDS)
    pair.ship(1)
    if pair.reads:
        assert pair.sent.get(timeout=WAIT_SECONDS).sequence == 1
    else:
        assert pair.broken.get(timeout=WAIT_SECONDS)[0] == "sender"


@pytest.mark.parametrize("kind", LINKS)
def test_fifty_rebuilds_leave_nothing_behind(owner: Owner, kind: str) -> None:
    def exchange(epoch: int) -> str:
        pair = Ends(owner, kind, f"rebuilt {kind}", epoch, None)
        for number in (1, 2):
            pair.ship(number)
            pair.land()
            pair.sent.get(timeout=WAIT_SECONDS)
        pair.close()
        return pair.address.key

    exchange(1)
    before = held()
    for epoch in range(2, REBUILDS + 2):
        key = exchange(epoch)
    deadline = time.monotonic() + WAIT_SECONDS
    while (more := what_grew(before)) and time.monotonic() < deadline:
        pass  # the store closes its ends of our connections when it comes round
    assert not more
    # What the last epoch's sender had not read yet; the next one takes it away.
    left = [name.split("/", 1)[1] for name in owner.place.join().list_keys() if key in name]
    assert left == ([f"{REBUILDS + 1}/ends/receiver"] if kind == "gloo" else [])


# ---- links that read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READS)
def test_blocks_that_were_given_away_are_refused_and_the_next_parcel_lands(
    ends: Callable[..., Ends], owner: Owner, kind: str
) -> None:
    pair = ends(kind)
    announced: queue.Queue[KvParcel] = queue.Queue()
    pair.ship(7, announced.put)
    stale = announced.get(timeout=WAIT_SECONDS)
    with changed(owner, 8):
        pair.receiver.expect(stale)
        assert pair.land() == (stale, None)
    pair.ship(9)
    parcel, packed = pair.land()
    assert packed is not None
    assert VERIFIER.agrees(parcel, packed)


@pytest.mark.parametrize("kind", READS)
def test_blocks_that_are_given_away_during_the_copy_are_refused(
    ends: Callable[..., Ends], owner: Owner, kind: str
) -> None:
    """A reader that was stopped in the middle, and goes on when the blocks are another's, drops what it has."""
    looked, on = threading.Event(), threading.Event()
    pair = ends(kind, view=lambda: ArenaView(owner.arena.memory.arena, Held(owner, looked, on)))
    pair.ship(3)
    assert looked.wait(WAIT_SECONDS)
    with changed(owner, 3):
        on.set()
        assert pair.land()[1] is None


@pytest.mark.parametrize("kind", READS)
def test_close_does_not_wait_for_a_copy_and_the_copy_ends_by_itself(
    ends: Callable[..., Ends], owner: Owner, kind: str
) -> None:
    looked, on = threading.Event(), threading.Event()
    pair = ends(kind, view=lambda: ArenaView(owner.arena.memory.arena, Held(owner, looked, on)))
    pair.ship(3)
    assert looked.wait(WAIT_SECONDS)
    pair.receiver.close()
    assert not pair.receiver.wait_closed(0.0)
    on.set()
    assert pair.receiver.wait_closed(WAIT_SECONDS)
    assert pair.broken.empty()


@pytest.mark.parametrize("kind", READS)
def test_a_parcel_that_names_blocks_nobody_has_is_refused(ends: Callable[..., Ends], owner: Owner, kind: str) -> None:
    pair = ends(kind)
    parcel = owner.parcel(1)
    assert parcel.source is not None
    beyond = KvSource(
        blocks=(BlockId(BLOCKS), BlockId(1)), generations=(0, 0), skip=0, first_head=0, heads=2, wire="fp32"
    )
    pair.receiver.expect(KvParcel(**{**fields(parcel), "source": beyond}))
    assert pair.land()[1] is None


class Held:
    """Generations; after the first parcel was looked up, the next look waits: the copy is under way."""

    def __init__(self, owner: Owner, looked: threading.Event, on: threading.Event) -> None:
        self._owner = owner
        self._looked = looked
        self._on = on

    def __len__(self) -> int:
        if self._looked.is_set():
            self._on.wait(WAIT_SECONDS)
        self._looked.set()
        return BLOCKS

    def __getitem__(self, block: int) -> int:
        return self._owner.arena.memory.generations[block]


class changed:
    """A block is given away, and as it was afterwards."""

    def __init__(self, owner: Owner, block: int) -> None:
        self._memory = owner.arena.memory
        self._owner = owner
        self._block = block

    def __enter__(self) -> None:
        self._owner.give_away(self._block)

    def __exit__(self, *_: object) -> None:
        self._memory.arena[self._block] = self._block


def fields(parcel: KvParcel) -> dict[str, Any]:
    return {name: getattr(parcel, name) for name in parcel.__dataclass_fields__}


def what_grew(before: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Since then. Less than before is what an earlier test was still closing."""
    return {name: (before[name], count) for name, count in held().items() if count > before[name]}


def held() -> dict[str, int]:
    gc.collect()
    with open("/proc/self/maps") as maps:
        mapped = sum("/" in line for line in maps)
    return {
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mapped files": mapped,
    }
