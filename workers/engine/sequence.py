"""One request inside an engine: its tokens, its blocks, how far it is. Knows no tensor, no network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from diptych.hashing import block_hashes, granule_hashes
from diptych.types import BlockHash, BlockId, Finish, Request, TokenLogprobs

Task: TypeAlias = Literal["answer", "prefill", "decode"]
"""answer: prompt and tokens here · prefill: up to the first token, then the KV goes elsewhere ·
decode: the prompt's KV comes from elsewhere."""


_FIRST = -(1 << 63)
"""Before all priorities."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable; the engine's thread is its one owner."""

    request: Request
    attempt: int
    task: Task
    arrival: int
    """Order among the engine's requests of one priority: who came first is served first and preempted last."""
    block_size: int
    tokens: list[int] = field(default_factory=list[int])
    """The prompt and what was generated."""
    granules: list[BlockHash] = field(default_factory=list[BlockHash])
    """Names of the full granules of `tokens` known so far."""
    computed: int = 0
    """Leading tokens whose KV is in `blocks`."""
    blocks: list[BlockId] = field(default_factory=list[BlockId])
    named: int = 0
    """Leading blocks whose content has its name."""
    cached_tokens: int = 0
    """Prompt tokens found in the cache when it was first admitted."""
    computed_tokens: int = 0
    """Prompt tokens computed here, again after a preemption included."""
    admissions: int = 0
    promoted: bool = False
    """It was overtaken so often that it goes before every priority."""
    prompt_scores: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    """Of the prompt's tokens from the second on, as far as computed and asked for."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.tokens)
        self.granules = list(self.request.granules)

    @property
    def turn(self) -> tuple[int, int]:
        """Lower is served first and preempted last."""
        return (_FIRST if self.promoted else self.request.priority, self.arrival)

    @property
    def owner(self) -> str:
        """Its name in the block pool."""
        return f"{self.request.id}#{self.attempt}"

    @property
    def ticket(self) -> str:
        """The name under which the pool holds what is promised to its hand-off."""
        return f"{self.owner}/ticket"

    @property
    def prompt_length(self) -> int:
        """Tokens that were there when it came; of an answer that goes on, with what was said."""
        return len(self.request.tokens)

    @property
    def answer_start(self) -> int:
        """Where the client's prompt ends."""
        return self.prompt_length - self.request.said

    @property
    def generated(self) -> int:
        """Tokens generated: the index of the next one."""
        return len(self.tokens) - self.answer_start

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def full_blocks(self) -> int:
        """Leading blocks whose every token is computed."""
        return self.computed // self.block_size

    @property
    def scores_prompt(self) -> bool:
        """Whether every prompt token has to be computed here, for what the model says of it."""
        return self.request.params.prompt_logprobs is not None and self.task != "decode" and not self.generated

    def reusable_names(self) -> tuple[BlockHash, ...]:
        """Names of the blocks a cache could give: at least one token is always left to compute,
        except for a hand-off, where nothing is computed here."""
        if self.scores_prompt:
            return ()
        last = self.prompt_length if self.task == "decode" else len(self.tokens) - 1
        return self.names()[: last // self.block_size]

    def names(self) -> tuple[BlockHash, ...]:
        """Names of all full blocks of `tokens`."""
        known = len(self.granules) * 16
        if len(self.tokens) - known >= 16:
            chain = self.granules[-1] if self.granules else self.request.root
            self.granules += granule_hashes(self.tokens, chain, start=known)
        return block_hashes(self.granules, self.block_size)

    def accept(self, token: int) -> Finish | None:
        """The next token; what that means for the answer."""
        index, params = self.generated, self.request.params
        self.tokens.append(token)
        if not params.forced and token in params.stop_token_ids:
            return "stop"
        return "length" if index + 1 >= params.max_tokens else None

    def restart(self) -> None:
        """It lost its blocks; everything is computed again, from what is then cached."""
        self.computed = self.named = 0
        self.blocks = []
        self.prompt_scores = []
        if self.task == "decode":
            self.task = "answer"
