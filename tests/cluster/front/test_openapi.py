"""The published document against the running server: valid and invalid requests made from it, by schemathesis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema.validators import Draft202012Validator
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from cluster.front.http import build_app
from cluster.front.openapi import OPERATIONS, document
from cluster.front.wish_headers import DEADLINE

if TYPE_CHECKING:
    from tests.cluster.conftest import ScriptedService, Wire

# Not positive_data_acceptance: what fits the schema may still be more than the context holds.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
DOCUMENT = document()
IN_RANGE: dict[str, Any] = {
    "allowed_token_ids": [97, 98],
    "bad_words": ["zz"],
    "frequency_penalty": 0.5,
    "logit_bias": {"97": 1.5},
    "logprobs": 2,
    "min_p": 0.1,
    "min_tokens": 1,
    "presence_penalty": -0.5,
    "prompt_logprobs": 1,
    "repetition_penalty": 1.2,
    "stop_token_ids": [9],
    "temperature": 0.5,
    "top_logprobs": 3,
    "top_p": 0.9,
}
"""The document gives types; which values the model takes, the front says when they come."""
WITH_BODY = [key for key, operation in OPERATIONS.items() if operation.bodies or operation.parameters]
ALONE = [key for key in OPERATIONS if key not in WITH_BODY]


def steered(case: schemathesis.Case) -> schemathesis.Case:
    """What no schema can say: which model is served, how much its context holds, how long an answer takes."""
    if DEADLINE.name in case.headers:
        case.headers[DEADLINE.name] = "60000"
    body = case.body
    if isinstance(body, dict):
        if isinstance(body.get("model"), str):
            body["model"] = "tiny"
        for name in ("max_tokens", "max_completion_tokens"):
            if type(body.get(name)) is int and body[name] > 100:
                body[name] = 100
        if body.get("prompt") == "":
            body["prompt"] = "a"
        for name, served in IN_RANGE.items():
            if isinstance(body.get(name), list | dict) or type(body.get(name)) in (int, float):
                body[name] = served
    return case


def ask_many(wire: Wire, key: tuple[str, str], mode: GenerationMode, examples: int) -> list[int]:
    """The statuses of so many requests, none of which broke a check."""
    method, path = key
    statuses: list[int] = []
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path][method]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def ask(case: schemathesis.Case) -> None:
        if mode is GenerationMode.POSITIVE:
            case = steered(case)
        response = case.call(base_url=wire.url)
        case.validate_response(response, checks=CHECKS)
        statuses.append(response.status_code)

    ask()
    return statuses


def check_endpoint(wire: Wire, service: ScriptedService, key: tuple[str, str], examples: int) -> None:
    """So many requests, half of which fit the document and half don't."""
    half = examples // 2
    service.max_context, service.answer = 8192, "Grüß"
    if not OPERATIONS[key].bodies:  # a string in the path can't be wrong
        assert len(ask_many(wire, key, GenerationMode.POSITIVE, examples)) >= examples
        return
    served = ask_many(wire, key, GenerationMode.POSITIVE, half)
    assert 200 in served
    refused = ask_many(wire, key, GenerationMode.NEGATIVE, half)
    assert all(400 <= status < 500 for status in refused)
    assert len(served) + len(refused) >= examples


@pytest.mark.parametrize("key", WITH_BODY, ids=" ".join)
def test_an_endpoint_keeps_to_its_document(wire: Wire, service: ScriptedService, key: tuple[str, str]) -> None:
    check_endpoint(wire, service, key, 16)


@pytest.mark.full
@pytest.mark.parametrize("key", WITH_BODY, ids=" ".join)
def test_an_endpoint_keeps_to_its_document_500_times(
    wire: Wire, service: ScriptedService, key: tuple[str, str]
) -> None:
    check_endpoint(wire, service, key, 500)


@pytest.mark.parametrize("key", ALONE, ids=" ".join)
def test_an_endpoint_without_input_keeps_to_its_document(wire: Wire, key: tuple[str, str]) -> None:
    assert ask_many(wire, key, GenerationMode.POSITIVE, 1) == [200]


def test_the_document_is_published_whole(wire: Wire) -> None:
    published = httpx.get(f"{wire.url}/openapi.json")
    assert published.headers["content-type"] == "application/json"
    assert published.json() == DOCUMENT


def test_every_route_is_in_the_document_and_every_operation_has_a_route(service: ScriptedService) -> None:
    routes = {
        (method.lower(), route.path.replace("{id:path}", "{id}"))
        for route in build_app(service).routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    served = {(method, path) for method, path in routes if method != "head" and path != "/openapi.json"}
    assert served == set(OPERATIONS)


def test_every_schema_in_the_document_is_one_and_says_what_its_fields_mean() -> None:
    def fields(schema: dict[str, Any]) -> list[str]:
        return [name for name, field in schema["properties"].items() if not field]

    for name, schema in DOCUMENT["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        assert schema["description"], name
        assert not fields(schema), name
