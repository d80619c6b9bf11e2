"""Charts as SVG that stands in a page: colours are the page's own variables, every mark says its numbers in a title."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from aq_jax.validate.markup import Child, Html, at, cosine, el, error, number, real, seconds

HUES = 8  # of cases and of stages, in the page's style
# The usual stages of a conversion and of loading, in the order of the work, and so of the colours.
STAGES = ("open", "read", "calibrate", "allocate", "train", "quantize", "write", "dequantize")
WIDE = 0.58  # a letter is about so many ems wide, in a wide font


def svg(key: str, size: tuple[float, float], title: str, description: str, *children: Child, class_: str = "") -> Html:
    """An image for eyes and for screen readers.

    Args:
        key: unique in the page.
        size: width and height of its own units, which are pixels where there is room.
        title: what it is.
        description: what it shows, in words.
        children: what is drawn.
        class_: of the element.

    >>> svg("a", (10, 20), "A line", "up", el("path", d="M0 0V20"))[:62]
    '<svg class="chart" viewBox="0 0 10 20" width="10" height="20" '
    """
    return el(
        "svg",
        el("title", title, id=f"{key}-title"),
        el("desc", description, id=f"{key}-desc"),
        children,
        class_=f"chart {class_}".strip(),
        viewBox=f"0 0 {size[0]:g} {size[1]:g}",
        width=size[0],
        height=size[1],
        role="img",
        aria_labelledby=f"{key}-title",
        aria_describedby=f"{key}-desc",
    )


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from low to high, about as many as wanted.

    >>> ticks(0, 8.1), ticks(0.9981, 0.9996, 3)
    ([0.0, 2.0, 4.0, 6.0, 8.0], [0.9985, 0.999, 0.9995])
    """
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = min((1, 2, 5, 10), key=lambda s: abs(math.log(s * unit / rough))) * unit
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return [
        round(i * step, places) + 0.0 for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def decades(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: 1, 2 and 5 of each decade; fewer over many decades.

    >>> decades(0.04, 3)
    [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    over = math.log10(high / low)
    steps = (1, 2, 5) if over < 2.2 else (1, 5) if over < 4.2 else (1,)
    found = [float(f"{step}e{power}") for power in powers for step in steps]
    found = [tick for tick in found if low <= tick <= high]
    return found if len(found) > 1 else ticks(low, high)


def _labels(low: float, high: float, wanted: int = 5, factor: float = 1.0, unit: str = "") -> dict[float, str]:
    """Ticks, and each as text in its unit, with the decimals that the step between them needs."""
    found = ticks(low * factor, high * factor, wanted)
    step = found[1] - found[0] if len(found) > 1 else 0.0
    form = f".{min(8, max(0, -math.floor(math.log10(step) + 1e-9)))}f" if step > 0 else ".6g"
    return {tick / factor: f"{tick:{form}}{unit}" for tick in found}


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    """A straight line."""
    return el("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def label(x: float, y: float, words: str, class_: str = "tick", anchor: str | None = None) -> Html:
    """Text in a chart."""
    return el("text", words, x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def short(words: str, letters: int) -> str:
    """As many letters as there is room for.

    >>> short("attention", 9), short("attention", 6)
    ('attention', 'atten…')
    """
    return words if len(words) <= letters else words[: max(1, letters - 1)] + "…"


def histogram(
    key: str, title: str, distribution: object, hue: int, worst: tuple[str, str] = ("p1", "min")
) -> Html | None:
    """A distribution's histogram with its mean and a percentile; None if there is nothing to draw.

    Args:
        key: unique in the page.
        title: what is counted.
        distribution: as in the report: count, mean, the ends, and a histogram of edges and counts.
        hue: the number of its colour.
        worst: the percentile and the value at the end that is worse.

    >>> histogram("a", "cosines", {"histogram": {"edges": [0, 1], "counts": [0]}}, 0) is None
    True
    """
    edges = [real(edge) for edge in at(distribution, "histogram", "edges") or ()]
    counts = [real(count) or 0.0 for count in at(distribution, "histogram", "counts") or ()]
    bins = [(a, b, n) for a, b, n in zip(edges, edges[1:], counts, strict=False) if a is not None and b is not None]
    full = [i for i, (_, _, n) in enumerate(bins) if n > 0]
    if not full:
        return None
    bins = bins[full[0] : full[-1] + 1]
    low, high, most = bins[0][0], bins[-1][1], max(n for _, _, n in bins)
    if not high > low:
        low, high = low - 1e-3, high + 1e-3
    width, height, left, right, top, bottom = 360.0, 166.0, 0.0, 360.0, 24.0, 138.0

    def at_x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    marks: list[Child] = []
    for a, b, n in bins:
        if n > 0:
            tall, wide = max(1.5, n / most * (bottom - top)), max(1.0, at_x(b) - at_x(a) - 1)
            words = el("title", f"{a:.6g} to {b:.6g}: {n:,.0f}")
            marks.append(
                el("rect", words, x=at_x(a), y=bottom - tall, width=wide, height=tall, class_=f"f{hue % HUES}")
            )
    marks.append(line(left, bottom, right, bottom, "axis"))
    labels = _labels(low, high, 4)
    if sum(map(len, labels.values())) > 28:  # long ones need room
        labels = _labels(low, high, 2)
    for value, words in labels.items():
        anchor = "start" if at_x(value) < 24 else "end" if at_x(value) > width - 24 else "middle"
        marks += [line(at_x(value), bottom, at_x(value), bottom + 4, "axis")]
        marks += [label(at_x(value), bottom + 19, words, anchor=anchor)]
    said: list[float] = []
    percentile, end = worst
    for name, class_, outwards in (
        ("mean", "mean", percentile != "p1"),
        (percentile, "percentile", percentile == "p1"),
    ):
        value = real(at(distribution, name))
        if value is not None and low <= value <= high:
            x = at_x(value)
            to_left = x > 60 if outwards else x > width - 50
            marks.append(line(x, 8, x, bottom, class_))
            start = x - 40 if to_left else x
            if all(abs(start - other) >= 40 for other in said):  # or else it would run into the mean's
                marks.append(label(x + (-5 if to_left else 5), 16, name, "tick", "end" if to_left else "start"))
            said.append(start)
    show = cosine if percentile == "p1" else error
    facts = ", ".join(f"{name} {show(at(distribution, name))}" for name in ("mean", percentile, end))
    description = f"{number(at(distribution, 'count'))} values: {facts}."
    return svg(key, (width, height), title, description, marks)


def stages(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The stages that any row has a time for, in the order of the work.

    >>> stages([{"write": 1, "read": 2, "ponder": 3, "train": None}])
    ['read', 'write', 'ponder']
    """
    found = dict.fromkeys(stage for row in rows for stage, spent in row.items() if real(spent) is not None)
    return [s for s in STAGES if s in found] + [s for s in found if s not in STAGES]


def hue_of(stage: str) -> int:
    """The number of a stage's colour."""
    return STAGES.index(stage) if stage in STAGES else HUES


def bars(key: str, title: str, rows: Sequence[tuple[str, Mapping[str, object]]]) -> Html | None:
    """A stacked bar of seconds for each row; None if there is nothing to draw.

    Args:
        key: unique in the page.
        title: what took the time.
        rows: a name, and the seconds of each stage.

    >>> "quantize" in bars("a", "Conversion", [("int8", {"read": 1.0, "quantize": 2.5})])
    True
    """
    order = stages([row for _, row in rows])
    totals = [sum(max(0.0, real(row.get(stage)) or 0.0) for stage in order) for _, row in rows]
    most = max(totals, default=0.0)
    if not most > 0:
        return None
    width, left, right, step, tall = 760.0, 128.0, 670.0, 34.0, 20.0
    bottom = len(rows) * step + 6
    factor, unit = (1e3, " ms") if most < 0.2 else (1 / 60, " min") if most > 240 else (1.0, " s")
    marks: list[Child] = []
    for value, words in _labels(0, most, 5, factor, unit).items():
        x = left + value / most * (right - left)
        marks += [line(x, 0, x, bottom, "grid"), label(x, bottom + 17, words, anchor="middle")]
    for i, ((name, row), total) in enumerate(zip(rows, totals, strict=True)):
        y, x = i * step + 7, left
        marks.append(label(left - 12, y + 14, short(name, 16), "strong", "end"))
        for stage in order:
            spent = max(0.0, real(row.get(stage)) or 0.0)
            wide = spent / most * (right - left)
            if wide > 0:
                words = el("title", f"{name}: {stage} {seconds(spent)}")
                marks.append(
                    el("rect", words, x=x, y=y, width=max(0.75, wide - 1), height=tall, class_=f"t{hue_of(stage)}")
                )
                if wide > 11.5 * WIDE * len(stage) + 10:
                    marks.append(label(x + 6, y + 14, stage, f"in t{hue_of(stage)}"))
            x += wide
        marks.append(label(x + 8, y + 14, seconds(total), "total"))
    said = "; ".join(f"{name}: {seconds(total)}" for (name, _), total in zip(rows, totals, strict=True))
    return svg(key, (width, bottom + 26), title, f"{said}.", marks)
