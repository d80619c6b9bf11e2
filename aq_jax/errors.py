"""What goes wrong, in three families.

Each message names where it happened, what was found, what was wanted, and what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence


class AqError(ValueError):
    """Base of every error raised on purpose by aq_jax; raised itself when tensor values are refused."""


class ConfigError(AqError):
    """A configuration asks for something unknown, contradictory or impossible."""


class FormatError(AqError):
    """A file or folder is not what the format says: wrong type, shape, length, column or version."""


class IntegrityError(AqError):
    """A file is well formed, but its bytes are not the bytes that were written."""


def some_of(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """List names for a message, and how many are left out of it.

    >>> some_of(["q", "k", "v", "o"], 2)
    'q, k and 2 more'
    """
    more = len(names) - most
    return between.join(names[:most]) + (f" and {more} more" if more > 0 else "")


def shorten(error: BaseException) -> str:
    """Cut an error's text: Orbax's are pages."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def escape(text: str) -> str:
    r"""Spell out what a reader could not see, or would control a terminal: names come from files.

    >>> escape("a\x1b[2J\u202e")
    'a\\x1b[2J\\u202e'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
