"""Log-probabilities in OpenAI's shapes, and vLLM's for those of the prompt. Knows no stream and no worker.

They are natural logarithms of the raw logits' softmax, before penalties and temperature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.front.tokenizer import TextModel
    from diptych.types import TokenLogprobs

Json: TypeAlias = dict[str, object]
Columns: TypeAlias = dict[str, list[object]]


class ChatLogprobs:
    """`logprobs` of chat completions, whole or piece by piece."""

    def __init__(self, text: TextModel) -> None:
        self._text = text

    def piece(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Json:
        content = [self._content(token, given) for token, given in zip(tokens, logprobs, strict=True)]
        return {"content": content, "refusal": None}

    def _content(self, token: int, given: TokenLogprobs) -> Json:
        tops = zip(given.top, given.top_logprobs, strict=True)
        return {**self._entry(token, given.logprob), "top_logprobs": [self._entry(*top) for top in tops]}

    def _entry(self, token: int, logprob: float) -> Json:
        data = self._text.written(token)
        return {"token": token_text(data), "logprob": logprob, "bytes": list(data)}


class TextLogprobs:
    """`logprobs` of text completions, whole or piece by piece."""

    def __init__(self, text: TextModel, *, offset: int = 0) -> None:
        """`offset`: characters of the answer's text before its first token."""
        self._text = text
        self._offset = offset
        self._detokenizer = text.detokenizer(continued=True)

    def piece(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> Columns:
        """The next tokens of the answer. None stands for a prompt's first token, which nothing predicted."""
        return {
            "text_offset": [self._next_offset(token) for token in tokens],
            "token_logprobs": [given.logprob if given else None for given in logprobs],
            "tokens": [token_text(self._text.written(token)) for token in tokens],
            "top_logprobs": [
                self._top(token, given) if given else None for token, given in zip(tokens, logprobs, strict=True)
            ],
        }

    def _top(self, token: int, given: TokenLogprobs) -> Json:
        """By text, the token itself always among them. Of tokens that read alike the likeliest counts."""
        pairs = [*zip(given.top, given.top_logprobs, strict=True), (token, given.logprob)]
        best: Json = {}
        for each, logprob in sorted(pairs, key=_falling):
            best.setdefault(token_text(self._text.written(each)), logprob)
        return best

    def _next_offset(self, token: int) -> int:
        """Where the token begins; within a character, where that begins."""
        offset = self._offset
        self._offset += len(self._detokenizer.push(token))
        return offset


def prompt_object(text: TextModel, tokens: Sequence[int], given: Sequence[TokenLogprobs]) -> list[Json | None]:
    """vLLM's `prompt_logprobs`: by token id, for each position; nothing predicted the first."""
    rest = zip(tokens[1:], given, strict=True)
    return [None, *(_position(text, token, logprobs) for token, logprobs in rest)]


def _position(text: TextModel, token: int, given: TokenLogprobs) -> Json:
    ranks = range(1, len(given.top) + 1)
    ranked = zip(given.top, given.top_logprobs, ranks, strict=True)
    return {
        str(each): {"logprob": logprob, "rank": rank, "decoded_token": token_text(text.written(each))}
        for each, logprob, rank in [(token, given.logprob, given.rank), *ranked]
    }


def token_text(data: bytes) -> str:
    """A token as text; OpenAI's spelling for one that is part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _falling(pair: tuple[int, float]) -> float:
    return -pair[1]
