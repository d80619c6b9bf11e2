"""Write docs/benchmarks.md and its chart from the last recorded figures: `python -m benchmarks.docs`."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import chart, report
from benchmarks.suites import SUITES
from benchmarks.tables import Marks, accuracy_table, memory_table, plain_table

DOCS = Path(__file__).parent.parent / "docs"
PAGE = "benchmarks.md"
NOTHING = "*Nothing is recorded yet: `make bench` measures it here.*\n"
HEAD = """# Benchmarks

`python -m benchmarks.docs` writes this page from the last recorded figures. `make bench` measures them again in four
minutes, `make bench SUITE=full` in thirty; `make bench NAMES="qdot load"` runs only these suites, and
`python -m benchmarks --record` keeps what it measured.

All contenders take turns in each round, and a figure is the median of the rounds. They run on one core unless a row
says otherwise, and compile before. A ratio of 2.0 means that ours takes half the time of the other; **bold figures are
those where the other is faster, or nearer to the float model**.
"""
KEPT = """
All contenders keep the memory that they free (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are high): by default
glibc maps a matrix of 4096 x 4096 anew each time, and the page faults would be most of what a suite measures. Work that
takes tens of seconds on such a matrix runs on 2048 x 2048 only. A process loads a model once, into new memory: `load`
runs with glibc as it comes.
"""
ADDED = """
The memory that quantizing MiniLM adds at most to a process that has imported and compiled everything, without memory
that a file backs: the median of runs, each in a fresh process, with the least and the most. All but the first keep
what they make, and write nothing.
"""
JUDGED = """
Each library quantizes the linears and the word embedding of MiniLM, and our float32 encoder runs what it dequantizes.
The text is prose of Python's manual.
"""
COUNTED = """No table has seen any of the {count:.0f} sentences. Bits of other libraries are packed codes, scales and
zero points in the types that they need, though some store more; bits of ours are those of a .parquet file. Beside each
library stands the best of ours that takes no more bits.
"""
IN_TABLES = "Bits of ours are counted compressed, in a table, those of others as arrays.\n"
PICTURE = """
<picture>
  <source media="(prefers-color-scheme: dark)" srcset="bits_dark.svg">
  <img alt="Bits a weight against the mean cosine of embeddings" src="bits_light.svg" width="840">
</picture>
"""
Columns = Sequence[tuple[str, str]]
_WEIGHTS: Columns = (
    ("NumPy, a loop", "NumPy, loops"),
    ("NumPy", "NumPy"),
    ("torchao", "torchao"),
    ("quanto", "quanto"),
    ("hqq, no optimizer", "hqq, start"),
    ("hqq", "hqq"),
    ("qwix absmax", "qwix"),
    ("gguf", "gguf"),
    ("onnxruntime", "onnxruntime"),
)
_MODELS: Columns = (
    ("JAX float32", "JAX float32"),
    ("aq_jax float32", "ours, float32"),
    ("torch float32", "torch float32"),
    ("torch bfloat16", "torch bfloat16"),
    ("ONNX Runtime", "ONNX Runtime int8"),
)
_LOADERS: Columns = (
    ("safetensors float32 to JAX", "safetensors to JAX"),
    ("safetensors float32 to torch, read", "to torch"),
    ("safetensors float32 to torch, mapped", "to torch, nothing read"),
)
_SENTENCES = "W8A8|MiniLM float32"
# By suite: the pattern of the cases that are shown, and columns: (what a peer's name begins with, its heading).
SPEEDS: Mapping[str, tuple[str, Columns]] = {
    "quantize": ("quantize", _WEIGHTS),
    "pack": ("MiniLM", _WEIGHTS),
    "road": ("to a table", _WEIGHTS),
    "load": ("", _LOADERS),
    "qdot": (r"int8, (384 x 1536|2048 x 2048), (1|32|512) rows", _MODELS),
    "encode": (_SENTENCES, _MODELS),
    "encode@2": (_SENTENCES, _MODELS),
}


def speed(found: Mapping[str, Any]) -> float:
    """Compute our speed as a multiple of the peer's, from either kind of ratio."""
    return 1 / found["value"] if found["unit"] == "x time" else found["value"]


def column_of(peer: str, columns: Columns) -> str | None:
    """Find the column of a peer by its exact name, or else by the first prefix of its name."""
    plain = peer.removesuffix(" (writes nothing)")
    for name, heading in columns:
        if plain == name:
            return heading
    # "NumPy" is no other contender of NumPy, and variants of a method that have no column stay out.
    return next((heading for name, heading in columns if plain.startswith((f"{name} ", f"{name}_"))), None)


def notes_of(found: Mapping[str, Any]) -> list[str]:
    """Collect the notes on what a peer does differently, or how it was measured."""
    notes = [part for part in found.get("note", "").split("; ") if part.startswith("theirs")]
    notes += ["theirs writes nothing"] * found["peer"].endswith("(writes nothing)")
    return notes + ["theirs ran in one round"] * ("low" in found and found["low"] == found["high"])


def speed_table(found: list[dict[str, Any]], columns: Columns) -> list[str]:
    """Lay out cases as lines and peers as columns; figures of faster peers are bold."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for result in found:
        head = column_of(result.get("peer", ""), columns)
        if head is None:
            continue
        name = result["case"].removesuffix(", 1 cores").replace(", 2 cores", ", both cores")
        row = cells.setdefault(name, {})
        row[head] = min(row.get(head, result), result, key=speed)  # of several types, the one that does best
    heads = [head for _, head in columns if any(head in row for row in cells.values())]
    if not heads:
        return []
    lines, marks = ["| other / ours in time | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"], Marks()
    for name, row in cells.items():
        shown = (_times(speed(row[head])) + marks(notes_of(row[head])) if head in row else "" for head in heads)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return [*lines, "", *marks.lines()]


def _times(value: float) -> str:
    shown = f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
    return f"**{shown}**" if value < 1 else shown


def page(found: Mapping[str, Any] | None, accelerated: Mapping[str, Any] | None = None) -> str:
    """Write the page: the conditions, and each suite with its question and its figures; then an accelerator's."""
    if found is None:
        return f"{HEAD}\n{NOTHING}"
    parts = [HEAD, "\n", *_how(found), *_suites(found)]
    if accelerated is not None:
        parts += ["\n# On an accelerator\n\n", *_how(accelerated), *_suites(accelerated)]
    return "".join(parts)


def _suites(found: Mapping[str, Any]) -> Iterator[str]:
    for suite, (_, question) in SUITES.items():
        of_suite = [result for result in found["results"] if result["suite"] == suite]
        if of_suite:
            if "accelerator" in found:
                question = re.sub(",? on one core", "", question)
            yield f"\n## {suite}\n\n{question}\n"
            yield from _figures(suite, of_suite)
    missing = sorted({part["case"] + ": " + part["reason"] for part in found["skipped"]})
    if missing:
        yield "\n## Left out\n\n"
        yield from (f"- {line}\n" for line in missing)


def _figures(suite: str, found: list[dict[str, Any]]) -> Iterator[str]:
    if suite in SPEEDS:
        pattern, columns = SPEEDS[suite]
        shown = [result for result in found if re.search(pattern, result["case"]) and report.is_ratio(result)]
        yield _block(speed_table(shown, columns))
    elif suite == "memory":
        yield ADDED + _block(memory_table(found))
    elif suite.startswith("accuracy"):
        count = next((result["value"] for result in found if result["unit"] == "sentences"), None)
        yield PICTURE + JUDGED + (IN_TABLES if count is None else COUNTED.format(count=count))
        yield _block(accuracy_table(found))
    else:
        yield _block(plain_table(found))


def _block(lines: list[str]) -> str:
    return "\n" + "\n".join(lines).rstrip() + "\n" if lines else ""


def _how(found: Mapping[str, Any]) -> Iterator[str]:
    """Describe the machine and the versions, and name suites that were measured under other conditions."""
    device = report.device(found)
    yield f"Recorded {found['date']}, {found['suite']} suites, on {device}, {found['cores']} cores, with\n"
    names = [f"{name} {version}" for name, version in {"Python": found["python"], **found["versions"]}.items()]
    yield textwrap.fill(", ".join(names) + ".", 120) + "\n"
    now, suites = report.conditions(found), {}
    for suite, then in found.get("earlier", {}).items():
        others = [name for name in {**now, **then} if now.get(name) != then.get(name)]
        said = [f"on {then['date']}"] * ("date" in others)
        changed = ", ".join(f"{name} {then.get(name, 'not there')}" for name in others if name != "date")
        said += [f"with {changed}"] * bool(changed)
        suites.setdefault(" ".join(said), []).append(suite)
    for said, those in suites.items():
        yield textwrap.fill(f"Measured {said}: {', '.join(those)}.", 120) + "\n"
    if "malloc" in found and "accelerator" not in found:
        yield KEPT


def files(found: Mapping[str, Any] | None, accelerated: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Write the files of docs/ that hold figures: name -> text."""
    results = found["results"] if found else []
    charts = {f"bits_{name}.svg": chart.draw(results, theme) for name, theme in chart.THEMES.items()}
    return {PAGE: page(found, accelerated), **charts}


def main() -> int:
    """Rewrite the page and its chart."""
    for name, text in files(report.latest(), report.latest(accelerated=True)).items():
        (DOCS / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
