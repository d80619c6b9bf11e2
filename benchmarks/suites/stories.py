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

    texts = [t.strip() for t in Path(folder, "stories.txt").read_text().split("<|endoftext|>") if t.strip()]
    with tempfile.TemporaryDirectory() as tables:
        floats = Path(tables, "float32.arrow")
        llama2c.to_table(Path(folder, "stories260K.bin"), Path(folder, "tok512.bin"), floats)

        def loss(path: Path) -> float:
            model = aq.load_model(path, "float32" if path != floats else None)
            assert isinstance(model, Generator)
            return -float(np.concatenate([np.asarray(model.score(text)) for text in texts]).mean())

        yield Result("stories260k float32: loss a token", loss(floats), "", "1.266 +- 0.001", "")
        # Calibrated on stories that the model itself tells: the given ones judge it.
        teller = aq.load_model(floats)
        assert isinstance(teller, Generator)
        told = [teller.generate("Once upon a time", 200, temperature=1.0, seed=seed) for seed in range(64)]
        text = Path(tables, "told.txt")
        text.write_text("\n".join("Once upon a time" + " ".join(story.split()) for story in told))
        for bits in (8, 4, 3, 2):
            for solver in ("mse", "gptq"):
                config = aq.QuantizationConfig(f"int{bits}", per_channel=True, symmetric=bits == 8, solver=solver)
                path = Path(tables, f"{solver}{bits}.arrow")
                aq.quantize_file(floats, path, config, calibration=aq.CalibrationConfig(str(text), max_tokens=256))
                yield Result(f"stories260k int{bits} channels, {solver}: loss a token", loss(path), "", "", "")
