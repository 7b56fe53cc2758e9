"""What no well-behaved gRPC client sends: refused as the caller's fault, and the server answers the next call."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import grpc
import pytest

from diptych.v1.inference_pb2 import GenerateRequest, GenerateResponse, ListModelsRequest
from diptych.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.conftest import Wire

GENERATE = "/diptych.v1.InferenceService/Generate"
WAIT_SECONDS = 10


@pytest.fixture
def channel(wire: Wire) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(wire.target) as channel:
        yield channel
        # Whatever was sent, the next request is answered.
        answer = list(InferenceServiceStub(channel).Generate(GenerateRequest(text="hello"), timeout=WAIT_SECONDS))
        assert "".join(response.chunk.text for response in answer) == "Grüß Gott"


def field(number: int, data: bytes) -> bytes:
    """One length-delimited field."""
    assert len(data) < 128
    return bytes((number << 3 | 2, len(data))) + data


TEXT = field(2, b"hello")
UNREADABLE = {
    "invalid UTF-8 in the prompt": field(2, b"\xff\xfe"),
    "invalid UTF-8 in the model": field(1, b"\xc3\x28") + TEXT,
    "invalid UTF-8 in the request id": TEXT + field(6, b"\x80"),
    "invalid UTF-8 in a message of a chat": field(3, field(1, field(2, b"\xed\xa0\x80"))),
    "invalid UTF-8 in a stop string": TEXT + field(5, field(6, b"\xff")),
    "a field that ends too early": bytes((2 << 3 | 2, 100)) + b"short",
    "no message at all": b"this is no protobuf",
    "a tag of field number 0": b"\x00\x00",
    "a varint without end": b"\x08" + b"\xff" * 20,
    "groups nested without end": b"\x0b" * 500,
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_a_message_that_cannot_be_read_is_the_callers_fault(channel: grpc.Channel, data: bytes) -> None:
    generate = channel.unary_stream(GENERATE, response_deserializer=GenerateResponse.FromString)
    with pytest.raises(grpc.RpcError) as refused:
        list(generate(data, timeout=WAIT_SECONDS))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "can't be read" in refused.value.details()


@pytest.mark.parametrize("method", ["Tokenize", "Detokenize"])
def test_so_it_is_in_every_call(channel: grpc.Channel, method: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"/diptych.v1.InferenceService/{method}")(field(1, b"\xff"), timeout=WAIT_SECONDS)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_fields_are_a_newer_clients_and_change_nothing(channel: grpc.Channel) -> None:
    generate = channel.unary_stream(GENERATE, response_deserializer=GenerateResponse.FromString)
    answer = list(generate(TEXT + b"\xc2\x3e\x03new", timeout=WAIT_SECONDS))
    assert "".join(response.chunk.text for response in answer) == "Grüß Gott"


def test_a_method_that_is_not_there_is_unimplemented(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/diptych.v1.InferenceService/Guess")(b"", timeout=WAIT_SECONDS)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_metadata_over_the_limit_is_refused(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        InferenceServiceStub(channel).ListModels(
            ListModelsRequest(), metadata=(("x-long", "x" * 20_000),), timeout=WAIT_SECONDS
        )
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + b"\x00" * 200, b"\x00" * 5000])
def test_what_is_no_grpc_is_hung_up_on(wire: Wire, channel: grpc.Channel, noise: bytes) -> None:
    with socket.create_connection(("127.0.0.1", wire.grpc_port), timeout=WAIT_SECONDS) as stranger:
        stranger.sendall(noise)
        while stranger.recv(4096):
            pass
