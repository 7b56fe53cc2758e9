"""`diptych.Client`: asks a front over gRPC, blocking. Knows the wire; nothing of workers, Ray or models."""

from __future__ import annotations

from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING, Protocol, cast

import grpc

from diptych.calls import (
    CHANGE_SECONDS,
    CHANNEL_OPTIONS,
    DEFAULT_TARGET,
    MAX_MESSAGE_BYTES,
    Unreachable,
    Wishes,
    chat_messages,
    generate_request,
    nobody_at,
    raised_by_the_front,
    role_number,
    tokenize_request,
)
from diptych.v1.admin_pb2 import (
    DrainRequest,
    DrainResponse,
    ExplainRequest,
    ExplainResponse,
    GetStatusRequest,
    GetStatusResponse,
    ScaleRequest,
    ScaleResponse,
    SetRoleRequest,
    SetRoleResponse,
)
from diptych.v1.admin_pb2_grpc import AdminServiceStub
from diptych.v1.inference_pb2 import DetokenizeRequest, GenerateRequest, GenerateResponse, ListModelsRequest, Model
from diptych.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self, Unpack

    from diptych.v1.inference_pb2 import DetokenizeResponse, ListModelsResponse, TokenizeRequest, TokenizeResponse

__all__ = ["DEFAULT_TARGET", "MAX_MESSAGE_BYTES", "Client", "Unreachable"]


class Client:
    """One connection to a front, opened at the first call.

    Calls raise what the front raised (`diptych.errors`), `Unreachable` when nobody answers, and
    `grpc.RpcError` for what is neither.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        connect_timeout_seconds: float = 5.0,
        timeout_seconds: float | None = None,
    ) -> None:
        """`timeout_seconds` is each call's deadline, an answer's last token included; None is none."""
        self._target = target
        self._connect_timeout_seconds = connect_timeout_seconds
        self._timeout_seconds = timeout_seconds
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._inference = cast("_Inference", InferenceServiceStub(self._channel))
        self._admin = cast("_Admin", AdminServiceStub(self._channel))
        self._connected = False

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        tokens: Sequence[int] | None = None,
        **wishes: Unpack[Wishes],
    ) -> Iterator[GenerateResponse]:
        """One answer to a text, a conversation or a row of tokens: chunks, then one `complete`.

        The request is sent at the first `next`; closing the iterator cancels it.
        """
        return self._responses(generate_request(prompt, messages, tokens, wishes))

    def ask(
        self, prompt: str, *, system: str | None = None, max_tokens: int | None = None, temperature: float = 0.0
    ) -> str:
        """The model's answer to one chat message; greedy unless told otherwise."""
        messages = chat_messages(prompt, system)
        responses = self.generate(messages=messages, max_tokens=max_tokens, temperature=temperature)
        return "".join(response.chunk.text for response in responses)

    def tokenize(
        self, prompt: str | None = None, *, messages: Sequence[Mapping[str, str]] | None = None
    ) -> tuple[int, ...]:
        """The tokens that `generate` would compute for this prompt."""
        request = tokenize_request(prompt, messages)
        with self._call():
            return tuple(self._inference.Tokenize(request, timeout=self._timeout_seconds).token_ids)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Their text, special tokens left out."""
        with self._call():
            return self._inference.Detokenize(DetokenizeRequest(token_ids=tokens), timeout=self._timeout_seconds).text

    def models(self) -> tuple[Model, ...]:
        """The models served."""
        with self._call():
            response = self._inference.ListModels(ListModelsRequest(), timeout=self._timeout_seconds)
        return tuple(response.models)

    def status(self) -> GetStatusResponse:
        """The scheduler's view of the cluster."""
        with self._call():
            return self._admin.GetStatus(GetStatusRequest(), timeout=self._timeout_seconds)

    def explain(self, request_id: str) -> ExplainResponse:
        """Why a request ran where it did, and how that went. Raises UnknownRequest."""
        with self._call():
            return self._admin.Explain(ExplainRequest(request_id=request_id), timeout=self._timeout_seconds)

    def drain(self, worker: str, *, replace: bool = False) -> DrainResponse:
        """Takes a worker out of service without losing a request; returns when it has ended."""
        with self._call():
            return self._admin.Drain(DrainRequest(worker=worker, replace=replace), timeout=CHANGE_SECONDS)

    def drain_node(self, node: str) -> DrainResponse:
        """Takes all workers of a Ray node (address or id) out of service; returns when they have ended."""
        with self._call():
            return self._admin.Drain(DrainRequest(node=node), timeout=CHANGE_SECONDS)

    def set_role(self, worker: str, role: str) -> SetRoleResponse:
        """What a worker does from now on: "prefill", "decode" or "mixed"."""
        request = SetRoleRequest(worker=worker, role=role_number(role))
        with self._call():
            return self._admin.SetRole(request, timeout=CHANGE_SECONDS)

    def scale(self, role: str, workers: int) -> ScaleResponse:
        """Starts or drains workers of a pool; returns when it has so many."""
        request = ScaleRequest(role=role_number(role), workers=workers)
        with self._call():
            return self._admin.Scale(request, timeout=CHANGE_SECONDS)

    def close(self) -> None:
        """Cancels what is running and hangs up."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _responses(self, request: GenerateRequest) -> Iterator[GenerateResponse]:
        with self._call():
            call = self._inference.Generate(request, timeout=self._timeout_seconds)
            try:
                yield from call
            finally:
                call.cancel()

    @contextmanager
    def _call(self) -> Generator[None]:
        self._connect()
        try:
            yield
        except grpc.RpcError as error:
            raise raised_by_the_front(error, self._target) from error

    def _connect(self) -> None:
        """Fails as soon as every address refused, instead of after the whole timeout."""
        if self._connected:
            return
        decided = Event()

        def hear(state: grpc.ChannelConnectivity) -> None:
            if state is grpc.ChannelConnectivity.READY:
                self._connected = True
            if state in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE):
                decided.set()

        self._channel.subscribe(hear, try_to_connect=True)
        decided.wait(self._connect_timeout_seconds)
        self._channel.unsubscribe(hear)
        if not self._connected:
            raise nobody_at(self._target)


class _Answer(Protocol):
    """A running server stream."""

    def __iter__(self) -> Iterator[GenerateResponse]: ...

    def cancel(self) -> bool: ...


class _Inference(Protocol):
    """The generated stub, which carries no types."""

    def Generate(self, request: GenerateRequest, *, timeout: float | None) -> _Answer: ...

    def Tokenize(self, request: TokenizeRequest, *, timeout: float | None) -> TokenizeResponse: ...

    def Detokenize(self, request: DetokenizeRequest, *, timeout: float | None) -> DetokenizeResponse: ...

    def ListModels(self, request: ListModelsRequest, *, timeout: float | None) -> ListModelsResponse: ...


class _Admin(Protocol):
    """The generated stub, which carries no types."""

    def GetStatus(self, request: GetStatusRequest, *, timeout: float | None) -> GetStatusResponse: ...

    def Explain(self, request: ExplainRequest, *, timeout: float | None) -> ExplainResponse: ...

    def Drain(self, request: DrainRequest, *, timeout: float | None) -> DrainResponse: ...

    def SetRole(self, request: SetRoleRequest, *, timeout: float | None) -> SetRoleResponse: ...

    def Scale(self, request: ScaleRequest, *, timeout: float | None) -> ScaleResponse: ...
