"""Turns what a client wants into `Ask`s, checked against what can be served. Knows no protocol.

Both fronts come through here, so that HTTP and gRPC refuse the same things in the same words.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cluster.front.service import Ask
from cluster.front.wanted import Wanted, check_token_ids, check_wanted
from diptych.errors import InvalidRequest, PromptTooLong, UnknownModel
from diptych.types import RequestId, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.front.chat import ChatMessage
    from cluster.front.service import Service
    from cluster.front.tokenizer import TextModel

LEAST_TEMPERATURE: Final = 1e-5
"""Below it logits overflow when divided, and nothing but the greedy token has a chance: it is served as 0."""
INLINE_CHARACTERS: Final = 16_384
"""Longer text is tokenised off the event loop, which would stall every other stream for milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A tokenised prompt, and the field it came in."""

    tokens: tuple[int, ...]
    name: str
    continued: bool = True
    """The answer goes on where the prompt ends; otherwise it is a text of its own."""


def check_model(service: Service, name: str) -> None:
    """Raises UnknownModel unless `name` is served here."""
    if name != service.model_name:
        raise UnknownModel(f"no model {name[:100]!r} here; {service.model_name!r} is served")


async def encode_text(text: TextModel, prompt: str, *, after_bos: bool = True) -> tuple[int, ...]:
    """The prompt as it stands, without a chat template."""
    if len(prompt) <= INLINE_CHARACTERS:
        return tuple(text.encode(prompt, after_bos=after_bos))
    return tuple(await asyncio.to_thread(text.encode, prompt, after_bos=after_bos))


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
    check_wanted(wanted, service.text.vocab_size)
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
            tenant=wanted.tenant,
            priority=wanted.priority,
            ttft_seconds=_seconds(wanted.ttft_ms),
            itl_seconds=_seconds(wanted.itl_ms),
            deadline_seconds=_seconds(wanted.deadline_ms),
            continued=prompt.continued,
        )
        for place, (prompt, params) in enumerate(zip(prompts, parameters, strict=True))
        for choice in range(choices)
    ]


def max_context(service: Service) -> int:
    """Prompt plus answer, in tokens, that fit now; what the model declares while no worker is there to hold any.

    The workers know better than the declaration: a scaled rope takes them further.
    """
    return service.max_context or service.text.context_length


def _parameters(service: Service, prompt: Prompt, wanted: Wanted, seed: int) -> SamplingParams:
    check_token_ids(prompt.tokens, service.text.vocab_size, prompt.name)
    temperature = _given(wanted.temperature, 1.0)
    own = () if wanted.ignore_eos else sorted(service.text.eos_token_ids)
    params = SamplingParams(
        max_tokens=_max_tokens(len(prompt.tokens), max_context(service), prompt, wanted),
        min_tokens=wanted.min_tokens,
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        top_p=_given(wanted.top_p, 1.0),
        top_k=min(wanted.top_k or 0, service.text.vocab_size),
        min_p=_given(wanted.min_p, 0.0),
        seed=seed,
        repetition_penalty=_given(wanted.repetition_penalty, 1.0),
        presence_penalty=_given(wanted.presence_penalty, 0.0),
        frequency_penalty=_given(wanted.frequency_penalty, 0.0),
        logit_bias=tuple(sorted(wanted.logit_bias.items())),
        allowed_token_ids=tuple(dict.fromkeys(wanted.allowed_token_ids or ())),
        bad_words=_spelled(service.text, wanted.bad_words),
        stop_token_ids=tuple(dict.fromkeys((*wanted.stop_token_ids, *own))),
        include_stop=wanted.include_stop,
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        fingerprint=wanted.fingerprint,
        forced=wanted.forced,
    )
    _check_drawable(params)
    return params


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _spelled(text: TextModel, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, at the start of a text and after a space: most models spell these differently."""
    spellings = [tuple(text.spell(form)) for word in words for form in (word, f" {word.lstrip()}")]
    return tuple(dict.fromkeys(spelling for spelling in spellings if spelling))


def _check_drawable(params: SamplingParams) -> None:
    """Raises InvalidRequest when nothing could be drawn from the first token on."""
    if params.min_tokens > params.max_tokens:
        message = f"min_tokens is {params.min_tokens}, but the answer has {params.max_tokens} tokens at most"
        raise InvalidRequest(message, param="min_tokens")
    allowed, bad = set(params.allowed_token_ids), {word[0] for word in params.bad_words if len(word) == 1}
    if allowed and allowed <= bad:
        raise InvalidRequest("bad_words bans every token that allowed_token_ids names", param="allowed_token_ids")
    if params.min_tokens and allowed and allowed <= bad.union(params.stop_token_ids):
        message = "min_tokens bans the stop tokens, and allowed_token_ids names no others"
        raise InvalidRequest(message, param="min_tokens")


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


def _seed(seed: int) -> int:
    """OpenAI's seeds are signed 64-bit numbers: a negative one is its two's complement."""
    if not -(2**63) <= seed < 2**64:
        raise InvalidRequest("seed must fit in 64 bits", param="seed")
    return seed % 2**64
