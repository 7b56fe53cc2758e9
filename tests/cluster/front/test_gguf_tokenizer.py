"""Tokenizers rebuilt from GGUF metadata, of both kinds; SentencePiece's against its own definition."""

from __future__ import annotations

import string
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.front.chat import ChatMessage
from cluster.front.detokenize import BYTE_LETTERS
from cluster.front.gguf_metadata import read_gguf_metadata
from cluster.front.pre_tokenizers import PATTERNS, byte_level_pre_tokenizer
from cluster.front.tokenizer import TextModel
from cluster.models import UnsupportedModel
from diptych.types import ModelSource


def load(path: Path) -> TextModel:
    return TextModel.load(ModelSource(name=path.stem, path=str(path), digest=""))


@pytest.fixture(scope="module")
def pieces(sentence_piece_gguf: Path) -> TextModel:
    return load(sentence_piece_gguf)


@pytest.fixture(scope="module")
def scores(sentence_piece_gguf: Path) -> dict[str, tuple[int, float]]:
    """Id and score of each ordinary word."""
    metadata = read_gguf_metadata(sentence_piece_gguf)
    texts, kinds = metadata.texts("tokenizer.ggml.tokens"), metadata.numbers("tokenizer.ggml.token_type")
    points = metadata.numbers("tokenizer.ggml.scores")
    table = enumerate(zip(texts, points, kinds, strict=True))
    return {text: (token, score) for token, (text, score, kind) in table if kind == 1}


def by_definition(text: str, scores: dict[str, tuple[int, float]]) -> list[int]:
    """SentencePiece's BPE: join the neighbours with the best score, the leftmost of equals, until none join."""
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [(scores[a + b][1], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not joins:
            break
        at = -max(joins)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    tokens: list[int] = []
    for symbol in symbols:
        tokens += [scores[symbol][0]] if symbol in scores else [3 + byte for byte in symbol.encode()]
    return tokens


@given(sample=st.text(st.sampled_from("thinagdserTHE </>é日👋 "), max_size=40))
def test_pieces_join_in_the_order_of_their_scores(
    pieces: TextModel, scores: dict[str, tuple[int, float]], sample: str
) -> None:
    assert pieces.encode(sample) == [1, *by_definition(sample, scores)]
    assert pieces.decode(pieces.encode(sample)) == sample


@pytest.mark.parametrize("hostile", ["</s>", "<s>hi</s>", "a</s", "<0x0A>", "<unk>"])
def test_pieces_of_a_control_tokens_string_never_join_to_it(pieces: TextModel, hostile: str) -> None:
    tokens = pieces.encode(hostile)
    assert min(tokens[1:]) > 2
    assert pieces.decode(tokens) == hostile


def test_a_template_of_pieces_gives_every_stretch_its_space(
    pieces: TextModel, scores: dict[str, tuple[int, float]]
) -> None:
    turns = [("user", "the </s>"), ("assistant", "and"), ("user", "an")]
    tokens = pieces.encode_chat([ChatMessage(role=role, content=content) for role, content in turns])
    first = by_definition("[INST] the </s> [/INST] and ", scores)
    assert tokens == [1, *first, 2, *by_definition("[INST] an [/INST]", scores)]


def test_pieces_declare_their_ends_and_context(pieces: TextModel) -> None:
    assert pieces.eos_token_ids == {2}
    assert pieces.context_length == 512


CUTS = {
    "default": ["it", "'", "s", " ", "123", "45", " x", "!", "\n"],
    "gpt-2": ["it", "'s", " 12345", " x", "!", "\n"],
    "smollm": ["it", "'s", " ", "1", "2", "3", "4", "5", " x", "!", "\n"],
    "llama-bpe": ["it", "'s", " ", "123", "45", " x", "!\n"],
    "qwen2": ["it", "'s", " ", "1", "2", "3", "4", "5", " x", "!\n"],
}


@pytest.mark.parametrize("name", sorted(CUTS))
def test_each_pre_tokenizer_cuts_its_own_way(name: str) -> None:
    letters = dict(enumerate(BYTE_LETTERS))
    expected = ["".join(letters[byte] for byte in part.encode()) for part in CUTS[name]]
    assert [part for part, _ in byte_level_pre_tokenizer(name).pre_tokenize_str("it's 12345 x!\n")] == expected


@pytest.mark.parametrize("name", sorted(PATTERNS))
@given(sample=st.text(max_size=40))
def test_no_pre_tokenizer_loses_a_byte(name: str, sample: str) -> None:
    parts = byte_level_pre_tokenizer(name).pre_tokenize_str(sample)
    joined = "".join(part for part, _ in parts)
    assert bytes(BYTE_LETTERS.index(letter) for letter in joined) == sample.encode()


def byte_level_file(path: Path, *, pre: str = "gpt-2", model: str = "gpt2", extra: tuple[str, ...] = ()) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    words = [*BYTE_LETTERS, *extra, "<|eot_id|>", "<|end_of_text|>"]
    writer.add_context_length(128)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(words) - 2) + [3, 3])
    writer.add_token_merges(["t h"] if "th" in extra else [])
    writer.add_bos_token_id(len(words) - 1)
    writer.add_eos_token_id(len(words) - 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_an_unknown_pre_tokenizer_is_an_error_that_names_it_and_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'brand-new' isn't supported.*qwen2.*smollm"):
        load(byte_level_file(tmp_path / "m.gguf", pre="brand-new"))


def test_an_unknown_kind_of_tokenizer_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'rwkv' isn't supported"):
        load(byte_level_file(tmp_path / "m.gguf", model="rwkv"))


def test_every_token_that_ends_an_answer_is_known_though_gguf_names_one(tmp_path: Path) -> None:
    assert load(byte_level_file(tmp_path / "m.gguf")).eos_token_ids == {256, 257}


def test_text_starts_with_bos_where_the_family_does(tmp_path: Path) -> None:
    assert load(byte_level_file(tmp_path / "gpt.gguf")).encode("a") == [97]
    assert load(byte_level_file(tmp_path / "llama.gguf", pre="llama-bpe")).encode("a") == [257, 97]


def test_merges_apply(tmp_path: Path) -> None:
    text = load(byte_level_file(tmp_path / "m.gguf", extra=("th",)))
    assert text.encode("the th") == [256, 101, 32, 256]


def test_a_word_that_is_the_whole_stretch_needs_no_merges_in_llama_3(tmp_path: Path) -> None:
    text = load(byte_level_file(tmp_path / "m.gguf", pre="llama-bpe", extra=("whole",)))
    assert text.encode("whole")[1:] == [256]


@pytest.mark.parametrize("size", [0, 3, 10, 30, 200, 5000])
def test_a_file_cut_short_is_an_error_that_names_it(tmp_path: Path, sentence_piece_gguf: Path, size: int) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(sentence_piece_gguf.read_bytes()[:size])
    with pytest.raises(UnsupportedModel, match=r"short\.gguf can't be read"):
        load(path)


@given(at=st.integers(4, 3000), byte=st.integers(0, 255))
def test_a_damaged_header_is_an_error_or_still_a_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, sentence_piece_gguf: Path, at: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    content = bytearray(sentence_piece_gguf.read_bytes())
    content[at] = byte
    path.write_bytes(content)
    try:
        text = load(path)
    except UnsupportedModel:
        return
    assert text.decode(text.encode(string.ascii_letters)) is not None


def test_metadata_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_string("text", "é")
    writer.add_int8("small", -3)
    writer.add_uint64("large", 2**63)
    writer.add_bool("flag", True)
    writer.add_array("numbers", [1.5, -2.0])
    writer.add_array("texts", ["a", ""])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = read_gguf_metadata(tmp_path / "m.gguf")
    assert (metadata.text("text"), metadata.whole("small"), metadata.whole("large")) == ("é", -3, 2**63)
    assert metadata.flag("flag", default=False)
    assert (metadata.numbers("numbers"), metadata.texts("texts")) == ([1.5, -2.0], ["a", ""])
    assert metadata.text("absent") is None
    with pytest.raises(UnsupportedModel, match="text is not a whole number"):
        metadata.whole("text")
