"""Turns what a client wants into `Ask`s, every number checked against what can be served. Knows no protocol.

Both fronts come through here, so that HTTP and gRPC refuse the same things in the same words.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cluster.front.service import Ask
from diptych.errors import InvalidRequest, PromptTooLong, UnknownModel
from diptych.types import RequestId, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.front.chat import ChatMessage
    from cluster.front.service import Service
    from cluster.front.tokenizer import TextModel

MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_STOP_TOKENS: Final = 256
MAX_TEMPERATURE: Final = 2.0
LEAST_TEMPERATURE: Final = 1e-5
"""Below it logits overflow when divided, and nothing but the greedy token has a chance: it is served as 0."""
INLINE_CHARACTERS: Final = 16_384
"""Longer text is tokenised off the event loop, which would stall every other stream for milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a client set; None is unset."""

    max_tokens: int | None = None
    max_tokens_name: str = "max_tokens"
    """What the client called it: errors name the field that was sent."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    fingerprint: bool = False
    forced: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A tokenised prompt, and the field it came in."""

    tokens: tuple[int, ...]
    name: str


def check_model(service: Service, name: str) -> None:
    """Raises UnknownModel unless `name` is served here."""
    if name != service.model_name:
        raise UnknownModel(f"no model {name[:100]!r} here; {service.model_name!r} is served")


async def encode_text(text: TextModel, prompt: str) -> tuple[int, ...]:
    """The prompt as it stands, without a chat template."""
    if len(prompt) <= INLINE_CHARACTERS:
        return tuple(text.encode(prompt))
    return tuple(await asyncio.to_thread(text.encode, prompt))


async def encode_chat(text: TextModel, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
    """The conversation, rendered with the model's template."""
    if sum(len(message.content) for message in messages) <= INLINE_CHARACTERS:
        return tuple(text.encode_chat(messages))
    return tuple(await asyncio.to_thread(text.encode_chat, messages))


async def decode_tokens(text: TextModel, tokens: Sequence[int]) -> str:
    """Their text, special tokens left out."""
    if len(tokens) <= INLINE_CHARACTERS:
        return text.decode(tokens)
    return await asyncio.to_thread(text.decode, tokens)


def asks_of(service: Service, id: str, prompts: Sequence[Prompt], wanted: Wanted, *, choices: int = 1) -> list[Ask]:  # noqa: A002
    """`choices` answers to each prompt, prompt by prompt.

    A choice's noise depends on the seed and its own number, not on the prompt's place: a prompt sent with others
    gets the answer it would get alone.
    """
    _check_sampling(wanted)
    _check_stops(wanted)
    check_token_ids(wanted.stop_token_ids, service.text.vocab_size, "stop_token_ids")
    check_token_ids(wanted.forced, service.text.vocab_size, "forced_token_ids")
    seed = secrets.randbits(63) if wanted.seed is None else _seed(wanted.seed)
    parameters = [_parameters(service, prompt, wanted, seed) for prompt in prompts]
    single = len(prompts) * choices == 1
    return [
        Ask(
            id=RequestId(id if single else f"{id}-{place * choices + choice}"),
            tokens=prompt.tokens,
            params=params,
            stop=wanted.stop,
            choice=choice,
        )
        for place, (prompt, params) in enumerate(zip(prompts, parameters, strict=True))
        for choice in range(choices)
    ]


def max_context(service: Service) -> int:
    """Prompt plus answer, in tokens, that fit now; what the model can take while no worker is there to hold any."""
    return min(service.max_context or service.text.context_length, service.text.context_length)


def _parameters(service: Service, prompt: Prompt, wanted: Wanted, seed: int) -> SamplingParams:
    check_token_ids(prompt.tokens, service.text.vocab_size, prompt.name)
    temperature = 1.0 if wanted.temperature is None else wanted.temperature
    own = () if wanted.ignore_eos else sorted(service.text.eos_token_ids)
    return SamplingParams(
        max_tokens=_max_tokens(len(prompt.tokens), max_context(service), prompt, wanted),
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        top_p=1.0 if wanted.top_p is None else wanted.top_p,
        top_k=min(wanted.top_k or 0, service.text.vocab_size),
        seed=seed,
        stop_token_ids=tuple(dict.fromkeys((*wanted.stop_token_ids, *own))),
        fingerprint=wanted.fingerprint,
        forced=wanted.forced,
    )


def _max_tokens(prompt_tokens: int, limit: int, prompt: Prompt, wanted: Wanted) -> int:
    if prompt_tokens == 0:
        raise InvalidRequest("the prompt is empty: send at least one token", param=prompt.name)
    left = limit - prompt_tokens
    if left < 1:
        raise PromptTooLong(
            f"the prompt has {prompt_tokens} tokens; prompt plus answer may have {limit} here: shorten the prompt",
            param=prompt.name,
        )
    asked = wanted.max_tokens if wanted.max_tokens is not None else len(wanted.forced) or left
    if asked > left:
        raise PromptTooLong(
            f"{prompt_tokens} prompt tokens plus {asked} to generate are {prompt_tokens + asked}, "
            f"more than the {limit} that fit here: ask for at most {left}",
            param=wanted.max_tokens_name,
        )
    return asked


def _check_sampling(wanted: Wanted) -> None:
    if wanted.max_tokens is not None and wanted.max_tokens < 1:
        name = wanted.max_tokens_name
        raise InvalidRequest(f"{name} is {wanted.max_tokens}; ask for at least 1", param=name)
    if wanted.temperature is not None and not 0 <= wanted.temperature <= MAX_TEMPERATURE:
        raise _out_of_range("temperature", wanted.temperature, f"from 0 to {MAX_TEMPERATURE:g}")
    if wanted.top_p is not None and not 0 < wanted.top_p <= 1:
        raise _out_of_range("top_p", wanted.top_p, "above 0, up to 1")
    if wanted.top_k is not None and wanted.top_k < 0:
        raise _out_of_range("top_k", wanted.top_k, "0 (no limit) or more")
    if wanted.max_tokens is not None and len(wanted.forced) > wanted.max_tokens:
        message = f"{len(wanted.forced)} forced tokens are more than max_tokens = {wanted.max_tokens}"
        raise InvalidRequest(message, param="forced_token_ids")


def _check_stops(wanted: Wanted) -> None:
    if len(wanted.stop) > MAX_STOPS:
        raise InvalidRequest(f"{len(wanted.stop)} stop strings; at most {MAX_STOPS} are taken", param="stop")
    for stop in wanted.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            message = f"a stop string has {len(stop)} characters; it must have 1 to {MAX_STOP_CHARACTERS}"
            raise InvalidRequest(message, param="stop")
    if len(wanted.stop_token_ids) > MAX_STOP_TOKENS:
        message = f"{len(wanted.stop_token_ids)} stop tokens; at most {MAX_STOP_TOKENS} are taken"
        raise InvalidRequest(message, param="stop_token_ids")


def check_token_ids(tokens: tuple[int, ...], vocab_size: int, name: str) -> None:
    """Raises InvalidRequest naming the first that the model doesn't have."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise InvalidRequest(f"token {wrong} isn't in the vocabulary of {vocab_size} tokens", param=name)


def _seed(seed: int) -> int:
    """OpenAI's seeds are signed 64-bit numbers: a negative one is its two's complement."""
    if not -(2**63) <= seed < 2**64:
        raise InvalidRequest("seed must fit in 64 bits", param="seed")
    return seed % 2**64


def _out_of_range(name: str, value: float, range_in_words: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {value:g}; it must be {range_in_words}", param=name)
