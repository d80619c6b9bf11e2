"""Lay out the tables of docs/benchmarks.md, and the footnotes below them."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KINDS = ("data-free", "calibrated")


class Marks:
    """Footnotes of a table, which get letters in order."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def __call__(self, notes: Sequence[str]) -> str:
        """Return the letters of notes, to be put behind a figure."""
        letters = [self._letters.setdefault(note, chr(ord("a") + len(self._letters))) for note in notes]
        return f" <sup>{' '.join(letters)}</sup>" if letters else ""

    def lines(self) -> list[str]:
        """List the footnotes."""
        text = "; ".join(f"<sup>{letter}</sup> {note}" for note, letter in self._letters.items())
        return [*textwrap.wrap(text, 120), ""]


def memory_table(found: list[dict[str, Any]]) -> list[str]:
    """Lay out the MB that each library adds, ours first."""
    cells: dict[str, dict[str, str]] = {}
    for result in found:
        match = re.match(
            r"MiniLM (int[82])(?: in memory, (.*)|.*, to a table): anonymous memory added$", result["case"]
        )
        if match is None or "low" not in result:  # older ones depended on what had run before
            continue
        spread = f" ({result['low']:.0f} to {result['high']:.0f})"
        name = match[2] or "aq_jax, to a table that is written"
        cells.setdefault(name, {})[match[1]] = f"{result['value']:.0f}{spread}"
    rows = [f"| {name} | {row.get('int8', '')} | {row.get('int2', '')} |" for name, row in cells.items()]
    return ["| MB added | int8 | int2 |", "|---|---|---|", *rows, ""] if rows else []


def accuracy_table(found: list[dict[str, Any]]) -> list[str]:
    """Lay out each library beside the best of ours of no more stored bits; bold where it beats ours without data."""
    parts = "code | stored bits | mean | 1st percentile"
    lines = [
        "| other | bits a weight | cosine, mean | 1st percentile "
        f"| ours without data: {parts} | ours calibrated: {parts} |",
        "|---" * 12 + "|",
    ]
    cosines, marks = [result for result in found if result["unit"] == "cosine"], Marks()
    for result in cosines:
        if result.get("note"):
            continue
        figures, cells = result["figures"], list[str]()
        best = {kind: best_within(cosines, figures["bits"], kind) for kind in KINDS}
        for ours in best.values():
            if ours is None:
                cells += ["none so small", "", "", ""]
                continue
            notes = [provenance(ours["made"])] if ours["note"] == "calibrated" and ours.get("made") else []
            name = name_in(ours).removeprefix("aq_jax ") + marks(notes)
            cells += [name, f"{stored_bits(ours):.2f}", f"{ours['value']:.4f}", f"{ours['figures']['p1']:.4f}"]
        least = best["data-free"] or {"value": math.inf, "figures": {"p1": math.inf}}
        pairs = ((result["value"], least["value"]), (figures["p1"], least["figures"]["p1"]))
        mean, low = (f"**{theirs:.4f}**" if theirs > own else f"{theirs:.4f}" for theirs, own in pairs)
        name = name_in(result)
        if "bits as stored" in figures:
            name += f" ({figures['bits as stored']:.2f} as stored)"
        lines.append(f"| {name} | {figures['bits']:.2f} | {mean} | {low} | " + " | ".join(cells) + " |")
    return [*lines, "", *marks.lines()] if len(lines) > 2 else []


def stored_bits(result: Mapping[str, Any]) -> float:
    """Return the bits a weight: of ours as a .parquet file holds them, of others as they need them.

    >>> stored_bits({"figures": {"bits": 4.25, "bits in a table": 4.09}}), stored_bits({"figures": {"bits": 4.5}})
    (4.09, 4.5)
    """
    return result["figures"].get("bits in a table", result["figures"]["bits"])


def best_within(found: Iterable[dict[str, Any]], bits: float, kind: str) -> dict[str, Any] | None:
    """Find the best of ours, "data-free" or "calibrated", that takes no more stored bits."""
    fitting = (result for result in found if result.get("note") == kind and stored_bits(result) <= bits + 0.005)
    return max(fitting, key=lambda result: result["value"], default=None)


def plain_table(found: list[dict[str, Any]]) -> list[str]:
    """Lay out one figure a line, with its limit and its notes."""
    lines = ["| what | measured | at least | also |", "|---|---|---|---|"]
    for result in found:
        figures = [f"{name} {value:.4g}" for name, value in result.get("figures", {}).items()]
        also = "; ".join(part for part in (*figures, result.get("note", "")) if part)
        beside = f" / {result['peer']}" if "peer" in result else ""
        least = result.get("least", "").replace("reported", "")
        value = f"{result['value']:.6g} {result['unit']}".strip()
        lines.append(f"| {result['case']}{beside} | {value} | {least} | {also} |")
    return lines


def name_in(result: Mapping[str, Any]) -> str:
    """Name the outputs that a cosine compares."""
    return result["case"].removesuffix(": embedding cosine")


def provenance(made: Mapping[str, Any]) -> str:
    """Describe the calibration data of a table."""
    text = made["calibration"]
    name = "Python's manual, others of which judge" if text["text"] == "pydoc_data.topics" else text["text"]
    said = f"calibrated on {text['sentences']:,} lines of {name} (digest {text['digest'][:8]})"
    if training := made.get("training"):
        said += f", trained for {training['seconds'] / 60:.0f} minutes on {training['text']['sentences']:,}"
    return f"{said}, table {made['table'][:8]}"
