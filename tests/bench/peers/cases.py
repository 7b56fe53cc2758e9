"""What every engine is asked in turn, and the lines it answers. Imports no engine and nothing of ours.

An engine is a process that reads a line of JSON, does the work, and writes a line with the seconds it took.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS = 12
"""Decode steps in one measurement."""
VOCABULARY = range(300, 40_000)


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `prompt` tokens. answer 0: their prefill; -1: a decode step; else until each has so many."""

    name: str
    batch: int
    prompt: int
    answer: int

    @property
    def tokens(self) -> int:
        """What is counted for a rate."""
        if self.answer > 0:
            return self.batch * self.answer
        return self.batch if self.answer else self.batch * self.prompt


CASES = (
    Case("prefill 128", 1, 128, 0),
    Case("prefill 512", 1, 512, 0),
    Case("prefill 2048", 1, 2048, 0),
    Case("decode 1 at 128", 1, 128, -1),
    Case("decode 8 at 128", 8, 128, -1),
    Case("decode 32 at 128", 32, 128, -1),
    Case("mixed 16 x 512 to 64", 16, 512, 64),
)


class Peer(Protocol):
    """One engine."""

    def prefill(self, prompts: Sequence[list[int]]) -> float:
        """Seconds until each has its first token."""
        ...

    def decode(self, prompts: Sequence[list[int]]) -> float:
        """Seconds of one step of all of them."""
        ...

    def mixed(self, prompts: Sequence[list[int]], answer: int) -> float:
        """Seconds until each has its whole answer, all asked at once."""
        ...


def prompts(case: Case, seed: int) -> list[list[int]]:
    """No two alike, so that nothing is cached."""
    dice = random.Random(f"{case.name} {seed}")
    return [dice.choices(VOCABULARY, k=case.prompt) for _ in range(case.batch)]


def ask(case: Case, seed: int) -> str:
    return json.dumps([asdict(case), seed])


def serve(peer: Peer) -> None:
    """Until there are no more lines. What engines print must not mix with answers: they have the first stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        fields, seed = json.loads(line)
        case = Case(**fields)
        asked = prompts(case, seed)
        if case.answer > 0:
            seconds = peer.mixed(asked, case.answer)
        else:
            seconds = peer.decode(asked) if case.answer else peer.prefill(asked)
        print(json.dumps(seconds), file=answers, flush=True)
