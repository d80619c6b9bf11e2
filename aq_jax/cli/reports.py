"""Print the result of a conversion, or of a dry run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aq_jax.cli.terminal import DONE, format_shape, print_line, print_table
from aq_jax.errors import escape

if TYPE_CHECKING:
    from aq_jax.conversion.dry_run import ExpectedResult
    from aq_jax.conversion.write import ConversionResult


def print_result(done: ConversionResult, as_json: bool) -> int:
    size = done.bytes
    if as_json:
        print_line(json.dumps(dataclasses.asdict(done)))
        return DONE
    if done.allocation:
        print_allocation(done.allocation)
    if done.training:
        t = done.training
        print_line(
            f"trained {t['steps']} steps on {t['texts']} lines, until {t['stopped']}; cosine {t['cosine_before']:.4f} "
            f"before, {t['cosine']:.4f} after, on the {t['held_out']} other lines that the best was chosen by"
        )
    for why in done.kept.values():
        print_line(f"kept unquantized: {escape(why)}")
    for note in done.notes:
        print_line(f"note: {escape(note)}")
    times = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in done.seconds.items())
    ratio = done.source_bytes / size if size else 0
    said = f"{ratio:.2f}x smaller than" if ratio >= 1 else f"{1 / ratio:.2f}x as large as" if ratio else ""
    compared = f", {said} its {done.source_bytes:,} bytes of weights" if said else ""
    print_line(f"{escape(done.path)}: {len(done.quantized)} tensors quantized, {size:,} bytes{compared} ({times})")
    return DONE


def print_allocation(record: Mapping[str, Any]) -> None:
    """Print each tensor's width and its cost: the predicted one, and the measured one where it is known."""
    rows = [
        (t["name"] if t["chosen"] else f"{t['name']} (fixed)", format_shape(t["shape"]), t["quant_type"],
         f"{t['bpw']:.3f}", f"{t['error']:.2e}")
        for t in record["tensors"]
    ]  # fmt: skip
    error = f"{1 - record['predicted_cosine']:.2e}"
    print_table(
        ("name", "shape", "type", "bits", "error"),
        rows,
        (f"{len(rows)} tensors", "", "", f"{record['bpw']:.3f}", error),
    )
    uniform = ", ".join(
        f"{width} {each['predicted_cosine']:.4f} at {each['bpw']:.2f}" for width, each in record["uniform"].items()
    )
    print_line(f"one width for all, predicted cosine at bits a weight: {uniform}")
    said = f"{record['bpw']:.3f} bits a weight; cosine {record['predicted_cosine']:.4f} predicted"
    if "cosine" in record:
        lines = f"{record['sentences']} {'other lines' if record['held_out'] else 'lines of the calibration itself'}"
        said += f", {record['cosine']:.4f} measured on {lines} of the text"
    print_line(said)
    if record.get("cosine", 1) < record.get("min_cosine", 0):
        print_line(f"note: measured below min_cosine = {record['min_cosine']}: ask for more, or take more text")


def print_dry_run(output: str, expected: ExpectedResult, as_json: bool) -> int:
    rows, notes, allocation = expected.rows, expected.notes, expected.allocation
    total = sum(row.bytes for row in rows)
    if as_json:
        report = {"output": output, "bytes": total, "rows": list(map(dataclasses.asdict, rows)), "notes": notes}
        print_line(json.dumps(report | ({"allocation": allocation} if allocation else {})))
        return DONE
    if allocation:
        print_allocation(allocation)
    cells = [(row.name, format_shape(row.shape), row.quant_type, f"{row.bytes:,}") for row in rows]
    print_table(("name", "shape", "type", "bytes"), cells, (f"{len(rows)} tensors", "", "", f"{total:,}"))
    for note in notes:
        print_line(f"note: {escape(note)}")
    print_line(f"{escape(output)}: would hold at most {total:,} bytes of tensors; nothing was written")
    return DONE
