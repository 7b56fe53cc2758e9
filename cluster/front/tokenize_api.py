"""/tokenize and /detokenize, in vLLM's shapes: text to tokens and back, nothing computed. Knows no server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, cast

from pydantic import Field
from starlette.responses import JSONResponse

from cluster.front.asks import check_model, decode_tokens, encode_chat, encode_text, max_context
from cluster.front.http_wire import read_json
from cluster.front.openai_api import turn_of
from cluster.front.openai_types import Body, Message, Neutral, parse_body
from cluster.front.wanted import check_token_ids

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cluster.front.service import Service

HARMLESS_HERE: Final[frozenset[str]] = frozenset()
NEUTRAL_FOR_TEXT: Final[Neutral] = {}
NEUTRAL_FOR_CHAT: Final[Neutral] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "tools": ([],),
}
"""vLLM's further fields, taken only with the value that this front always has."""


class TokenizeTextRequest(Body):
    """The body of /tokenize for a text. `model` may be left out."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    """Whether the model's BOS, if it declares one, comes first."""
    return_token_strs: bool = False
    """The vocabulary's spelling of each token too."""


class TokenizeChatRequest(Body):
    """The body of /tokenize for a conversation. `model` may be left out."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    return_token_strs: bool = False
    """The vocabulary's spelling of each token too."""


class DetokenizeRequest(Body):
    """The body of /detokenize. `model` may be left out."""

    model: str | None = None
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class TokenizeApi:
    """The endpoints, over one service."""

    service: Service

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body = await read_json(request)
        text = self.service.text
        if _has_messages(body):
            chat = parse_body(TokenizeChatRequest, body, NEUTRAL_FOR_CHAT, HARMLESS_HERE)
            check_model(self.service, chat.model or self.service.model_name)
            tokens = await encode_chat(text, [turn_of(message) for message in chat.messages])
            return self._tokens(tokens, spelled=chat.return_token_strs)
        wanted = parse_body(TokenizeTextRequest, body, NEUTRAL_FOR_TEXT, HARMLESS_HERE)
        check_model(self.service, wanted.model or self.service.model_name)
        tokens = await encode_text(text, wanted.prompt, after_bos=wanted.add_special_tokens)
        return self._tokens(tokens, spelled=wanted.return_token_strs)

    def _tokens(self, tokens: tuple[int, ...], *, spelled: bool) -> Response:
        words = self.service.text.words(tokens) if spelled else None
        limit = max_context(self.service)
        return JSONResponse({"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": words})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        body = parse_body(DetokenizeRequest, await read_json(request), {}, HARMLESS_HERE)
        check_model(self.service, body.model or self.service.model_name)
        tokens = tuple(body.tokens)
        check_token_ids(tokens, self.service.text.vocab_size, "tokens")
        return JSONResponse({"prompt": await decode_tokens(self.service.text, tokens)})


def _has_messages(body: object) -> bool:
    return isinstance(body, dict) and cast("dict[str, object]", body).get("messages") is not None
