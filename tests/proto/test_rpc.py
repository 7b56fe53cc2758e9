"""Our errors over gRPC: what a front raises is what its client raises."""

from __future__ import annotations

import grpc
import pytest
from google.rpc.status_pb2 import Status

from diptych import errors
from diptych.errors import InvalidRequest, Overloaded, PromptTooLong, ServingError
from diptych.rpc import code_of, from_status, reason_of, to_status

KINDS = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_survives_the_wire(kind: type[ServingError]) -> None:
    received = from_status(Status.FromString(to_status(kind("what and why")).SerializeToString()))
    assert type(received) is kind
    assert str(received) == "what and why"


def test_the_field_and_the_wait_survive_too() -> None:
    refused = from_status(to_status(PromptTooLong("long", param="messages")))
    overloaded = from_status(to_status(Overloaded("full", retry_after=0.25)))
    assert isinstance(refused, PromptTooLong)
    assert refused.param == "messages"
    assert isinstance(overloaded, Overloaded)
    assert overloaded.retry_after == 0.25


def test_an_error_of_an_unknown_class_goes_as_its_nearest_known_base() -> None:
    class Odd(InvalidRequest):
        pass

    assert reason_of(Odd("x")) == "INVALID_REQUEST"
    assert code_of(Odd("x")) is grpc.StatusCode.INVALID_ARGUMENT


def test_somebody_elses_status_is_nobodys_error() -> None:
    assert from_status(Status(code=3, message="x")) is None


@pytest.mark.parametrize("letter", ["a", "ü", "漢", "🙂", "%", "\ud800"])
def test_a_long_message_fits_into_grpcs_metadata(letter: str) -> None:
    status = to_status(InvalidRequest(letter * 100_000, param="prompt"))
    percent_encoded = 3 * len(status.message.encode())
    base64 = status.ByteSize() * 4 / 3
    assert len(status.message) > 100
    assert percent_encoded + base64 < 8192
