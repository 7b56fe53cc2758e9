"""Names of KV blocks: SHA-256 over the chain of 16-token granules. Knows tokens, not tensors.

Two blocks have the same name only if everything that shaped their content is the same: every
token before and in them, the model, the adapter, the tenant's salt, and the weight format and KV
dtype of the worker that computed them. The chain starts at a root over the latter; granule i's
name is SHA-256(name of granule i - 1, its 16 token ids as little-endian uint32). A worker's
block is a whole number of granules and takes the name of its last one, so workers with different
block sizes agree on names.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from diptych.types import BlockHash

GRANULE = 16
_PACK = struct.Struct(f"<{GRANULE}I")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvIdentity:
    """What besides the tokens decides the bits of a KV block."""

    model_digest: str
    weight_format: str
    kv_dtype: str
    adapter: str = ""
    salt: str = ""

    def root(self) -> BlockHash:
        """The name every chain of this identity starts from."""
        text = "\x1f".join((self.model_digest, self.weight_format, self.kv_dtype, self.adapter, self.salt))
        return BlockHash(hashlib.sha256(text.encode()).digest())


def tenant_root(root: BlockHash, tenant: str) -> BlockHash:
    """As `KvIdentity.salt`, where only the root is known. The empty tenant's is `root` itself.

    What is hashed is shorter than a granule's, so no tenant's name makes a root that is some prompt's granule.
    """
    if not tenant:
        return root
    return BlockHash(hashlib.sha256(b"tenant\x1f" + root + hashlib.sha256(tenant.encode()).digest()).digest())


def granule_hashes(tokens: Sequence[int], root: BlockHash, *, start: int = 0) -> tuple[BlockHash, ...]:
    """Names of the full granules of `tokens[start:]`.

    `start` is a multiple of 16 and `root` the name of the granule that ends there (the
    identity's root when `start` is 0).
    """
    names: list[BlockHash] = []
    name = root
    for at in range(start, len(tokens) - GRANULE + 1, GRANULE):
        name = BlockHash(hashlib.sha256(name + _PACK.pack(*tokens[at : at + GRANULE])).digest())
        names.append(name)
    return tuple(names)


def block_hashes(granules: Iterable[BlockHash], block_size: int) -> tuple[BlockHash, ...]:
    """Names of the full blocks of `block_size` tokens, from the names of their granules."""
    per_block = granules_per_block(block_size)
    return tuple(islice(granules, per_block - 1, None, per_block))


def granules_per_block(block_size: int) -> int:
    """Raises ValueError unless `block_size` is a positive multiple of the granule."""
    if block_size <= 0 or block_size % GRANULE:
        raise ValueError(f"block size {block_size} is not a multiple of {GRANULE} tokens")
    return block_size // GRANULE
