"""Two ends of a real gloo pair: how they meet, and how a wait ends. What all links do is in `test_link_contract`."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.errors import TransferFailed
from diptych.types import KvParcel, PairAddress
from workers.transfer.checksum import Verifier
from workers.transfer.link import MeetingPlace, PairLink
from workers.transfer.pair import ReceiverPair, SenderPair, Shipment

HOST = "127.0.0.1"
CPU = torch.device("cpu")
WAIT_SECONDS = 20.0
VERIFIER = Verifier("all", b"secret")


@pytest.fixture(scope="module")
def place() -> MeetingPlace:
    return MeetingPlace(HOST, WAIT_SECONDS)


def shipment(number: int, announce: Callable[[KvParcel], None], sent: Callable[[KvParcel], None]) -> Shipment:
    packed = torch.full((1000 * number + 8,), number % 256, dtype=torch.uint8)
    parcel = KvParcel(transfer="t", leg=0, pair="p>d", epoch=1, sequence=0, first=number, count=1, nbytes=len(packed))
    return Shipment(parcel=parcel, content=lambda: packed, announce=announce, sent=sent)


@dataclass
class Ends:
    """A sender and a receiver; what happened to them, in queues a test can wait on."""

    place: MeetingPlace
    address: PairAddress
    timeout_seconds: float = WAIT_SECONDS
    landed: queue.Queue[tuple[KvParcel, Tensor]] = field(default_factory=queue.Queue)
    sent: queue.Queue[KvParcel] = field(default_factory=queue.Queue)
    broken: queue.Queue[tuple[str, TransferFailed]] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.receiver = ReceiverPair(
            self.link("receiver"),
            self.address,
            0,
            self.place,
            lambda parcel, packed: self.landed.put((parcel, packed)),
            lambda error: self.broken.put(("receiver", error)),
        )
        self.sender = SenderPair(
            self.link("sender"), self.address, VERIFIER, lambda error: self.broken.put(("sender", error))
        )

    def link(self, side: Any) -> PairLink:
        return PairLink("gloo", side, HOST, CPU, self.timeout_seconds)

    def ship(self, number: int, announce: Callable[[KvParcel], None] | None = None) -> None:
        self.sender.ship(shipment(number, announce or self.receiver.expect, self.sent.put))

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        assert self.sender.wait_closed(WAIT_SECONDS)
        assert self.receiver.wait_closed(WAIT_SECONDS)


@pytest.fixture
def ends(place: MeetingPlace, request: pytest.FixtureRequest) -> Iterator[Callable[..., Ends]]:
    made: list[Ends] = []

    def make(epoch: int = 1, **values: Any) -> Ends:
        address = PairAddress(host=HOST, port=place.port, key=request.node.name, epoch=epoch)
        made.append(Ends(place, address, **values))
        return made[-1]

    yield make
    for each in made:
        each.close()


def keys(place: MeetingPlace, name: str) -> list[str]:
    return [key for key in place.join().list_keys() if name in key]


def test_close_ends_a_receive_that_waits(ends: Callable[..., Ends]) -> None:
    pair = ends()
    pair.ship(0)
    pair.landed.get(timeout=WAIT_SECONDS)
    pair.receiver.expect(KvParcel(transfer="t", leg=0, pair="p>d", epoch=1, sequence=1, first=0, count=1, nbytes=100))
    pair.receiver.close()
    assert pair.receiver.wait_closed(WAIT_SECONDS / 2)


def test_close_ends_a_send_that_waits(ends: Callable[..., Ends]) -> None:
    pair = ends()
    pair.ship(0)
    pair.landed.get(timeout=WAIT_SECONDS)
    announced = threading.Event()
    pair.ship(500, lambda _: announced.set())  # nobody receives it
    announced.wait(WAIT_SECONDS)
    pair.sender.close()
    assert pair.sender.wait_closed(WAIT_SECONDS / 2)
    side, error = pair.broken.get(timeout=WAIT_SECONDS)
    assert (side, type(error)) == ("sender", TransferFailed)


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_close_ends_a_wait_for_the_other_side(ends: Callable[..., Ends], side: str) -> None:
    pair = ends(timeout_seconds=600.0)
    waits = threading.Event()
    if side == "sender":
        pair.ship(0, lambda _: waits.set())
        waits.wait(WAIT_SECONDS)
    else:
        pair.receiver.expect(
            KvParcel(transfer="t", leg=0, pair="p>d", epoch=1, sequence=0, first=0, count=1, nbytes=100)
        )
    end = getattr(pair, side)
    end.close()
    assert end.wait_closed(WAIT_SECONDS)


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_who_comes_after_the_other_gave_up_does_not_wait_for_it(ends: Callable[..., Ends], side: str) -> None:
    pair = ends(timeout_seconds=600.0)
    announced: queue.Queue[KvParcel] = queue.Queue()
    if side == "receiver":
        pair.ship(0, announced.put)
        parcel = announced.get(timeout=WAIT_SECONDS)
        while not any("here/sender" in key for key in keys(pair.place, pair.address.key)):
            pass
        pair.sender.close()
        assert pair.sender.wait_closed(WAIT_SECONDS)
        pair.receiver.expect(parcel)
    else:
        pair.receiver.expect(KvParcel(transfer="t", leg=0, pair="p>d", epoch=1, sequence=0, first=0, count=1, nbytes=8))
        while not any("here/receiver" in key for key in keys(pair.place, pair.address.key)):
            pass
        pair.receiver.close()
        assert pair.receiver.wait_closed(WAIT_SECONDS)
        pair.ship(0, announced.put)
    errors = [pair.broken.get(timeout=WAIT_SECONDS) for _ in range(2)]
    assert errors[1][0] == side
    assert "gave up" in str(errors[1][1])


def test_who_never_met_its_peer_fails_within_its_timeout(ends: Callable[..., Ends]) -> None:
    pair = ends(timeout_seconds=0.1)
    pair.ship(0, lambda _: None)
    side, error = pair.broken.get(timeout=WAIT_SECONDS)
    assert side == "sender"
    assert "did not meet within 0:00:00.1" in str(error)
    with pytest.raises(TransferFailed, match="closed"):
        pair.sender._link.send(lambda: torch.zeros(1, dtype=torch.uint8))


def test_a_store_that_is_gone_fails_the_sender_within_its_timeout(ends: Callable[..., Ends]) -> None:
    with socket.socket() as gone:
        gone.bind((HOST, 0))
        port = gone.getsockname()[1]
    link = PairLink("gloo", "sender", HOST, CPU, 0.2)
    with pytest.raises(TransferFailed, match="did not meet"):
        link.open(PairAddress(host=HOST, port=port, key="k", epoch=1))


def test_the_death_of_one_end_is_heard_at_the_other(ends: Callable[..., Ends]) -> None:
    pair = ends()
    pair.ship(0)
    pair.landed.get(timeout=WAIT_SECONDS)
    pair.sent.get(timeout=WAIT_SECONDS)  # or its own end breaks first
    pair.receiver.expect(KvParcel(transfer="t", leg=0, pair="p>d", epoch=1, sequence=1, first=0, count=1, nbytes=100))
    pair.sender.close()
    side, error = pair.broken.get(timeout=WAIT_SECONDS)
    assert (side, type(error)) == ("receiver", TransferFailed)


def test_a_pair_that_nothing_is_sent_over_is_never_opened(ends: Callable[..., Ends], place: MeetingPlace) -> None:
    pair = ends()
    pair.close()
    assert pair.broken.empty()
    assert keys(place, pair.address.key) == []


def test_a_pair_closes_its_own_sockets_and_no_others(ends: Callable[..., Ends]) -> None:
    pair = ends()
    with socket.create_server((HOST, 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        # These, too, appear in the process while the pair opens its own.
        others: list[socket.socket] = []

        def announce(parcel: KvParcel) -> None:
            pair.receiver.expect(parcel)
            others.extend(socket.socketpair())
            with socket.create_server((HOST, 0)) as late:
                others.append(socket.create_connection(late.getsockname()))
                others.append(late.accept()[0])

        pair.ship(0, announce)
        pair.landed.get(timeout=WAIT_SECONDS)
        pair.close()
        for one, other in ((client, accepted), (others[0], others[1]), (others[2], others[3])):
            one.sendall(b"still here")
            assert other.recv(10) == b"still here"
            one.close()
            other.close()
