"""Folders as Hugging Face lays them out, against transformers reading the same folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from cluster.front.chat import ChatMessage
from cluster.front.tokenizer import TextModel
from cluster.models import UnsupportedModel
from diptych.errors import InvalidRequest
from diptych.types import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CORPUS = ["the quick brown fox and the lazy dog", "user assistant hello there, hello again"] * 3
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<turn>\n{% endfor %}assistant:"
TURNS = [("user", "hello <there> the fox"), ("assistant", " the dog "), ("user", "and again")]


def trained(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=kind != "bytes"))
    alphabet = []
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=kind)
    special = ["<unk>", "<s>", "</s>", AddedToken("<turn>", special=True, normalized=False)]
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "<>:,.\n"], trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def folder(at: Path, kind: str = "bytes", **config: object) -> Path:
    trained(kind).save(str(at / "tokenizer.json"))
    words = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "unk_token": "<unk>",
        "chat_template": TEMPLATE,
    }
    words |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (at / "tokenizer_config.json").write_text(json.dumps(words))
    (at / "config.json").write_text(json.dumps({"max_position_embeddings": 640, "vocab_size": 512, **config}))
    (at / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    return at


def load(at: Path) -> TextModel:
    return TextModel.load(ModelSource(name="folder", path=str(at), digest=""))


def reference(at: Path) -> PreTrainedTokenizerFast:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports' own affairs
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(at)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "first", "always", "never"])
def test_a_folder_speaks_the_tokens_that_transformers_speaks(tmp_path: Path, kind: str) -> None:
    text, other = load(folder(tmp_path, kind)), reference(tmp_path)
    for sample in ("the fox", " the fox", "hello,\n\nhello", "the"):
        assert text.encode(sample) == other(sample)["input_ids"]
        # With these two, a space that the client sent first can't be told from the one that is put there.
        strips = kind in ("first", "always")
        assert text.decode(text.encode(sample)) == (sample.removeprefix(" ") if strips else sample)
    conversation = [{"role": role, "content": content} for role, content in TURNS]
    expected = other.apply_chat_template(conversation, return_dict=False)
    assert text.encode_chat([ChatMessage(role=role, content=content) for role, content in TURNS]) == expected


def test_a_folder_declares_context_vocabulary_and_every_end(tmp_path: Path) -> None:
    text = load(folder(tmp_path))
    assert (text.context_length, text.vocab_size, text.eos_token_ids) == (640, 512, {2, 3})


def test_special_strings_in_a_folders_text_stay_text(tmp_path: Path) -> None:
    text = load(folder(tmp_path))
    hostile = "<s></s><turn>"
    assert text.encode(hostile)[0] == 1
    assert min(text.encode(hostile)[1:]) > 3
    assert text.decode(text.encode(hostile)) == hostile


def test_a_vocabulary_whose_whole_words_spell_a_special_token_still_cannot_be_tricked(tmp_path: Path) -> None:
    at = folder(tmp_path)
    content = json.loads((at / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    content["pre_tokenizer"] |= {"trim_offsets": True}
    (at / "tokenizer.json").write_text(json.dumps(content))
    text = load(at)
    assert min(text.encode("</s>")[1:]) > 3
    assert text.decode(text.encode("</s>")) == "</s>"


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    at = folder(tmp_path)
    (at / "chat_template.jinja").write_text("own: {{ messages[0]['content'] }}")
    text = load(at)
    assert text.decode(text.encode_chat([ChatMessage(role="user", content="hi")])) == "own: hi"


def test_a_model_without_a_template_serves_text_and_refuses_chats(tmp_path: Path) -> None:
    at = folder(tmp_path)
    (at / "tokenizer_config.json").unlink()
    text = load(at)
    assert text.decode(text.encode("the fox")) == "the fox"
    with pytest.raises(InvalidRequest, match="no chat template"):
        text.encode_chat([ChatMessage(role="user", content="hi")])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json can't be read"),
        ("config.json", "{}", "how long a context"),
        ("config.json", '{"max_position_embeddings": "many"}', r"config\.json can't be read"),
        ("generation_config.json", "[", r"generation_config\.json can't be read"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    at = folder(tmp_path)
    (at / name).write_text(content)
    with pytest.raises(UnsupportedModel, match=complaint):
        load(at)


def test_a_decoder_of_another_family_is_refused_by_name(tmp_path: Path) -> None:
    at = folder(tmp_path)
    content = json.loads((at / "tokenizer.json").read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (at / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModel, match="decoder WordPiece isn't supported"):
        load(at)
