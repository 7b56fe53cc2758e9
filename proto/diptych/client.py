"""`diptych.Client`: asks a front over gRPC, blocking. Knows the wire; nothing of workers, Ray or models."""

from __future__ import annotations

from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING, Final, Protocol, cast

import grpc
from grpc_status import rpc_status

from diptych.errors import DeadlineExceeded
from diptych.rpc import from_status
from diptych.v1.admin_pb2 import GetStatusRequest, GetStatusResponse
from diptych.v1.admin_pb2_grpc import AdminServiceStub
from diptych.v1.inference_pb2 import (
    Chat,
    ChatMessage,
    GenerateRequest,
    GenerateResponse,
    ListModelsRequest,
    Model,
    Sampling,
    TokenIds,
    TokenizeRequest,
)
from diptych.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from google.rpc.status_pb2 import Status

    from diptych.v1.inference_pb2 import ListModelsResponse, TokenizeResponse

DEFAULT_TARGET: Final = "127.0.0.1:50051"
MAX_MESSAGE_BYTES: Final = 8 << 20
_CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # The server allows a ping every 20 s; more often and it hangs up (too_many_pings).
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


class Unreachable(ConnectionError):
    """No front answers at this address."""


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
        self._channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self._inference = cast("_Inference", InferenceServiceStub(self._channel))
        self._admin = cast("_Admin", AdminServiceStub(self._channel))
        self._connected = False

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        tokens: Sequence[int] | None = None,
        model: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: Iterable[str] = (),
        stop_token_ids: Iterable[int] = (),
        ignore_eos: bool = False,
        fingerprint: bool = False,
        forced: Iterable[int] = (),
        request_id: str = "",
    ) -> Iterator[GenerateResponse]:
        """One answer to a text, a conversation or a row of tokens: chunks, then one `complete`.

        The request is sent at the first `next`; closing the iterator cancels it.
        """
        request = GenerateRequest(
            model=model,
            sampling=Sampling(
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                stop=stop,
                stop_token_ids=stop_token_ids,
                ignore_eos=ignore_eos,
            ),
            request_id=request_id,
            fingerprint=fingerprint,
            forced_token_ids=forced,
        )
        if sum(given is not None for given in (prompt, messages, tokens)) != 1:
            raise ValueError("give one of prompt, messages and tokens")
        if prompt is not None:
            request.text = prompt
        elif messages is not None:
            request.chat.CopyFrom(_chat(messages))
        elif tokens is not None:
            request.token_ids.CopyFrom(TokenIds(ids=tokens))
        return self._responses(request)

    def ask(
        self, prompt: str, *, system: str | None = None, max_tokens: int | None = None, temperature: float = 0.0
    ) -> str:
        """The model's answer to one chat message; greedy unless told otherwise."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        responses = self.generate(messages=messages, max_tokens=max_tokens, temperature=temperature)
        return "".join(response.chunk.text for response in responses)

    def tokenize(
        self, prompt: str | None = None, *, messages: Sequence[Mapping[str, str]] | None = None
    ) -> tuple[int, ...]:
        """The tokens that `generate` would compute for this prompt."""
        if (prompt is None) == (messages is None):
            raise ValueError("give one of prompt and messages")
        chat = None if messages is None else _chat(messages)
        with self._call():
            response = self._inference.Tokenize(TokenizeRequest(text=prompt, chat=chat), timeout=self._timeout_seconds)
        return tuple(response.token_ids)

    def models(self) -> tuple[Model, ...]:
        """The models served."""
        with self._call():
            response = self._inference.ListModels(ListModelsRequest(), timeout=self._timeout_seconds)
        return tuple(response.models)

    def status(self) -> GetStatusResponse:
        """The scheduler's view of the cluster."""
        with self._call():
            return self._admin.GetStatus(GetStatusRequest(), timeout=self._timeout_seconds)

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
            raise _raised_by_the_front(error, self._target) from error

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
            raise Unreachable(f"nothing answers at {self._target}; is `diptych serve` running?")


class _Answer(Protocol):
    """A running server stream."""

    def __iter__(self) -> Iterator[GenerateResponse]: ...

    def cancel(self) -> bool: ...


class _Inference(Protocol):
    """The generated stub, which carries no types."""

    def Generate(self, request: GenerateRequest, *, timeout: float | None) -> _Answer: ...

    def Tokenize(self, request: TokenizeRequest, *, timeout: float | None) -> TokenizeResponse: ...

    def ListModels(self, request: ListModelsRequest, *, timeout: float | None) -> ListModelsResponse: ...


class _Admin(Protocol):
    """The generated stub, which carries no types."""

    def GetStatus(self, request: GetStatusRequest, *, timeout: float | None) -> GetStatusResponse: ...


def _chat(messages: Sequence[Mapping[str, str]]) -> Chat:
    return Chat(messages=[ChatMessage(**message) for message in messages])


def _raised_by_the_front(error: grpc.RpcError, target: str) -> Exception:
    """What the front raised, when it said so; what the connection's end means, when it did not."""
    assert isinstance(error, grpc.Call), "gRPC raises the call itself"
    # grpc_status ships no types.
    status = cast("Status | None", rpc_status.from_call(error))  # pyright: ignore[reportUnknownMemberType]
    raised = from_status(status) if status is not None else None
    if raised is not None:
        return raised
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(error.details())
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return Unreachable(f"{target} hung up: {error.details()}")
    return error
