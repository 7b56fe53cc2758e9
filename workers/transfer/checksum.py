"""What a parcel's bytes must be: a CRC on some parcels, or a keyed MAC on all. Knows bytes only."""

from __future__ import annotations

import hashlib
import hmac
import zlib
from typing import TYPE_CHECKING

from diptych.types import Verify

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_EVERY = 8
"""Under `sample`, one parcel in so many carries a CRC-32: it finds a link that corrupts, cheaply."""


class Verifier:
    """`kv.verify`: off, sample (CRC-32 of every 8th parcel of a pair) or all (BLAKE2b-128 with the
    cluster's secret, which also proves that the parcel came from this cluster)."""

    def __init__(self, verify: Verify, secret: bytes) -> None:
        self._verify = verify
        self._secret = secret

    def checksum(self, packed: Tensor, sequence: int) -> bytes | None:
        """packed: [bytes] uint8, copied from its device when needed; `sequence` is the parcel's number on its pair."""
        if self._verify == "off" or (self._verify == "sample" and sequence % SAMPLE_EVERY):
            return None
        view = memoryview(packed.cpu().numpy())  # pyright: ignore[reportArgumentType]
        if self._verify == "sample":
            return zlib.crc32(view).to_bytes(4, "little")
        return hashlib.blake2b(view, key=self._secret, digest_size=16).digest()

    def agrees(self, packed: Tensor, sequence: int, checksum: bytes | None) -> bool:
        """Whether the bytes that came are the bytes that left."""
        ours = self.checksum(packed, sequence)
        return ours is None or (checksum is not None and hmac.compare_digest(ours, checksum))
