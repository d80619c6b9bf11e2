"""Measure a real float Llama of 260 thousand parameters, if its files are given."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.timing import Line, Result, Skipped

STORIES = "AQ_JAX_STORIES"  # a folder with stories260K.bin, tok512.bin and stories.txt, split by <|endoftext|>


def stories(full: bool) -> Iterator[Line]:
    """Measure the loss a token in every width, with and without calibration."""
    folder = os.environ.get(STORIES)
    if not folder:
        yield Skipped("stories260k", f"{STORIES} names no folder")
        return
    import aq_jax as aq
    from aq_jax.converters import llama2c
    from aq_jax.nn import Generator
    from aq_jax.store.inspection import inspect_table

    texts = [t.strip() for t in Path(folder, "stories.txt").read_text().split("<|endoftext|>") if t.strip()]
    with tempfile.TemporaryDirectory() as tables:
        floats = Path(tables, "float32.arrow")
        llama2c.to_table(Path(folder, "stories260K.bin"), Path(folder, "tok512.bin"), floats)

        def loss(path: Path) -> float:
            model = aq.load_model(path, "float32" if path != floats else None)
            assert isinstance(model, Generator)
            return -float(np.concatenate([np.asarray(model.score(text)) for text in texts]).mean())

        def of(name: str, config: aq.QuantizationConfig, least: str = "") -> Result:
            path = Path(tables, "quantized.parquet")
            aq.quantize_file(floats, path, config, calibration=calibration)
            layers = [layer for layer in inspect_table(path).layers if layer.quant_type != "none"]
            bits = 8 * sum(layer.bytes for layer in layers) / sum(layer.params for layer in layers)
            figures = {"bits in a table": bits}
            return Result(f"stories260k {name}: loss a token", loss(path), "", least, figures=figures)

        yield Result("stories260k float32: loss a token", loss(floats), "", "1.266 +- 0.001", "")
        # Calibrated on stories that the model itself tells: the given ones judge it.
        teller = aq.load_model(floats)
        assert isinstance(teller, Generator)
        told = [teller.generate("Once upon a time", 200, temperature=1.0, seed=seed) for seed in range(64)]
        text = Path(tables, "told.txt")
        text.write_text("\n".join("Once upon a time" + " ".join(story.split()) for story in told))
        calibration = aq.CalibrationConfig(str(text), max_tokens=256)
        for bits in (8, 4, 3, 2):
            for solver in ("mse", "gptq"):
                config = aq.QuantizationConfig(f"int{bits}", per_channel=True, symmetric=bits == 8, solver=solver)
                yield of(f"int{bits} channels, {solver}", config)
        # The token embeddings, which are the head too, need a bit more: an eighth of the weights.
        for code, table, least in (("tcq4", "tcq5", ""), ("tcq3", "tcq4", ""), ("tcq2", "tcq3", "<= 2.463")):
            overrides = (aq.Override("embed_tokens", quant_type=table),)
            config = aq.QuantizationConfig(code, solver="gptq", overrides=overrides)
            yield of(f"{code}, tokens {table}, gptq", config, least)
