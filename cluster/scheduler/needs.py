"""How many workers of each role there is work for, beside how many there are. Knows no time and decides nothing."""

from __future__ import annotations

from math import inf
from typing import Final, Literal, NamedTuple, TypeAlias

Pool: TypeAlias = Literal["prefill", "decode"]
"""Mixed workers are left alone."""
POOLS: Final[tuple[Pool, Pool]] = ("prefill", "decode")


class Needs(NamedTuple):
    """Of each role: how many workers it keeps busy, and how many it has."""

    prefill: float
    decode: float
    prefills: int
    decodes: int

    def demand(self, role: Pool) -> float:
        """In workers."""
        return self.prefill if role == "prefill" else self.decode

    def have(self, role: Pool) -> int:
        """Workers."""
        return self.prefills if role == "prefill" else self.decodes

    def load(self, role: Pool) -> float:
        """1 is all that it can bear."""
        return self.demand(role) / self.have(role) if self.have(role) else inf

    @property
    def total(self) -> int:
        """Workers of both."""
        return self.prefills + self.decodes

    def resized(self, role: Pool, count: int) -> Needs:
        """As it would be with so many more of that role."""
        if role == "prefill":
            return self._replace(prefills=self.prefills + count)
        return self._replace(decodes=self.decodes + count)

    def moved(self, taker: Pool, count: int) -> Needs:
        """As it would be with so many from the other role."""
        giver: Pool = "decode" if taker == "prefill" else "prefill"
        return self.resized(taker, count).resized(giver, -count)

    def __str__(self) -> str:
        return ", ".join(f"{role} load {self.load(role):.2f} of {self.have(role)}" for role in POOLS)
