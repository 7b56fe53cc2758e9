"""One simulated request: what was asked, and what came of it. Knows no worker and no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from cluster.scheduler.costs import RequestShape
from diptych.hashing import GRANULE
from diptych.types import BlockHash, FrontId, Request, RequestId, SamplingParams
from workers.engine.sequence import Sequence, Task

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cluster.simulate.trace import TraceRequest
    from diptych.types import Placement

_NAME_BYTES = 32
_TAG_BYTES = 2
_FRONT = FrontId("front")
_NO_NAME = BlockHash(bytes(_NAME_BYTES))


@dataclass(slots=True, eq=False)
class Asked:
    """Mutable; the virtual cluster is its one owner. Times are virtual seconds."""

    id: RequestId
    content: TraceRequest
    arrival: float
    block_tokens: int
    names: tuple[BlockHash, ...]
    """Of the full blocks of prompt and answer."""
    tail: BlockHash
    """Stands for the prompt's last block, which is partial, or for nothing."""
    attempt: int = 0
    placement: Placement | None = None
    """The last attempt's."""
    placed: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0
    """Of the answer, so far."""
    cached_tokens: int = 0
    """Of the prompt, found by who first computed it; borrowed ones included."""
    computed_tokens: int = 0
    """Of prompts, by all who computed any."""
    sent_bytes: int = 0
    ended: float | None = None
    error: str = ""

    @property
    def prompt_tokens(self) -> int:
        """Of the present attempt: what was answered so far is part of its prompt."""
        return self.content.prompt_tokens + self.tokens

    @property
    def ttft_seconds(self) -> float | None:
        """From the arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def itl_seconds(self) -> float | None:
        """Mean, between tokens; None with fewer than two."""
        if self.first_token is None or self.last_token is None or self.tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.tokens - 1)

    def shape(self) -> RequestShape:
        """What the scheduler is told."""
        full, tail = divmod(self.prompt_tokens, self.block_tokens)
        granules = granule_names((*self.names[:full], self.tail), self.block_tokens)
        return RequestShape(
            request=self.id,
            granules=tuple(granules[: len(granules) - (self.block_tokens - tail + GRANULE - 1) // GRANULE]),
            prompt_tokens=self.prompt_tokens,
            max_tokens=self.content.output_tokens - self.tokens,
        )

    def sequence(self, task: Task, arrival: int) -> VirtualSequence:
        """The present attempt, for a worker's batch."""
        request = Request(
            id=self.id,
            front=_FRONT,
            tokens=(0,) * self.prompt_tokens,
            granules=(),
            root=_NO_NAME,
            params=SamplingParams(max_tokens=self.content.output_tokens - self.tokens),
        )
        return VirtualSequence(
            request=request,
            attempt=self.attempt,
            task=task,
            arrival=arrival,
            block_size=self.block_tokens,
            asked=self,
        )


@dataclass(slots=True, eq=False, kw_only=True)
class VirtualSequence(Sequence):
    """A sequence without tokens worth the name: its trace names its blocks."""

    asked: Asked
    known_names: tuple[BlockHash, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = [0] * len(self.request.tokens)
        self.known_names = self.asked.names

    def names(self) -> tuple[BlockHash, ...]:
        return self.known_names[: len(self.tokens) // self.block_size]

    @property
    def generated(self) -> int:
        """As any sequence's, which no attempt goes on with: nothing was said before. Asked for at every row."""
        return len(self.tokens) - len(self.request.tokens)

    @property
    def wanted(self) -> int:
        """Tokens still to generate."""
        return self.request.params.max_tokens - self.generated


class Namer:
    """Block names from content numbers; equal numbers are one object, hashed once."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._names: dict[int, BlockHash] = {}

    def ask(self, place: int, content: TraceRequest, arrival: float) -> Asked:
        """The request at that place of the trace."""
        full = content.prompt_tokens // self._block_tokens
        count = (content.prompt_tokens + content.output_tokens) // self._block_tokens
        told = [self._name(block) for block in (*content.blocks[:full], *content.answer_blocks)]
        own = [_own(place, block) for block in range(len(told), count)]
        return Asked(
            id=RequestId(f"r{place}"),
            content=content,
            arrival=arrival,
            block_tokens=self._block_tokens,
            names=(*told, *own),
            tail=self._name(content.blocks[-1]) if len(content.blocks) > full else _own(place, count),
        )

    def _name(self, block: int) -> BlockHash:
        name = self._names.get(block)
        if name is None:
            name = self._names[block] = block_name(block)
        return name


def block_name(block: int) -> BlockHash:
    """Of a content number."""
    return BlockHash(block.to_bytes(_NAME_BYTES, "big", signed=True))


def granule_names(blocks: Iterable[BlockHash], block_tokens: int) -> list[BlockHash]:
    """Of 16 tokens each: the block's own name for its last one, names derived from it for the others."""
    before = _tags(block_tokens // GRANULE)
    names: list[BlockHash] = []
    for block in blocks:
        rest = block[_TAG_BYTES:]
        names += [BlockHash(tag + rest) for tag in before]
        names.append(block)
    return names


@cache
def _tags(granules: int) -> tuple[bytes, ...]:
    return tuple(each.to_bytes(_TAG_BYTES, "big") for each in range(1, granules))


def _own(place: int, block: int) -> BlockHash:
    """Of a block that no other request has."""
    return BlockHash(f"{place}/{block}".encode().rjust(_NAME_BYTES))
