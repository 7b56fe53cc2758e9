"""OpenAI's request bodies, as far as we honour them. Knows what a field may hold, not what it leads to.

A field is honoured, or harmless and ignored, or refused by name: none is accepted and quietly not done.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from difflib import get_close_matches
from typing import Annotated, Final, Literal, TypeAlias, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from diptych.errors import InvalidRequest

MAX_CHOICES: Final = 128
"""Answers in one request: `n` times the number of prompts."""

HARMLESS: Final = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"}
)
"""They say who asks or where to keep it, and leave the answer as it is."""

NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Not served in this version: taken only with a value that asks for nothing."""


def _flat_content(value: object) -> object:
    """A list of text parts as one text; other kinds of part are refused."""
    if not isinstance(value, list):
        return value
    parts = cast("list[object]", value)
    return "\n".join(_part_text(place, part) for place, part in enumerate(parts))


def _part_text(place: int, part: object) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case _:
            raise PydanticCustomError("part", "part {place} is not of type text, with a text", {"place": place})


def _prompt_list(value: object) -> list[str] | list[list[int]]:
    """A string, strings, tokens or lists of tokens: always as a list of prompts."""
    items: object = [value] if isinstance(value, str) or _are_tokens(value) else value
    if isinstance(items, list) and items:
        if all(isinstance(item, str) for item in cast("list[object]", items)):
            return cast("list[str]", items)
        if all(_are_tokens(item) for item in cast("list[object]", items)):
            return cast("list[list[int]]", items)
    raise PydanticCustomError("prompt", "must be a string, a list of strings, of tokens, or of lists of tokens")


def _are_tokens(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(type(item) is int for item in cast("list[object]", value))


def _stop_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _bias_by_token(value: object) -> object:
    """JSON's keys are strings: "50256" is token 50256."""
    if not isinstance(value, dict):
        return value
    return {_token(key): bias for key, bias in cast("dict[str, object]", value).items()}


def _token(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) <= 10):
        raise PydanticCustomError("token", "{key} is not a token's number", {"key": repr(key[:20])})
    return int(key)


_STRINGS: Final = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_TOKENS: Final = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PROMPT_SCHEMA: Final = {
    "anyOf": [{"type": "string"}, _STRINGS, _TOKENS, {"type": "array", "items": _TOKENS, "minItems": 1}]
}
_STOP_SCHEMA: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_PART_SCHEMA: Final = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_BIAS_SCHEMA: Final = {
    "type": "object",
    "additionalProperties": {"type": ["number", "null"]},
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
}
_CONTENT_SCHEMA: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]}
"""What the validators above take, for the published document."""

Count: TypeAlias = Annotated[int, Field(ge=-(2**31), le=2**31)]
"""Wide enough for any count; what it may be is checked where the model is known."""


class Body(BaseModel):
    """A JSON object that clients send."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    """Padding against traffic analysis; harmless to leave out."""


class Extension(Body):
    """diptych's own wishes."""

    fingerprint: bool = False


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_flat_content), WithJsonSchema(_CONTENT_SCHEMA)]
    name: str | None = None


class AnyRequest(Body):
    """What chat and text completions share. None is unset."""

    model: str
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias_by_token), WithJsonSchema(_BIAS_SCHEMA)] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    min_tokens: Count | None = None
    stop: Annotated[list[str], BeforeValidator(_stop_list), WithJsonSchema(_STOP_SCHEMA)] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    """vLLM's: prompts are found cached only when they came with the same."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    """vLLM's: lower is served first."""
    diptych: Extension | None = None


class ChatRequest(AnyRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None


class CompletionRequest(AnyRequest):
    """The body of /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompt_list), WithJsonSchema(_PROMPT_SCHEMA)]
    logprobs: Count | None = None
    echo: bool | None = None


BodyT = TypeVar("BodyT", bound=Body)
AnyRequestT = TypeVar("AnyRequestT", bound=AnyRequest)
Neutral: TypeAlias = Mapping[str, tuple[object, ...]]


def parse_request(kind: type[AnyRequestT], body: object) -> AnyRequestT:
    """The body as `kind`. Raises InvalidRequest naming the first field that is wrong."""
    request = parse_body(kind, body, NEUTRAL, HARMLESS)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        message = "prompt_logprobs come with the whole answer only: leave stream out"
        raise InvalidRequest(message, param="prompt_logprobs")
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    return request


def parse_body(kind: type[BodyT], body: object, neutral: Neutral, harmless: Container[str]) -> BodyT:
    """As `parse_request`, for any kind: `neutral` fields have only these values, `harmless` ones any."""
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    fields = _without_nulls(cast("dict[str, object]", body))
    for name in fields.keys() - kind.model_fields.keys():
        if name not in harmless:
            _check_other(name, fields[name], kind, neutral)
    try:
        return kind.model_validate({name: value for name, value in fields.items() if name in kind.model_fields})
    except ValidationError as error:
        raise _first_wrong(error) from error


def _check_other(name: str, value: object, kind: type[Body], neutral: Neutral) -> None:
    if name in neutral:
        # By type too: 0 logprobs are not False logprobs.
        if not any(type(value) is type(one) and value == one for one in neutral[name]):
            raise InvalidRequest(f"{name} with this value isn't served here: leave it out", param=name)
        return
    near = get_close_matches(name[:100], [*kind.model_fields, *neutral], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidRequest(f"unknown field {name[:100]!r}{hint}", param=name[:100])


def _without_nulls(fields: dict[str, object]) -> dict[str, object]:
    """null means absent, in messages and options too: clients send back what they were given."""
    return {name: _without_nulls_inside(value) for name, value in fields.items() if value is not None}


def _without_nulls_inside(value: object) -> object:
    if isinstance(value, dict):
        return _without_nulls(cast("dict[str, object]", value))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_without_nulls_inside(item) for item in cast("list[object]", value)]
    return cast("object", value)


def _first_wrong(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # A union's branches put their own types into the path, which no client sent.
    path = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path if part != "str").lstrip(".")
    return InvalidRequest(f"{name}: {first['msg']}", param=name)
