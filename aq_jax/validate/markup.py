"""Build markup that is safe by construction: any string that is not finished markup is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from aq_jax.errors import escape

VOID = frozenset({"meta"})


class Html(str):
    """Finished markup, which is put into other markup as it is."""

    __slots__ = ()


Child = str | int | float | None | Iterable[Any]


def escaped(value: object) -> str:
    r"""Escape text, and spell out what a reader could not see (controls, marks that turn the direction of writing).

    >>> escaped("a < b\x1b[2J\u202e")
    'a &lt; b\\x1b[2J\\u202e'
    """
    return html.escape(escape(str(value)))


def el(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """Build an element of HTML or SVG.

    Args:
        name: name of the element.
        children: contents; `Html` as it is, other strings escaped, iterables one after the other, None for nothing.
        attributes: values by name; `class_` is class, `aria_label` is aria-label, None is left out.

    >>> el("p", "1 < 2 ", [el("b", 3), None], class_="note")
    '<p class="note">1 &lt; 2 <b>3</b></p>'
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    shown = {key: f"{value:.1f}" if isinstance(value, float) else value for key, value in given.items()}
    opened = "".join(f' {key}="{escaped(value)}"' for key, value in shown.items())
    return Html(f"<{name}{opened}>{_joined(children)}" + ("" if name in VOID else f"</{name}>"))


def _joined(children: Child) -> str:
    if children is None or isinstance(children, Html):
        return children or ""
    if isinstance(children, str) or not isinstance(children, Iterable):
        return escaped(children)
    return "".join(map(_joined, children))
