"""What HTTP headers wish for a request, beside its body. Where both say something the body counts.

Knows names and shapes; what the numbers may be is checked with all other wishes (`cluster.front.wanted`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from cluster.front.wanted import MAX_MS, MAX_PRIORITY, MAX_TENANT_CHARACTERS, MIN_PRIORITY, Wanted
from diptych.errors import InvalidRequest

if TYPE_CHECKING:
    from starlette.requests import Request

_MAX_DIGITS: Final = 12


class Header(NamedTuple):
    """One header, as the published document tells of it."""

    name: str
    meaning: str
    schema: dict[str, object]


_MILLISECONDS: Final[dict[str, object]] = {"type": "integer", "minimum": 1, "maximum": MAX_MS}
PRIORITY: Final = Header(
    "x-priority",
    "As `priority` in the body, which counts when both are there.",
    {"type": "integer", "minimum": MIN_PRIORITY, "maximum": MAX_PRIORITY},
)
TENANT: Final = Header(
    "x-tenant",
    "As `cache_salt` in the body, which counts when both are there.",
    {"type": "string", "minLength": 1, "maxLength": MAX_TENANT_CHARACTERS},
)
TTFT: Final = Header(
    "x-slo-ttft-ms", "The first token is wished within so long; missing it ends nothing.", _MILLISECONDS
)
ITL: Final = Header("x-slo-itl-ms", "As x-slo-ttft-ms, of the mean time between tokens.", _MILLISECONDS)
DEADLINE: Final = Header(
    "x-request-timeout-ms", "How long the whole answer may take; then it ends with deadline_exceeded.", _MILLISECONDS
)
HEADERS: Final = (DEADLINE, PRIORITY, TENANT, TTFT, ITL)


def with_headers(wanted: Wanted, request: Request, *, has_priority: bool) -> Wanted:
    """The wishes of body and headers. Raises InvalidRequest naming a header that isn't what it should be."""
    priority, tenant = _whole(request, PRIORITY), request.headers.get(TENANT.name)
    if tenant == "":
        raise InvalidRequest(f"{TENANT.name} is empty: name a tenant or leave it out", param=TENANT.name)
    if priority is not None and not has_priority:
        wanted = replace(wanted, priority=priority, priority_name=PRIORITY.name)
    if tenant is not None and not wanted.tenant:
        wanted = replace(wanted, tenant=tenant, tenant_name=TENANT.name)
    return replace(
        wanted,
        ttft_ms=_whole(request, TTFT),
        ttft_ms_name=TTFT.name,
        itl_ms=_whole(request, ITL),
        itl_ms_name=ITL.name,
        deadline_ms=_whole(request, DEADLINE),
        deadline_ms_name=DEADLINE.name,
    )


def _whole(request: Request, header: Header) -> int | None:
    said = request.headers.get(header.name)
    if said is None:
        return None
    digits = said.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= _MAX_DIGITS):
        least, most = header.schema["minimum"], header.schema["maximum"]
        message = f"{header.name} is {said[:40]!r}; it must be a whole number from {least} to {most}"
        raise InvalidRequest(message, param=header.name)
    return int(said)
