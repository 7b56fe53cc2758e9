"""docs/api.md names what there is: every field, path, limit and error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.front import grpc_service, http_wire, wanted
from cluster.front.errors import http_error
from cluster.front.openai_types import HARMLESS, MAX_CHOICES, ChatRequest, CompletionRequest, StreamOptions
from cluster.front.openapi import OPERATIONS
from diptych import errors
from diptych.errors import ServingError
from diptych.rpc import code_of, reason_of
from diptych.v1 import admin_pb2, inference_pb2

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServingError)]


def row(word: str) -> str:
    return next(line for line in PAGE.splitlines() if line.startswith("|") and re.search(rf"\b{word}\b", line))


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, StreamOptions])
def test_every_field_is_there(kind: type[ChatRequest | CompletionRequest | StreamOptions]) -> None:
    assert [name for name in kind.model_fields if f"`{name}`" not in PAGE] == []


def test_every_harmless_field_is_there() -> None:
    assert [name for name in HARMLESS if f"`{name}`" not in PAGE] == []


def test_every_path_is_there() -> None:
    assert [path for method, path in OPERATIONS if f"{method.upper()} {path}" not in PAGE] == []


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind is not ServingError])
def test_every_error_is_there_with_both_statuses(kind: type[ServingError]) -> None:
    error = kind.__new__(kind)
    Exception.__init__(error, "")
    vars(error).update(param=None, retry_after=1.0)
    answer, line = http_error(error), row(reason_of(error))
    assert line.startswith(f"| {answer.status} |")
    assert f"| {code_of(error).name} |" in line


def test_every_method_is_there() -> None:
    services = [
        *inference_pb2.DESCRIPTOR.services_by_name.values(),
        *admin_pb2.DESCRIPTOR.services_by_name.values(),
    ]
    assert [method.name for service in services for method in service.methods if f"{method.name}`" not in PAGE] == []


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("stop", wanted.MAX_STOPS),
        ("stop_token_ids", wanted.MAX_STOP_TOKENS),
        ("logit_bias", wanted.MAX_BIASED_TOKENS),
        ("bad_words", wanted.MAX_BAD_WORDS),
        ("allowed_token_ids", wanted.MAX_ALLOWED_TOKENS),
        ("prompt_logprobs", wanted.MAX_LOGPROBS),
        ("n", MAX_CHOICES),
        ("repetition_penalty", int(wanted.MAX_REPETITION_PENALTY)),
        ("temperature", int(wanted.MAX_TEMPERATURE)),
        ("priority", wanted.MAX_PRIORITY),
    ],
)
def test_every_limit_is_there(name: str, limit: int) -> None:
    assert re.search(rf"(?<![\d,]){limit:,}(?!,?\d)", row(name)), row(name)


def test_the_limits_of_both_servers_are_there() -> None:
    assert f"{http_wire.BODY_TIMEOUT_SECONDS:g} s" in PAGE
    assert f"{http_wire.MAX_BODY_BYTES >> 20} MiB" in PAGE
    assert f"at most {grpc_service.MAX_MESSAGE_BYTES >> 20} MiB" in PAGE
    assert f"{grpc_service.MAX_CONCURRENT_STREAMS:,} calls" in PAGE
    assert f"nothing for {grpc_service.STALL_TIMEOUT_SECONDS:g} s" in PAGE
