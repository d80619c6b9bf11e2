"""Draw bits a weight against accuracy as SVG, with what nothing else beats in both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from aq_jax.validate.markup import Html, el

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1080.0, 440.0, 64.0, 930.0, 40.0, 392.0
LEAST = 1e-6  # a smaller loss is drawn as this one: the axis is logarithmic
LETTER, LINE = 7.0, 15.0  # width of a letter and height of a line, in pixels


@dataclass(frozen=True, slots=True)
class Point:
    """A way to quantize.

    Args:
        name: name that stands beside the point.
        bits: bits a weight.
        loss: what is lost, not negative; more is worse.
        note: accuracy in words.
        kind: class of the point in the page's style: "ours", "failed" or "peer".
    """

    name: str
    bits: float
    loss: float
    note: str
    kind: str = "ours"


def frontier(points: Sequence[Point]) -> list[Point]:
    """Keep the points that no other point beats: none is as small, or smaller, and loses less.

    >>> [p.name for p in frontier([Point("a", 8, 0.1, ""), Point("b", 4, 0.2, ""), Point("c", 4, 0.3, "")])]
    ['b', 'a']
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits, p.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def draw(points: Sequence[Point], axis: str, tick: Callable[[float], str]) -> Html:
    """Draw points by bits (linear) and loss (logarithmic, the least on top), and the frontier as a dotted line.

    Args:
        points: at least one.
        axis: name of the vertical axis.
        tick: text of a loss on that axis.

    >>> chart = draw([Point("int8", 8.1, 0.0005, "0.9995")], "output cosine", lambda loss: f"{1 - loss:.4g}")
    >>> "int8: 8.10 bits a weight, output cosine 0.9995" in chart
    True
    """
    logs = [math.log10(max(point.loss, LEAST)) for point in points]
    low, high = min(logs) - 0.2, max(logs) + 0.2
    most = max(1, math.ceil(max(point.bits for point in points)))

    def x(bits: float) -> float:
        return LEFT + bits / most * (RIGHT - LEFT)

    def y(loss: float) -> float:
        return TOP + (math.log10(max(loss, LEAST)) - low) / (high - low) * (BOTTOM - TOP)

    marks = [_text(LEFT, 18, f"↑ {axis}, better"), _text(RIGHT, HEIGHT - 6, "bits a weight", anchor="end")]
    marks.append(_text(LEFT, HEIGHT - 6, "← smaller"))
    for loss in _decades(low, high):
        marks += [_line(LEFT, y(loss), RIGHT, y(loss)), _text(LEFT - 8, y(loss) + 4, tick(loss), anchor="end")]
    for bits in range(0, most + 1, -(-most // 16)):
        marks += [_line(x(bits), BOTTOM, x(bits), BOTTOM + 5), _text(x(bits), BOTTOM + 20, str(bits), anchor="middle")]
    best = frontier(points)
    steps = "".join(f"H{x(there.bits):.1f}V{y(there.loss):.1f}" for _, there in pairwise(best))
    start = f"M{x(best[0].bits):.1f} {y(best[0].loss):.1f}"
    marks.append(el("path", d=f"{start}{steps}H{RIGHT:.1f}", class_="frontier"))
    dots: list[Html] = []
    labels: list[tuple[float, float, float]] = []  # y of each, and its two ends
    for point in sorted(points, key=lambda p: p.loss):
        # Above a frontier is room to the left, and below it to the right.
        peer, width = point.kind == "peer", LETTER * len(point.name)
        left, row = (x(point.bits) + 8, y(point.loss) + 14) if peer else (x(point.bits) - 8 - width, y(point.loss) - 6)
        for taken, start_x, end_x in sorted(labels):  # from above: below what would be written over
            if start_x < left + width and left < end_x and abs(row - taken) < LINE:
                row = taken + LINE
        labels.append((row, left, left + width))
        said = el("title", f"{point.name}: {point.bits:.2f} bits a weight, {axis} {point.note}")
        dots.append(el("circle", said, cx=x(point.bits), cy=y(point.loss), r=5.5, class_=point.kind))
        marks.append(_text(left if peer else left + width, row, point.name, None if peer else "end", point.kind))
    told = "; ".join(f"{p.name}: {p.bits:.2f} bits, {p.note}" for p in points)
    said = [el("title", f"Bits a weight against {axis}", id="chart-title"), el("desc", f"{told}.", id="chart-desc")]
    return el(
        "svg", said, marks, dots, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="img",
        aria_labelledby="chart-title", aria_describedby="chart-desc",
    )  # fmt: skip


def _decades(low: float, high: float) -> list[float]:
    """Find round numbers between two powers of ten: 1, 2 and 5 of each decade, fewer of many decades."""
    steps = (1, 2, 5) if high - low < 2.5 else (1,) if high - low > 4.5 else (1, 3)
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [float(f"{step}e{power}") for power in powers for step in steps]
    return [loss for loss in found if low <= math.log10(loss) <= high]


def _line(x1: float, y1: float, x2: float, y2: float) -> Html:
    return el("line", x1=x1, y1=y1, x2=x2, y2=y2)


def _text(x: float, y: float, words: str, anchor: str | None = None, class_: str | None = None) -> Html:
    return el("text", words, x=x, y=y, text_anchor=anchor, class_=class_)
