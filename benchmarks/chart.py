"""Draw bits a weight against accuracy, ours beside peers, from recorded figures: SVG, for light pages and dark."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.tables import stored_bits

WIDTH, HEIGHT = 840, 500
LEFT, RIGHT, TOP, BOTTOM = 78, 824, 48, 410  # of the axes
BITS = (1.5, 9.0)
# Cosines; the axis has the logarithm of what is missing to 1.
TICKS = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999)
OURS = {"calibrated": "aq_jax, calibrated on text", "data-free": "aq_jax, no data"}
PEERS = {
    "gguf": "gguf", "onnxruntime": "ONNX Runtime", "torchao": "torchao", "qwix": "qwix", "quanto": "quanto",
    "hqq": "HQQ", "NumPy": "NumPy, rounded",
}  # fmt: skip


@dataclass(frozen=True)
class Theme:
    """The colours of a page.

    Args:
        text: The colour of words and axes.
        grid: The colour of the lines behind.
        page: The colour of the page, which surrounds points so that they stay apart.
        ours: The colour of our two lines.
        peers: The colours of the libraries, in the order of `PEERS`.
    """

    text: str
    grid: str
    page: str
    ours: str
    peers: tuple[str, ...]


THEMES: Mapping[str, Theme] = {
    "light": Theme(
        "#1f2328", "#d1d9e0", "#ffffff", "#0969da",
        ("#bc4c00", "#8250df", "#116329", "#a40e26", "#6e5600", "#0b7285", "#59636e"),
    ),
    "dark": Theme(
        "#f0f6fc", "#3d444d", "#0d1117", "#58a6ff",
        ("#f0883e", "#bc8cff", "#56d364", "#ff7b72", "#e3b341", "#39c5cf", "#9198a1"),
    ),
}  # fmt: skip
# Around (0, 0), as paths: each library has a shape of its own, for those who do not tell its colour.
SHAPES = (
    "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0z", "M-5-5H5V5H-5z", "M0-7L6 5H-6z", "M0-7L7 0L0 7L-7 0z", "M0 7L6-5H-6z",
    "M-6-2H-2V-6H2V-2H6V2H2V6H-2V2H-6z", "M-6-4L-4-6L0-2L4-6L6-4L2 0L6 4L4 6L0 2L-4 6L-6 4L-2 0z",
)  # fmt: skip


def points(found: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Collect (bits a weight, mean cosine) by series: "calibrated", "data-free", or a library of `PEERS`."""
    series: dict[str, list[tuple[float, float]]] = {}
    for result in found:
        if not result["suite"].startswith("accuracy") or result["unit"] != "cosine":
            continue
        name = result.get("note") or re.split("[ ,]", result["case"])[0]
        if name in (*OURS, *PEERS):
            series.setdefault(name, []).append((stored_bits(result), result["value"]))
    return series


def front(found: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the points that no other beats with as few bits.

    >>> front([(2, 0.5), (4, 0.9), (4, 0.8), (3, 0.4)])
    [(2, 0.5), (4, 0.9)]
    """
    kept: list[tuple[float, float]] = []
    for bits, cosine in sorted(found, key=lambda point: (point[0], -point[1])):
        if not kept or cosine > kept[-1][1]:
            kept.append((bits, cosine))
    return kept


def to_pixel(bits: float, cosine: float) -> tuple[float, float]:
    """Compute the pixel of a point."""
    up = -math.log10(1 - cosine) / -math.log10(1 - TICKS[-1])
    across = (bits - BITS[0]) / (BITS[1] - BITS[0])
    return LEFT + across * (RIGHT - LEFT), BOTTOM - max(up, 0) * (BOTTOM - TOP)


def draw(found: Sequence[Mapping[str, Any]], theme: Theme) -> str:
    """Draw the chart of recorded results; SVG."""
    series = points(found)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        f' font-family="system-ui, sans-serif" font-size="15" fill="{theme.text}">',
        "<title>Bits a weight against the cosine of MiniLM's embeddings with the float32 model's</title>",
        _text(12, 24, "Mean cosine of MiniLM's embeddings with the float32 model's: higher is nearer"),
    ]
    for cosine in TICKS:
        _, y = to_pixel(0, cosine)
        lines.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{theme.grid}"/>')
        lines.append(_text(LEFT - 10, y + 5, f"{cosine:g}", "end"))
    for bits in range(math.ceil(BITS[0]), math.floor(BITS[1]) + 1):
        x, _ = to_pixel(bits, 0)
        lines.append(f'<path d="M{x:.1f} {BOTTOM}v6" stroke="{theme.text}"/>')
        lines.append(_text(x, BOTTOM + 24, f"{bits}", "middle"))
    below = "bits a weight, scales and zero points counted; ours as a file holds them"
    lines.append(_text((LEFT + RIGHT) / 2, BOTTOM + 46, below, "middle"))
    ours = {name: [to_pixel(*point) for point in front(series[name])] for name in OURS if name in series}
    for name, line in ours.items():
        dash = "" if name == "calibrated" else ' stroke-dasharray="7 5"'
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in line)
        lines.append(f'<path d="M{path}" fill="none" stroke="{theme.ours}" stroke-width="3"{dash}/>')
        x, y = line[-1]
        side = (x - 12, y - 16) if name == "calibrated" else (x, y + 40)
        lines.append(_text(*side, OURS[name], "middle", f' font-weight="600" fill="{theme.ours}"'))
    across = LEFT - 10.0
    for (name, label), colour, shape in zip(PEERS.items(), theme.peers, SHAPES, strict=True):
        for x, y in (*(to_pixel(*point) for point in series.get(name, ())), (across, HEIGHT - 16)):
            lines.append(
                f'<path transform="translate({x:.1f} {y:.1f})" d="{shape}" fill="{colour}" stroke="{theme.page}"/>'
            )
        lines.append(_text(across + 12, HEIGHT - 11, label))
        across += 42 + 8.8 * len(label)
    for x, y in (point for line in ours.values() for point in line):
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{theme.ours}" stroke="{theme.page}"/>')
    return "\n".join([*lines, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
