"""What every kind of tokenizer file is read into: the words, and what the model says about them.

Knows no file format; `gguf_tokenizer`, `folder_tokenizer` and `byte_tokenizer` each make one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenizers import AddedToken, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialToken:
    """A token that steers the model and that no user's text may turn into."""

    id: int
    text: str
    strips_left: bool = False
    strips_right: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How a word of the vocabulary spells the bytes it stands for."""

    byte_level: bool
    """GPT-2's alphabet, one letter per byte; otherwise SentencePiece's: ▁ is a space, <0x0A> a byte."""
    strips_first_space: bool = False
    """The text's first word carries a space that isn't part of the text."""
    names_unknown: bool = False
    """An id without a word decodes to ⟨id⟩ rather than to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Words and declarations of one model."""

    tokenizer: Tokenizer
    """Takes special tokens' strings for ordinary text (`encode_special_tokens`)."""
    spelling: Spelling
    special: tuple[SpecialToken, ...]
    unknown_id: int | None
    bos_id: int | None
    """Set only when plain text starts with it."""
    eos_token_ids: frozenset[int]
    size: int
    """Ids the model takes: 0 … size - 1."""
    context_length: int
    chat_template: str | None
    template_tokens: dict[str, str] = field(default_factory=dict[str, str])
    """What templates call bos_token, eos_token, unk_token, pad_token."""
    space_at_start: bool = False
    """Text gets a space in front at the very start of the prompt, not after a special token."""


def add_words(tokenizer: Tokenizer, texts: Iterable[str], *, special: bool) -> None:
    """Words that are found whole in text, before anything else is cut."""
    words = [AddedToken(text, special=special, normalized=False) for text in texts]
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    add(words)


def special_tokens(tokenizer: Tokenizer, also: Iterable[int]) -> tuple[SpecialToken, ...]:
    """All special tokens of `tokenizer`, once the ids in `also` are made special too."""
    words = (tokenizer.id_to_token(token) for token in also)
    add_words(tokenizer, [word for word in words if word], special=True)
    tokenizer.encode_special_tokens = True
    return tuple(
        SpecialToken(id=token, text=added.content, strips_left=added.lstrip, strips_right=added.rstrip)
        for token, added in sorted(tokenizer.get_added_tokens_decoder().items())
        if added.special and added.content
    )
