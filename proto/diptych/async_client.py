"""`diptych.AsyncClient`: asks a front over gRPC from asyncio. Knows the wire; nothing of workers, Ray or models."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, cast

import grpc
import grpc.aio

from diptych.calls import (
    CHANGE_SECONDS,
    CHANNEL_OPTIONS,
    DEFAULT_TARGET,
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
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
    from types import TracebackType
    from typing import Self, Unpack

    from diptych.v1.inference_pb2 import DetokenizeResponse, ListModelsResponse, TokenizeRequest, TokenizeResponse


class AsyncClient:
    """`diptych.Client` for an event loop: the same calls, awaited, and the same errors.

    Make it inside the running loop that uses it.
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
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._inference = cast("_Inference", InferenceServiceStub(self._channel))
        self._admin = cast("_Admin", AdminServiceStub(self._channel))
        self._connected = False

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        tokens: Sequence[int] | None = None,
        **wishes: Unpack[Wishes],
    ) -> AsyncGenerator[GenerateResponse, None]:
        """One answer to a text, a conversation or a row of tokens: chunks, then one `complete`.

        The request is sent at the first `anext`; closing the generator cancels it.
        """
        request = generate_request(prompt, messages, tokens, wishes)
        async with self._call():
            call = self._inference.Generate(request, timeout=self._timeout_seconds)
            try:
                async for response in call:
                    yield response
            finally:
                call.cancel()

    async def ask(
        self, prompt: str, *, system: str | None = None, max_tokens: int | None = None, temperature: float = 0.0
    ) -> str:
        """The model's answer to one chat message; greedy unless told otherwise."""
        messages = chat_messages(prompt, system)
        responses = self.generate(messages=messages, max_tokens=max_tokens, temperature=temperature)
        return "".join([response.chunk.text async for response in responses])

    async def tokenize(
        self, prompt: str | None = None, *, messages: Sequence[Mapping[str, str]] | None = None
    ) -> tuple[int, ...]:
        """The tokens that `generate` would compute for this prompt."""
        request = tokenize_request(prompt, messages)
        async with self._call():
            return tuple((await self._inference.Tokenize(request, timeout=self._timeout_seconds)).token_ids)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """Their text, special tokens left out."""
        request = DetokenizeRequest(token_ids=tokens)
        async with self._call():
            return (await self._inference.Detokenize(request, timeout=self._timeout_seconds)).text

    async def models(self) -> tuple[Model, ...]:
        """The models served."""
        async with self._call():
            return tuple((await self._inference.ListModels(ListModelsRequest(), timeout=self._timeout_seconds)).models)

    async def status(self) -> GetStatusResponse:
        """The scheduler's view of the cluster."""
        async with self._call():
            return await self._admin.GetStatus(GetStatusRequest(), timeout=self._timeout_seconds)

    async def explain(self, request_id: str) -> ExplainResponse:
        """Why a request ran where it did, and how that went. Raises UnknownRequest."""
        async with self._call():
            return await self._admin.Explain(ExplainRequest(request_id=request_id), timeout=self._timeout_seconds)

    async def drain(self, worker: str, *, replace: bool = False) -> DrainResponse:
        """Takes a worker out of service without losing a request; returns when it has ended."""
        async with self._call():
            return await self._admin.Drain(DrainRequest(worker=worker, replace=replace), timeout=CHANGE_SECONDS)

    async def drain_node(self, node: str) -> DrainResponse:
        """Takes all workers of a Ray node (address or id) out of service; returns when they have ended."""
        async with self._call():
            return await self._admin.Drain(DrainRequest(node=node), timeout=CHANGE_SECONDS)

    async def set_role(self, worker: str, role: str) -> SetRoleResponse:
        """What a worker does from now on: "prefill", "decode" or "mixed"."""
        request = SetRoleRequest(worker=worker, role=role_number(role))
        async with self._call():
            return await self._admin.SetRole(request, timeout=CHANGE_SECONDS)

    async def scale(self, role: str, workers: int) -> ScaleResponse:
        """Starts or drains workers of a pool; returns when it has so many."""
        request = ScaleRequest(role=role_number(role), workers=workers)
        async with self._call():
            return await self._admin.Scale(request, timeout=CHANGE_SECONDS)

    async def close(self) -> None:
        """Cancels what is running and hangs up."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @asynccontextmanager
    async def _call(self) -> AsyncGenerator[None]:
        await self._connect()
        try:
            yield
        except grpc.RpcError as error:
            raise raised_by_the_front(error, self._target) from error

    async def _connect(self) -> None:
        """Fails as soon as every address refused, instead of after the whole timeout."""
        if self._connected:
            return
        try:
            async with asyncio.timeout(self._connect_timeout_seconds):
                self._connected = await self._settled() is grpc.ChannelConnectivity.READY
        except TimeoutError as error:
            raise nobody_at(self._target) from error
        if not self._connected:
            raise nobody_at(self._target)

    async def _settled(self) -> grpc.ChannelConnectivity:
        """The first state that decides whether somebody answers."""
        while (state := self._channel.get_state(try_to_connect=True)) not in (
            grpc.ChannelConnectivity.READY,
            grpc.ChannelConnectivity.TRANSIENT_FAILURE,
            grpc.ChannelConnectivity.SHUTDOWN,
        ):
            await self._channel.wait_for_state_change(state)
        return state


class _Answer(Protocol):
    """A running server stream."""

    def __aiter__(self) -> AsyncIterator[GenerateResponse]: ...

    def cancel(self) -> bool: ...


class _Inference(Protocol):
    """The generated stub, which carries no types."""

    def Generate(self, request: GenerateRequest, *, timeout: float | None) -> _Answer: ...

    def Tokenize(self, request: TokenizeRequest, *, timeout: float | None) -> Awaitable[TokenizeResponse]: ...

    def Detokenize(self, request: DetokenizeRequest, *, timeout: float | None) -> Awaitable[DetokenizeResponse]: ...

    def ListModels(self, request: ListModelsRequest, *, timeout: float | None) -> Awaitable[ListModelsResponse]: ...


class _Admin(Protocol):
    """The generated stub, which carries no types."""

    def GetStatus(self, request: GetStatusRequest, *, timeout: float | None) -> Awaitable[GetStatusResponse]: ...

    def Explain(self, request: ExplainRequest, *, timeout: float | None) -> Awaitable[ExplainResponse]: ...

    def Drain(self, request: DrainRequest, *, timeout: float | None) -> Awaitable[DrainResponse]: ...

    def SetRole(self, request: SetRoleRequest, *, timeout: float | None) -> Awaitable[SetRoleResponse]: ...

    def Scale(self, request: ScaleRequest, *, timeout: float | None) -> Awaitable[ScaleResponse]: ...
