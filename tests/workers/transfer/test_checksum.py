"""What a parcel carries so that its bytes can be trusted, for each `kv.verify`."""

from __future__ import annotations

import hashlib
import zlib

import pytest
import torch

from workers.transfer.checksum import SAMPLE_EVERY, Verifier

BYTES = torch.arange(1000, dtype=torch.int32).to(torch.uint8)
RAW = bytes(BYTES.tolist())


def flipped(at: int) -> torch.Tensor:
    other = BYTES.clone()
    other[at] ^= 1
    return other


def test_off_asks_for_nothing() -> None:
    verifier = Verifier("off", b"k")
    assert verifier.checksum(BYTES, 0) is None
    assert verifier.agrees(flipped(3), 0, None)


def test_sample_carries_a_crc_32_on_every_eighth_parcel_from_the_first() -> None:
    verifier = Verifier("sample", b"k")
    carried = [verifier.checksum(BYTES, sequence) for sequence in range(2 * SAMPLE_EVERY + 1)]
    assert [at for at, checksum in enumerate(carried) if checksum] == [0, 8, 16]
    assert carried[0] == zlib.crc32(RAW).to_bytes(4, "little")
    assert verifier.agrees(BYTES, 8, carried[8])
    assert not verifier.agrees(flipped(999), 8, carried[8])
    assert verifier.agrees(flipped(999), 9, None)


def test_all_carries_a_mac_that_only_this_cluster_can_make() -> None:
    verifier = Verifier("all", b"secret")
    mac = verifier.checksum(BYTES, 5)
    assert mac == hashlib.blake2b(RAW, key=b"secret", digest_size=16).digest()
    assert verifier.agrees(BYTES, 5, mac)
    assert not verifier.agrees(flipped(0), 5, mac)
    assert not Verifier("all", b"other").agrees(BYTES, 5, mac)


@pytest.mark.parametrize("verify", ["sample", "all"])
def test_a_checksum_that_is_missing_or_cut_is_no_checksum(verify: str) -> None:
    verifier = Verifier(verify, b"k")
    checksum = verifier.checksum(BYTES, 0)
    assert checksum is not None
    assert not verifier.agrees(BYTES, 0, None)
    assert not verifier.agrees(BYTES, 0, checksum[:-1])
