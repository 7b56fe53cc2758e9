"""What a parcel's bytes must be: a CRC on some parcels, or a keyed MAC on all. Knows bytes only."""

from __future__ import annotations

import hashlib
import hmac
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from diptych.types import KvParcel, Verify

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_EVERY = 8
"""Under `sample`, one parcel in so many carries a CRC-32: it finds a link that corrupts, cheaply."""


class Verifier:
    """`kv.verify`: off, sample (CRC-32 of every 8th parcel of a pair) or all (BLAKE2b-128 with the
    cluster's secret, which also proves that the parcel came from this cluster).

    A checksum is of the parcel's own words and of its content: bytes that were swapped with
    another ticket's are as wrong as bytes that changed.
    """

    def __init__(self, verify: Verify, secret: bytes) -> None:
        self._verify = verify
        self._secret = secret

    def checksum(self, parcel: KvParcel, content: Callable[[], Tensor]) -> bytes | None:
        """content: [bytes] uint8, copied from its device; asked for only when this parcel carries a checksum."""
        if self._verify == "off" or (self._verify == "sample" and parcel.sequence % SAMPLE_EVERY):
            return None
        words = _words(parcel)
        view = memoryview(content().cpu().numpy())  # pyright: ignore[reportArgumentType]
        if self._verify == "sample":
            return zlib.crc32(view, zlib.crc32(words)).to_bytes(4, "little")
        mac = hashlib.blake2b(words, key=self._secret, digest_size=16)
        mac.update(view)
        return mac.digest()

    def agrees(self, parcel: KvParcel, content: Tensor) -> bool:
        """Whether the bytes that came are the bytes that left."""
        ours = self.checksum(parcel, lambda: content)
        return ours is None or (parcel.checksum is not None and hmac.compare_digest(ours, parcel.checksum))


def _words(parcel: KvParcel) -> bytes:
    where = (parcel.transfer, parcel.leg, parcel.pair, parcel.epoch)
    said = (*where, parcel.sequence, parcel.first, parcel.count, parcel.nbytes)
    return "\x1f".join(map(str, said)).encode() + b"\x1f"
