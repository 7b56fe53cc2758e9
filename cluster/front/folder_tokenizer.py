"""A vocabulary from a folder with tokenizer.json and the files beside it. Knows Hugging Face's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Metaspace

from cluster.front.vocabulary import Spelling, Vocabulary, special_tokens
from cluster.models.errors import UnsupportedModel


class _File(BaseModel):
    # These files aren't ours, and hold much that isn't about text.
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Word(_File):
    content: str


class _NamedTemplate(_File):
    name: str
    template: str


class _TokenizerConfig(_File):
    bos_token: str | _Word | None = None
    eos_token: str | _Word | None = None
    unk_token: str | _Word | None = None
    pad_token: str | _Word | None = None
    add_bos_token: bool | None = None
    chat_template: str | list[_NamedTemplate] | None = None


class _GenerationConfig(_File):
    eos_token_id: int | list[int] | None = None


class _ModelConfig(_GenerationConfig):
    max_position_embeddings: int | None = None
    n_positions: int | None = None
    vocab_size: int | None = None
    text_config: _ModelConfig | None = None


_Kind = TypeVar("_Kind", bound=_File)


def folder_vocabulary(folder: Path) -> Vocabulary:
    """Raises `UnsupportedModel` where a file is missing, damaged or of a kind that we don't read."""
    tokenizer = _tokenizer(folder / "tokenizer.json")
    words = _read(folder / "tokenizer_config.json", _TokenizerConfig)
    model = _read(folder / "config.json", _ModelConfig)
    template_tokens = _template_tokens(words)
    prompt_start = tokenizer.encode("", add_special_tokens=True).ids
    ends = _end_ids(folder, model, tokenizer, template_tokens.get("eos_token"))
    bos = _word_id(tokenizer, template_tokens.get("bos_token"))
    starts_with_bos = bool(prompt_start) and prompt_start[0] == bos
    unknown = _word_id(tokenizer, template_tokens.get("unk_token"))
    vocabulary_size = tokenizer.get_vocab_size(with_added_tokens=True)
    return Vocabulary(
        space_at_start=_move_space_to_start(tokenizer),
        tokenizer=tokenizer,
        spelling=_spelling(_state(tokenizer.decoder), folder),
        special=special_tokens(tokenizer, ends if bos is None else ends | {bos}),
        unknown_id=unknown,
        bos_id=bos if (starts_with_bos if words.add_bos_token is None else words.add_bos_token) else None,
        eos_token_ids=ends,
        size=_text_part(model).vocab_size or vocabulary_size,
        context_length=_context_length(folder, model),
        chat_template=_chat_template(folder, words),
        template_tokens=template_tokens,
    )


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path} can't be read: {error}") from error


def _read(path: Path, kind: type[_Kind]) -> _Kind:
    """What a missing file means is up to the defaults."""
    try:
        return kind.model_validate_json(path.read_bytes() if path.is_file() else b"{}")
    except ValidationError as error:
        raise UnsupportedModel(f"{path} can't be read: {error}") from error


def _template_tokens(words: _TokenizerConfig) -> dict[str, str]:
    named = {"bos_token": words.bos_token, "eos_token": words.eos_token}
    named |= {"unk_token": words.unk_token, "pad_token": words.pad_token}
    return {name: word if isinstance(word, str) else word.content for name, word in named.items() if word is not None}


def _word_id(tokenizer: Tokenizer, word: str | None) -> int | None:
    return None if word is None else tokenizer.token_to_id(word)


def _end_ids(folder: Path, model: _ModelConfig, tokenizer: Tokenizer, eos: str | None) -> frozenset[int]:
    generation = _read(folder / "generation_config.json", _GenerationConfig).eos_token_id
    declared = [generation, _text_part(model).eos_token_id, model.eos_token_id, _word_id(tokenizer, eos)]
    lists = (found if isinstance(found, list) else [found] for found in declared if found is not None)
    return frozenset(token for found in lists for token in found)


def _text_part(model: _ModelConfig) -> _ModelConfig:
    return model.text_config or model


def _context_length(folder: Path, model: _ModelConfig) -> int:
    length = _text_part(model).max_position_embeddings or _text_part(model).n_positions
    if not length:
        raise UnsupportedModel(
            f"{folder / 'config.json'} doesn't say how long a context it takes (max_position_embeddings)"
        )
    return length


def _chat_template(folder: Path, words: _TokenizerConfig) -> str | None:
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text()
    if isinstance(words.chat_template, list):
        return next((named.template for named in words.chat_template if named.name == "default"), None)
    return words.chat_template


def _move_space_to_start(tokenizer: Tokenizer) -> bool:
    """Whether text gets a space at the start of the prompt only.

    We encode the stretches between special tokens one by one, and each would look like a start.
    """
    part = tokenizer.pre_tokenizer
    if not isinstance(part, Metaspace) or part.prepend_scheme != "first":
        return False
    tokenizer.pre_tokenizer = Metaspace(replacement=part.replacement, prepend_scheme="never", split=part.split)
    return True


def _state(part: Any) -> dict[str, Any]:  # noqa: ANN401, tokenizers types its parts so
    return {} if part is None else cast("dict[str, Any]", json.loads(part.__getstate__()))


def _spelling(decoder: dict[str, Any], folder: Path) -> Spelling:
    steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    kinds = {str(step.get("type")) for step in steps}
    if kinds == {"ByteLevel"}:
        return Spelling(byte_level=True)
    if "Replace" in kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return Spelling(byte_level=False, strips_first_space="Strip" in kinds)
    if kinds == {"Metaspace"}:
        return Spelling(byte_level=False, strips_first_space=steps[0].get("prepend_scheme") != "never")
    raise UnsupportedModel(f"{folder / 'tokenizer.json'}: decoder {'+'.join(sorted(kinds))} isn't supported")
