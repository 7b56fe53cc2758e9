"""A two-rank process group between one sender and one receiver. Knows bytes, not blocks.

gloo between CPUs, NCCL between GPUs, by the same class. No default group, no world: members come
and go, and a death touches one pair. Every call is made by the pair's one link thread, but `close`,
which any thread may call to end a wait at once.

Facts this rests on (torch 2.13): a timed-out gloo `wait` closes the pair for good, so a timeout is
an end and never a poll; gloo's `abort` leaves a waiting receive blocked, shutting the pair's
sockets wakes it; NCCL ignores tags, so order is the only match.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from diptych.errors import TransferFailed
from diptych.types import KvParcel, LinkKind, PairAddress
from workers.transfer.buffers import Buffers
from workers.transfer.sockets import Address, Connections, close_all, connected, is_cut, listening, open_sockets

Side = Literal["sender", "receiver"]
_LOOK_SECONDS = 0.005
"""How often one side of a pair looks whether the other came."""
_RANK: dict[Side, int] = {"sender": 0, "receiver": 1}


class _Work(Protocol):
    def wait(self, timeout: timedelta) -> bool: ...


class _Group(Protocol):
    """What ProcessGroupGloo and ProcessGroupNCCL have beyond torch's stubs of them."""

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> _Work: ...

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> _Work: ...

    def abort(self) -> None: ...


class MeetingPlace:
    """The store where a receiver's pairs rendezvous, on a socket it bound itself.

    TCPStore given a port listens on all addresses; given a bound socket it listens there only.
    """

    def __init__(self, host: str, timeout_seconds: float) -> None:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.bind((host, 0))
        listener.listen()
        self.host = host
        self.port: int = listener.getsockname()[1]
        self._store = TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_seconds),
            master_listen_fd=listener.detach(),
        )

    def join(self) -> Store:
        """A connection of the caller's own: a blocked `get` stalls every user of its client."""
        # torch's stubs don't know it.
        return cast("Store", self._store.clone())  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


class Link(Protocol):
    """One end of a pair. Used by the pair's thread alone, but for `close`. All raise TransferFailed."""

    def open(self, address: PairAddress, place: MeetingPlace | None = None) -> None:
        """Meet the other side; the receiver has the meeting place."""
        ...

    def send(self, content: Callable[[], Tensor]) -> None:
        """content: [nbytes] uint8."""
        ...

    def receive(self, parcel: KvParcel) -> Tensor | None:
        """[nbytes] uint8 in a new buffer that is nobody else's; None when the content was given up meanwhile."""
        ...

    def close(self) -> None:
        """Idempotent, from any thread: ends a wait under way, never waits itself."""
        ...


class PairLink:
    """One direction between two workers: rank 0 sends, rank 1 receives."""

    def __init__(
        self,
        kind: LinkKind,
        side: Side,
        host: str,
        device: torch.device,
        timeout_seconds: float,
        buffers: Buffers | None = None,
    ) -> None:
        """`host` is this side's own address; `timeout_seconds` bounds every wait."""
        self._buffers = buffers or Buffers()
        self._kind = kind
        self._side: Side = side
        self._host = host
        # gloo moves host memory: blocks of a GPU cross it by way of the CPU.
        self._device = device if kind == "nccl" else torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None
        self._timeout = timedelta(seconds=timeout_seconds)
        self._group: _Group | None = None
        self._sockets: tuple[socket.socket, ...] = ()
        self._closed = threading.Event()

    def open(self, address: PairAddress, place: MeetingPlace | None = None) -> None:
        """Meet the other side; both call it. Raises TransferFailed within the timeout."""
        key = f"{address.key}/{address.epoch}"
        try:
            store = place.join() if place else self._dial(address)
            store.set_timeout(self._timeout)
            prefixed = PrefixStore(key, store)
            self._meet(prefixed, key)
            if self._kind == "gloo":
                self._open_gloo(prefixed)
            else:
                self._open_nccl(prefixed)
        except RuntimeError as error:  # DistStoreError and gloo's timeouts are RuntimeErrors
            raise TransferFailed(f"pair {key} did not meet within {self._timeout}: {error}") from error
        if place:
            self._forget(store, address)
        if self._closed.is_set():  # before it had sockets to shut
            self.close()
            raise TransferFailed(f"pair {key} was closed while it opened")

    def send(self, content: Callable[[], Tensor]) -> None:
        """Returns when the receiver has it (gloo) or it left (NCCL)."""
        assert self._side == "sender"
        self._run(content().to(self._device))

    def receive(self, parcel: KvParcel) -> Tensor:
        """The next bytes of the pair."""
        assert self._side == "receiver"
        if self._device.type == "cpu":
            packed = self._buffers.take(parcel.nbytes)
        else:
            packed = torch.empty(parcel.nbytes, dtype=torch.uint8, device=self._device)
        self._run(packed)
        return packed

    def close(self) -> None:
        """Idempotent, from any thread: ends a wait under way, never waits itself."""
        self._closed.set()
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        if self._kind == "nccl" and self._group is not None:
            self._group.abort()  # never destroy: that is a collective and hangs on a dead peer

    def _run(self, packed: Tensor) -> None:
        if self._closed.is_set() or self._group is None:
            raise TransferFailed("the pair is closed")
        peer = 1 - _RANK[self._side]
        try:
            run = self._group.send if self._side == "sender" else self._group.recv
            with self._own_stream():
                work = run([packed], peer, 0)
                # Cut before it began: gloo would not notice until its timeout.
                if self._closed.is_set() or any(is_cut(end) for end in self._sockets):
                    raise TransferFailed("the other side is gone")
                # With a timeout NCCL's wait, too, blocks this thread until the data moved.
                work.wait(self._timeout)
        except RuntimeError as error:
            raise TransferFailed(f"the pair broke: {error}") from error

    def _own_stream(self) -> AbstractContextManager[object]:
        """On a GPU: after what the engine has queued so far (the packing), beside what it queues next."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        return torch.cuda.stream(self._stream)

    def _meet(self, store: Store, key: str) -> None:
        """Until the other side is here too, and neither has given up.

        This wait alone may be long, so `close` ends it. Whether the pair is opened is settled by one
        write: nobody goes on to wait, where nothing ends it, for one who has left.
        """
        theirs = "receiver" if self._side == "sender" else "sender"
        store.set(f"here/{self._side}", "")
        deadline = time.monotonic() + self._timeout.total_seconds()
        wanted, why = "opened", f"the {theirs} gave up"
        while wanted == "opened" and not store.check([f"here/{theirs}"]):
            if self._closed.wait(_LOOK_SECONDS):
                wanted, why = "given up", "it was closed"
            elif time.monotonic() > deadline:
                wanted, why = "given up", f"no {theirs} came"
        if store.compare_set("fate", "", wanted) != b"opened":
            raise TransferFailed(f"pair {key} did not meet within {self._timeout}: {why}")

    def _dial(self, address: PairAddress) -> TCPStore:
        return TCPStore(address.host, address.port, is_master=False, wait_for_workers=False, timeout=self._timeout)

    def _open_gloo(self, store: Store) -> None:
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs know half of it
        before = open_sockets()
        device = gloo.create_device(hostname=self._host)
        listeners = listening(open_sockets() - before)
        options = gloo._Options()
        options._devices = [device]
        options._timeout = self._timeout
        options._threads = 1
        before = open_sockets()
        self._group = gloo(store, _RANK[self._side], 2, options)
        self._sockets = self._agree(store, listeners, connected(open_sockets() - before))

    def _open_nccl(self, store: Store) -> None:
        # The default tears the process down on an error; timeouts are ours to own.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        nccl: Any = dist.ProcessGroupNCCL  # only builds with CUDA have it
        options = nccl.Options()
        options._timeout = self._timeout
        options.config.max_ctas = 4  # a transfer must not take the SMs that compute needs
        group = nccl(store, _RANK[self._side], 2, options)
        group.eager_connect_single_device(self._device)
        self._group = group
        self._stream = torch.cuda.Stream(self._device)

    def _agree(self, store: Store, listeners: set[Address], candidates: Connections) -> tuple[socket.socket, ...]:
        """The sockets that both sides hold an end of, at one of gloo's two listeners: no other is ever shut."""
        try:
            theirs = "receiver" if self._side == "sender" else "sender"
            store.set(f"ends/{self._side}", json.dumps([[*listeners], [*candidates]]))
            their_listeners, their_ends = json.loads(store.get(f"ends/{theirs}"))
            listeners = listeners | set(their_listeners)
            other = {(here, there) for here, there in their_ends}
        except BaseException:
            close_all(candidates.values())
            raise
        ours = {ends for ends in candidates if ends[::-1] in other and not listeners.isdisjoint(ends)}
        close_all(end for ends, end in candidates.items() if ends not in ours)
        return tuple(candidates[ends] for ends in ours)

    def _forget(self, store: Store, address: PairAddress) -> None:
        """The keys of this rendezvous, and of the pair's earlier ones, are of no use to anyone.

        The sender may not have read our ends yet: those go with the next epoch.
        """
        unread = f"{address.key}/{address.epoch}/ends/receiver"
        for name in store.list_keys():
            if f"{address.key}/" in name and unread not in name:
                store.delete_key(name)
