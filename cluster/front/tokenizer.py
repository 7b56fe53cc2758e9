"""The model's text side: text and conversations to tokens, tokens to text. Knows no file format.

Special tokens are the model's control plane. They come from the model's declarations and its chat
template; text that a client wrote never turns into one, whatever it spells.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from cluster.front.byte_tokenizer import byte_vocabulary
from cluster.front.chat import ChatMessage, ChatTemplate
from cluster.front.detokenize import Detokenizer, TokenBytes, decode
from cluster.front.folder_tokenizer import folder_vocabulary
from cluster.front.gguf_tokenizer import gguf_vocabulary
from cluster.front.vocabulary import SpecialToken, Vocabulary
from diptych.errors import InvalidRequest
from diptych.types import ModelSource


class TextModel:
    """Everything about one model that is text. Immutable; safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._token_bytes = TokenBytes(vocabulary)
        self._special_ids = frozenset(token.id for token in vocabulary.special) - {vocabulary.unknown_id}
        self._special_names = {token.id: token.text.encode() for token in vocabulary.special}
        # Looks ahead, so that strings which overlap are all found.
        texts = "|".join(re.escape(token.text) for token in vocabulary.special)
        self._special_texts = re.compile(f"(?={texts or '(?!)'})")
        source = vocabulary.chat_template
        variables = vocabulary.template_tokens
        self._template = None if source is None else ChatTemplate(source, vocabulary.special, variables)

    @classmethod
    def load(cls, source: ModelSource) -> TextModel:
        """Raises `cluster.models.UnsupportedModel` when the files can't be read."""
        if source.path.startswith("random:"):
            return cls(byte_vocabulary())
        path = Path(source.path)
        return cls(folder_vocabulary(path) if path.is_dir() else gguf_vocabulary(path))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends an answer."""
        return self._vocabulary.eos_token_ids

    @property
    def context_length(self) -> int:
        """Tokens the model was trained for, prompt and answer together."""
        return self._vocabulary.context_length

    @property
    def vocab_size(self) -> int:
        """Ids 0 … vocab_size - 1 mean something to the model."""
        return self._vocabulary.size

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` works."""
        return self._template is not None

    def encode(self, text: str, *, after_bos: bool = True) -> list[int]:
        """The tokens of a client's text, after BOS where the model declares it.

        Raises `InvalidRequest` when the text can't be UTF-8 (a lone surrogate).
        """
        bos = self._vocabulary.bos_id if after_bos else None
        start = [] if bos is None else [bos]
        return [*start, *self._ordinary(text, at_start=True)]

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The tokens of a conversation up to where the assistant's next answer starts.

        Raises `InvalidRequest` when the model has no template or its template refuses.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use completions with a prompt", param="messages")
        tokens: list[int] = []
        for at, piece in enumerate(self._template.render(messages)):
            if isinstance(piece, SpecialToken):
                tokens.append(piece.id)
            else:
                tokens += self._ordinary(piece, at_start=at == 0)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special ones left out. Bytes that are no UTF-8 become U+FFFD."""
        return decode(tokens, self._token_bytes)

    def detokenizer(self, *, continued: bool = False) -> Detokenizer:
        """A new one, for one answer. `continued`: a space that it starts with belongs to it."""
        return Detokenizer(self._token_bytes, continued=continued)

    def spell(self, text: str) -> list[int]:
        """The tokens of `text` alone, without BOS. Raises `InvalidRequest` as `encode` does."""
        return self._ordinary(text, at_start=False)

    def written(self, token: int) -> bytes:
        """A single token as it is written: bytes that may be no text, the name of a special token."""
        return self._special_names.get(token) or self._token_bytes[token]

    def words(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it."""
        return [self._vocabulary.tokenizer.id_to_token(token) or "" for token in tokens]

    def _ordinary(self, text: str, *, at_start: bool) -> list[int]:
        if at_start and self._vocabulary.space_at_start and not text.startswith((" ", "▁")):
            text = " " + text
        _check_unicode(text)
        tokens = self._merged(text)
        return tokens if self._special_ids.isdisjoint(tokens) else self._taken_apart(text)

    def _merged(self, text: str) -> list[int]:
        return self._vocabulary.tokenizer.encode(text, add_special_tokens=False).ids

    def _taken_apart(self, text: str) -> list[int]:
        """The merges of some vocabularies can spell a special token: cut its string after the first letter."""
        cuts = {found.start() + 1 for found in self._special_texts.finditer(text)}
        edges = [0, *sorted(cuts), len(text)]
        tokens = [token for start, end in pairwise(edges) for token in self._merged(text[start:end])]
        if self._special_ids.isdisjoint(tokens):
            return tokens
        raise InvalidRequest("this model can't spell the text without one of its special tokens")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"text is not valid Unicode: {error.reason} at character {error.start}") from error
