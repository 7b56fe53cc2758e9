"""Our types as protobuf messages and back. Knows shapes only."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from cluster.front.chat import ChatMessage
from cluster.front.wanted import Wanted
from diptych.errors import InvalidRequest
from diptych.v1.admin_pb2 import (
    AutoscaleStatus,
    AwayWorker,
    GetStatusResponse,
    KvLayout,
    QueueStatus,
    Role,
    WorkerCounters,
    WorkerInfo,
    WorkerLoad,
    WorkerStatus,
)
from diptych.v1.inference_pb2 import (
    FinishReason,
    GenerateChunk,
    GenerateComplete,
    GenerateResponse,
    Sampling,
    Served,
    TokenLogprobs,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.front import service
    from diptych import types
    from diptych.v1.inference_pb2 import Chat, GenerateRequest

_ROLES: Final[Mapping[types.Role, Role]] = {
    "prefill": Role.ROLE_PREFILL,
    "decode": Role.ROLE_DECODE,
    "mixed": Role.ROLE_MIXED,
}
_FINISHES: Final = {"stop": FinishReason.FINISH_REASON_STOP, "length": FinishReason.FINISH_REASON_LENGTH}
_PROMPT_TOKENS: Final = 4096
"""Of so many a message tells: their best alternatives take up to 200 bytes each, a message 8 MiB."""
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


def wanted_of(request: GenerateRequest) -> Wanted:
    """What a client set; an unset optional field is None."""
    sampling = request.sampling
    return Wanted(
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        temperature=sampling.temperature if sampling.HasField("temperature") else None,
        top_p=sampling.top_p if sampling.HasField("top_p") else None,
        top_k=sampling.top_k if sampling.HasField("top_k") else None,
        min_p=sampling.min_p if sampling.HasField("min_p") else None,
        min_tokens=sampling.min_tokens,
        seed=sampling.seed if sampling.HasField("seed") else None,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else None,
        presence_penalty=sampling.presence_penalty if sampling.HasField("presence_penalty") else None,
        frequency_penalty=sampling.frequency_penalty if sampling.HasField("frequency_penalty") else None,
        logit_bias=dict(sampling.logit_bias),
        bad_words=tuple(sampling.bad_words),
        allowed_token_ids=tuple(sampling.allowed_token_ids) or None,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        include_stop=sampling.include_stop,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
        tenant=request.tenant,
        priority=request.priority,
        ttft_ms=request.ttft_ms if request.HasField("ttft_ms") else None,
        itl_ms=request.itl_ms if request.HasField("itl_ms") else None,
        deadline_ms=request.deadline_ms if request.HasField("deadline_ms") else None,
        fingerprint=request.fingerprint,
        forced=tuple(request.forced_token_ids),
    )


def path_of(name: str | None) -> str | None:
    """A field's path in GenerateRequest, from the name that `cluster.front.asks` knows it by."""
    return f"sampling.{name}" if name in Sampling.DESCRIPTOR.fields_by_name else name


def check_request_id(request_id: str) -> None:
    """Raises InvalidRequest unless it can stand in logs, headers and URLs as it is."""
    if not _REQUEST_ID.fullmatch(request_id):
        message = f"request_id {request_id[:40]!r} is not 1 to 128 letters, digits, '-', '_' and '.'"
        raise InvalidRequest(message, param="request_id")


def turns_of(chat: Chat) -> list[ChatMessage]:
    """The conversation. Raises InvalidRequest when it has no turn."""
    if not chat.messages:
        raise InvalidRequest("the chat has no messages: send at least one", param="chat.messages")
    return [
        ChatMessage(role=message.role, content=message.content, name=message.name or None) for message in chat.messages
    ]


def chunks_of(delta: service.Delta) -> list[GenerateResponse]:
    """A piece of the answer, after what there is to say of the prompt; none when it says nothing."""
    of_prompt = delta.prompt_logprobs or ()
    starts = range(0, len(of_prompt), _PROMPT_TOKENS)
    chunks = [GenerateChunk(prompt_logprobs=_logprobs(of_prompt[at : at + _PROMPT_TOKENS])) for at in starts]
    if delta.text or delta.tokens:
        chunks.append(
            GenerateChunk(
                text=delta.text,
                token_ids=delta.tokens,
                fingerprints=delta.fingerprints,
                argmax_token_ids=delta.argmax,
                logprobs=_logprobs(delta.logprobs),
            )
        )
    return [GenerateResponse(chunk=chunk) for chunk in chunks]


def _logprobs(given: Sequence[types.TokenLogprobs]) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(logprob=each.logprob, rank=each.rank, top_token_ids=each.top, top_logprobs=each.top_logprobs)
        for each in given
    ]


def complete_of(request_id: str, finish: types.Finish, usage: service.Usage) -> GenerateResponse:
    """The last message of an answer."""
    counts = Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.served.cached_tokens,
    )
    return GenerateResponse(
        complete=GenerateComplete(
            finish_reason=_FINISHES[finish],
            usage=counts,
            diptych=served_of(usage.served),
            request_id=request_id,
        )
    )


def served_of(served: types.Served) -> Served:
    """How an answer was made, as clients are told."""
    return Served(**asdict(served))


def status_of(status: types.ClusterStatus, *, ready: bool) -> GetStatusResponse:
    """The scheduler's view."""
    return GetStatusResponse(
        model=status.model,
        build=status.build,
        ready=ready,
        workers=[_worker_of(worker) for worker in status.workers],
        requests_placed=status.requests_placed,
        index_blocks=status.index_blocks,
        queues=[_queue_of(queue) for queue in status.queues],
        autoscale=None if status.autoscale is None else _autoscale_of(status.autoscale),
        away=[AwayWorker(id=worker, why=why) for worker, why in status.away],
    )


def _autoscale_of(autoscale: types.AutoscaleStatus) -> AutoscaleStatus:
    return AutoscaleStatus(
        dry_run=autoscale.dry_run,
        wanted=dict(autoscale.wanted),
        changes=dict(autoscale.changes),
        reversals=autoscale.reversals,
        words=autoscale.words,
    )


def _queue_of(queue: types.QueueStatus) -> QueueStatus:
    return QueueStatus(
        name=queue.name,
        length=queue.length,
        oldest_seconds=queue.oldest_seconds,
        released=queue.released,
        waited_seconds=queue.waited_seconds,
        rejected=dict(queue.rejected),
    )


def role_of(role: int) -> types.Role:
    """Raises InvalidRequest for none of them."""
    for name, number in _ROLES.items():
        if number == role:
            return name
    raise InvalidRequest("which role? prefill, decode or mixed", param="role")


def _worker_of(worker: types.WorkerStatus) -> WorkerStatus:
    info = asdict(worker.info)
    del info["role"], info["layout"]
    layout = KvLayout(**asdict(worker.info.layout))
    return WorkerStatus(
        info=WorkerInfo(**info, role=_ROLES[worker.info.role], layout=layout),
        load=WorkerLoad(**asdict(worker.load)),
        counters=WorkerCounters(**asdict(worker.counters)),
        alive=worker.alive,
        report_age_seconds=worker.report_age_seconds,
    )
