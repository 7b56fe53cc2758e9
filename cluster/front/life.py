"""A request over all its attempts: what is left of it, and whether there is another try. Knows no worker."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diptych.errors import Draining, EngineBroke, Internal
from diptych.hashing import GRANULE, granule_hashes

if TYPE_CHECKING:
    from cluster.front.inbox import Inbox
    from cluster.front.outcomes import Watch
    from cluster.front.service import Ask
    from diptych.errors import ServingError
    from diptych.types import Request

_LOSSES = 3
"""Workers that a request may lose one after the other without a token in between: it may be what kills them."""
_BREAKS = 2
"""Engines that may break in a step with a request, whatever it says in between: the next one ends it. Fewer than a
pool replaces by default (`cluster.max_deaths`)."""
_ATTEMPTS = 16


@dataclass(slots=True)
class Life:
    """A request over all its attempts."""

    ask: Ask
    request: Request
    """As it came."""
    inbox: Inbox
    watch: Watch
    losses: int = 0
    """Without a token in between."""
    breaks: int = 0
    waits_until: float | None = None
    """Since its last token it has nobody to wait for but until then."""

    def continued(self) -> Request:
        """What is left to do."""
        request, said = self.request, self.inbox.said
        if not said:
            return request
        tokens = (*request.tokens, *said)
        chain = request.granules[-1] if request.granules else request.root
        more = granule_hashes(tokens, chain, start=len(request.granules) * GRANULE)
        return replace(request, tokens=tokens, granules=(*request.granules, *more), said=len(said))

    def lost(self, error: ServingError) -> None:
        """An attempt ended. Raises `error` when there is no other."""
        if self.inbox.spoke:
            self.losses, self.waits_until = 0, None
        if isinstance(error, EngineBroke):
            self.breaks += 1
        if self.breaks > _BREAKS:
            raise Internal(f"{self.breaks} engines broke while they computed it, and it may be why: {error}")
        if not isinstance(error, Draining):
            self.losses += 1
        if self.losses > _LOSSES or self.inbox.attempt + 1 >= _ATTEMPTS:
            raise error

    def wait(self, now: float, until: float, error: ServingError) -> None:
        """There is nobody to ask. Raises `error` when that was so for too long."""
        if self.waits_until is None:
            self.waits_until = until
        if now >= self.waits_until:
            raise error
