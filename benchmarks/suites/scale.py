"""Measure conversions as models grow: time a byte, and memory, should stay the same."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import checkpoints
from benchmarks.suites.memory import peak_added
from benchmarks.timing import Line, Result

WIDTH, INNER, VOCABULARY = 1024, 4096, 2048  # a layer of 33.6 MB
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


def scale(full: bool) -> Iterator[Line]:
    """Convert Llamas of 64 MB to 4 GB into shards of int8, by one process; their files are mostly holes."""
    import aq_jax as aq

    first: tuple[float, float] | None = None
    for megabytes in SIZES if full else SIZES[:4]:
        with tempfile.TemporaryDirectory() as scratch:
            shapes = checkpoints.llama_shapes(max(1, megabytes // 34), WIDTH, INNER, VOCABULARY)
            size = checkpoints.write_checkpoint(Path(scratch, "model"), shapes, 1 << 30, filled=0.02)
            shards = aq.ShardsConfig(size="256MB", workers=1)
            model, int8 = str(Path(scratch, "model")), aq.QuantizationConfig("int8")
            if first is None:  # compile before anything is measured
                aq.convert(aq.ConversionConfig(model, str(Path(scratch, "warm")), int8, shards=shards))
            config = aq.ConversionConfig(model, str(Path(scratch, "out")), int8, shards=shards)
            start = time.perf_counter()
            memory = peak_added(lambda config=config: aq.convert(config))
            rate = (time.perf_counter() - start) / size * 1e9
        first = first or (rate, memory)
        yield Result(
            f"a model of {size / 1e6:.0f} MB to int8 shards: time",
            rate,
            "s a GB",
            figures={"of the smallest": rate / first[0], "MB added": memory, "MB of the smallest": first[1]},
        )
