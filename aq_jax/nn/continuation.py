"""Turn tokens into text as they come: whole characters only, and nothing of what a stop string cuts off."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from aq_jax.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HALF = "�"  # what a tokenizer makes of a part of a character


class Continuation:
    """The text that follows a prompt.

    Args:
        tokenizer: The tokenizer.
        prompt: The ids of the prompt.
        ends: The ids that end the text.
        stop: The strings that end the text, before the first of them.

    >>> from tokenizers import Tokenizer, decoders, models
    >>> tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, "a"))
    >>> tokenizer.decoder = decoders.Fuse()
    >>> text = Continuation(tokenizer, [0], stop=["bcb"])
    >>> text.add([0, 1]), text.add([2]), text.add([2]), text.add([0, 1, 2, 1, 0]), text.over
    ('a', '', 'bcc', 'a', True)
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], ends: Collection[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ends = {*ends, *special_ids(tokenizer, stop)}
        # Decoders drop a text's leading space, so tokens are decoded after those before them, which are taken off.
        self._ids, self._read = list(prompt), len(prompt)
        self._held = ""
        self.over = False

    def add(self, tokens: Sequence[int]) -> str:
        """Add tokens, and return the text that is certain now; what follows an end is nothing."""
        found = ""
        for token in tokens:
            if not self.over and token in self._ends:
                found += self.end()
            if self.over:
                break
            self._ids.append(token)
            found += self._take(last=False)
        return found

    def end(self) -> str:
        """End the text, and return what is left of it."""
        found = "" if self.over else self._take(last=True)
        self.over = True
        return found

    def _take(self, last: bool) -> str:
        """Decode what is whole, or all, and return what no stop string can reach."""
        before = self._tokenizer.decode(self._ids[: self._read])
        whole = self._tokenizer.decode(self._ids)
        if last or not whole.endswith(HALF):
            # Only bytes that are not UTF-8 change the text before them.
            new = self._tokenizer.decode(self._ids[self._read :])
            self._held += whole.removeprefix(before) if whole.startswith(before) else new
            if new:  # special tokens are no text, after which a leading space would be kept
                self._ids = self._ids[self._read :]
            self._read = len(self._ids)
        text = self._held
        cut = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=len(text))
        maybe = len(text) if last else min((_begins(stop, text) for stop in self._stop), default=len(text))
        self.over = cut < len(text) and cut <= maybe
        shown = cut if self.over else min(cut, maybe)
        self._held = text[shown:]
        return text[:shown]


def _begins(stop: str, text: str) -> int:
    """Find where the end of a text begins a stop string that it does not finish; its length if it does not."""
    first = max(0, len(text) - len(stop) + 1)
    return next((at for at in range(first, len(text)) if stop.startswith(text[at:])), len(text))


def special_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> set[int]:
    """Find the stop strings that are special tokens, which no text shows."""
    added = tokenizer.get_added_tokens_decoder() if stop else {}
    return {number for number, token in added.items() if token.special and token.content in stop}


def check_stop(stop: str | Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Check stop strings, of which there may be none, and return them as a tuple.

    Raises:
        ConfigError: for an empty one, which every text has, and for what is no string.
    """
    if stop is None:
        return ()
    found: tuple[Any, ...] = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    for each in found:
        if not isinstance(each, str) or not each:
            raise ConfigError(f"{where}: stop has {each!r}; wanted strings of one character or more")
    return found
