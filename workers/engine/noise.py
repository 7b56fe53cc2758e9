"""The randomness of sampling: one uniform per token, a pure function of where it is used.

Knows no generator state: the same (seed, choice, position) gives the same uniform on every worker,
in every batch, before and after a migration.
"""

from __future__ import annotations

import hashlib
import struct

_KEY = struct.Struct("<QQQ")


def uniform(seed: int, choice: int, position: int) -> float:
    """In [0, 1), 53 bits of BLAKE2b over the three numbers. `position` is the token's index in
    prompt plus answer."""
    digest = hashlib.blake2b(_KEY.pack(seed, choice, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
