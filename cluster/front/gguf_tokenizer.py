"""A vocabulary from a GGUF file's metadata. Knows GGUF's keys, not its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence

from cluster.front.gguf_metadata import GgufMetadata, read_gguf_metadata
from cluster.front.pre_tokenizers import BEGINS_WITH_BOS, WHOLE_WORDS_FIRST, byte_level_pre_tokenizer
from cluster.front.vocabulary import Spelling, Vocabulary, add_words, special_tokens
from cluster.models.errors import UnsupportedModel

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("eos", "eot", "eom")
# GGUF names one end token, and some models have several. llama.cpp knows the others by name too.
_END_WORDS = frozenset(
    (
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<|end_of_text|>",
        "<|END_OF_TURN_TOKEN|>",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001, DeepSeek spells it so
        "</s>",
        "<EOT>",
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """The words in the order of their ids, with what the file says of each."""

    texts: list[str]
    kinds: list[int]
    scores: list[float]

    def of_kind(self, kind: int) -> list[str]:
        return [text for text, own in zip(self.texts, self.kinds, strict=True) if own == kind]

    def ids(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self.texts)}


def gguf_vocabulary(path: Path) -> Vocabulary:
    """Raises `UnsupportedModel` for a kind of tokenizer that we don't build."""
    metadata = read_gguf_metadata(path)
    words = _words(metadata)
    kind = metadata.text("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, spelling, bos = _byte_level(metadata, words)
    elif kind == "llama":
        tokenizer, spelling, bos = _sentence_pieces(metadata, words)
    else:
        raise UnsupportedModel(f"{path}: tokenizer {kind!r} isn't supported; these are: gpt2, llama")
    ends = _end_ids(metadata, words)
    bos_id = _word_id(metadata, words, "bos")
    return Vocabulary(
        tokenizer=tokenizer,
        spelling=spelling,
        special=special_tokens(tokenizer, ends if bos_id is None else ends | {bos_id}),
        unknown_id=_word_id(metadata, words, "unknown"),
        bos_id=bos_id if metadata.flag("tokenizer.ggml.add_bos_token", default=bos) else None,
        eos_token_ids=ends,
        size=len(words.texts),
        context_length=_context_length(metadata),
        chat_template=metadata.text("tokenizer.chat_template"),
        template_tokens=_template_tokens(metadata, words),
    )


def _words(metadata: GgufMetadata) -> _Words:
    texts = metadata.texts("tokenizer.ggml.tokens")
    if not texts:
        raise UnsupportedModel(f"{metadata.path} holds no tokenizer (no tokenizer.ggml.tokens)")
    kinds = [int(kind) for kind in metadata.numbers("tokenizer.ggml.token_type")] or [_NORMAL] * len(texts)
    scores = metadata.numbers("tokenizer.ggml.scores") or [0.0] * len(texts)
    if len(set(texts)) != len(texts):
        raise UnsupportedModel(f"{metadata.path}: {len(texts) - len(set(texts))} tokens occur twice")
    if not len(texts) == len(kinds) == len(scores):
        raise UnsupportedModel(f"{metadata.path}: {len(texts)} tokens, {len(kinds)} token types, {len(scores)} scores")
    return _Words(texts=texts, kinds=kinds, scores=scores)


def _word_id(metadata: GgufMetadata, words: _Words, name: str) -> int | None:
    token = metadata.whole(f"tokenizer.ggml.{name}_token_id")
    if token is not None and not 0 <= token < len(words.texts):
        raise UnsupportedModel(f"{metadata.path}: {name} token {token} of {len(words.texts)}")
    return token


def _byte_level(metadata: GgufMetadata, words: _Words) -> tuple[Tokenizer, Spelling, bool]:
    name = metadata.text("tokenizer.ggml.pre") or "default"
    model = BPE(words.ids(), _merges(metadata, words), ignore_merges=name in WHOLE_WORDS_FIRST)
    tokenizer = _with_added(Tokenizer(model), words)
    tokenizer.pre_tokenizer = byte_level_pre_tokenizer(name)
    return tokenizer, Spelling(byte_level=True), name in BEGINS_WITH_BOS


def _merges(metadata: GgufMetadata, words: _Words) -> list[tuple[str, str]]:
    known = words.ids()
    merges: list[tuple[str, str]] = []
    for line in metadata.texts("tokenizer.ggml.merges"):
        left, _, right = line.partition(" ")
        if not (left in known and right in known and left + right in known):
            raise UnsupportedModel(f"{metadata.path}: merge {line!r} is of words that the vocabulary lacks")
        merges.append((left, right))
    return merges


def _sentence_pieces(metadata: GgufMetadata, words: _Words) -> tuple[Tokenizer, Spelling, bool]:
    unknown = _word_id(metadata, words, "unknown")
    model = BPE(
        words.ids(),
        _merges(metadata, words) or _merges_by_score(words),
        unk_token=None if unknown is None else words.texts[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = _with_added(Tokenizer(model), words)
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", default=True)
    spaces = Replace(" ", "▁")
    # As in SentencePiece and llama.cpp: every stretch of text between special tokens gets a space.
    tokenizer.normalizer = Sequence([Prepend("▁"), spaces]) if prefix else spaces
    return tokenizer, Spelling(byte_level=False, strips_first_space=prefix), True


def _merges_by_score(words: _Words) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose whole has the best score: merges in that order.

    Only ordinary words are wholes or parts, or text could merge its way into a control token.
    """
    plain = {
        text: score for text, kind, score in zip(words.texts, words.kinds, words.scores, strict=True) if kind == _NORMAL
    }
    ranks = words.ids()
    found: list[tuple[float, int, int, str, str]] = []
    for whole, score in plain.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in plain and right in plain:
                found.append((-score, ranks[left], ranks[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _with_added(tokenizer: Tokenizer, words: _Words) -> Tokenizer:
    add_words(tokenizer, words.of_kind(_CONTROL), special=True)
    add_words(tokenizer, words.of_kind(_USER_DEFINED), special=False)
    return tokenizer


def _end_ids(metadata: GgufMetadata, words: _Words) -> frozenset[int]:
    declared = (_word_id(metadata, words, name) for name in _ENDS)
    control = zip(words.texts, words.kinds, strict=True)
    known = (token for token, (text, kind) in enumerate(control) if kind == _CONTROL and text in _END_WORDS)
    return frozenset((*(token for token in declared if token is not None), *known))


def _context_length(metadata: GgufMetadata) -> int:
    key = f"{metadata.text('general.architecture')}.context_length"
    length = metadata.whole(key)
    if length is None or length <= 0:
        raise UnsupportedModel(f"{metadata.path} doesn't say how long a context it takes ({key})")
    return length


def _template_tokens(metadata: GgufMetadata, words: _Words) -> dict[str, str]:
    ids = {role: _word_id(metadata, words, name) for role, name in _ROLES.items()}
    return {role: words.texts[token] for role, token in ids.items() if token is not None}
