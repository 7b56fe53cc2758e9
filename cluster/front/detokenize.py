"""Tokens to text, whole or piece by piece. Knows how words spell bytes, not how text is cut.

Not tokenizers' DecodeStream: it decodes a growing window anew for each token, gives up on bytes
that are no text, and what it still holds at the end can't be had. Here each token is its bytes, and
the standard incremental decoder holds back exactly the bytes of an unfinished character.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from cluster.front.vocabulary import Vocabulary


def _byte_letters() -> str:
    """GPT-2's alphabet: printable bytes are their own letter, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_LETTERS = _byte_letters()
"""The letter that stands for each byte, at the byte's index."""
_BYTES = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
_BYTE_WORD = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of each token, worked out on first use and kept."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokenizer = vocabulary.tokenizer
        self.spelling = vocabulary.spelling
        added = vocabulary.tokenizer.get_added_tokens_decoder()
        self._known = {token: word.content.encode() for token, word in added.items()}
        self._known.update((word.id, b"") for word in vocabulary.special)

    def __getitem__(self, token: int) -> bytes:
        """Empty for special tokens, and for ids that mean nothing here."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._spelled(token)
        return known

    def _spelled(self, token: int) -> bytes:
        word = self._tokenizer.id_to_token(token) if token >= 0 else None
        if word is None:
            return f"⟨{token}⟩".encode() if self.spelling.names_unknown else b""
        if not self.spelling.byte_level:
            byte = _BYTE_WORD.fullmatch(word)
            return bytes((int(byte[1], 16),)) if byte else word.replace("▁", " ").encode()
        if all(letter in _BYTES for letter in word):
            return bytes(_BYTES[letter] for letter in word)
        return word.encode()


def decode(tokens: Sequence[int], token_bytes: TokenBytes) -> str:
    """The text of all tokens at once. Bytes that are no UTF-8 become U+FFFD."""
    data = b"".join(token_bytes[token] for token in tokens)
    if token_bytes.spelling.strips_first_space:
        data = data.removeprefix(b" ")
    return data.decode(errors="replace")


class Detokenizer:
    """The text of one answer as its tokens come. Never half a character.

    All that `push` returns and then `finish` make up exactly what `decode` makes of the tokens.
    """

    def __init__(self, token_bytes: TokenBytes, *, continued: bool = False) -> None:
        """`continued`: a text goes on, and its first word's space is a space."""
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = token_bytes.spelling.strips_first_space and not continued

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        data = self._token_bytes[token]
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What an unfinished character leaves: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)
