"""The gRPC front, asked by our client, by bare stubs, and by the standard health and reflection clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from cluster.front.wanted import MAX_STOPS
from diptych.errors import (
    DeadlineExceeded,
    Draining,
    Internal,
    InvalidRequest,
    LayoutMismatch,
    NoWorker,
    Overloaded,
    PromptTooLong,
    ServingError,
    UnknownModel,
    WorkerLost,
)
from diptych.v1.admin_pb2 import Role
from diptych.v1.inference_pb2 import (
    Chat,
    ChatMessage,
    FinishReason,
    GenerateRequest,
    GenerateResponse,
    Sampling,
    TokenIds,
    TokenizeRequest,
)
from diptych.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diptych import Client
    from tests.cluster.conftest import ScriptedService, Wire

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def channel(wire: Wire) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(wire.target) as channel:
        yield channel


def text_of(responses: list[GenerateResponse]) -> str:
    return "".join(response.chunk.text for response in responses)


def test_an_answer_comes_in_chunks_and_ends_with_its_usage_and_how_it_was_served(client: Client) -> None:
    *chunks, last = client.generate("hello")
    assert text_of(chunks) == "Grüß Gott"
    assert bytes(token for chunk in chunks for token in chunk.chunk.token_ids).decode() == "Grüß Gott"
    assert last.complete.finish_reason == FinishReason.FINISH_REASON_STOP
    assert (last.complete.usage.prompt_tokens, last.complete.usage.completion_tokens) == (5, 11)
    assert last.complete.usage.cached_tokens == 3
    assert last.complete.diptych.how == "remote"
    assert (last.complete.diptych.prefill_worker, last.complete.diptych.decode_worker) == ("prefill-0", "decode-0")
    assert (last.complete.diptych.kv_blocks_sent, last.complete.diptych.kv_bytes_sent) == (2, 2048)


def test_a_prompt_is_text_a_conversation_or_tokens(client: Client, service: ScriptedService) -> None:
    list(client.generate("ab"))
    list(client.generate(tokens=[97, 98]))
    list(client.generate(messages=HELLO))
    assert service.asks[0].tokens == service.asks[1].tokens == (97, 98)
    assert service.asks[2].tokens == client.tokenize(messages=HELLO)
    assert client.tokenize("ab") == (97, 98)


def test_what_the_client_leaves_out_takes_the_documented_defaults(client: Client, service: ScriptedService) -> None:
    list(client.generate("hello"))
    list(client.generate("hello"))
    first, second = (ask.params for ask in service.asks)
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (1.0, 1.0, 0, 512 - 5)
    assert set(first.stop_token_ids) == service.text.eos_token_ids
    assert first.seed != second.seed
    assert service.asks[0].id != service.asks[1].id


def test_what_the_client_sets_reaches_the_engine(client: Client, service: ScriptedService) -> None:
    list(
        client.generate(
            "hello",
            max_tokens=7,
            temperature=0.7,
            top_p=0.9,
            top_k=5,
            seed=2**64 - 1,
            stop=["\n"],
            stop_token_ids=[9],
            ignore_eos=True,
            fingerprint=True,
            request_id="my-request.1",
        )
    )
    [ask] = service.asks
    assert (ask.id, ask.stop) == ("my-request.1", ("\n",))
    assert (ask.params.max_tokens, ask.params.temperature, ask.params.top_p) == (7, 0.7, 0.9)
    assert (ask.params.top_k, ask.params.seed, ask.params.stop_token_ids) == (5, 2**64 - 1, (9,))
    assert ask.params.fingerprint


def test_a_set_zero_is_not_unset(client: Client, service: ScriptedService) -> None:
    list(client.generate("hello", temperature=0, seed=0))
    assert (service.asks[0].params.temperature, service.asks[0].params.seed) == (0.0, 0)


def test_fingerprints_come_with_their_tokens(client: Client) -> None:
    chunks = [response.chunk for response in client.generate("hello", fingerprint=True)][:-1]
    assert all(len(chunk.fingerprints) == len(chunk.token_ids) for chunk in chunks)
    assert all(len(one) == 32 for chunk in chunks for one in chunk.fingerprints)


def test_forced_tokens_bound_the_answer_and_bring_the_models_own_choices(
    client: Client, service: ScriptedService
) -> None:
    responses = list(client.generate("hello", forced=[1, 2, 3]))
    assert service.asks[0].params.forced == (1, 2, 3)
    assert service.asks[0].params.max_tokens == 3
    assert [token for response in responses for token in response.chunk.argmax_token_ids] == [1, 2]


def test_the_call_names_its_request_before_the_first_chunk(wire: Wire, channel: grpc.Channel) -> None:
    call = InferenceServiceStub(channel).Generate(GenerateRequest(text="hello"))
    named = dict(call.initial_metadata())["x-request-id"]
    assert list(call)[-1].complete.request_id == named


def test_the_models_and_the_clusters_status_are_told(client: Client) -> None:
    [model] = client.models()
    assert (model.id, model.max_context) == ("tiny", 512)
    status = client.status()
    assert (status.model, status.build, status.ready) == ("tiny", "b1", True)
    assert (status.requests_placed, status.index_blocks) == (5, 11)
    prefill, decode = status.workers
    assert (prefill.info.id, prefill.info.role, decode.info.role) == ("prefill-0", Role.ROLE_PREFILL, Role.ROLE_DECODE)
    assert (decode.load.blocks_held, decode.counters.leaked_blocks, decode.info.layout.dtype) == (25, 7, "fp32")


BAD_REQUESTS = [
    (GenerateRequest(), "prompt"),
    (GenerateRequest(text=""), "text"),
    (GenerateRequest(token_ids=TokenIds()), "token_ids"),
    (GenerateRequest(token_ids=TokenIds(ids=[260])), "token_ids"),
    (GenerateRequest(chat=Chat()), "chat.messages"),
    (GenerateRequest(chat=Chat(messages=[ChatMessage(content="x")])), "messages[0].role"),
    (GenerateRequest(chat=Chat(messages=[ChatMessage(role="robot", content="x")])), "messages[0].role"),
    (GenerateRequest(text="a" * 512), "text"),
    (GenerateRequest(text="a", sampling=Sampling(max_tokens=0)), "sampling.max_tokens"),
    (GenerateRequest(text="a", sampling=Sampling(max_tokens=512)), "sampling.max_tokens"),
    (GenerateRequest(text="a", sampling=Sampling(max_tokens=2**32 - 1)), "sampling.max_tokens"),
    (GenerateRequest(text="a", sampling=Sampling(temperature=-1)), "sampling.temperature"),
    (GenerateRequest(text="a", sampling=Sampling(temperature=2.5)), "sampling.temperature"),
    (GenerateRequest(text="a", sampling=Sampling(temperature=float("nan"))), "sampling.temperature"),
    (GenerateRequest(text="a", sampling=Sampling(temperature=float("inf"))), "sampling.temperature"),
    (GenerateRequest(text="a", sampling=Sampling(top_p=0)), "sampling.top_p"),
    (GenerateRequest(text="a", sampling=Sampling(top_p=float("nan"))), "sampling.top_p"),
    (GenerateRequest(text="a", sampling=Sampling(top_p=1.5)), "sampling.top_p"),
    (GenerateRequest(text="a", sampling=Sampling(stop=[""])), "sampling.stop"),
    (GenerateRequest(text="a", sampling=Sampling(stop=["x" * 1000])), "sampling.stop"),
    (GenerateRequest(text="a", sampling=Sampling(stop=["x"] * (MAX_STOPS + 1))), "sampling.stop"),
    (GenerateRequest(text="a", sampling=Sampling(stop_token_ids=[260])), "sampling.stop_token_ids"),
    (GenerateRequest(text="a", sampling=Sampling(stop_token_ids=[1] * 257)), "sampling.stop_token_ids"),
    (GenerateRequest(text="a", sampling=Sampling(min_p=1.5)), "sampling.min_p"),
    (GenerateRequest(text="a", sampling=Sampling(min_p=float("nan"))), "sampling.min_p"),
    (GenerateRequest(text="a", sampling=Sampling(max_tokens=3, min_tokens=4)), "sampling.min_tokens"),
    (GenerateRequest(text="a", sampling=Sampling(repetition_penalty=0)), "sampling.repetition_penalty"),
    (GenerateRequest(text="a", sampling=Sampling(repetition_penalty=float("inf"))), "sampling.repetition_penalty"),
    (GenerateRequest(text="a", sampling=Sampling(presence_penalty=-2.1)), "sampling.presence_penalty"),
    (GenerateRequest(text="a", sampling=Sampling(frequency_penalty=float("nan"))), "sampling.frequency_penalty"),
    (GenerateRequest(text="a", sampling=Sampling(logit_bias={1: 101})), "sampling.logit_bias"),
    (GenerateRequest(text="a", sampling=Sampling(logit_bias={260: 1})), "sampling.logit_bias"),
    (GenerateRequest(text="a", sampling=Sampling(logit_bias={1: float("nan")})), "sampling.logit_bias"),
    (GenerateRequest(text="a", sampling=Sampling(logit_bias=dict.fromkeys(range(1025), 1.0))), "sampling.logit_bias"),
    (GenerateRequest(text="a", sampling=Sampling(bad_words=[""])), "sampling.bad_words"),
    (GenerateRequest(text="a", sampling=Sampling(bad_words=["x"] * 257)), "sampling.bad_words"),
    (GenerateRequest(text="a", sampling=Sampling(allowed_token_ids=[260])), "sampling.allowed_token_ids"),
    (GenerateRequest(text="a", sampling=Sampling(allowed_token_ids=[1] * 8193)), "sampling.allowed_token_ids"),
    (GenerateRequest(text="a", sampling=Sampling(logprobs=21)), "sampling.logprobs"),
    (GenerateRequest(text="a", sampling=Sampling(prompt_logprobs=21)), "sampling.prompt_logprobs"),
    (GenerateRequest(text="a", forced_token_ids=[260]), "forced_token_ids"),
    (GenerateRequest(text="a", forced_token_ids=[1, 2], sampling=Sampling(max_tokens=1)), "forced_token_ids"),
    (GenerateRequest(text="a", request_id="a b"), "request_id"),
    (GenerateRequest(text="a", request_id="a\nb"), "request_id"),
    (GenerateRequest(text="a", request_id="x" * 129), "request_id"),
]


@pytest.mark.parametrize(("request_", "field"), BAD_REQUESTS, ids=lambda value: str(value).replace("\n", " ")[:60])
def test_a_wrong_field_is_refused_by_name(channel: grpc.Channel, request_: GenerateRequest, field: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        list(InferenceServiceStub(channel).Generate(request_, timeout=10))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    info, bad = ErrorInfo(), BadRequest()
    details = rpc_status.from_call(refused.value).details
    assert details[0].Unpack(info)
    assert details[1].Unpack(bad)
    assert (info.domain, [violation.field for violation in bad.field_violations]) == ("diptych", [field])


def test_tokenize_refuses_what_generate_refuses(channel: grpc.Channel) -> None:
    for request in (TokenizeRequest(), TokenizeRequest(chat=Chat())):
        with pytest.raises(grpc.RpcError) as refused:
            InferenceServiceStub(channel).Tokenize(request, timeout=10)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_our_client_raises_what_the_front_raised(client: Client) -> None:
    with pytest.raises(UnknownModel, match="'tiny' is served"):
        list(client.generate("hello", model="gpt-9"))
    with pytest.raises(PromptTooLong, match="at most 507") as refused:
        list(client.generate("hello", max_tokens=600))
    assert refused.value.param == "sampling.max_tokens"
    with pytest.raises(InvalidRequest, match="temperature is 9"):
        list(client.generate("hello", temperature=9))


def test_a_message_over_the_limit_is_refused(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        list(InferenceServiceStub(channel).Generate(GenerateRequest(text="a" * (9 << 20)), timeout=10))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


ERRORS = [
    (InvalidRequest("no", param="x"), grpc.StatusCode.INVALID_ARGUMENT),
    (Overloaded("full", retry_after=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NoWorker("none"), grpc.StatusCode.UNAVAILABLE),
    (Draining("bye"), grpc.StatusCode.FAILED_PRECONDITION),
    (WorkerLost("gone"), grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (LayoutMismatch("these two"), grpc.StatusCode.FAILED_PRECONDITION),
    (Internal("oops"), grpc.StatusCode.INTERNAL),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("fail_at", [0, 3])
def test_a_service_error_has_its_code_wherever_it_strikes(
    channel: grpc.Channel,
    client: Client,
    service: ScriptedService,
    error: ServingError,
    code: grpc.StatusCode,
    fail_at: int,
) -> None:
    service.fail_at, service.error = fail_at, error
    call = InferenceServiceStub(channel).Generate(GenerateRequest(text="hello"), timeout=10)
    with pytest.raises(grpc.RpcError):
        list(call)
    assert (call.code(), call.details()) == (code, str(error))
    with pytest.raises(type(error), match=str(error)):
        list(client.generate("hello"))


def test_an_overload_says_when_to_come_back(channel: grpc.Channel, service: ScriptedService) -> None:
    service.fail_at, service.error = 0, Overloaded("full", retry_after=2.5)
    with pytest.raises(grpc.RpcError) as refused:
        list(InferenceServiceStub(channel).Generate(GenerateRequest(text="hello"), timeout=10))
    retry = RetryInfo()
    assert any(detail.Unpack(retry) for detail in rpc_status.from_call(refused.value).details)
    assert retry.retry_delay.ToMilliseconds() == 2500


def test_a_bug_is_answered_with_the_requests_id_and_none_of_its_words(client: Client, service: ScriptedService) -> None:
    service.fail_at, service.error = 3, LookupError("secret")
    with pytest.raises(Internal, match="mine") as failed:
        list(client.generate("hello", request_id="mine"))
    assert "secret" not in str(failed.value)


def test_health_follows_the_service_and_the_admin_service_only_the_process(
    channel: grpc.Channel, service: ScriptedService
) -> None:
    health = HealthStub(channel)

    def statuses() -> list[int]:
        names = ("", "diptych.v1.InferenceService", "diptych.v1.AdminService")
        return [health.Check(HealthCheckRequest(service=name), timeout=10).status for name in names]

    serving, not_serving = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
    assert statuses() == [serving, serving, serving]
    service.ready = False
    assert statuses() == [not_serving, not_serving, serving]
    with pytest.raises(grpc.RpcError) as refused:
        health.Check(HealthCheckRequest(service="nobody"), timeout=10)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_watcher_hears_of_every_change(channel: grpc.Channel, service: ScriptedService) -> None:
    watch = HealthStub(channel).Watch(HealthCheckRequest(), timeout=20)
    assert next(watch).status == HealthCheckResponse.SERVING
    service.ready = False
    assert next(watch).status == HealthCheckResponse.NOT_SERVING
    watch.cancel()


def test_reflection_describes_the_services(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {"diptych.v1.InferenceService", "diptych.v1.AdminService", "grpc.health.v1.Health"} <= set(
        database.get_services()
    )
    described = DescriptorPool(database).FindServiceByName("diptych.v1.InferenceService")
    assert [method.name for method in described.methods] == ["Generate", "Tokenize", "Detokenize", "ListModels"]
