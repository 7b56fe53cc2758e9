"""The vocabulary of `random:` models: one token per byte, and ChatML. Knows no shape."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from cluster.front.detokenize import BYTE_LETTERS
from cluster.front.vocabulary import Spelling, Vocabulary, add_words, special_tokens

CONTEXT_LENGTH = 8192
_SPECIAL = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
_BOS, _EOS, _, _IM_END = range(256, 260)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_vocabulary() -> Vocabulary:
    """Ids 0 … 255 are bytes, 256 … 259 special; what a larger model emits above decodes to ⟨id⟩."""
    tokenizer = Tokenizer(BPE({letter: byte for byte, letter in enumerate(BYTE_LETTERS)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    add_words(tokenizer, _SPECIAL, special=True)
    return Vocabulary(
        tokenizer=tokenizer,
        spelling=Spelling(byte_level=True, names_unknown=True),
        special=special_tokens(tokenizer, ()),
        unknown_id=None,
        bos_id=None,
        eos_token_ids=frozenset((_EOS, _IM_END)),
        size=256 + len(_SPECIAL),
        context_length=CONTEXT_LENGTH,
        chat_template=_CHATML,
        template_tokens={"bos_token": _SPECIAL[0], "eos_token": _SPECIAL[1]},
    )
