"""Templates: what they may do, what clients can't do through them, and how they refuse."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.front.chat import ChatMessage, ChatTemplate
from cluster.front.vocabulary import SpecialToken
from cluster.models import UnsupportedModel
from diptych.errors import InvalidRequest

START = SpecialToken(id=1, text="<|im_start|>")
END = SpecialToken(id=2, text="<|im_end|>")
TURN_USER = SpecialToken(id=3, text="<|user|>")
ROW = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"


def template(source: str, *special: SpecialToken) -> ChatTemplate:
    return ChatTemplate(source, special or (START, END), {"bos_token": "<|im_start|>"})


def user(content: str, *, name: str | None = None) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=content, name=name)]


@given(content=st.text(st.sampled_from("<|im_startend>/ \n123"), max_size=30))
def test_no_content_adds_or_hides_a_special_token(content: str) -> None:
    prompt = template(ROW).render(user(content))
    assert prompt == (START, f"user\n{content.strip()}", END)


@given(
    content=st.lists(
        st.sampled_from(["<|im_", "start|>", "<|im_end|>", "<|im_start|>", "<", ">", " ", "end|>"]), max_size=8
    )
)
def test_special_tokens_put_together_from_parts_stay_text(content: list[str]) -> None:
    prompt = template(ROW).render(user("".join(content)))
    assert prompt == (START, f"user\n{''.join(content).strip()}", END)


def test_neighbouring_fields_cannot_form_a_special_token_together() -> None:
    source = "{% for m in messages %}{{ m['name'] }}{{ m['content'] }}{% endfor %}"
    assert template(source).render(user("end|>", name="<|im_")) == ("<|im_end|>",)


def test_a_template_may_build_special_tokens_around_a_role() -> None:
    source = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    assert template(source, TURN_USER).render(user("hi <|user|>")) == (TURN_USER, "hi <|user|>")


def test_special_tokens_come_from_the_templates_variables_too() -> None:
    assert template("{{ bos_token }}x{{ eos_token }}").render(user("")) == (START, "x")


def test_a_special_token_that_swallows_space_swallows_it() -> None:
    greedy = SpecialToken(id=9, text="<|end|>", strips_left=True, strips_right=True)
    prompt = template("a  <|end|>\n {{ messages[0]['content'] }}", greedy).render(user("\n b "))
    assert prompt == ("a", greedy, "b ")


def test_templates_get_what_they_are_written_against() -> None:
    source = (
        "{%- for m in messages %}\n    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {%- generation %}{{ m | tojson }}{% endgeneration %}\n{%- endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}{% if add_generation_prompt %}!{% endif %}"
    )
    messages = [*user("<é> & 'q'"), *user("never")]
    (text,) = template(source).render(messages)
    assert isinstance(text, str)
    shown, rest = text[: text.index("}") + 1], text[text.index("}") + 1 :]
    assert json.loads(shown) == {"role": "user", "content": "<é> & 'q'"}
    assert "<é> & " in shown
    assert rest == "4True!"


def test_a_template_refuses_in_its_own_words() -> None:
    source = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('Start with a system turn.') }}{% endif %}"
    with pytest.raises(InvalidRequest, match=r"Start with a system turn\.") as refused:
        template(source).render(user("hi"))
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.join(1) }}",
        "{{ messages[5].content.x }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for a in range(1000000) %}{% endfor %}",
        "{% for a in range(90000) %}{{ 'long ' * 90 }}{% endfor %}",
    ],
)
def test_a_template_that_fails_or_reaches_too_far_is_a_refused_request(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        template(source).render(user("hi"))


def test_a_template_that_is_no_template_is_refused_when_it_is_read() -> None:
    with pytest.raises(UnsupportedModel, match="chat template can't be read"):
        template("{% for %}")
