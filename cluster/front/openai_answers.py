"""Answers in OpenAI's shapes: whole, and as stream events. Knows neither sockets nor where tokens come from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cluster.front.openai_choices import Choice
    from cluster.front.service import Delta, Usage
    from diptych.types import Finish, Served, TokenLogprobs

Json: TypeAlias = dict[str, object]
Kind: TypeAlias = Literal["chat", "text"]
_NOT_TOLD = frozenset(("kv_seconds", "kv_wait_seconds"))
"""Of `Served`: times are for `diptych explain`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What every body and event of one response has in common."""

    id: str
    kind: Kind
    model: str
    created: int
    """Unix seconds."""

    def fields(self, *, streamed: bool) -> Json:
        """The leading fields of a body or an event."""
        whole = "chat.completion" if self.kind == "chat" else "text_completion"
        name = f"{whole}.chunk" if streamed and self.kind == "chat" else whole
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}


@dataclass(slots=True)
class Answer:
    """One choice, as far as it has come."""

    pieces: list[str] = field(default_factory=list[str])
    tokens: list[int] = field(default_factory=list[int])
    fingerprints: list[bytes] = field(default_factory=list[bytes])
    logprobs: list[TokenLogprobs] = field(default_factory=list["TokenLogprobs"])
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish: Finish | None = None
    usage: Usage | None = None

    def add(self, delta: Delta) -> None:
        """The next piece."""
        self.pieces.append(delta.text)
        self.tokens += delta.tokens
        self.fingerprints += delta.fingerprints
        self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish is not None:
            self.finish, self.usage = delta.finish, delta.usage


def whole(envelope: Envelope, answers: Sequence[Answer], choices: Sequence[Choice], choices_per_prompt: int) -> Json:
    """The body of a response that isn't streamed."""
    pairs = zip(answers, choices, strict=True)
    bodies = [_whole_choice(envelope.kind, index, *pair) for index, pair in enumerate(pairs)]
    fields = envelope.fields(streamed=False)
    usage = total_usage(answers, choices_per_prompt)
    # Where vLLM has it: all choices of a chat have one prompt.
    of_prompt = _of_prompt(answers[0], choices[0]) if envelope.kind == "chat" else {}
    return {**fields, "choices": bodies, "usage": usage, **of_prompt}


def _whole_choice(kind: Kind, index: int, answer: Answer, choice: Choice) -> Json:
    text = "".join(answer.pieces)
    said: Json = {"text": text}
    if kind == "chat":
        said = {"message": {"role": "assistant", "content": text, "refusal": None}}
    return {
        "index": index,
        **said,
        "logprobs": choice.logprobs(answer.tokens, answer.logprobs, answer.prompt_logprobs),
        "finish_reason": answer.finish,
        **(_of_prompt(answer, choice) if kind == "text" else {}),
        **_fingerprinted(answer.tokens, answer.fingerprints),
    }


def _of_prompt(answer: Answer, choice: Choice) -> Json:
    logprobs = choice.prompt_logprobs(answer.prompt_logprobs)
    return {} if logprobs is None else {"prompt_logprobs": logprobs}


def total_usage(answers: Sequence[Answer], choices_per_prompt: int) -> Json:
    """A prompt counts once however many answers it has; what was computed and sent for each of them adds up."""
    usages = [answer.usage for answer in answers if answer.usage is not None]
    assert len(usages) == len(answers), "an answer has no usage"
    firsts = usages[::choices_per_prompt]
    return usage_object(
        sum(usage.prompt_tokens for usage in firsts),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.served.cached_tokens for usage in firsts),
        _together([usage.served for usage in usages]),
    )


def usage_object(prompt_tokens: int, completion_tokens: int, cached_tokens: int, served: Served) -> Json:
    """OpenAI's usage object with our extension."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "diptych": {name: value for name, value in asdict(served).items() if name not in _NOT_TOLD},
    }


def _together(all_served: Sequence[Served]) -> Served:
    """Numbers add up; different workers are named side by side, and so are different ways."""
    if len(all_served) == 1:
        return all_served[0]
    return replace(
        all_served[0],
        prefill_worker=_distinct(served.prefill_worker for served in all_served),
        decode_worker=_distinct(served.decode_worker for served in all_served),
        prompt_tokens_computed=sum(served.prompt_tokens_computed for served in all_served),
        cached_tokens=sum(served.cached_tokens for served in all_served),
        kv_blocks_sent=sum(served.kv_blocks_sent for served in all_served),
        kv_bytes_sent=sum(served.kv_bytes_sent for served in all_served),
    )


def _distinct(names: Iterable[str]) -> str:
    return ",".join(dict.fromkeys(names))


def _fingerprinted(tokens: Sequence[int], fingerprints: Sequence[bytes]) -> Json:
    if not fingerprints:
        return {}
    return {"diptych": {"token_ids": list(tokens), "fingerprints": [one.hex() for one in fingerprints]}}


class EventWriter:
    """Writes one response's stream events. What doesn't change between them is serialised once."""

    def __init__(self, envelope: Envelope, *, answers: int, include_usage: bool, continuous_usage: bool) -> None:
        self._kind: Kind = envelope.kind
        self._head = "data: " + _dumps(envelope.fields(streamed=True))[:-1] + ',"choices":['
        # OpenAI's chunks carry "usage": null when the last one will carry the usage.
        self._tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self._continuous_usage = continuous_usage
        self._completion_tokens = [0] * answers
        self._begun = [False] * answers

    def events(self, index: int, delta: Delta, prompt_tokens: int, choice: Choice) -> bytes:
        """The events of one piece; none while all of it is held back."""
        opening = "" if self._begun[index] or self._kind == "text" else self._opening(index)
        self._begun[index] = True
        self._completion_tokens[index] += len(delta.tokens)
        logprobs = choice.logprobs(delta.tokens, delta.logprobs, delta.prompt_logprobs)
        if not (delta.text or delta.finish or delta.fingerprints or logprobs):
            return opening.encode()
        body = self._choice(index, delta, logprobs)
        tail = self._counted(index, prompt_tokens) if self._continuous_usage else self._tail
        return f"{opening}{self._head}{body}{tail}".encode()

    def last(self, usage: Json | None) -> bytes:
        """The usage, when it was asked for, and the end."""
        counted = f'{self._head}],"usage":{_dumps(usage)}}}\n\n' if usage is not None else ""
        return f"{counted}data: [DONE]\n\n".encode()

    def _opening(self, index: int) -> str:
        delta = '{"role":"assistant","content":""}'
        return f'{self._head}{{"index":{index},"delta":{delta},"logprobs":null,"finish_reason":null}}{self._tail}'

    def _choice(self, index: int, delta: Delta, logprobs: object) -> str:
        text = _dumps(delta.text)
        said = f'"delta":{{"content":{text}}}' if self._kind == "chat" else f'"text":{text}'
        finish = f'"{delta.finish}"' if delta.finish else "null"
        extension = _fingerprinted(delta.tokens, delta.fingerprints)
        more = f',"diptych":{_dumps(extension["diptych"])}' if extension else ""
        return f'{{"index":{index},{said},"logprobs":{_dumps(logprobs)},"finish_reason":{finish}{more}}}'

    def _counted(self, index: int, prompt_tokens: int) -> str:
        completion_tokens = self._completion_tokens[index]
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        return f'],"usage":{_dumps(usage)}}}\n\n'


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
