"""`python -m benchmarks.readme`: the README's tables of figures, from the last recorded ones. No figure is typed."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.tables import Marks, accuracy_table, memory_table

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- figures: python -m benchmarks.readme -->", "<!-- end of figures -->"
NOTHING = "*Nothing is recorded yet: `make bench` measures it here.*"
KEPT = (
    "All keep the memory that they free (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are high): by default glibc",
    "maps matrices of 4096 x 4096 anew each time, and page faults would be most of what is measured. What takes tens",
    "of seconds on those is measured on 2048 x 2048 only. A model is loaded once, into memory that is new: loading is",
    "measured with glibc as it comes.",
)
# Heading, suites, a pattern of the cases that are shown, columns: (what a peer's name begins with, how it is headed).
SPEEDS: Sequence[tuple[str, tuple[str, ...], str, tuple[tuple[str, str], ...]]] = (
    (
        "weights, other / ours in time",
        ("quantize", "pack", "road"),
        r"quantize|to a table|pack.*MiniLM",
        (
            ("NumPy, a loop", "NumPy, loops"),
            ("NumPy", "NumPy"),
            ("torchao", "torchao"),
            ("quanto", "quanto"),
            ("hqq, no optimizer", "hqq, start"),
            ("hqq", "hqq"),
            ("qwix absmax", "qwix"),
            ("gguf", "gguf"),
            ("onnxruntime", "onnxruntime"),
        ),
    ),
    (
        "models, other / ours in time",
        ("qdot", "encode", "encode@2"),
        r"int8, (384 x 1536|2048 x 2048), (1|32|512) rows|W8A8|MiniLM float32",
        (
            ("JAX float32", "JAX float32"),
            ("aq_jax float32", "ours, float32"),
            ("torch float32", "torch float32"),
            ("torch bfloat16", "torch bfloat16"),
            ("ONNX Runtime", "ONNX Runtime int8"),
        ),
    ),
    (
        "loading: their float32 file / our int8 table, in time",
        ("load",),
        "",
        (
            ("safetensors float32 to JAX", "safetensors to JAX"),
            ("safetensors float32 to torch, read", "to torch"),
            ("safetensors float32 to torch, mapped", "to torch, nothing read"),
        ),
    ),
)


def speed(found: Mapping[str, Any]) -> float:
    """How many times as fast we are, of a ratio of either kind."""
    return 1 / found["value"] if found["unit"] == "x time" else found["value"]


def column_of(peer: str, columns: Sequence[tuple[str, str]]) -> str | None:
    """The heading under which a peer stands: an exact name, or else the first that its own begins with."""
    plain = peer.removesuffix(" (writes nothing)")
    for name, heading in columns:
        if plain == name:
            return heading
    # "NumPy" is no other contender of NumPy, and variants of a method that have no column stay out.
    return next((heading for name, heading in columns if plain.startswith((f"{name} ", f"{name}_"))), None)


def notes_of(found: Mapping[str, Any]) -> list[str]:
    """In what a peer's work, or its measurement, is another."""
    notes = [part for part in found.get("note", "").split("; ") if part.startswith("theirs")]
    notes += ["theirs writes nothing"] * found["peer"].endswith("(writes nothing)")
    return notes + ["theirs ran in one round"] * ("low" in found and found["low"] == found["high"])


def speed_table(heading: str, found: list[dict[str, Any]], columns: Sequence[tuple[str, str]]) -> list[str]:
    """Cases down, peers across; where the other is faster, in bold."""
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
    lines, marks = [f"| {heading} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"], Marks()
    for name, row in cells.items():
        shown = (_times(speed(row[head])) + marks(notes_of(row[head])) if head in row else "" for head in heads)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return [*lines, "", *marks.lines()]


def _times(value: float) -> str:
    shown = f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
    return f"**{shown}**" if value < 1 else shown


def tables(found: Mapping[str, Any] | None) -> str:
    """What stands between the marks."""
    if found is None:
        return NOTHING
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"Recorded {found['date']}, {found['suite']} suites: {found['cpu']}, {found['cores']} cores, "
        f"Python {found['python']}, {names}.",
        *_with_others(found),
        "Medians of rounds in which all take turns, on one core unless said otherwise; what compiles does so before.",
        "2.0 means that ours takes half the time; **in bold the other is faster, or nearer to the float model**.",
        *(KEPT if "malloc" in found else ()),
        "",
    ]
    for heading, suites, pattern, columns in SPEEDS:
        chosen = [
            result
            for suite in suites
            for result in found["results"]
            if result["suite"] == suite and re.search(pattern, result["case"]) and report.is_ratio(result)
        ]
        table = speed_table(heading, chosen, columns)
        lines += table if heading == SPEEDS[0][0] else folded(re.split("[,:]", heading)[0], table)
    if added := memory_table([result for result in found["results"] if result["suite"] == "memory"]):
        said = (
            "What quantizing MiniLM adds at most to a process that has everything imported and compiled, in memory",
            "that no file backs: the median of runs, each in a fresh process, with the least and the most. All but the",
            "first keep what they made, and write nothing.",
        )
        lines += folded("memory", [*said, "", *added])
    fits = accuracy_table([result for result in found["results"] if result["suite"].startswith("accuracy")])
    if fits:
        said = (
            "Embeddings of MiniLM with the linears and the word embedding replaced by what each library dequantizes,",
            "beside the float32 model's. The judged text is prose of Python's manual.",
            *judged_how(found),
        )
        lines += folded("accuracy at equal bits", [*said, "", *fits])
    missing = sorted({part["case"] + ": " + part["reason"] for part in found["skipped"]})
    if missing:
        lines += ["Left out: " + "; ".join(missing) + ".", ""]
    return "\n".join(lines).rstrip()


def judged_how(found: Mapping[str, Any]) -> Sequence[str]:
    """By which sentences, and how bits are counted; older records count ours in another way."""
    count = next((result["value"] for result in found["results"] if result["unit"] == "sentences"), None)
    if count is None:
        return ("Bits of ours are counted compressed, in a table, those of others as arrays.",)
    return (
        f"None of its {count:.0f} sentences has been seen by a table. Bits are counted alike for all, as arrays: codes",
        "packed, scales and zero points in the types that each library needs; beside each stands the best of ours that",
        'takes no more. "In a table" is what that one takes in a .parquet file, where scales and zero points compress.',
    )


def _with_others(found: Mapping[str, Any]) -> Sequence[str]:
    """The suites that were measured under other conditions than the last ones, and what those were."""
    now, suites = report.conditions(found), {}
    for suite, then in found.get("earlier", {}).items():
        names = [name for name in {**now, **then} if now.get(name) != then.get(name)]
        said = ", ".join(f"{name} {then.get(name, 'not there')}" for name in names)
        suites.setdefault(said, []).append(suite)
    return [f"Measured with {said}: {', '.join(names)}." for said, names in suites.items()]


def folded(summary: str, lines: list[str]) -> list[str]:
    """Lines that a page shows when it is asked to: tables that are longer than what is around them."""
    if not lines:
        return []
    return ["<details>", f"<summary>{summary[0].upper()}{summary[1:]}</summary>", "", *lines, "</details>", ""]


def replaced(text: str, inner: str) -> str:
    """A text with this between the marks.

    Raises:
        ValueError: if it has no such marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} in the text")
    return f"{before}{BEGIN}\n{inner}\n{END}{after}"


def main() -> int:
    """Rewrite the README."""
    README.write_text(replaced(README.read_text(), tables(report.latest())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
