"""The HTTP front's OpenAPI document, made from the models that read its bodies. Knows no server and no service.

Every model's optional fields take null, which means absent; what a body may hold beside its model (harmless and
neutral fields) is said here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from pydantic.json_schema import models_json_schema

from cluster.front import response_shapes as shapes
from cluster.front import wanted as limits
from cluster.front.openai_types import HARMLESS, NEUTRAL, ChatRequest, CompletionRequest
from cluster.front.tokenize_api import (
    NEUTRAL_FOR_CHAT,
    NEUTRAL_FOR_TEXT,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from cluster.front.wish_headers import HEADERS
from diptych import __version__

if TYPE_CHECKING:
    from pydantic import BaseModel

    from cluster.front.openai_types import Neutral

Json: TypeAlias = dict[str, Any]

_POINTER: Final = "#/components/schemas/"
_REFUSALS: Final = {
    400: "The request is wrong; `param` names the field.",
    404: "No such model.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    415: "The content type isn't JSON.",
}
_FAILURES: Final = {
    429: "Too much is waiting; Retry-After says when to come back.",
    500: "A bug of ours.",
    502: "A worker was lost with the request.",
    503: "No worker can take the request, or this front is going away.",
    504: "The request's own deadline passed.",
}
_BESIDE: Final[dict[type[BaseModel], Neutral]] = {
    ChatRequest: NEUTRAL,
    CompletionRequest: NEUTRAL,
    TokenizeTextRequest: NEUTRAL_FOR_TEXT,
    TokenizeChatRequest: NEUTRAL_FOR_CHAT,
}


_LIMITS: Final[dict[str, Json]] = {
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
    "temperature": {"minimum": 0, "maximum": limits.MAX_TEMPERATURE},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": {"minimum": -limits.MAX_PENALTY, "maximum": limits.MAX_PENALTY},
    "frequency_penalty": {"minimum": -limits.MAX_PENALTY, "maximum": limits.MAX_PENALTY},
    "repetition_penalty": {"minimum": 1 / limits.MAX_REPETITION_PENALTY, "maximum": limits.MAX_REPETITION_PENALTY},
    "stop_token_ids": {"maxItems": limits.MAX_STOP_TOKENS},
    "bad_words": {"maxItems": limits.MAX_BAD_WORDS},
    "allowed_token_ids": {"minItems": 1, "maxItems": limits.MAX_ALLOWED_TOKENS},
    "logit_bias": {"maxProperties": limits.MAX_BIASED_TOKENS},
    "top_logprobs": {"minimum": 0, "maximum": limits.MAX_LOGPROBS},
    "cache_salt": {"maxLength": limits.MAX_TENANT_CHARACTERS},
    "prompt_logprobs": {"minimum": 0, "maximum": limits.MAX_LOGPROBS},
}
"""What is checked where the numbers are used (`cluster.front.asks`), so that both protocols have it."""


class Operation(NamedTuple):
    """One path's one method."""

    summary: str
    answers: type[BaseModel] | None
    """None is text."""
    bodies: tuple[type[BaseModel], ...] = ()
    streams: bool = False
    """An event stream with `stream: true`; takes the headers that wish."""
    may_be_unready: bool = False
    parameters: tuple[Json, ...] = ()


_MODEL_ID: Final[Json] = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
OPERATIONS: Final[dict[tuple[str, str], Operation]] = {
    ("post", "/v1/chat/completions"): Operation(
        "An answer to a conversation", shapes.ChatCompletion, (ChatRequest,), streams=True
    ),
    ("post", "/v1/completions"): Operation(
        "A text's continuation", shapes.TextCompletion, (CompletionRequest,), streams=True
    ),
    ("get", "/v1/models"): Operation("The models served", shapes.ModelList),
    ("get", "/v1/models/{id}"): Operation("One model", shapes.Model, parameters=(_MODEL_ID,)),
    ("post", "/tokenize"): Operation(
        "The tokens of a text or a conversation", shapes.Tokens, (TokenizeTextRequest, TokenizeChatRequest)
    ),
    ("post", "/detokenize"): Operation("The text of tokens", shapes.Text, (DetokenizeRequest,)),
    ("get", "/health"): Operation("As /health/ready", shapes.Health, may_be_unready=True),
    ("get", "/health/live"): Operation("Whether this process answers", shapes.Health),
    ("get", "/health/ready"): Operation(
        "Whether a request sent now would be placed", shapes.Health, may_be_unready=True
    ),
    ("get", "/version"): Operation("diptych's version", shapes.Version),
    ("get", "/metrics"): Operation("Prometheus metrics of this front and the cluster", None),
}


def document() -> Json:
    """The whole document, OpenAPI 3.1."""
    paths: dict[str, Json] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "diptych",
            "version": __version__,
            "description": "OpenAI's API over a disaggregated cluster. What can't be honoured is a 400 that names it.",
        },
        "paths": paths,
        "components": {"schemas": _schemas()},
    }


def _operation(operation: Operation) -> Json:
    parameters = [*operation.parameters, *(_headers() if operation.streams else [])]
    said: Json = {"summary": operation.summary, "responses": dict(_responses(operation))}
    if parameters:
        said["parameters"] = parameters
    if operation.bodies:
        schemas = [_pointer(body) for body in operation.bodies]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        said["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return said


def _headers() -> list[Json]:
    return [
        {"name": name, "in": "header", "required": False, "description": meaning, "schema": schema}
        for name, meaning, schema in HEADERS
    ]


def _responses(operation: Operation) -> Iterator[tuple[str, Json]]:
    answer = "text/plain" if operation.answers is None else "application/json"
    schema = {"type": "string"} if operation.answers is None else _pointer(operation.answers)
    content: Json = {answer: {"schema": schema}}
    if operation.streams:
        content["text/event-stream"] = {}  # OpenAPI 3.1 can't say what one event holds
    meaning = (
        "Done; with `stream: true` events `data: {…}`, the last one `data: [DONE]`." if operation.streams else "Done."
    )
    yield "200", {"description": meaning, "content": content}
    if operation.may_be_unready:
        yield "503", {"description": "Not ready.", "content": {"application/json": {"schema": schema}}}
    if operation.bodies:
        yield from _error_responses(_REFUSALS)
    elif operation.parameters:
        yield from _error_responses({404: _REFUSALS[404]})
    if operation.streams:
        yield from _error_responses(_FAILURES)


def _error_responses(kinds: dict[int, str]) -> Iterator[tuple[str, Json]]:
    for status, meaning in kinds.items():
        content = {"application/json": {"schema": _pointer(shapes.ErrorAnswer)}}
        yield str(status), {"description": meaning, "content": content}


def _pointer(model: type[BaseModel]) -> Json:
    return {"$ref": _POINTER + model.__name__}


def _schemas() -> Json:
    bodies = {body for operation in OPERATIONS.values() for body in operation.bodies}
    answers = {operation.answers for operation in OPERATIONS.values() if operation.answers} | {shapes.ErrorAnswer}
    read = _definitions(bodies, "validation")
    for definition in read.values():
        _take_nulls(definition)
    for body, neutral in _BESIDE.items():
        fields = read[body.__name__]["properties"]
        _limit(fields)
        read[body.__name__]["properties"] = _beside(neutral, harmless=neutral is NEUTRAL) | fields
    return dict(sorted((_definitions(answers, "serialization") | read).items()))


def _definitions(models: set[type[BaseModel]], mode: Any) -> Json:  # noqa: ANN401 (pydantic's two literals)
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schema = models_json_schema([(model, mode) for model in ordered], ref_template=_POINTER + "{model}")
    return deepcopy(schema["$defs"])


def _take_nulls(definition: Json) -> None:
    """null means absent, in every object and of every name."""
    required = definition.get("required", [])
    for name, field in definition.get("properties", {}).items():
        if name not in required and {"type": "null"} not in field.get("anyOf", []):
            definition["properties"][name] = {"anyOf": [field, {"type": "null"}]}
    if definition.get("additionalProperties") is False:
        definition["additionalProperties"] = {"type": "null"}


def _limit(properties: Json) -> None:
    for name in _LIMITS.keys() & properties.keys():
        properties[name]["anyOf"][0].update(_LIMITS[name])


def _beside(neutral: Neutral, *, harmless: bool) -> Json:
    """What a body may hold that its model doesn't know."""
    refused = {
        name: {"anyOf": [*({"const": value} for value in values), {"type": "null"}], "description": "Not served."}
        for name, values in neutral.items()
    }
    ignored = {name: {"description": "Taken, and changes nothing."} for name in sorted(HARMLESS) if harmless}
    return refused | ignored
