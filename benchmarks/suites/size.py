"""Measure bytes on disk, and the error of weights."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import models
from benchmarks.timing import Line, Result


def size(full: bool) -> Iterator[Line]:
    """Measure the real model's bytes on disk, and the error of its weights."""
    import aq_jax as aq
    from aq_jax.converters import huggingface
    from aq_jax.store.inspection import Inspection, inspect_table

    folder = models.folder()
    with tempfile.TemporaryDirectory() as scratch:

        def table(name: str, config: aq.QuantizationConfig, compression: str = "none") -> Inspection:
            path = Path(scratch, f"{name}.parquet")
            huggingface.to_table(folder, path, config, compression=compression)  # pyright: ignore[reportArgumentType]
            return inspect_table(path)

        int8 = table("int8", aq.QuantizationConfig("int8", per_channel=True))
        zstd = table("int8z", aq.QuantizationConfig("int8", per_channel=True), "zstd")
        int2 = table("int2", aq.QuantizationConfig("int2", group_size=128))
        affine = table("int2a", aq.QuantizationConfig("int2", group_size=128, symmetric=False))
    source = 4 * int8.params
    for name, found, least, goal in (
        ("int8 .parquet", int8, 3.9, ""),
        ("int8 .parquet, zstd", zstd, 3.9, "4.2"),
        ("int2 g128 .parquet", int2, 14.1, "14.8"),
    ):
        ratio = source / found.file_bytes
        yield Result(f"{name}: float32 / size", ratio, "x smaller", str(least), goal, f"float16 / size {ratio / 2:.2f}")
    cosines = [layer.cosine for layer in int8.layers if layer.cosine is not None]
    yield Result("int8 weight cosine, mean", statistics.mean(cosines), "", "0.9999", "")
    yield Result("int8 weight cosine, min", min(cosines), "", "0.9994", "")
    for name, found, least, goal in (("symmetric", int2, "0.930", "0.933"), ("asymmetric", affine, "0.937", "0.940")):
        linears = [x.cosine for x in found.layers if x.cosine is not None and "embeddings" not in x.name]
        yield Result(f"int2 g128 mse, {name}: mean cosine of linears", statistics.mean(linears), "", least, goal)


def gaussian(full: bool) -> Iterator[Line]:
    """Measure the error of `mse` at two bits on N(0, 1)."""
    import aq_jax as aq

    w = np.random.default_rng(1).standard_normal((2048, 1024), np.float32)
    for symmetric, group, limit in ((False, 64, 0.105), (False, 128, 0.112), (True, 64, 0.115), (True, 128, 0.118)):
        config = aq.QuantizationConfig("int2", group_size=group, symmetric=symmetric)
        q = aq.quantize(w, config)
        assert isinstance(q, aq.QTensor)
        error = float(np.mean((np.asarray(aq.dequantize(q)) - w) ** 2))
        kind = "symmetric" if symmetric else "asymmetric"
        yield Result(f"mse on N(0,1), 2 bits, {kind} g{group}: error", error, "", f"<= {limit}", "")
