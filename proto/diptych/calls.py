"""What the blocking and the asyncio client share: requests, channel options, errors. Knows no connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, TypedDict, cast

import grpc
from google.rpc.status_pb2 import Status

from diptych.errors import DeadlineExceeded, ServingError
from diptych.rpc import from_status
from diptych.v1.admin_pb2 import Role
from diptych.v1.inference_pb2 import Chat, ChatMessage, GenerateRequest, Sampling, TokenIds, TokenizeRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DEFAULT_TARGET: Final = "127.0.0.1:50051"
MAX_MESSAGE_BYTES: Final = 8 << 20
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # The server allows a ping every 20 s; more often and it hangs up (too_many_pings).
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
_DETAILS_KEY: Final = "grpc-status-details-bin"
"""Where gRPC carries a google.rpc.Status."""


CHANGE_SECONDS: Final = 960.0
"""Operations wait for answers under way and for models to load; longer than the cluster itself waits for them."""


def role_number(role: str) -> Role:
    """Raises ValueError for none of them."""
    roles = {"prefill": Role.ROLE_PREFILL, "decode": Role.ROLE_DECODE, "mixed": Role.ROLE_MIXED}
    if role not in roles:
        raise ValueError(f"role is {role!r}: one of {', '.join(roles)}")
    return roles[role]


class Unreachable(ConnectionError):
    """No front answers at this address."""


class Wishes(TypedDict, total=False):
    """What may be asked of an answer. Absent and None are unset: the front's default."""

    model: str
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    min_tokens: int
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float]
    """By token, what is added to its logit."""
    bad_words: Iterable[str]
    allowed_token_ids: Iterable[int]
    """When there are any, nothing else is drawn."""
    logprobs: int | None
    """Each token comes with its log-probability and so many of the best alternatives'."""
    prompt_logprobs: int | None
    """As `logprobs`, of the prompt's tokens from the second on."""
    stop: Iterable[str]
    stop_token_ids: Iterable[int]
    include_stop: bool
    """What ended the answer is part of it."""
    ignore_eos: bool
    fingerprint: bool
    """Each token comes with a SHA-256 over the bits of its logits."""
    forced: Iterable[int]
    """Teacher forcing: these tokens are emitted in turn, whatever the logits say."""
    request_id: str
    tenant: str
    """Prompts are found cached only when the same tenant sent them."""
    priority: int
    """Lower is served first. Unset: 0."""
    ttft_ms: int | None
    """The first token is wanted within so long; missing it ends nothing."""
    itl_ms: int | None
    """As `ttft_ms`, the mean time between tokens."""
    deadline_ms: int | None
    """Later than that the answer isn't wanted: it ends in DeadlineExceeded."""


def generate_request(
    prompt: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    tokens: Sequence[int] | None,
    wishes: Wishes,
) -> GenerateRequest:
    """Raises ValueError unless exactly one prompt is given."""
    if sum(given is not None for given in (prompt, messages, tokens)) != 1:
        raise ValueError("give one of prompt, messages and tokens")
    request = GenerateRequest(
        model=wishes.get("model", ""),
        sampling=Sampling(
            max_tokens=wishes.get("max_tokens"),
            temperature=wishes.get("temperature"),
            top_p=wishes.get("top_p"),
            top_k=wishes.get("top_k"),
            seed=wishes.get("seed"),
            stop=wishes.get("stop", ()),
            stop_token_ids=wishes.get("stop_token_ids", ()),
            ignore_eos=wishes.get("ignore_eos", False),
            min_p=wishes.get("min_p"),
            min_tokens=wishes.get("min_tokens", 0),
            repetition_penalty=wishes.get("repetition_penalty"),
            presence_penalty=wishes.get("presence_penalty"),
            frequency_penalty=wishes.get("frequency_penalty"),
            logit_bias=wishes.get("logit_bias", {}),
            bad_words=wishes.get("bad_words", ()),
            allowed_token_ids=wishes.get("allowed_token_ids", ()),
            logprobs=wishes.get("logprobs"),
            prompt_logprobs=wishes.get("prompt_logprobs"),
            include_stop=wishes.get("include_stop", False),
        ),
        request_id=wishes.get("request_id", ""),
        tenant=wishes.get("tenant", ""),
        priority=wishes.get("priority", 0),
        ttft_ms=wishes.get("ttft_ms"),
        itl_ms=wishes.get("itl_ms"),
        deadline_ms=wishes.get("deadline_ms"),
        fingerprint=wishes.get("fingerprint", False),
        forced_token_ids=wishes.get("forced", ()),
    )
    if prompt is not None:
        request.text = prompt
    elif messages is not None:
        request.chat.CopyFrom(_chat(messages))
    elif tokens is not None:
        request.token_ids.CopyFrom(TokenIds(ids=tokens))
    return request


def tokenize_request(prompt: str | None, messages: Sequence[Mapping[str, str]] | None) -> TokenizeRequest:
    """Raises ValueError unless exactly one prompt is given."""
    if (prompt is None) == (messages is None):
        raise ValueError("give one of prompt and messages")
    return TokenizeRequest(text=prompt, chat=None if messages is None else _chat(messages))


def chat_messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    """One question, after a system message if there is one."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return [*messages, {"role": "user", "content": prompt}]


def nobody_at(target: str) -> Unreachable:
    """What a connection that doesn't come about means."""
    return Unreachable(f"nothing answers at {target}; is `diptych serve` running?")


def raised_by_the_front(error: grpc.RpcError, target: str) -> Exception:
    """What the front raised, when it said so; what the connection's end means, when it did not."""
    ended = cast("_Ended", error)
    raised = _rich_error(ended)
    if raised is not None:
        return raised
    if ended.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(ended.details())
    # Who cancels a call itself does not look at its end: here it was a server that stops.
    if ended.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return Unreachable(f"{target} hung up: {ended.details()}")
    return error


class _Ended(Protocol):
    """What gRPC's blocking and asyncio errors have in common, under no common type."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def _rich_error(ended: _Ended) -> ServingError | None:
    details = [value for key, value in ended.trailing_metadata() or () if key == _DETAILS_KEY]
    return from_status(Status.FromString(details[0])) if details and isinstance(details[0], bytes) else None


def _chat(messages: Sequence[Mapping[str, str]]) -> Chat:
    return Chat(messages=[ChatMessage(**message) for message in messages])
