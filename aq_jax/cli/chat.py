"""Chat with a language model: a line is a message, and answers come as they are made."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aq_jax.cli.terminal import escape_lines, flush_output, interrupted, print_line, print_note, read_input
from aq_jax.errors import AqError, ConfigError

if TYPE_CHECKING:
    from aq_jax.nn.generator import Generator

PROMPT = "> "


def chat(
    generator: Generator, system: str | None, max_tokens: int, options: dict[str, Any], as_json: bool = False
) -> None:
    """Answer the lines of the standard input until it ends; an interrupt ends an answer, which is kept as it is.

    On a terminal, a message that cannot be answered is noted, and left out; elsewhere it ends the chat.

    Args:
        generator: The language model.
        system: The first message, which says what the model is to be; None for the template's own.
        max_tokens: The most tokens of an answer.
        options: The options of `Generator.generate`.
        as_json: Whether each answer is printed whole, as a message in a line of JSON.

    Raises:
        AqError: for a message that cannot be answered, and for a line that is not UTF-8.
    """
    from aq_jax.nn.prompt_cache import PromptCache

    options = {**options, "prompt_cache": PromptCache()}
    messages = [{"role": "system", "content": system}] if system is not None else []
    first = len(messages)
    for line in read_lines():
        messages.append({"role": "user", "content": line})
        answer = ""
        try:
            for text in _answer(generator, messages, first, max_tokens, options):
                answer += text
                if not as_json:
                    print_line(escape_lines(text), end="")
                    flush_output()
        except KeyboardInterrupt:
            interrupted.clear()
        except AqError as error:
            if not on_terminal():
                raise
            print_note(str(error))
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
        print_line(json.dumps(messages[-1]) if as_json else "")
        flush_output()


def _answer(
    generator: Generator, messages: list[dict[str, str]], first: int, max_tokens: int, options: dict[str, Any]
) -> Iterator[str]:
    """Begin an answer; where the model does not take all messages, forget the first that are no system's."""
    from aq_jax.nn.generator import TooLongError

    forgotten = 0
    while True:
        kept = [*messages[:first], *messages[first + forgotten :]]
        try:
            answer = generator.stream(messages=kept, max_tokens=max_tokens, **options)
        except TooLongError:
            if len(kept) < first + 3:
                raise
            forgotten += 2
            continue
        for message in messages[first : first + forgotten : 2]:
            print_note(f"the conversation is too long for the model: it forgets {message['content']!r:.60}")
        messages[:] = kept
        return answer


def on_terminal() -> bool:
    """Tell whether somebody types, and reads."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def read_lines() -> Iterator[str]:
    """Read messages, one a line, with a prompt on a terminal; an interrupt there does nothing.

    Raises:
        ConfigError: for a line that is not UTF-8, and for an input that is closed.
    """
    if on_terminal():
        yield from _ask()
        return
    for number, line in enumerate(read_input(), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise ConfigError(f"-: line {number} is not UTF-8; wanted one message a line, in UTF-8") from None
        if text:
            yield text


def _ask() -> Iterator[str]:
    with suppress(ImportError):  # makes lines editable
        importlib.import_module("readline")
    print_note("a line is a message; Ctrl-C ends an answer, Ctrl-D the chat")
    while True:
        try:
            if text := input(PROMPT).strip():
                yield text
        except EOFError:
            print_line("")
            return
        except KeyboardInterrupt:
            interrupted.clear()
            print_line("")
