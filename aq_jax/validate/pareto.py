"""The chart of bits per weight against accuracy, with the cases that no other case beats in both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from aq_jax.validate.charts import HUES, WIDE, decades, label, line, short, svg, ticks
from aq_jax.validate.markup import Child, Html, el


@dataclass(frozen=True, slots=True)
class Point:
    """A case: its size, and what it loses (more is worse; any positive number)."""

    name: str
    bits: float
    loss: float
    note: str
    hue: int


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats: none is as small, or smaller, and loses less.

    >>> [p.name for p in frontier([Point("a", 8, 0.1, "", 0), Point("b", 4, 0.2, "", 1), Point("c", 4, 0.3, "", 2)])]
    ['b', 'a']
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits, p.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


Box = tuple[float, float, float, float]


def _place(x: float, y: float, width: float, taken: Sequence[Box], frame: Box) -> tuple[float, float, str, Box]:
    """Where two lines of text for a point are least in the way, the near places first: x, y, the anchor, the box."""
    height, gap = 32.0, 11.0
    # To the upper left of a frontier is nothing; further up or down, a line leads to the text.
    places = [
        (side, y - 22 + shift * 34, anchor)
        for shift in (0, 0.5, -0.5, 1, -1, 2, -2, 3, -3, 4, -4)
        for side, anchor in ((x - gap - width, "end"), (x + gap, "start"))
    ]

    def cost(place: tuple[float, float, str]) -> float:
        box = (place[0], place[1], place[0] + width, place[1] + height)
        return round(sum(_overlap(box, other) for other in taken) + width * height - _overlap(box, frame))

    x0, top, anchor = min(places, key=cost)
    return x0 + (width if anchor == "end" else 0.0), top, anchor, (x0, top, x0 + width, top + height)


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def tradeoff(points: Sequence[Point], axis: str, tick: Callable[[float], str]) -> Html:
    """Bits a weight against what is lost, on a logarithmic axis, with the frontier.

    Args:
        points: of the cases.
        axis: what is on the vertical axis.
        tick: how a loss is written there.

    >>> chart = tradeoff([Point("int8", 8.1, 0.0005, "", 0)], "output cosine", lambda loss: f"{1 - loss:.4f}")
    >>> "int8" in chart, "0.9995" in chart
    (True, True)
    """
    width, height, left, right, top, bottom = 760.0, 420.0, 52.0, 740.0, 34.0, 372.0
    # The axis stops at a loss of a millionth: nothing is drawn infinitely far up.
    losses = [max(point.loss, 1e-6) for point in points]
    low, high = math.log10(min(losses)), math.log10(max(losses))
    room = max(0.12 * (high - low), 0.15)
    low, high = low - room, high + room
    most = 1.08 * max(point.bits for point in points) or 1.0

    def at_x(bits: float) -> float:
        return left + bits / most * (right - left)

    def at_y(loss: float) -> float:
        return top + (math.log10(max(loss, 1e-6)) - low) / (high - low) * (bottom - top)

    marks: list[Child] = []
    for value in decades(10**low, 10**high):
        marks += [line(left, at_y(value), right, at_y(value), "grid"), label(left - 10, at_y(value) + 4, tick(value))]
    marks = [el("g", marks, text_anchor="end")]
    for bits in ticks(0, most, 8):
        marks += [line(at_x(bits), bottom, at_x(bits), bottom + 5, "axis")]
        marks += [label(at_x(bits), bottom + 20, f"{bits:g}", anchor="middle")]
    marks += [
        line(left, bottom, right, bottom, "axis"),
        label(0, 16, f"↑ better: {axis}", "name"),
        label(right, height - 8, "bits per weight", "name", "end"),
        label(left, height - 8, "← smaller", "name"),
    ]
    best = frontier(points)
    taken: list[Box] = [(at_x(p.bits) - 7, at_y(p.loss) - 7, at_x(p.bits) + 7, at_y(p.loss) + 7) for p in points]
    path = f"M{at_x(best[0].bits):.1f} {at_y(best[0].loss):.1f}"
    for here, there in pairwise(best):
        path += f"H{at_x(there.bits):.1f}V{at_y(there.loss):.1f}"
        taken.append((at_x(here.bits), at_y(here.loss) - 2, at_x(there.bits), at_y(here.loss) + 2))
        taken.append((at_x(there.bits) - 2, at_y(there.loss), at_x(there.bits) + 2, at_y(here.loss)))
    marks.append(el("path", d=f"{path}H{right:.1f}", class_="frontier"))
    for point in points:
        x, y, name = at_x(point.bits), at_y(point.loss), short(point.name, 28)
        long = max(13 * len(name), 11.5 * len(point.note)) * WIDE
        tx, ty, anchor, box = _place(x, y, long, taken, (left, top - 12, right, bottom))
        taken.append(box)
        on = point in best
        marks.append(
            el(
                "g",
                el("title", f"{point.name}: {point.bits:.2f} bits per weight, {point.note}"),
                line(x, y, tx, ty + 16, "leader") if abs(ty + 22 - y) > 30 else None,
                el("circle", cx=x, cy=y, r=6.0, class_=f"{'point' if on else 'point beaten'} s{point.hue % HUES}"),
                label(tx, ty + 13, name, "strong", anchor),
                label(tx, ty + 28, point.note, "tick", anchor),
            )
        )
    said = "; ".join(f"{p.name}: {p.bits:.2f} bits, {p.note}" for p in points)
    title = f"Bits per weight against {axis}"
    said += f". On the frontier: {', '.join(p.name for p in best)}."
    return svg("tradeoff", (width, height), title, said, marks, class_="plot")
