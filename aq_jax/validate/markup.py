"""Markup that is safe by construction, and numbers as people read them: what the page and its charts are made of."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DASH, TIMES = "\u2013", "\u00d7"
VOID = frozenset({"br", "col", "meta"})


class Html(str):
    """Finished markup. It is put into other markup as it is, where any other string is escaped."""

    __slots__ = ()


Child = str | int | float | None | Iterable[Any]


def text(value: object) -> str:
    r"""Escaped text. What a reader could not see (controls, marks that turn the direction of writing) is spelled out.

    >>> text("a < b\x1b[2J\u202e")
    'a &lt; b\\x1b[2J\\u202e'
    """
    return html.escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)))


def el(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element, of SVG too.

    Args:
        name: of the element.
        children: `Html` as it is, other strings escaped, iterables one after the other, None for nothing.
        attributes: `class_` is class, `aria_sort` is aria-sort; None and False are left out.

    >>> el("p", "1 < 2 ", el("b", 3), class_="note")
    '<p class="note">1 &lt; 2 <b>3</b></p>'
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None and value is not False:
            shown = (
                ""
                if value is True
                else text(f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value)
            )
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{shown}"')
    parts.append(">")
    return Html("".join(parts) + join(children) + ("" if name in VOID else f"</{name}>"))


def join(children: Child) -> Html:
    """Children of an element, one after the other.

    >>> join(["<", None, Html("<br>")])
    '&lt;<br>'
    """
    if children is None:
        return Html()
    if isinstance(children, Html):
        return children
    if isinstance(children, str) or not isinstance(children, Iterable):
        return Html(text(children))
    return Html("".join(join(child) for child in children))


def at(report: Any, *keys: str) -> Any:
    """What lies at a path, None where a part of the path is missing.

    >>> at({"a": {"b": 1}}, "a", "b"), at({"a": None}, "a", "b")
    (1, None)
    """
    for key in keys:
        report = report.get(key) if isinstance(report, Mapping) else None
    return report


def real(value: object) -> float | None:
    """A number that can be drawn, and its square too; None for all else.

    >>> real(3), real(float("nan")), real("3"), real(True)
    (3.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e99:
        return None
    return float(value) if abs(value) > 1e-99 else 0.0


def number(value: object, form: str = ",.0f", unit: str = "") -> str:
    """A number as `form` says, with its unit; a dash for what is none.

    >>> number(22713216), number(3.94159, ".2f", "×"), number(None), number(float("nan"))
    ('22,713,216', '3.94×', '–', '–')
    """
    found = real(value)
    if found is None:
        return "∞" if value == math.inf else DASH
    return f"{found:{form}}{unit}"


def cosine(value: object) -> str:
    """Four decimals, and as many more as it takes not to say 1 of what is less.

    >>> cosine(0.9), cosine(0.999987), cosine(1), cosine(None)
    ('0.9000', '0.99999', '1.0000', '–')
    """
    found = real(value)
    if found is None:
        return DASH
    digits = next((n for n in range(4, 9) if found >= 1 or float(f"{found:.{n}f}") < 1), 9)
    return f"{found:.{digits}f}"


def error(value: object) -> str:
    """Two digits, wherever the point is.

    >>> error(0.0625), error(0.9), error(0.00999), error(6.1e-5), error(0.0), error(None)
    ('0.062', '0.90', '0.010', '6.1e-5', '0', '–')
    """
    found = real(value)
    if found is None:
        return DASH
    if found == 0:
        return "0"
    head, _, tail = f"{found:.1e}".partition("e")  # rounded first: 0.00999 is 0.010
    return f"{found:.{max(0, 1 - int(tail))}f}" if -3 <= int(tail) < 3 else f"{head}e{int(tail)}"


def megabytes(value: object) -> str:
    """Bytes in millions; few of them in thousands.

    >>> megabytes(940e6), megabytes(90_861_000), megabytes(6_039_000), megabytes(27_091)
    ('940 MB', '90.9 MB', '6.04 MB', '27.1 kB')
    """
    found = real(value)
    if found is not None and found < 1e5:
        return f"{found / 1e3:.1f} kB"
    return DASH if found is None else f"{found / 1e6:,.{2 if found < 9.995e6 else 1 if found < 9.995e7 else 0}f} MB"


def seconds(value: object) -> str:
    """Seconds; thousandths of few, minutes of many.

    >>> seconds(1.1e-5), seconds(0.0042), seconds(1.5), seconds(12.3), seconds(754), seconds(None)
    ('0.01 ms', '4.2 ms', '1.50 s', '12.3 s', '12 min 34 s', '–')
    """
    found = real(value)
    if found is None:
        return DASH
    if found < 0.0995:
        return f"{found * 1000:.{0 if found >= 0.00995 or not found else 1 if found >= 0.000995 else 2}f} ms"
    if found < 119.5:
        return f"{found:.{2 if found < 9.995 else 1}f} s"
    return f"{round(found) // 60} min {round(found) % 60:02d} s"


def counted(count: int, noun: str) -> str:
    """So many of something.

    >>> counted(1, "case"), counted(5, "case")
    ('1 case', '5 cases')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def words(value: object) -> str:
    """A value of a report in words: a dash for nothing, yes and no for booleans.

    >>> words("int8"), words(None), words(True), words(0)
    ('int8', '–', 'yes', '0')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    return DASH if value is None or value == "" or value != value else str(value)


def scroll(label: str, *content: Child, tall: bool = False) -> Html:
    """What may be wider than a screen, or taller: it scrolls by itself, by keyboard too.

    >>> scroll("Cases", "...")
    '<div class="scroll" role="region" aria-label="Cases" tabindex="0">...</div>'
    """
    return el("div", content, class_="scroll tall" if tall else "scroll", role="region", aria_label=label, tabindex="0")


def table(caption: str, head: Html | Sequence[str], rows: Iterable[Sequence[Child]], class_: str | None = None) -> Html:
    """A table that scrolls by itself.

    Args:
        caption: for who cannot see where it stands.
        head: of the columns, or whole rows.
        rows: the head of the row first; other cells are put into a `td` unless they are markup.
        class_: of the table.

    >>> table("Letters", ["a", "b"], [["x", "y"]])[-70:]
    '<tbody><tr><th scope="row">x</th><td>y</td></tr></tbody></table></div>'
    """
    columns = head if isinstance(head, Html) else el("tr", [el("th", h, scope="col") for h in head])
    body = [
        el("tr", el("th", first, scope="row"), [c if isinstance(c, Html) else el("td", c) for c in cells])
        for first, *cells in rows
    ]
    inside = el("caption", caption, class_="hidden"), el("thead", columns), el("tbody", body)
    return scroll(caption, el("table", inside, class_=class_), tall=class_ == "sortable")
