"""Where readers on this machine get a worker's arena: an abstract Unix socket that hands over its file.

Only processes of the same network namespace reach it (pods on one host may not: that is found out by
trying), and only those that know the cluster's secret are let in. Knows no ticket.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Final

from diptych.errors import TransferFailed
from diptych.types import KvLayout
from workers.transfer.shared_arena import ArenaShape, ArenaView, SharedArena

_NONCE_BYTES = 16
_PROOF_BYTES = 32
_HEADER_BYTES = 4096
_VISIT_SECONDS = 2
"""A visit takes microseconds; one that takes longer is over."""
_MOST_VISITORS = 64
"""At once; who came first goes first."""
_PAUSE_SECONDS = 0.1
"""After a visitor could not be let in for want of a descriptor."""


@dataclass(frozen=True, slots=True, eq=False)
class _Visit:
    visitor: socket.socket
    nonce: bytes
    deadline: float


class Doorway:
    """Hands the arena to whoever proves to be of this cluster; a visitor who stalls keeps nobody out. `close` it."""

    def __init__(self, arena: SharedArena, secret: bytes) -> None:
        self._arena = arena
        self._secret = secret
        self.address: Final = f"diptych-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen(_MOST_VISITORS)
        self._listener.setblocking(False)
        self._visits: dict[int, _Visit] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="kv-doorway", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Idempotent. Those who have the arena keep it."""
        self._closed.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(_VISIT_SECONDS)
        self._listener.close()

    def _serve(self) -> None:
        door = self._listener.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(door, selectors.EVENT_READ)
            while not self._closed.is_set():
                for key, _ in selector.select(_VISIT_SECONDS if self._visits else None):
                    if key.fd == door:
                        self._welcome(selector)
                    elif visit := self._visits.get(key.fd):
                        self._answer(visit)
                        self._part(visit, selector)
                now = time.monotonic()
                for visit in [each for each in self._visits.values() if each.deadline <= now]:
                    self._part(visit, selector)
            for visit in list(self._visits.values()):
                self._part(visit, selector)

    def _welcome(self, selector: selectors.BaseSelector) -> None:
        try:
            visitor, _ = self._listener.accept()
        except BlockingIOError:
            return  # gone again
        except OSError:
            self._closed.wait(_PAUSE_SECONDS)
            return
        if len(self._visits) == _MOST_VISITORS:
            self._part(next(iter(self._visits.values())), selector)
        visitor.setblocking(False)
        visit = _Visit(visitor, secrets.token_bytes(_NONCE_BYTES), time.monotonic() + _VISIT_SECONDS)
        self._visits[visitor.fileno()] = visit
        selector.register(visitor, selectors.EVENT_READ)
        with suppress(OSError):  # gone again: then it is readable
            visitor.send(visit.nonce)

    def _part(self, visit: _Visit, selector: selectors.BaseSelector) -> None:
        del self._visits[visit.visitor.fileno()]
        selector.unregister(visit.visitor)
        visit.visitor.close()

    def _answer(self, visit: _Visit) -> None:
        with suppress(OSError):
            if hmac.compare_digest(visit.visitor.recv(_PROOF_BYTES), _proof(visit.nonce, self._secret)):
                socket.send_fds(visit.visitor, [self._told()], [self._arena.file])

    def _told(self) -> bytes:
        shape = self._arena.shape
        told = {
            "layout": asdict(shape.layout),
            "blocks": shape.blocks,
            "device": shape.device,
            "cuda_handle": self._arena.cuda_handle.hex(),
        }
        return json.dumps(told).encode()


def enter(address: str, secret: bytes, layout: KvLayout) -> ArenaView:
    """The arena behind a doorway. Raises TransferFailed when there is no way in, or another layout behind it."""
    files: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
            # With a timeout of Python's a queue of others would be an error at once.
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_VISIT_SECONDS), 0))
            visitor.connect(f"\0{address}")
            visitor.settimeout(_VISIT_SECONDS)
            visitor.send(_proof(visitor.recv(_NONCE_BYTES), secret))
            header, files, _, _ = socket.recv_fds(visitor, _HEADER_BYTES, 1)
            if not header or not files:
                raise TransferFailed(f"{address} hands nothing over: another cluster's secret?")
            told = json.loads(header)
            shape = ArenaShape(layout=KvLayout(**told["layout"]), blocks=told["blocks"], device=told["device"])
            if shape.layout != layout:
                raise TransferFailed(f"{address} has {shape.layout}, expected {layout}")
            return ArenaView.of_file(files[0], shape, bytes.fromhex(told["cuda_handle"]))
    except OSError as error:
        raise TransferFailed(f"{address} can't be mapped: {error}") from error
    finally:
        for file in files:
            os.close(file)


def _proof(nonce: bytes, secret: bytes) -> bytes:
    return hashlib.blake2b(nonce, key=secret[:64], digest_size=_PROOF_BYTES).digest()
