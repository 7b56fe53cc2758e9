"""One answer as its client reads it: from the tokens that workers say to text, scores and usage. Knows no worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.front.service import Ask, Delta, Usage
from cluster.front.stop_strings import StopStrings

if TYPE_CHECKING:
    from cluster.front.tokenizer import TextModel
    from diptych.types import Emission, Finish, Served, TokenLogprobs


class Answer:
    """From emissions to text."""

    def __init__(self, ask: Ask, text: TextModel) -> None:
        self._ask = ask
        self._detokenizer = text.detokenizer(continued=ask.continued)
        self._stops = StopStrings(ask.stop, include=ask.params.include_stop)
        self._count = 0
        self._served: Served | None = None
        self._prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
        self.ended_by_worker = False

    def take(self, emissions: list[Emission]) -> Delta:
        """Everything these tokens add to the answer."""
        text = ""
        tokens: list[int] = []
        kept: list[Emission] = []
        for emission in emissions:
            self._count += 1
            self._served = emission.served or self._served
            may_stop = self._count >= self._ask.params.min_tokens
            self.ended_by_worker = emission.finish is not None
            if emission.prompt_logprobs is not None:
                self._prompt_logprobs = emission.prompt_logprobs
            if emission.finish != "stop" or self._ask.params.include_stop:
                kept.append(emission)
                tokens.append(emission.token)
                shown, found = self._stops.push(self._detokenizer.push(emission.token), may_stop=may_stop)
                text += shown
                if found:
                    return self._delta(text, tokens, kept, "stop")
            if emission.finish:
                shown, found = self._stops.push(self._detokenizer.finish(), may_stop=may_stop)
                text += shown if found else shown + self._stops.finish()
                return self._delta(text, tokens, kept, "stop" if found else emission.finish)
        return self._delta(text, tokens, kept, None)

    def _delta(self, text: str, tokens: list[int], kept: list[Emission], finish: Finish | None) -> Delta:
        usage = None
        if finish:
            assert self._served is not None, "a worker's first emission says how it is served"
            usage = Usage(prompt_tokens=len(self._ask.tokens), completion_tokens=self._count, served=self._served)
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return Delta(
            text=text,
            tokens=tuple(tokens),
            fingerprints=tuple(each.fingerprint for each in kept if each.fingerprint is not None),
            argmax=tuple(each.argmax for each in kept if each.argmax is not None),
            logprobs=tuple(each.logprobs for each in kept if each.logprobs is not None),
            prompt_logprobs=prompt_logprobs,
            finish=finish,
            usage=usage,
        )
