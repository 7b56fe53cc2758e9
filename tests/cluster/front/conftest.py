"""A SentencePiece-like model small enough to build for each session."""

from __future__ import annotations

import string
from pathlib import Path

import gguf
import pytest

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
CONTROL = ("<s>", "</s>")
MERGED = (
    "▁t",
    "he",
    "▁the",
    "in",
    "ing",
    "▁a",
    "an",
    "▁an",
    "and",
    "▁and",
    "th",
    "the",
    "ss",
    "</",
    "s>",
    "▁▁",
    "er",
    "re",
    "ere",
)


def words() -> list[tuple[str, float, int]]:
    """(text, score, kind): kinds are 1 ordinary, 2 unknown, 3 control, 6 byte."""
    table: list[tuple[str, float, int]] = [("<unk>", 0.0, 2), *((text, 0.0, 3) for text in CONTROL)]
    table += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    table += [(text, -float(at), 1) for at, text in enumerate(MERGED)]
    table += [(letter, -1000.0 - at, 1) for at, letter in enumerate("▁" + string.ascii_letters + string.punctuation)]
    return table


@pytest.fixture(scope="session")
def sentence_piece_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pieces") / "pieces.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    texts, scores, kinds = zip(*words(), strict=True)
    writer.add_context_length(512)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
