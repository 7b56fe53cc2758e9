"""What a client set, and the range that each number has. Knows no model and no protocol.

Both fronts come through here, so that HTTP and gRPC refuse the same things in the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from diptych.errors import InvalidRequest

MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_STOP_TOKENS: Final = 256
MAX_TEMPERATURE: Final = 2.0
MAX_PENALTY: Final = 2.0
MAX_REPETITION_PENALTY: Final = 100.0
MAX_BIAS: Final = 100.0
MAX_BIASED_TOKENS: Final = 1024
MAX_BAD_WORDS: Final = 256
MAX_BAD_WORD_CHARACTERS: Final = 256
MAX_ALLOWED_TOKENS: Final = 8192
MAX_LOGPROBS: Final = 20
MAX_TENANT_CHARACTERS: Final = 256
MIN_PRIORITY: Final = -(2**31)
MAX_PRIORITY: Final = 2**31 - 1
MAX_MS: Final = 86_400_000
"""A day: the longest time that may be wished for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a client set; None is unset."""

    max_tokens: int | None = None
    max_tokens_name: str = "max_tokens"
    """What the client called it: errors name the field that was sent."""
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] = field(default_factory=dict[int, float])
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    logprobs_name: str = "logprobs"
    """What the client called it."""
    prompt_logprobs: int | None = None
    tenant: str = ""
    tenant_name: str = "tenant"
    """What the client called it."""
    priority: int = 0
    """Lower is served first."""
    priority_name: str = "priority"
    """What the client called it."""
    ttft_ms: int | None = None
    """The first token is wanted within so long."""
    ttft_ms_name: str = "ttft_ms"
    """What the client called it, here and below."""
    itl_ms: int | None = None
    """As `ttft_ms`, the mean time between tokens."""
    itl_ms_name: str = "itl_ms"
    deadline_ms: int | None = None
    """Later than that nobody wants the answer."""
    deadline_ms_name: str = "deadline_ms"
    fingerprint: bool = False
    forced: tuple[int, ...] = ()


def check_wanted(wanted: Wanted, vocabulary: int) -> None:
    """Raises InvalidRequest naming the first field that is out of its range. `vocabulary` counts its tokens."""
    _check_counts(wanted)
    _check_times(wanted)
    _check_drawing(wanted)
    _check_penalties(wanted)
    if wanted.tenant:
        _check_texts(wanted.tenant_name, (wanted.tenant,), 1, MAX_TENANT_CHARACTERS)
    _check_texts("stop", wanted.stop, MAX_STOPS, MAX_STOP_CHARACTERS)
    _check_texts("bad_words", wanted.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARACTERS)
    _check_tokens("stop_token_ids", wanted.stop_token_ids, MAX_STOP_TOKENS, vocabulary)
    _check_tokens("logit_bias", tuple(wanted.logit_bias), MAX_BIASED_TOKENS, vocabulary)
    _check_tokens("allowed_token_ids", wanted.allowed_token_ids or (), MAX_ALLOWED_TOKENS, vocabulary)
    check_token_ids(wanted.forced, vocabulary, "forced_token_ids")
    if wanted.allowed_token_ids == ():
        raise InvalidRequest("allowed_token_ids is empty: name a token or leave it out", param="allowed_token_ids")


def check_token_ids(tokens: Sequence[int], vocabulary: int, name: str) -> None:
    """Raises InvalidRequest naming the first that the model doesn't have."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary):
        wrong = next(token for token in tokens if not 0 <= token < vocabulary)
        raise InvalidRequest(f"token {wrong} isn't in the vocabulary of {vocabulary} tokens", param=name)


def _check_counts(wanted: Wanted) -> None:
    if wanted.max_tokens is not None and wanted.max_tokens < 1:
        name = wanted.max_tokens_name
        raise InvalidRequest(f"{name} is {wanted.max_tokens}; ask for at least 1", param=name)
    if wanted.min_tokens < 0:
        raise _out_of_range("min_tokens", wanted.min_tokens, "0 or more")
    if not MIN_PRIORITY <= wanted.priority <= MAX_PRIORITY:
        name = wanted.priority_name
        message = f"{name} is {wanted.priority}; it must be from {MIN_PRIORITY} to {MAX_PRIORITY}"
        raise InvalidRequest(message, param=name)
    if wanted.max_tokens is not None and len(wanted.forced) > wanted.max_tokens:
        message = f"{len(wanted.forced)} forced tokens are more than max_tokens = {wanted.max_tokens}"
        raise InvalidRequest(message, param="forced_token_ids")
    for name, count in ((wanted.logprobs_name, wanted.logprobs), ("prompt_logprobs", wanted.prompt_logprobs)):
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise _out_of_range(name, count, f"from 0 to {MAX_LOGPROBS}")


def _check_times(wanted: Wanted) -> None:
    times = (
        (wanted.ttft_ms_name, wanted.ttft_ms),
        (wanted.itl_ms_name, wanted.itl_ms),
        (wanted.deadline_ms_name, wanted.deadline_ms),
    )
    for name, milliseconds in times:
        if milliseconds is not None and not 1 <= milliseconds <= MAX_MS:
            message = f"{name} is {milliseconds}; it must be a whole number of milliseconds, 1 to {MAX_MS}"
            raise InvalidRequest(message, param=name)


def _check_drawing(wanted: Wanted) -> None:
    if wanted.temperature is not None and not 0 <= wanted.temperature <= MAX_TEMPERATURE:
        raise _out_of_range("temperature", wanted.temperature, f"from 0 to {MAX_TEMPERATURE:g}")
    if wanted.top_p is not None and not 0 < wanted.top_p <= 1:
        raise _out_of_range("top_p", wanted.top_p, "above 0, up to 1")
    if wanted.top_k is not None and wanted.top_k < 0:
        raise _out_of_range("top_k", wanted.top_k, "0 (no limit) or more")
    if wanted.min_p is not None and not 0 <= wanted.min_p <= 1:
        raise _out_of_range("min_p", wanted.min_p, "from 0 to 1")


def _check_penalties(wanted: Wanted) -> None:
    penalties = {"presence_penalty": wanted.presence_penalty, "frequency_penalty": wanted.frequency_penalty}
    for name, penalty in penalties.items():
        if penalty is not None and not -MAX_PENALTY <= penalty <= MAX_PENALTY:
            raise _out_of_range(name, penalty, f"from {-MAX_PENALTY:g} to {MAX_PENALTY:g}")
    repetition = wanted.repetition_penalty
    # The lower bound keeps its reciprocal, which some logits are multiplied by, as small as the upper one.
    if repetition is not None and not 1 / MAX_REPETITION_PENALTY <= repetition <= MAX_REPETITION_PENALTY:
        bounds = f"from {1 / MAX_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g}, 1 for none"
        raise _out_of_range("repetition_penalty", repetition, bounds)
    for token, bias in wanted.logit_bias.items():
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            message = f"the bias of token {token} is {bias:g}; it must be from {-MAX_BIAS:g} to {MAX_BIAS:g}"
            raise InvalidRequest(message, param="logit_bias")


def _check_texts(name: str, texts: tuple[str, ...], most: int, most_characters: int) -> None:
    if len(texts) > most:
        raise InvalidRequest(f"{name} has {len(texts)} strings; at most {most} are taken", param=name)
    for text in texts:
        if not 1 <= len(text) <= most_characters:
            message = f"a string of {name} has {len(text)} characters; it must have 1 to {most_characters}"
            raise InvalidRequest(message, param=name)


def _check_tokens(name: str, tokens: tuple[int, ...], most: int, vocabulary: int) -> None:
    if len(tokens) > most:
        raise InvalidRequest(f"{name} has {len(tokens)} tokens; at most {most} are taken", param=name)
    check_token_ids(tokens, vocabulary, name)


def _out_of_range(name: str, value: float, range_in_words: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {value:g}; it must be {range_in_words}", param=name)
