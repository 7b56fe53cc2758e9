"""OpenAI's endpoints: from a body to asks, from deltas to a response. Knows no server, route or worker."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, Response

from cluster.front.answering import answer_all, within
from cluster.front.asks import Prompt, asks_of, check_model, encode_chat, encode_text, max_context
from cluster.front.chat import ChatMessage
from cluster.front.http_wire import EventStream, read_json, while_connected
from cluster.front.openai_answers import Answer, Envelope, EventWriter, total_usage, whole
from cluster.front.openai_choices import Choice
from cluster.front.openai_types import MAX_CHOICES, ChatRequest, CompletionRequest, parse_request
from cluster.front.patience import Patience
from cluster.front.request_log import Record
from cluster.front.wanted import Wanted
from cluster.front.wish_headers import with_headers
from cluster.observe.metrics import FrontMetrics
from diptych import __version__
from diptych.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from starlette.requests import Request

    from cluster.front.http_wire import Emit
    from cluster.front.openai_answers import Kind
    from cluster.front.openai_types import AnyRequest, Message
    from cluster.front.service import Ask, Delta, Service


@dataclass(frozen=True, slots=True)
class OpenAiApi:
    """The endpoints, over one service."""

    service: Service
    metrics: FrontMetrics
    started: int
    """Unix seconds; the model's `created`."""
    patience: Patience = field(default_factory=Patience)
    """With clients that read slowly."""

    async def chat_completions(self, request: Request) -> Response | EventStream:
        """POST /v1/chat/completions."""
        body = parse_request(ChatRequest, await read_json(request))
        check_model(self.service, body.model)
        tokens = await encode_chat(self.service.text, [turn_of(message) for message in body.messages])
        wanted = replace(_wanted(body), logprobs_name="top_logprobs")
        if body.logprobs:
            wanted = replace(wanted, logprobs=body.top_logprobs or 0)
        if body.max_completion_tokens is not None:
            wanted = replace(wanted, max_tokens=body.max_completion_tokens, max_tokens_name="max_completion_tokens")
        prompt = Prompt(tokens=tokens, name="messages", continued=False)
        return await self._respond(request, "chat", body, [prompt], wanted)

    async def completions(self, request: Request) -> Response | EventStream:
        """POST /v1/completions."""
        body = parse_request(CompletionRequest, await read_json(request))
        check_model(self.service, body.model)
        answers = len(body.prompt) * (body.n or 1)
        if answers > MAX_CHOICES:
            raise InvalidRequest(f"{answers} answers in one request; at most {MAX_CHOICES} are given", param="prompt")
        prompts = [Prompt(tokens=await self._encode(prompt), name="prompt") for prompt in body.prompt]
        wanted = replace(_wanted(body), logprobs=body.logprobs)
        if body.echo and body.logprobs is not None:
            # What is said before the answer has log-probabilities as the answer has.
            wanted = replace(wanted, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
        return await self._respond(request, "text", body, prompts, wanted)

    async def _encode(self, prompt: str | list[int]) -> tuple[int, ...]:
        return await encode_text(self.service.text, prompt) if isinstance(prompt, str) else tuple(prompt)

    async def _respond(
        self, request: Request, kind: Kind, body: AnyRequest, prompts: Sequence[Prompt], wanted: Wanted
    ) -> Response | EventStream:
        request_id, record, choices = request_id_of(request), record_of(request), body.n or 1
        wanted = with_headers(wanted, request, has_priority=body.priority is not None)
        asks = asks_of(self.service, request_id, prompts, wanted, choices=choices)
        deadline = asks[0].deadline_seconds
        envelope = Envelope(id=request_id, kind=kind, model=self.service.model_name, created=int(time.time()))
        beside = [self._choice(ask, kind, body, place // choices) for place, ask in enumerate(asks)]
        if body.stream:
            produce = self._streaming(asks, beside, envelope, body, deadline, record)
            return EventStream(produce, request_id, self.patience, record)
        answers = [Answer() for _ in asks]

        async def collect(place: int, delta: Delta) -> None:
            answers[place].add(beside[place].with_echo(delta))

        async with within(deadline):
            await while_connected(request.receive, answer_all(self.service, asks, record, collect))
        return JSONResponse(whole(envelope, answers, beside, choices))

    def _choice(self, ask: Ask, kind: Kind, body: AnyRequest, prompt: int) -> Choice:
        echo = None
        if isinstance(body, CompletionRequest) and body.echo:
            sent = body.prompt[prompt]
            echo = sent if isinstance(sent, str) else self.service.text.decode(sent)
        tells_prompt = body.prompt_logprobs is not None
        return Choice(ask, self.service.text, kind, echo=echo, tells_prompt=tells_prompt)

    def _streaming(
        self,
        asks: Sequence[Ask],
        beside: Sequence[Choice],
        envelope: Envelope,
        body: AnyRequest,
        deadline: float | None,
        record: Record,
    ) -> Callable[[Emit], Awaitable[None]]:
        options = body.stream_options
        include_usage = options is not None and bool(options.include_usage)
        continuous_usage = options is not None and bool(options.continuous_usage_stats)
        writer = EventWriter(
            envelope, answers=len(asks), include_usage=include_usage, continuous_usage=continuous_usage
        )
        ends = [Answer() for _ in asks]

        async def produce(emit: Emit) -> None:
            async def write(place: int, delta: Delta) -> None:
                if delta.finish is not None:
                    ends[place].add(delta)
                choice = beside[place]
                events = writer.events(place, choice.with_echo(delta), len(asks[place].tokens), choice)
                if events:
                    await emit(events)

            async with within(deadline):
                await answer_all(self.service, asks, record, write)
            await emit(writer.last(total_usage(ends, body.n or 1) if include_usage else None))

        return produce

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        check_model(self.service, request.path_params["id"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, object]:
        return {
            "id": self.service.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "diptych",
            "max_model_len": max_context(self.service),
        }

    async def live(self, request: Request) -> Response:
        """GET /health/live: this process answers."""
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """GET /health/ready: a request sent now would be placed."""
        ready = self.service.ready
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def version(self, request: Request) -> Response:
        """GET /version."""
        return JSONResponse({"version": __version__})

    async def exposition(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(await self.metrics.exposition(self.service), media_type=FrontMetrics.MEDIA_TYPE)


def _wanted(body: AnyRequest) -> Wanted:
    return Wanted(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        # vLLM's clients say -1 for no limit.
        top_k=0 if body.top_k == -1 else body.top_k,
        min_p=body.min_p,
        min_tokens=body.min_tokens or 0,
        seed=body.seed,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias or {},
        bad_words=tuple(body.bad_words or ()),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        prompt_logprobs=body.prompt_logprobs,
        tenant=body.cache_salt or "",
        tenant_name="cache_salt",
        priority=body.priority or 0,
        fingerprint=body.diptych is not None and body.diptych.fingerprint,
    )


def turn_of(message: Message) -> ChatMessage:
    """One turn as the chat template takes it."""
    # OpenAI's newer name for the system's turn; chat templates know the older one.
    role = "system" if message.role == "developer" else message.role
    return ChatMessage(role=role, content=message.content, name=message.name)


def record_of(request: Request) -> Record:
    """What the log will say of it."""
    record = request.scope["record"]
    assert isinstance(record, Record)
    return record


def request_id_of(request: Request) -> str:
    """The id that the front gave this request."""
    return str(request.scope["request_id"])
