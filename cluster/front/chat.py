"""A conversation through the model's own template. Knows strings, not token ids' meaning.

Special tokens come from the template alone. What a client wrote is searched for their strings
before rendering; each find is replaced by a number that nobody can guess, and put back as ordinary
text once the special tokens of the rendered text are found.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypeAlias

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.front.vocabulary import SpecialToken
from cluster.models.errors import UnsupportedModel
from diptych.errors import InvalidRequest

if TYPE_CHECKING:
    from jinja2.parser import Parser

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_RENDERED_LIMIT_FACTOR = 16
_RENDERED_LIMIT_CHARACTERS = 1 << 20
# A template is a program: on messages that it doesn't foresee it may fail in any of these ways.
_TEMPLATE_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)

Piece: TypeAlias = str | SpecialToken


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn."""

    role: str
    content: str
    name: str | None = None


class ChatTemplate:
    """A compiled template, and the special tokens that it alone may write."""

    def __init__(self, source: str, special: Sequence[SpecialToken], variables: Mapping[str, str]) -> None:
        """Raises `UnsupportedModel` when the template is no Jinja."""
        self._special = {token.text: token for token in special}
        self._hider = _Hider(self._special)
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source, globals=_FUNCTIONS)
        except TemplateError as error:
            raise UnsupportedModel(f"the model's chat template can't be read: {error}") from error

    def render(self, messages: Sequence[ChatMessage]) -> tuple[Piece, ...]:
        """The prompt up to where the assistant's answer starts.

        Raises `InvalidRequest` with the template's own words when it refuses the conversation.
        """
        _check_roles(messages)
        veil = _Veil(self._hider)
        turns = [_turn(message, veil.hide) for message in messages]
        written = sum(len(message.content) for message in messages)
        limit = _RENDERED_LIMIT_CHARACTERS + _RENDERED_LIMIT_FACTOR * written
        try:
            text = _joined(
                self._template.generate(
                    messages=turns, add_generation_prompt=True, tools=None, documents=None, **self._variables
                ),
                limit,
            )
        except _TEMPLATE_FAILURES as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return tuple(self._pieces(text, veil.reveal))

    def _pieces(self, text: str, reveal: Callable[[str], str]) -> Generator[Piece]:
        for at, part in enumerate(self._hider.split(text)):
            if at % 2:
                yield self._special[part]
            elif part:
                yield reveal(part)


class _Hider:
    """Finds special tokens' strings, and pieces of them at a text's edges."""

    def __init__(self, special: Mapping[str, SpecialToken]) -> None:
        longest_first = sorted(special, key=len, reverse=True)
        self._whole = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._beginnings = frozenset(text[:cut] for text in special for cut in range(1, len(text)))
        self._endings = frozenset(text[cut:] for text in special for cut in range(1, len(text)))
        self._longest = max(map(len, special), default=0)
        cuts = (_padded(token) for token in (special[text] for text in longest_first))
        self._cut = re.compile(f"({'|'.join(cuts)})") if special else re.compile(r"(?!)")

    def split(self, text: str) -> list[str]:
        """Texts and special tokens in turn, these without the space that some of them swallow."""
        parts = self._cut.split(text)
        return [self._bare(part) if at % 2 else part for at, part in enumerate(parts)]

    def _bare(self, part: str) -> str:
        found = self._whole.search(part)
        assert found is not None
        return found[0]

    def hide(self, text: str, hide: Callable[[str], str]) -> str:
        """`text` with nothing left that could be, or become at its edges, a special token.

        Templates trim, so an edge is where the white space ends.
        """
        text = self._whole.sub(lambda found: hide(found[0]), text)
        body = text.strip()
        start, end = text.find(body), text.find(body) + len(body)
        first = self._fragment(
            body[:size] for size in range(min(self._longest, len(body)), 0, -1) if body[:size] in self._endings
        )
        last_sizes = range(min(self._longest, len(body) - len(first)), 0, -1)
        last = self._fragment(body[-size:] for size in last_sizes if body[-size:] in self._beginnings)
        middle = body[len(first) : len(body) - len(last)]
        edges = (hide(first) if first else "") + middle + (hide(last) if last else "")
        return text[:start] + edges + text[end:]

    def _fragment(self, candidates: Iterable[str]) -> str:
        return next(iter(candidates), "")


class _Veil:
    """What one rendering hid, under numbers of its own."""

    def __init__(self, hider: _Hider) -> None:
        self._hider = hider
        self._mark = "".join(secrets.choice("0123456789") for _ in range(30))
        self._hidden: list[str] = []
        # Digits survive what templates do to text: trim, lower, tojson, escape.
        self._placeholder = re.compile(self._mark + r"(\d{8})")

    def hide(self, text: str) -> str:
        return self._hider.hide(text, self._keep)

    def reveal(self, text: str) -> str:
        return self._placeholder.sub(lambda found: self._hidden[int(found[1])], text)

    def _keep(self, text: str) -> str:
        self._hidden.append(text)
        return f"{self._mark}{len(self._hidden) - 1:08d}"


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates on the hub are written against."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(value: object, indent: int | None = None) -> str:
    # Jinja's own escapes HTML characters, which models never saw in training.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)


_FUNCTIONS: dict[str, Callable[[str], object]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


def _check_roles(messages: Sequence[ChatMessage]) -> None:
    """Some templates build special tokens around the role (<|user|>): it must not be a client's own word."""
    if not messages:
        raise InvalidRequest("messages is empty; a conversation needs at least one", param="messages")
    for at, message in enumerate(messages):
        if message.role not in ROLES:
            known = ", ".join(ROLES)
            raise InvalidRequest(
                f"messages[{at}].role is {message.role!r}; roles are {known}", param=f"messages[{at}].role"
            )


def _turn(message: ChatMessage, hide: Callable[[str], str]) -> dict[str, str]:
    turn = {"role": message.role, "content": hide(message.content)}
    if message.name is not None:
        turn["name"] = hide(message.name)
    return turn


def _joined(parts: Iterable[str], limit: int) -> str:
    taken: list[str] = []
    size = 0
    for part in parts:
        size += len(part)
        if size > limit:
            raise ValueError(f"it wrote more than {limit} characters")
        taken.append(part)
    return "".join(taken)


def _padded(token: SpecialToken) -> str:
    before = r"\s*" if token.strips_left else ""
    after = r"\s*" if token.strips_right else ""
    return before + re.escape(token.text) + after
