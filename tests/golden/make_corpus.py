"""Writes tests/golden/corpus: what the first release writes, one file of every kind, and what each means.

`PYTHONPATH=tests python tests/golden/make_corpus.py` was run once, and its files are committed: they load for ever. It
stays as a record of how they were made; a later release adds a corpus of its own instead of making this one again.

meaning.json has, for each file, its version, tied names and rows; expected.npz the numbers, as the slow reader of the
documentation reads them (`tests/independent_reader.py`), and what the two models give.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import bert_oracle
import independent_reader
import numpy as np
import safetensors.numpy
import small_llama

import aq_jax as aq
from aq_jax.conversion import write
from aq_jax.converters import orbax
from aq_jax.io import dense, qtensors
from aq_jax.store import open_table
from aq_jax.store.layout import pieces

CORPUS = Path(__file__).parent / "corpus"
BERT = {**bert_oracle.CONFIG, "num_hidden_layers": 1, "max_position_embeddings": 32, "intermediate_size": 32}
TEXTS = ["the quick cats", "she runs in that house of the small sun"]
SUFFIXES = ("parquet", "arrow")
KINDS = {
    "int8.channel": ((6, 20), {"quant_type": "int8"}),
    "int8.tensor": ((5, 7), {"quant_type": "int8", "per_channel": False}),
    "int8.group": ((4, 32), {"quant_type": "int8", "group_size": 16}),
    "int8.asymmetric": ((6, 20), {"quant_type": "int8", "symmetric": False}),
    "int8.conv": ((4, 3, 2, 2), {"quant_type": "int8"}),
    "int4.channel": ((6, 20), {"quant_type": "int4", "per_channel": True}),
    "int4.group": ((4, 32), {"quant_type": "int4", "group_size": 16}),
    "int4.asymmetric": ((4, 32), {"quant_type": "int4", "group_size": 16, "symmetric": False}),
    "int4.minmax": ((4, 32), {"quant_type": "int4", "group_size": 16, "symmetric": False, "solver": "minmax"}),
    "int4.absmax": ((4, 32), {"quant_type": "int4", "group_size": 16, "solver": "absmax"}),
    "int4.rotated": ((4, 32), {"quant_type": "int4", "group_size": 16, "rotate": True}),
    "int3.across_rows": ((5, 7), {"quant_type": "int3", "group_size": 8}),
    "int3.stacked": ((2, 3, 16), {"quant_type": "int3", "group_size": 16, "symmetric": False}),
    "int3.rotated": ((4, 24), {"quant_type": "int3", "per_channel": True, "rotate": True}),
    "int2.published": ((4, 96), {"quant_type": "int2"}),
    "int2.tensor": ((13,), {"quant_type": "int2", "group_size": 16}),
    "int2.rotated": ((2, 128), {"quant_type": "int2", "rotate": True, "symmetric": False}),
    "int2.empty": ((0, 8), {"quant_type": "int2"}),
}


def weight(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * 0.1).astype(np.float32)


def quantized() -> dict[str, Any]:
    """A QTensor of every kind, and a tied one."""
    out: dict[str, Any] = {}
    for seed, (name, (shape, config)) in enumerate(KINDS.items()):
        out[name] = aq.quantize(weight(shape, seed), aq.QuantizationConfig(**config), name)
    return out | {"tied": out["int4.group"], "bias": weight((6,), 99)}


def plain() -> dict[str, np.ndarray]:
    """An array of every dtype that a table has."""
    from aq_jax.store import DTYPES

    values = {name: (np.arange(15) % 3).reshape(3, 5).astype(dtype) for name, dtype in DTYPES.items()}
    embed = weight((4, 3), 7)
    return values | {"scalar": np.float32(2.5), "empty": np.zeros((0, 4), np.float32), "embed": embed, "head": embed}


def folder_of_bert(folder: Path) -> Path:
    tensors = bert_oracle.weights(BERT)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    bert_oracle.write_side_files(folder, BERT)
    return folder


def make(scratch: Path) -> None:
    for suffix in SUFFIXES:
        aq.save(CORPUS / f"v1.{suffix}", plain(), config={"note": "Größe"})
        aq.save(CORPUS / f"v2.{suffix}", quantized(), config={"made": "by hand"})
    aq.save(CORPUS / "compressed.parquet", quantized(), compression="zstd")
    source = folder_of_bert(scratch)
    mixed = aq.QuantizationConfig(
        "int4", group_size=16, rotate=True, mixed_precision_layers=("embeddings",),
        overrides=(aq.Override("intermediate", "int2"), aq.Override("query", "int8"), aq.Override("value", "none")),
    )  # fmt: skip
    for suffix in SUFFIXES:  # fp16, search, absmax, none and rotated rows, with what is recorded of each
        aq.convert(aq.ConversionConfig(str(source), str(scratch / "out" / f"m.{suffix}"), mixed))
        shutil.copy(scratch / "out" / f"m.{suffix}", CORPUS / f"converted.{suffix}")
    gptq = aq.QuantizationConfig("int4", group_size=16, symmetric=False, solver="gptq", rotate=True)
    text = scratch / "text.txt"
    text.write_text("\n".join(bert_oracle.TEXT.split(".")) + "\n" + "\n".join(TEXTS), encoding="utf-8")
    calibration = aq.CalibrationConfig(text=str(text), sentences=8)
    (CORPUS / "gptq").mkdir()
    aq.convert(aq.ConversionConfig(str(source), str(CORPUS / "gptq" / "m.parquet"), gptq, calibration))
    tensors = {name: value for name, value in bert_oracle.weights(BERT).items() if "encoder" in name}
    bulk = {"w": weight((12, 24), 1), "x": weight((12, 24), 2).astype(np.float16), "bias": weight((12,), 3)}
    aq.save(scratch / "bulk.parquet", bulk)
    limited = functools.partial(pieces, limit=256)
    dense.pieces = qtensors.pieces = write.pieces = limited  # type: ignore[assignment]
    for suffix in SUFFIXES:
        for config in ("int8", "int3"):
            aq.quantize_file(scratch / "bulk.parquet", CORPUS / f"pieces_{config}.{suffix}", config)
    dense.pieces = qtensors.pieces = write.pieces = pieces
    shards = aq.ConversionConfig(
        str(source), str(CORPUS / "shards"), mixed, shards=aq.ShardsConfig(size=8000, workers=1)
    )
    aq.convert(shards)
    small_llama.make(scratch / "llama", aq.QuantizationConfig("int4", group_size=16))
    shutil.copytree(scratch / "llama", CORPUS / "llama", ignore=shutil.ignore_patterns("*.bin"))
    stacked = aq.quantize_tree({"layers": {"kernel": weight((2, 8, 16), 4)}}, aq.QuantizationConfig("int3"))
    tree = {"layers": [quantized(), stacked], "numbers": {2: np.arange(3), 10: tensors}, "pair": (None, {})}
    orbax.save(CORPUS / "checkpoint", tree)
    orbax.from_table(CORPUS / "converted.parquet", CORPUS / "checkpoint_of_table")


def tables() -> list[Path]:
    """Every table of the corpus; a folder of shards is one."""
    single = [p for p in sorted(CORPUS.rglob("*")) if p.suffix in (".parquet", ".arrow") and p.parent.name != "shards"]
    return [*single, CORPUS / "shards"]


def meaning() -> None:
    known: dict[str, Any] = {}
    numbers: dict[str, np.ndarray] = {}
    for path in tables():
        name = str(path.relative_to(CORPUS))
        files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
        with open_table(path) as table:
            rows = {
                stored: {
                    "shape": list(info.shape), "dtype": info.dtype, "quant_type": info.quant_type,
                    "quant_axis": info.quant_axis, "group_size": info.group_size, "rotation": info.rotation,
                    "solver": info.solver, "pieces": len(table.pieces(stored)),
                }
                for stored in table.names
                for info in (table.pieces(stored)[0],)
            }  # fmt: skip
            known[name] = {"version": table.version, "aliases": dict(table.aliases), "rows": rows}
        for file in files:
            for tensor, value in independent_reader.read_tensors(file).items():
                if tensor in rows:
                    kept = value.dtype.kind in "iubc" or value.dtype.itemsize == 8
                    # The Parquet and the Arrow file of one name hold the same.
                    numbers[f"{name.partition('.')[0]}/{tensor}"] = value if kept else value.astype(np.float32)
    for name, ask in (("gptq/m.parquet", "encode"), ("llama/m.parquet", "score")):
        model = aq.load_model(CORPUS / name, "float32")
        numbers[f"{name.partition('/')[0]}:{ask}"] = np.asarray(
            model.encode(TEXTS) if ask == "encode" else model.score(TEXTS[0])
        )
    for name in ("checkpoint", "checkpoint_of_table"):
        for path, leaf in _leaves(orbax.load(CORPUS / name)):
            value = aq.dequantize(leaf) if isinstance(leaf, aq.QTensor) else leaf
            numbers[f"{name}/{path}"] = np.asarray(value)
    (CORPUS / "meaning.json").write_text(json.dumps(known, indent=1), encoding="utf-8")
    np.savez_compressed(CORPUS / "expected.npz", **numbers)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    import jax

    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, aq.QTensor))
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in found]


if __name__ == "__main__":
    import tempfile

    shutil.rmtree(CORPUS, ignore_errors=True)
    CORPUS.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
    meaning()
