"""What a request wishes for beside its text: the same over HTTP headers, HTTP bodies and gRPC, and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

from cluster.front.wish_headers import HEADERS
from diptych.errors import DeadlineExceeded, InvalidRequest

if TYPE_CHECKING:
    from cluster.front.service import Ask
    from diptych import Client
    from tests.cluster.conftest import ScriptedService, Wire

BODY = {"model": "tiny", "prompt": "hello"}


def post(wire: Wire, body: dict[str, object], **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{wire.url}/v1/completions", json=body, headers=named)


def wishes(ask: Ask) -> tuple[Any, ...]:
    return ask.priority, ask.tenant, ask.ttft_seconds, ask.itl_seconds, ask.deadline_seconds


def test_headers_say_what_grpc_fields_say(wire: Wire, client: Client, service: ScriptedService) -> None:
    named = {"x_priority": "-7", "x_tenant": "acme", "x_slo_ttft_ms": "250", "x_slo_itl_ms": "30"}
    assert post(wire, BODY, x_request_timeout_ms="60000", **named).status_code == 200
    assert wishes(service.asks[-1]) == (-7, "acme", 0.25, 0.03, 60.0)
    list(client.generate("hello", priority=-7, tenant="acme", ttft_ms=250, itl_ms=30, deadline_ms=60_000))
    assert wishes(service.asks[-1])[:4] == (-7, "acme", 0.25, 0.03)
    assert service.asks[-1].deadline_seconds == pytest.approx(60.0)


def test_without_a_word_nothing_is_wished(wire: Wire, service: ScriptedService) -> None:
    assert post(wire, BODY).status_code == 200
    assert wishes(service.asks[-1]) == (0, "", None, None, None)


def test_the_body_counts_where_both_say_something(wire: Wire, service: ScriptedService) -> None:
    post(wire, BODY | {"priority": 0, "cache_salt": "body"}, x_priority="5", x_tenant="header")
    assert wishes(service.asks[-1])[:2] == (0, "body")


@pytest.mark.parametrize("name", [header.name for header in HEADERS if header.schema["type"] == "integer"])
@pytest.mark.parametrize("said", ["soon", "1.5", "", "٣", "99999999999999", "9999999999", "--1"])
def test_a_header_that_is_no_number_in_its_range_is_refused_by_name(wire: Wire, name: str, said: str) -> None:
    headers = {name.encode(): said.encode(), b"content-type": b"application/json"}
    response = httpx.post(f"{wire.url}/v1/completions", content=b'{"model":"tiny","prompt":"a"}', headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


@pytest.mark.parametrize("said", ["", "x" * 257])
def test_a_tenant_has_a_name_of_bounded_length(wire: Wire, said: str) -> None:
    response = post(wire, BODY, x_tenant=said)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-tenant")


@pytest.mark.parametrize("field", ["ttft_ms", "itl_ms", "deadline_ms"])
@pytest.mark.parametrize("value", [0, 86_400_001])
def test_a_time_out_of_range_is_refused_over_grpc_by_its_field(client: Client, field: str, value: int) -> None:
    with pytest.raises(InvalidRequest, match=field) as refused:
        list(client.generate("hello", **{field: value}))
    assert refused.value.param == field


def test_a_deadline_in_the_message_ends_the_answer_as_a_calls_own_does(
    client: Client, service: ScriptedService
) -> None:
    service.hold_at = 2
    with pytest.raises(DeadlineExceeded):
        list(client.generate("hello", deadline_ms=200))
