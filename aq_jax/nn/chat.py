"""Render the messages of a chat by the template that comes with a tokenizer.

Templates are programs of others: they run in jinja2's sandbox, with what transformers gives them, on plain data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aq_jax.errors import AqError, FormatError
from aq_jax.nn.tokenizer import CONFIG, read_special_tokens
from aq_jax.store.jsonfile import read_json

if TYPE_CHECKING:
    from jinja2 import Template

FILE = "chat_template.jinja"
Message = Mapping[str, Any]


class ChatTemplate:
    """A template of messages.

    Args:
        source: The template, in jinja2's language.
        tokens: The special tokens by the names that templates have for them, such as "eos_token".
        where: The file that holds it, for errors.

    >>> template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
    ...                         {"eos_token": "</s>"}, "tokenizer_config.json")
    >>> template.render([{"role": "user", "content": "Hello"}])
    'user: Hello</s>'
    """

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        self.source, self.tokens, self.where = source, dict(tokens), where

    def render(self, messages: Sequence[Message]) -> str:
        """Render messages, and what begins the next one, which the model then continues.

        Raises:
            AqError: for messages that are none, and for a template that cannot be read, or refuses them, by its words.
        """
        plain = check_messages(messages)
        try:
            return self._template.render(
                messages=plain, tools=None, documents=None, add_generation_prompt=True, **self.tokens
            )
        except Exception as error:  # whatever a program of others raises
            text = (str(error).strip().splitlines() or [""])[0]
            raise AqError(f"{self.where}: the chat template fails: {type(error).__name__}: {text}") from None

    @cached_property
    def _template(self) -> Template:
        from jinja2 import nodes
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """Read `generation` blocks, which mark what a model has said, as what they hold."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> list[nodes.Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def refuse(text: str) -> None:
            raise TemplateError(text)

        def to_json(x: Any, ensure_ascii: bool = False, **how: Any) -> str:  # the built-in one escapes HTML
            return json.dumps(x, ensure_ascii=ensure_ascii, **how)

        made = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], autoescape=False
        )
        made.filters["tojson"] = to_json
        made.globals["raise_exception"] = refuse
        made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return made.from_string(self.source)


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Check messages, and return them as plain data.

    Raises:
        AqError: for what is no list of messages, each with a role and a content that are strings.

    >>> check_messages([{"role": "user"}])
    Traceback (most recent call last):
    aq_jax.errors.AqError: messages: message 0 is {'role': 'user'}; wanted a role and a content, both strings
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise AqError(f"messages: found {str(messages)[:80]!r}; wanted a list of one message or more")
    for number, message in enumerate(messages):
        said = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(each, str) for each in said):
            raise AqError(
                f"messages: message {number} is {str(message)[:80]}; wanted a role and a content, both strings"
            )
    try:
        return json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError) as error:
        raise AqError(f"messages: hold what is no plain data: {error}") from None


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """Read a folder's template: chat_template.jinja, or else that of tokenizer_config.json; None if there is none.

    Raises:
        FormatError: for a template that is no text, for several of which none is the default, and as
            `read_special_tokens`.
    """
    said = read_json(folder, CONFIG, dict) or {}
    file, found = folder / CONFIG, said.get("chat_template")
    if (folder / FILE).exists():
        file = folder / FILE
        found = _read_text(file)
    if isinstance(found, list):  # of tools, documents and the like, by name
        found = {str(each.get("name")): each.get("template") for each in found if isinstance(each, dict)}
        if "default" not in found:
            raise FormatError(f"{file}: has the chat templates {', '.join(found)}; wanted one that is called default")
        found = found["default"]
    if not isinstance(found, str | None):
        raise FormatError(f"{file}: chat_template is {str(found)[:80]!r}; wanted a text")
    if found is None:
        return None
    used = {"eos_token", *re.findall(r"\w+_token\b", found)}  # the first also ends a message, see `Generator`
    return ChatTemplate(found, read_special_tokens(folder, used), str(file))


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: is no UTF-8: {error.reason} at byte {error.start}") from None
