"""Run `make demo`: quantize the real MiniLM by two configs, load it back, and print one table."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from aq_jax.cli import use_compile_cache
from aq_jax.config.schema import load_config
from aq_jax.errors import AqError

CONFIGS = ("configs/minilm_int8.toml", "configs/minilm_int2.toml")
HEADER = ("config", "MB", "x f32", "x f16", "cosine", "min", "compile", "read", "quantize", "write", "load", "digests")


def main() -> int:
    """Print the table; return 1 if a digest does not match."""
    use_compile_cache()
    try:
        rows = [measure(path) for path in CONFIGS]
    except AqError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    widths = [max(len(row[i]) for row in (HEADER, *rows)) for i in range(len(HEADER))]
    for row in (HEADER, *rows):
        cells = enumerate(zip(row, widths, strict=True))
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in cells))
    print(
        "\ncosine: of each quantized tensor with its float32 weights, mean and smallest; times in ms: compile is what"
        "\nthe first run took longer than the second; load is the whole file to float32 JAX arrays, digests checked."
        "\nLook closer: .venv/bin/aq-jax inspect build/minilm_int2.parquet --sort cosine"
    )
    return 0 if all(row[-1].endswith("ok") for row in rows) else 1


def measure(path: str) -> tuple[str, ...]:
    """Build one row of the table."""
    from aq_jax import load
    from aq_jax.converters.convert import convert
    from aq_jax.store.verify import verify_table

    config = load_config(path)
    start = time.perf_counter()
    convert(config)
    first = time.perf_counter() - start
    start = time.perf_counter()
    done = convert(config)
    second = time.perf_counter() - start
    start = time.perf_counter()
    load(done.path)
    loaded = time.perf_counter() - start
    verdict = verify_table(done.path)
    size = Path(done.path).stat().st_size
    cosines = list(done.quantized.values())
    times = (first - second, *(done.seconds[k] for k in ("read", "quantize", "write")), loaded)
    return (
        Path(path).stem,
        f"{size / 1e6:.2f}",
        f"{done.source_bytes / size:.2f}",
        f"{done.source_bytes / 2 / size:.2f}",
        f"{statistics.mean(cosines):.5f}",
        f"{min(cosines):.5f}",
        *(f"{1e3 * max(t, 0):.0f}" for t in times),
        f"{verdict.rows} ok" if verdict.ok else f"{len(verdict.errors)} BAD",
    )


if __name__ == "__main__":
    sys.exit(main())
