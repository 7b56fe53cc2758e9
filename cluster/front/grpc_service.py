"""The gRPC front: `diptych.v1`'s services, and the server they run in. Knows neither Ray nor placement."""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.front.answering import answer, within
from cluster.front.asks import (
    Prompt,
    asks_of,
    check_model,
    decode_tokens,
    encode_chat,
    encode_text,
    max_context,
)
from cluster.front.grpc_calls import answering, write_within
from cluster.front.grpc_explanations import explained
from cluster.front.grpc_health import Health
from cluster.front.grpc_messages import (
    check_request_id,
    chunks_of,
    complete_of,
    path_of,
    role_of,
    status_of,
    turns_of,
    wanted_of,
)
from cluster.front.grpc_readable import Readable
from cluster.front.listening import check_free
from cluster.front.patience import Patience
from cluster.front.request_log import RequestLog
from cluster.front.wanted import check_token_ids
from diptych.errors import InvalidRequest
from diptych.types import DrainNode, DrainWorker, ScalePool, SetWorkerRole, WorkerId
from diptych.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Generator

    from cluster.front.grpc_calls import Context
    from cluster.front.request_log import Record
    from cluster.front.service import Ask, Delta, Service
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
    from diptych.v1.inference_pb2 import (
        DetokenizeRequest,
        DetokenizeResponse,
        GenerateRequest,
        ListModelsRequest,
        ListModelsResponse,
        TokenizeRequest,
        TokenizeResponse,
    )

MAX_MESSAGE_BYTES: Final = 8 << 20
STALL_TIMEOUT_SECONDS: Final = 60.0
"""A client that reads nothing for so long has its call ended and its blocks freed."""
MOST_WORKERS: Final = 4096
"""Of a pool; more is a slip of the finger."""
MAX_CONCURRENT_STREAMS: Final = 1024
"""Per connection; a further call waits in its client."""

_SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
    # A peer that vanished without a word is noticed within a minute and a half, and its requests are cancelled.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients may ping every 20 s, idle ones too.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # For successors: who listens first has looked whether somebody else does (`check_free`).
    ("grpc.so_reuseport", 1),
)


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Answers, over one service."""

    def __init__(self, service: Service, log: RequestLog) -> None:
        self._service = service
        self._log = log
        self._running: set[str] = set()
        self._patience = Patience()

    async def Generate(self, request: GenerateRequest, context: Context) -> None:
        """Chunks, then one `complete`; the call's end, however it comes, frees the request's blocks."""
        request_id = request.request_id or _new_id("gen")
        record = self._log.record(request_id, "grpc", "Generate")
        async with answering(context, record):
            check_request_id(request_id)
            ask = await self._ask(request, request_id)
            left = context.time_remaining()
            ask = replace(ask, deadline_seconds=min(filter(None, (ask.deadline_seconds, left)), default=None))
            with self._alone(request_id):
                await context.send_initial_metadata((("x-request-id", request_id),))
                async with within(ask.deadline_seconds):
                    await self._write(ask, record, context)

    async def Tokenize(self, request: TokenizeRequest, context: Context) -> TokenizeResponse:
        """The tokens that Generate would compute."""
        async with answering(context, self._log.record(_new_id(), "grpc", "Tokenize")):
            return inference_pb2.TokenizeResponse(token_ids=(await self._prompt(request)).tokens)

    async def Detokenize(self, request: DetokenizeRequest, context: Context) -> DetokenizeResponse:
        """The tokens' text."""
        async with answering(context, self._log.record(_new_id(), "grpc", "Detokenize")):
            check_model(self._service, request.model or self._service.model_name)
            tokens = tuple(request.token_ids)
            check_token_ids(tokens, self._service.text.vocab_size, "token_ids")
            return inference_pb2.DetokenizeResponse(text=await decode_tokens(self._service.text, tokens))

    async def ListModels(self, request: ListModelsRequest, context: Context) -> ListModelsResponse:
        """The one model served."""
        async with answering(context, self._log.record(_new_id(), "grpc", "ListModels")):
            model = inference_pb2.Model(id=self._service.model_name, max_context=max_context(self._service))
            return inference_pb2.ListModelsResponse(models=[model])

    async def _ask(self, request: GenerateRequest, request_id: str) -> Ask:
        prompt = await self._prompt(request)
        try:
            [ask] = asks_of(self._service, request_id, [prompt], wanted_of(request))
        except InvalidRequest as error:
            raise type(error)(str(error), param=path_of(error.param)) from error
        return ask

    async def _prompt(self, request: GenerateRequest | TokenizeRequest) -> Prompt:
        check_model(self._service, request.model or self._service.model_name)
        if not isinstance(request, inference_pb2.TokenizeRequest) and request.HasField("token_ids"):
            return Prompt(tokens=tuple(request.token_ids.ids), name="token_ids")
        name = request.WhichOneof("prompt")
        if name is None:
            raise InvalidRequest("the request has no prompt: set text, chat or token_ids", param="prompt")
        if name == "chat":
            tokens = await encode_chat(self._service.text, turns_of(request.chat))
            return Prompt(tokens=tokens, name=name, continued=False)
        return Prompt(tokens=await encode_text(self._service.text, request.text), name=name)

    async def _write(self, ask: Ask, record: Record, context: Context) -> None:
        async def write(delta: Delta) -> None:
            for chunk in chunks_of(delta):
                await write_within(self._patience, context, chunk, STALL_TIMEOUT_SECONDS)
            if delta.finish is not None:
                assert delta.usage is not None, "the last piece carries the usage"
                complete = complete_of(ask.id, delta.finish, delta.usage)
                await write_within(self._patience, context, complete, STALL_TIMEOUT_SECONDS)

        record.begin([ask])
        await answer(self._service, ask, record, write)

    @contextmanager
    def _alone(self, request_id: str) -> Generator[None]:
        """Two running requests of one id would get each other's tokens."""
        if request_id in self._running:
            raise InvalidRequest(f"a request {request_id!r} is running already", param="request_id")
        self._running.add(request_id)
        try:
            yield
        finally:
            self._running.remove(request_id)


class Admin(admin_pb2_grpc.AdminServiceServicer):
    """The cluster, seen."""

    def __init__(self, service: Service, log: RequestLog) -> None:
        self._service = service
        self._log = log

    async def GetStatus(self, request: GetStatusRequest, context: Context) -> GetStatusResponse:
        """The scheduler's view."""
        async with answering(context, self._log.record(_new_id(), "grpc", "GetStatus")):
            return status_of(await self._service.status(), ready=self._service.ready)

    async def Explain(self, request: ExplainRequest, context: Context) -> ExplainResponse:
        """A request's decision records."""
        async with answering(context, self._log.record(_new_id(), "grpc", "Explain")):
            if not request.request_id:
                raise InvalidRequest("whose? Give the request_id that came with the answer", param="request_id")
            return explained(await self._service.explain(request.request_id))

    async def Drain(self, request: DrainRequest, context: Context) -> DrainResponse:
        """A worker out of service."""
        async with answering(context, self._log.record(_new_id(), "grpc", "Drain")):
            changed = await self._service.change(_drain_of(request))
            return admin_pb2.DrainResponse(moved=changed.moved, seconds=changed.seconds, ended=changed.ended)

    async def SetRole(self, request: SetRoleRequest, context: Context) -> SetRoleResponse:
        """A worker's role from now on."""
        async with answering(context, self._log.record(_new_id(), "grpc", "SetRole")):
            worker, role = WorkerId(_named(request.worker)), role_of(request.role)
            changed = await self._service.change(SetWorkerRole(worker=worker, role=role))
            return admin_pb2.SetRoleResponse(seconds=changed.seconds)

    async def Scale(self, request: ScaleRequest, context: Context) -> ScaleResponse:
        """A pool's size."""
        async with answering(context, self._log.record(_new_id(), "grpc", "Scale")):
            if request.workers > MOST_WORKERS:
                raise InvalidRequest(f"workers is {request.workers}, at most {MOST_WORKERS}", param="workers")
            role = role_of(request.role)
            changed = await self._service.change(ScalePool(role=role, workers=request.workers))
            return admin_pb2.ScaleResponse(started=changed.started, ended=changed.ended, seconds=changed.seconds)


def _drain_of(request: DrainRequest) -> DrainWorker | DrainNode:
    if not request.node:
        return DrainWorker(worker=WorkerId(_named(request.worker)), replace=request.replace)
    if request.worker:
        raise InvalidRequest("a worker or a node, not both", param="node")
    if request.replace:
        raise InvalidRequest("a node's workers always get successors, elsewhere: leave replace out", param="replace")
    return DrainNode(node=request.node)


def _named(worker: str) -> str:
    if not worker:
        raise InvalidRequest("which worker? `diptych status` lists them", param="worker")
    return worker


def _new_id(kind: str = "req") -> str:
    return f"{kind}-{secrets.token_hex(16)}"


async def serve_grpc(
    service: Service, host_port: str, log: RequestLog | None = None, *, beside: bool = False
) -> tuple[grpc.aio.Server, int]:
    """Listens on "host:port" (port 0: any) in the caller's event loop, `beside` one that is about to end, perhaps.

    Returns the server and its port.
    End it with `await server.stop(grace_seconds)`. Raises OSError when it can't listen.
    """
    log = log or RequestLog()
    server = grpc.aio.server(interceptors=(Readable(log),), options=_SERVER_OPTIONS)
    _add_services(service, log, server)
    try:
        if not beside:
            check_free(host_port)
        port = server.add_insecure_port(host_port)
    except (OSError, RuntimeError) as error:
        raise OSError(f"gRPC can't listen on {host_port}: is it in use? Choose another --grpc") from error
    await server.start()
    return server, port


def _add_services(service: Service, log: RequestLog, server: grpc.aio.Server) -> None:
    inference = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
    admin = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
    health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    checked = Health(service, frozenset(("", inference)), frozenset((admin, health)))
    # Generated code carries no types.
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(  # pyright: ignore[reportUnknownMemberType]
        Inference(service, log), server
    )
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Admin(service, log), server)  # pyright: ignore[reportUnknownMemberType]
    health_pb2_grpc.add_HealthServicer_to_server(checked, server)  # pyright: ignore[reportUnknownMemberType]
    reflection.enable_server_reflection((inference, admin, health, reflection.SERVICE_NAME), server)
