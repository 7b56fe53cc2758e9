"""The shapes of what the HTTP front answers, for the published document and its tests.

The front writes its answers directly (`openai_answers`); nothing is built from these.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    """An object that may grow."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


class ErrorDetail(Shape):
    """What went wrong, as OpenAI says it."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    """The field at fault."""
    code: str


class ErrorAnswer(Shape):
    """Every answer that isn't 2xx."""

    error: ErrorDetail


class PromptDetails(Shape):
    """Where a prompt's tokens came from."""

    cached_tokens: int


class Served(Shape):
    """How the answer was made; numbers of several choices add up, several workers stand side by side."""

    how: str
    """remote: prefill and decode apart. local: decode computed the prompt too. mixed: one mixed worker did both."""
    prefill_worker: str
    decode_worker: str
    prompt_tokens_computed: int
    cached_tokens: int
    kv_blocks_sent: int
    kv_bytes_sent: int


class Usage(Shape):
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    diptych: Served


class TopLogprob(Shape):
    """A token and its log-probability: of the raw logits, before penalties and temperature."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """Of one token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Shape):
    """With `logprobs: true`."""

    content: list[ChatLogprob]
    refusal: None


class TextLogprobs(Shape):
    """With `logprobs: n`: one entry per token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Shape):
    """Of a prompt's token or one of its best alternatives."""

    logprob: float
    rank: int
    decoded_token: str


class ChatAnswerMessage(Shape):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Shape):
    """One answer of a chat."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(Shape):
    """A whole chat answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    """By token id, for each position of the prompt, when asked for."""


class TextChoice(Shape):
    """One answer to a text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    """By token id, for each position of the prompt, when asked for."""


class TextCompletion(Shape):
    """A whole text answer."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Model(Shape):
    """A model served here."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Prompt plus answer, in tokens."""


class ModelList(Shape):
    """The models served here."""

    object: Literal["list"]
    data: list[Model]


class Tokens(Shape):
    """A tokenised prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    """The vocabulary's spelling of each, when asked for."""


class Text(Shape):
    """Detokenised tokens."""

    prompt: str


class Version(Shape):
    """diptych's own."""

    version: str


class Health(Shape):
    """live; ready or not ready."""

    status: str
