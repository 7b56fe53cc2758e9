"""What a choice says beside its answer: log-probabilities, and the prompt again. Knows no stream and no body."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.front.openai_logprobs import ChatLogprobs, Columns, Json, TextLogprobs, prompt_object

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.front.openai_answers import Kind
    from cluster.front.service import Ask, Delta
    from cluster.front.tokenizer import TextModel
    from diptych.types import TokenLogprobs


class Choice:
    """Of one answer, whole or piece by piece."""

    def __init__(self, ask: Ask, text: TextModel, kind: Kind, *, echo: str | None, tells_prompt: bool) -> None:
        """`echo`: the prompt's text, to be said before the answer. `tells_prompt`: `prompt_logprobs` was asked for."""
        self._ask = ask
        self._text = text
        self._echo = echo
        self._tells_prompt = tells_prompt
        self._begun = False
        wanted = ask.params.logprobs is not None
        self._chat = ChatLogprobs(text) if wanted and kind == "chat" else None
        after_prompt = len(echo or "")
        self._plain = TextLogprobs(text, offset=after_prompt) if wanted and kind == "text" else None

    def with_echo(self, delta: Delta) -> Delta:
        """The first piece begins with the prompt."""
        if self._begun:
            return delta
        self._begun = True
        return delta._replace(text=self._echo + delta.text) if self._echo else delta

    def logprobs(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        of_prompt: Sequence[TokenLogprobs] | None = None,
    ) -> Json | Columns | None:
        """A choice's `logprobs`, for this piece; None when there is nothing to tell."""
        if self._chat is not None:
            return self._chat.piece(tokens, logprobs) if tokens else None
        if self._plain is None:
            return None
        if self._echo is None or of_prompt is None:
            return self._plain.piece(tokens, logprobs) if tokens else None
        before, piece = self._before(of_prompt), self._plain.piece(tokens, logprobs)
        return {name: [*before[name], *piece[name]] for name in before}

    def prompt_logprobs(self, of_prompt: Sequence[TokenLogprobs] | None) -> list[Json | None] | None:
        """vLLM's `prompt_logprobs`; None unless asked for."""
        count = self._ask.params.prompt_logprobs
        if not self._tells_prompt or of_prompt is None or count is None:
            return None
        return prompt_object(self._text, self._ask.tokens, of_prompt)

    def _before(self, of_prompt: Sequence[TokenLogprobs]) -> Columns:
        """The prompt's own tokens, in front of the answer's."""
        count = self._ask.params.logprobs or 0
        cut = [each._replace(top=each.top[:count], top_logprobs=each.top_logprobs[:count]) for each in of_prompt]
        return TextLogprobs(self._text).piece(self._ask.tokens, [None, *cut])
