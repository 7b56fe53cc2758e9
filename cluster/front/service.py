"""What the two protocols (HTTP, gRPC) ask of the front: the seam between wire and dispatch.

Knows neither protocol, nor Ray, nor how a request is placed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from diptych.types import (
    Changed,
    ClusterStatus,
    Explanation,
    Finish,
    Operation,
    RequestId,
    SamplingParams,
    Served,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from cluster.front.tokenizer import TextModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an answer took."""

    prompt_tokens: int
    completion_tokens: int
    served: Served


class Delta(NamedTuple):
    """The next piece of one answer. The last one carries `finish` and `usage`."""

    text: str
    """May be empty while half a character or a possible stop string is held back."""
    tokens: tuple[int, ...]
    fingerprints: tuple[bytes, ...] = ()
    """One per token, when asked for."""
    argmax: tuple[int, ...] = ()
    """One per token, under teacher forcing."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token, when asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """With the first piece, when asked for: of the prompt's tokens from the second on."""
    finish: Finish | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One answer wanted: tokens in, sampling, and where the text has to end."""

    id: RequestId
    tokens: tuple[int, ...]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    choice: int = 0
    tenant: str = ""
    """Cached blocks are shared within it only."""
    priority: int = 0
    """Lower is served first."""
    ttft_seconds: float | None = None
    """The first token is wanted within so long; None leaves it to the cluster."""
    itl_seconds: float | None = None
    """As `ttft_seconds`, the mean time between tokens."""
    deadline_seconds: float | None = None
    """Later than that nobody wants the answer. Whoever asks ends it then, too."""
    continued: bool = False
    """The answer goes on where the prompt ends, so a space that it starts with is its own."""


class Service(Protocol):
    """Implemented by `cluster.front.dispatcher.Dispatcher`."""

    @property
    def model_name(self) -> str:
        """The one model served here."""
        ...

    @property
    def text(self) -> TextModel:
        """Its tokenizer and chat template."""
        ...

    @property
    def max_context(self) -> int:
        """Prompt plus answer, in tokens, that the smallest worker can hold."""
        ...

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be placed."""
        ...

    def generate(self, ask: Ask) -> AsyncGenerator[Delta, None]:
        """The answer, piece by piece. Closing the generator cancels the request everywhere.

        Raises `diptych.errors.ServingError` subclasses, before or between deltas. The front
        adds the model's own stop tokens unless the caller already decided (`ignore_eos`).
        """
        ...

    async def status(self) -> ClusterStatus:
        """The scheduler's view, at most a second old."""
        ...

    async def change(self, operation: Operation) -> Changed:
        """Operate the cluster; what that did. Raises ServingError."""
        ...

    async def explain(self, request: str) -> tuple[Explanation, ...]:
        """The decision's record of each of its choices. Raises UnknownRequest."""
        ...
