"""A small Llama of random weights: llama2.c's two files, and the table and side files that become of them."""

from __future__ import annotations

from pathlib import Path

import llama2c_oracle as oracle

import aq_jax as aq
from aq_jax.converters import llama2c

PIECES = [" t", "he", " the", "an", " an", "ab", *" thean<s>\nbé"]
VOCAB = len(oracle.FIRST) + len(PIECES)
# The number of positions is no power of two, and an int4 group of 16 divides every row.
SHAPE = {"dim": 32, "hidden": 48, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": VOCAB, "seq": 96}
BIN, TOKENIZER, TABLE = "model.bin", "tok.bin", "m.parquet"


def make(
    folder: Path, config: aq.QuantizationConfig | None = None, *, shared: bool = False, kv_heads: int = 2, seed: int = 0
) -> Path:
    """Write all of it into a folder.

    Returns:
        The path of the table; `BIN` and `TOKENIZER` lie beside it.
    """
    folder.mkdir(exist_ok=True)
    oracle.write_model(folder / BIN, **{**SHAPE, "kv_heads": kv_heads}, shared=shared, seed=seed)
    assert oracle.write_tokenizer(folder / TOKENIZER, PIECES) == VOCAB
    llama2c.to_table(folder / BIN, folder / TOKENIZER, folder / TABLE, config)
    return folder / TABLE
