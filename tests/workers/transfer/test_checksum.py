"""What a parcel carries so that its bytes can be trusted, for each `kv.verify`."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import pytest
import torch

from diptych.types import KvParcel, TransferId
from workers.transfer.checksum import SAMPLE_EVERY, Verifier


def parcel(sequence: int, checksum: bytes | None = None, **words: Any) -> KvParcel:
    where = {"transfer": TransferId("t"), "leg": 0, "pair": "p>d", "epoch": 1}
    values = {**where, "first": 0, "count": 1, "nbytes": 1000, **words}
    return KvParcel(sequence=sequence, checksum=checksum, **values)


def checksum(verifier: Verifier, sequence: int) -> bytes | None:
    return verifier.checksum(parcel(sequence), lambda: BYTES)


BYTES = torch.arange(1000, dtype=torch.int32).to(torch.uint8)
RAW = bytes(BYTES.tolist())
WORDS = b"t\x1f0\x1fp>d\x1f1\x1f%d\x1f0\x1f1\x1f1000\x1f"


def flipped(at: int) -> torch.Tensor:
    other = BYTES.clone()
    other[at] ^= 1
    return other


def test_off_asks_for_nothing() -> None:
    verifier = Verifier("off", b"k")
    assert checksum(verifier, 0) is None
    assert verifier.agrees(parcel(0, None), flipped(3))


def test_sample_carries_a_crc_32_on_every_eighth_parcel_from_the_first() -> None:
    verifier = Verifier("sample", b"k")
    carried = [checksum(verifier, sequence) for sequence in range(2 * SAMPLE_EVERY + 1)]
    assert [at for at, checksum in enumerate(carried) if checksum] == [0, 8, 16]
    assert carried[0] == zlib.crc32(WORDS % 0 + RAW).to_bytes(4, "little")
    assert verifier.agrees(parcel(8, carried[8]), BYTES)
    assert not verifier.agrees(parcel(8, carried[8]), flipped(999))
    assert verifier.agrees(parcel(9, None), flipped(999))


def test_all_carries_a_mac_that_only_this_cluster_can_make() -> None:
    verifier = Verifier("all", b"secret")
    mac = checksum(verifier, 5)
    assert mac == hashlib.blake2b(WORDS % 5 + RAW, key=b"secret", digest_size=16).digest()
    assert verifier.agrees(parcel(5, mac), BYTES)
    assert not verifier.agrees(parcel(5, mac), flipped(0))
    assert not Verifier("all", b"other").agrees(parcel(5, mac), BYTES)


@pytest.mark.parametrize("verify", ["sample", "all"])
def test_a_checksum_that_is_missing_or_cut_is_no_checksum(verify: str) -> None:
    verifier = Verifier(verify, b"k")
    whole = checksum(verifier, 0)
    assert whole is not None
    assert not verifier.agrees(parcel(0, None), BYTES)
    assert not verifier.agrees(parcel(0, whole[:-1]), BYTES)


@pytest.mark.parametrize("words", [{"transfer": TransferId("u")}, {"leg": 1}, {"epoch": 2}, {"first": 1}, {"count": 2}])
@pytest.mark.parametrize("verify", ["sample", "all"])
def test_bytes_that_were_meant_for_another_parcel_are_wrong(verify: str, words: dict[str, Any]) -> None:
    verifier = Verifier(verify, b"k")
    assert verifier.agrees(parcel(0, checksum(verifier, 0)), BYTES)
    assert not verifier.agrees(parcel(0, checksum(verifier, 0), **words), BYTES)
