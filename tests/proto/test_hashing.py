"""Names of KV blocks: what may share one, and what may not."""

from __future__ import annotations

import struct

from diptych.hashing import GRANULE, KvIdentity, granule_hashes, tenant_root

ROOT = KvIdentity(model_digest="m", weight_format="fp32", kv_dtype="fp32").root()


def test_each_tenant_has_a_root_of_its_own_and_nobody_has_the_shared_one() -> None:
    roots = {tenant_root(ROOT, tenant) for tenant in ("", "red", "blue", "\x1f", "red\x1fblue")}
    assert len(roots) == 5
    assert tenant_root(ROOT, "") == ROOT
    assert tenant_root(ROOT, "red") == tenant_root(ROOT, "red")


def test_no_tenants_name_leads_into_another_ones_prompt() -> None:
    """A name that spells a granule's tokens would, were it hashed as they are."""
    tokens = [ord(letter) for letter in "abcdefghijklmnop"]
    [granule] = granule_hashes(tokens, ROOT)
    assert len(tokens) == GRANULE
    assert tenant_root(ROOT, struct.pack(f"<{GRANULE}I", *tokens).decode()) != granule
