"""Whether workers of some roles can answer requests together. Knows roles alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from cluster.config import Config
    from diptych.types import Role


def unserved(config: Config, roles: Collection[Role]) -> str:
    """What would be wrong with just these; empty when requests are answered."""
    if not set(roles) - {"prefill"}:
        return "nobody would decode"
    if config.placement.how == "remote" and not {"prefill", "decode"} <= set(roles):
        return "placement.how = 'remote' would lack a prefill or a decode worker"
    return ""
