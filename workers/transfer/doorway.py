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
import socket
import threading
from contextlib import suppress
from dataclasses import asdict
from typing import Final

from diptych.errors import TransferFailed
from diptych.types import KvLayout
from workers.transfer.shared_arena import ArenaShape, ArenaView, SharedArena

_NONCE_BYTES = 16
_PROOF_BYTES = 32
_HEADER_BYTES = 4096
_VISIT_SECONDS = 2.0
"""A visitor takes microseconds; a stuck one must not keep others out."""


class Doorway:
    """Hands the arena to whoever proves to be of this cluster. `close` it."""

    def __init__(self, arena: SharedArena, secret: bytes) -> None:
        self._arena = arena
        self._secret = secret
        self.address: Final = f"diptych-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._serve, name="kv-doorway", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Idempotent. Those who have the arena keep it."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(_VISIT_SECONDS)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                visitor, _ = self._listener.accept()
            except OSError:
                return  # closed
            with visitor, suppress(OSError):
                visitor.settimeout(_VISIT_SECONDS)
                self._meet(visitor)

    def _meet(self, visitor: socket.socket) -> None:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        visitor.send(nonce)
        if not hmac.compare_digest(visitor.recv(_PROOF_BYTES), _proof(nonce, self._secret)):
            return
        shape = self._arena.shape
        told = {
            "layout": asdict(shape.layout),
            "blocks": shape.blocks,
            "device": shape.device,
            "cuda_handle": self._arena.cuda_handle.hex(),
        }
        socket.send_fds(visitor, [json.dumps(told).encode()], [self._arena.file])


def enter(address: str, secret: bytes, layout: KvLayout) -> ArenaView:
    """The arena behind a doorway. Raises TransferFailed when there is no way in, or another layout behind it."""
    files: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
            visitor.settimeout(_VISIT_SECONDS)
            visitor.connect(f"\0{address}")
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
