"""Whatever tokens come, the pieces make up the whole, and no piece holds half a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.front.tokenizer import TextModel
from diptych.types import ModelSource

TEXTS = ("日本語の漢字", "مرحبا بالعالم", "👩‍👩‍👧‍👦🏳️‍🌈👋🏽", "naïve café", "plain")


@pytest.fixture(scope="module")
def byte_level(default_model: ModelSource) -> TextModel:
    return TextModel.load(default_model)


@pytest.fixture(scope="module")
def pieces(sentence_piece_gguf: Path) -> TextModel:
    return TextModel.load(ModelSource(name="pieces", path=str(sentence_piece_gguf), digest=""))


@pytest.fixture(scope="module")
def plain_bytes() -> TextModel:
    return TextModel.load(ModelSource(name="random:tiny", path="random:tiny", digest=""))


@pytest.fixture(params=["byte_level", "pieces", "plain_bytes"], scope="module")
def text(request: pytest.FixtureRequest) -> TextModel:
    return request.getfixturevalue(request.param)


def streamed(text: TextModel, tokens: list[int]) -> list[str]:
    stream = text.detokenizer()
    return [*(stream.push(token) for token in tokens), stream.finish()]


@given(data=st.data())
def test_the_pieces_of_any_tokens_make_up_their_text(text: TextModel, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, text.vocab_size + 5), max_size=60))
    assert "".join(streamed(text, tokens)) == text.decode(tokens)


def can_spell(text: TextModel, sample: str) -> bool:
    """The default model has no token for six control characters, nor for some of Unicode's far planes."""
    return text.decode(text.encode(sample)) == sample


@given(sample=st.text(st.characters(exclude_categories=["Cc", "Cs", "Co", "Cn"]), max_size=60))
def test_no_piece_of_valid_text_holds_half_a_character(text: TextModel, sample: str) -> None:
    assume(can_spell(text, sample))
    tokens = text.encode(sample)
    pieces = streamed(text, tokens)
    assert "".join(pieces) == sample
    assert sum(piece.count("\ufffd") for piece in pieces) == sample.count("\ufffd")


@pytest.mark.parametrize("sample", TEXTS)
def test_every_piece_is_whole_characters_in_any_script(text: TextModel, sample: str) -> None:
    pieces = streamed(text, text.encode(sample))
    assert "".join(pieces) == sample
    assert "\ufffd" not in "".join(pieces)


def test_bytes_of_a_character_are_held_until_it_is_whole(plain_bytes: TextModel) -> None:
    assert streamed(plain_bytes, list("é👋".encode())) == ["", "é", "", "", "", "👋", ""]


def test_a_special_token_in_the_middle_of_a_character_does_not_break_it(plain_bytes: TextModel) -> None:
    assert streamed(plain_bytes, [0xC3, 258, 0xA9]) == ["", "", "é", ""]


def test_an_answer_cut_within_a_character_ends_with_one_replacement(plain_bytes: TextModel) -> None:
    assert streamed(plain_bytes, [0x61, 0xF0, 0x9F]) == ["a", "", "", "\ufffd"]


def test_random_weights_name_the_ids_they_have_no_word_for(plain_bytes: TextModel) -> None:
    assert plain_bytes.decode([0x61, 260, 128_000, 259]) == "a⟨260⟩⟨128000⟩"


def test_the_first_words_space_is_not_part_of_the_text_and_later_ones_are(pieces: TextModel) -> None:
    the = pieces.encode("the")[1:]
    assert streamed(pieces, [*the, *the]) == ["the", " the", ""]
