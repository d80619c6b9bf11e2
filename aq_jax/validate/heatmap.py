"""Relative errors of quantized tensors, as a map for each case: a row for each layer, a column for each part of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aq_jax.validate.charts import label, short, svg
from aq_jax.validate.markup import Child, Html, at, el, error, real

STEPS = 9  # of the colour scale, in the page's style
COLUMNS = 12  # more parts than this, and the columns are kinds
Layers = Sequence[Mapping[str, Any]]


def part(name: str, layer: object) -> str:
    """What of a layer a tensor is: its name without the layer, the numbers in it, and what says nothing.

    >>> part("encoder.layer.0.attention.self.query.weight", 0), part("model.layers.7.mlp.experts.3.up_proj.weight", 7)
    ('attention.self.query', 'mlp.experts.*.up_proj')
    """
    words = name.split(".")
    rest = words[words.index(str(layer)) + 1 :] if str(layer) in words else words
    while len(rest) > 1 and rest[-1] in {"weight", "kernel", "dense"}:
        rest = rest[:-1]
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", ".".join(rest)) or name


def tails(parts: Sequence[str]) -> list[str]:
    """The shortest endings that tell the parts from each other.

    >>> tails(["attention.self.query", "attention.output", "output"])
    ['query', 'attention.output', 'output']
    """
    found = []
    for whole in parts:
        words = whole.split(".")
        endings = [".".join(words[-n:]) for n in range(1, len(words) + 1)]
        alone = (e for e in endings if not any(p != whole and (p == e or p.endswith(f".{e}")) for p in parts))
        found.append(next(alone, whole))
    return found


@dataclass(frozen=True, slots=True)
class Scale:
    """Colours for relative errors: equal steps of the logarithm."""

    low: float
    high: float

    @classmethod
    def of(cls, errors: Sequence[float]) -> Scale:
        """The scale that holds all of them, to the next third of a decade."""
        logs = [math.log10(e) for e in errors if e > 0] or [0.0]
        low, high = math.floor(3 * min(logs)) / 3, math.ceil(3 * max(logs)) / 3
        return cls(low, max(high, low + 1))

    def step(self, value: object) -> int | None:
        """The number of an error's colour, None for what is no number.

        >>> scale = Scale.of([1e-4, 1.0])
        >>> scale.step(1e-4), scale.step(0.01), scale.step(1), scale.step(None)
        (0, 4, 8, None)
        """
        found = real(value)
        if found is None:
            return None
        place = (math.log10(found) - self.low) / (self.high - self.low) if found > 0 else 0.0
        return min(STEPS - 1, max(0, int(place * STEPS)))

    def legend(self) -> Html:
        """The colours, and the errors between them."""
        wide, edge, marks = 56.0, 20.0, []
        for i in range(STEPS):
            marks.append(el("rect", x=edge + i * wide, y=0.0, width=wide - 1, height=10.0, class_=f"c{i}"))
        for i in range(STEPS + 1):
            value = 10 ** (self.low + (self.high - self.low) * i / STEPS)
            marks.append(label(edge + i * wide, 25, error(value), "tick", "middle"))
        title = f"Colours from {error(10**self.low)} to {error(10**self.high)}"
        return svg(
            "scale",
            (STEPS * wide + 2 * edge, 30),
            title,
            "Relative error, on a logarithmic scale.",
            marks,
            class_="legend",
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What all maps of a report have in common: the same tensors at the same places."""

    columns: tuple[str, ...]
    by_kind: bool
    names: frozenset[str]

    @classmethod
    def of(cls, cases: Sequence[Layers]) -> Plan:
        """The tensors that have an error in any case, and the columns that these need."""
        rows = [row for layers in cases for row in layers if real(row.get("rel_mse")) is not None]
        inner = [row for row in rows if row.get("layer") is not None]
        parts = tuple(dict.fromkeys(part(str(row.get("name")), row["layer"]) for row in inner))
        kinds = tuple(dict.fromkeys(str(row.get("kind")) for row in inner))
        by_kind = len(parts) > COLUMNS
        return cls(kinds if by_kind else parts, by_kind, frozenset(str(row.get("name")) for row in rows))

    def column(self, row: Mapping[str, Any]) -> str:
        """The column of a tensor within a layer."""
        return str(row.get("kind")) if self.by_kind else part(str(row.get("name")), row["layer"])


def _mean(rows: Layers) -> float | None:
    """The mean error of the tensors of a cell, each as much as it has parameters."""
    pairs = [(e, real(row.get("params")) or 1.0) for row in rows if (e := real(row.get("rel_mse"))) is not None]
    return sum(e * n for e, n in pairs) / sum(n for _, n in pairs) if pairs else None


def heat_map(key: str, name: str, layers: Layers, plan: Plan, scale: Scale) -> Html | None:
    """The map of one case; None if it has no quantized tensors.

    Args:
        key: unique in the page.
        name: of the case.
        layers: of the case, as in the report.
        plan: the places.
        scale: the colours.

    >>> rows = [{"name": "h.0.up.weight", "layer": 0, "kind": "feed-forward", "rel_mse": 0.01, "params": 4}]
    >>> "0.010" in heat_map("a", "int4", rows, Plan.of([rows]), Scale.of([0.01]))
    True
    """
    shown = [row for row in layers if str(row.get("name")) in plan.names]
    if all(real(row.get("rel_mse")) is None for row in shown):
        return None
    inner = [row for row in shown if row.get("layer") is not None]
    embeddings = [row for row in shown if row.get("layer") is None and row.get("kind") == "embeddings"]
    other = [row for row in shown if row.get("layer") is None and row.get("kind") != "embeddings"]
    numbers = sorted({row["layer"] for row in inner}, key=lambda n: (str(type(n)), n))
    columns = plan.columns if inner else ()
    wide, left, top = (66.0 if len(columns) <= 7 else 46.0), 76.0, 34.0 if columns else 4.0
    width = left + wide * max(len(columns), 6)
    tall = 24.0 if len(numbers) <= 40 else 12.0
    marks: list[Child] = []

    def cell(x: float, y: float, w: float, h: float, name: str, rows: Layers, caption: str = "") -> None:
        value, middle = _mean(rows), y + h / 2 + 3.5
        step = scale.step(value)
        class_ = "none" if step is None else f"c{step}"
        marks.append(
            el(
                "g",
                el("title", f"{name}: {error(value)}"),
                el("rect", x=x, y=y, width=w - 1, height=h - 1, class_=class_),
                label(x + 7, middle, caption, f"in {class_}", "start") if caption else None,
                label(x + w - 8, middle, error(value), f"in {class_}", "end") if caption else None,
                label(x + w / 2, middle, error(value), f"in {class_}", "middle") if h > 16 and not caption else None,
            )
        )

    if columns:
        marks.append(label(left - 10, 28, "layer", "tick", "end"))
    for i, words in enumerate(tails(columns)):
        head, _, tail = words.rpartition(".")
        x, letters = left + (i + 0.5) * wide, int(wide / 5.4)
        for word, y in ((head, 15), (tail, 28)):
            marks.append(label(x, y, short(word, letters), "tick", "middle") if word else None)
    y = top
    for number in numbers:
        marks.append(label(left - 10, y + tall / 2 + 3.5, str(number), "tick", "end"))
        for i, column in enumerate(columns):
            rows = [row for row in inner if row["layer"] == number and plan.column(row) == column]
            if rows:
                one = str(rows[0].get("name")) if len(rows) == 1 else f"layer {number}, {column}"
                cell(left + i * wide, y, wide, tall, one, rows)
        y += tall
    # What is in no layer has cells of its own, of two columns, with room for a name.
    for title, rows in (("embeddings", embeddings), ("other", other)):
        y += 6 if rows and y > top else 0
        if rows:
            marks.append(label(left - 10, y + 15.5, title, "tick", "end"))
        names = [
            short(name.removesuffix("_embeddings"), 12)
            for name in tails([part(str(r.get("name")), None) for r in rows])
        ]
        across = int((width - left) / (2 * wide))
        for i, (row, caption) in enumerate(zip(rows, names, strict=True)):
            x = left + i % across * 2 * wide
            cell(x, y + i // across * 24, 2 * wide, 24, str(row.get("name")), [row], caption)
        y += -(-len(rows) // across) * 24
    counted = [e for row in shown if (e := real(row.get("rel_mse"))) is not None]
    worst = max(counted)
    at_fault = next(row for row in shown if real(row.get("rel_mse")) == worst)
    description = f"{len(counted)} quantized tensors; the worst is {at(at_fault, 'name')}, {error(worst)}."
    return svg(key, (width, y + 2), f"Relative error of {name}", description, marks, class_="heat")
