"""Checkpoints that somebody has quantized already: refused where they would be rounded again, copied where not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import listing

import aq_jax as aq
from aq_jax.config import AllocationConfig, ConversionConfig, QuantizationConfig
from aq_jax.conversion.prequantized import recognize
from aq_jax.converters import huggingface
from aq_jax.converters.convert import dry_run

F8, E8M0, BF16 = "float8_e4m3fn", "float8_e8m0fnu", "bfloat16"
Layout = dict[str, tuple[tuple[int, ...], str]]

# A layer of 64 inputs and 32 outputs, in groups of 16, as each project writes it.
KINDS: dict[str, tuple[str, Layout]] = {
    "gptq": ("GPTQ", {
        "l.qweight": ((8, 32), "int32"), "l.qzeros": ((4, 4), "int32"), "l.scales": ((4, 32), "float16"),
        "l.g_idx": ((64,), "int32"),
    }),
    "gptq without g_idx": ("GPTQ", {
        "l.qweight": ((8, 32), "int32"), "l.qzeros": ((4, 4), "int32"), "l.scales": ((4, 32), "float16"),
    }),
    "awq": ("AWQ", {
        "l.qweight": ((64, 4), "int32"), "l.qzeros": ((4, 4), "int32"), "l.scales": ((4, 32), "float16"),
    }),
    "bitsandbytes nf4": ("bitsandbytes", {
        "l.weight": ((1024, 1), "uint8"), "l.weight.absmax": ((32,), "uint8"), "l.weight.quant_map": ((16,), "float32"),
        "l.weight.nested_absmax": ((1,), "float32"), "l.weight.nested_quant_map": ((256,), "float32"),
        "l.weight.quant_state.bitsandbytes__nf4": ((82,), "uint8"),
    }),
    "bitsandbytes int8": ("bitsandbytes", {"l.weight": ((32, 64), "int8"), "l.SCB": ((32,), "float32")}),
    "fp8 in blocks": ("FP8 with weight_scale_inv", {
        "l.weight": ((32, 64), F8), "l.weight_scale_inv": ((2, 4), "float32"),
    }),
    "fp8 with a scale": ("FP8 with weight_scale", {
        "l.weight": ((32, 64), F8), "l.weight_scale": ((32, 1), BF16), "l.input_scale": ((), "float32"),
    }),
    "fp8 with powers of two": ("FP8 with scale", {"l.weight": ((32, 64), F8), "l.scale": ((2, 4), E8M0)}),
    "fp8 experts": ("FP8 with up_proj_scale_inv", {
        "e.up_proj": ((2, 32, 64), F8), "e.up_proj_scale_inv": ((2, 2, 4), "float32"),
    }),
    "compressed-tensors, packed": ("compressed-tensors", {
        "l.weight_packed": ((32, 8), "int32"), "l.weight_scale": ((32, 4), BF16), "l.weight_shape": ((2,), "int64"),
    }),
    "compressed-tensors, int8": ("int8 codes with weight_scale", {
        "l.weight": ((32, 64), "int8"), "l.weight_scale": ((32, 1), BF16),
    }),
    "compressed-tensors, dense": ("rounded weights with weight_scale", {
        "l.weight": ((32, 64), BF16), "l.weight_scale": ((32, 4), BF16),
    }),
    "compressed-tensors, sparse": ("compressed-tensors", {
        "l.weight.compressed": ((1024,), BF16), "l.weight.bitmask": ((32, 8), "uint8"),
        "l.weight.shape": ((2,), "int64"),
    }),
    "nvfp4": ("TensorRT Model Optimizer", {
        "l.weight": ((32, 32), "uint8"), "l.weight_scale_2": ((), "float32"), "l.weight_scale": ((32, 4), F8),
    }),
    "hqq": ("HQQ", {
        "l.W_q": ((16, 64), "uint8"), "l.scale": ((128, 1), "float16"), "l.zero": ((128, 1), "float16"),
        "l.group_size": ((), "int32"),
    }),
    "mlx": ("MLX", {
        "l.weight": ((32, 8), "uint32"), "l.scales": ((32, 4), "float16"), "l.biases": ((32, 4), "float16"),
    }),
    "mxfp4": ("MXFP4", {
        "e.gate_up_proj_blocks": ((2, 32, 2, 16), "uint8"), "e.gate_up_proj_scales": ((2, 32, 2), "uint8"),
        "e.gate_up_proj_bias": ((2, 32), BF16),
    }),
    "torchao": ("torchao", {"l._weight_qdata": ((32, 64), F8), "l._weight_scale": ((32, 1), "float32")}),
    "quanto": ("quanto", {
        "l.weight._data": ((32, 64), "int8"), "l.weight._scale": ((32, 1), BF16), "l.input_scale": ((), BF16),
    }),
    "torchao, of old": ("int8 codes", {
        "l.weight.tensor_impl.int_data": ((32, 64), "int8"), "l.weight.tensor_impl.scale": ((32,), "float32"),
    }),
    "torchao, with a colon": ("int8 codes", {
        "l.weight:_weight_qdata": ((32, 64), "int8"), "l.weight:_weight_scale": ((32, 1), "float32"),
    }),
    "marlin": ("Marlin", {"l.B": ((4, 64), "int32"), "l.s": ((1, 32), "float16")}),
    "vptq": ("int16 codes", {
        "l.indices": ((1, 32, 4), "int16"), "l.centroids.weight": ((1, 16, 8), "float16"),
        "l.weight_scale": ((64,), "float16"),
    }),
    "fp8 as ComfyUI has it": ("float8_e4m3fn codes", {"l.weight": ((32, 64), F8), "l.scale_weight": ((), "float32")}),
    "fp8, only marked": ("FP8 with scale_weight", {"l.weight": ((32, 64), F8), "scaled_fp8": ((2,), F8)}),
    "quip": ("QuIP#", {"l.Qidxs": ((32, 8), "int64"), "l.SU": ((64,), "float16"), "l.SV": ((32,), "float16")}),
    "spqr": ("SpQR", {"l.dense_weights": ((32, 8), "int64"), "l.row_offsets": ((33,), "int32")}),
    "smoothquant": ("int8 codes", {"l.weight": ((32, 64), "int8"), "l.a": ((), "float32"), "l.b": ((), "float32")}),
    "codes of any name": ("uint8 codes", {
        "l.weight_quantized": ((32, 32), "uint8"), "l.weight_scales": ((32, 2), "float32"),
        "l.weight_zeros": ((32, 2), "float32"),
    }),
    "qwix": ("Qwix", {
        "l.kernel.array.qvalue": ((64, 32), "int8"), "l.kernel.array.scale": ((4, 32), "float32"),
    }),
}  # fmt: skip

# What float models have, and what is no scale.
FLOATS: dict[str, Layout] = {
    "norms and scales": {
        "norm.scale": ((64,), "float32"), "logit_scale": ((), "float32"), "layer_scale": ((64, 1), "float32"),
        "block.layer_scale.gamma": ((1, 64), "float32"), "l.weight": ((32, 64), BF16), "l.scale": ((1, 64), BF16),
        "attn.scales": ((4, 4), "float32"), "attn.scale": ((4, 4), "float32"),
    },
    "weight norm": {"conv.weight_g": ((32, 1, 1), "float32"), "conv.weight_v": ((32, 64, 3), "float32")},
    "parts of attention": {
        "a.W_q": ((64, 64), "float32"), "a.q_weight": ((64, 64), "float32"), "a.qweight": ((64, 64), "float32"),
        "codec.codebooks": ((8, 64), "float32"), "trellis": ((8, 8), "float32"), "m.absmax": ((4, 4), "float32"),
    },
    "positions and masks": {
        "embeddings.position_ids": ((1, 512), "int64"), "h.attn.bias": ((1, 1, 8, 8), "uint8"),
        "h.attn.masked_bias": ((), "float32"), "index.weight": ((4, 4), "int64"), "index.scale": ((4, 4), "float32"),
    },
    "indexes, and buffers of an integer model": {
        "a.relative_position_index": ((49, 49), "int64"), "a.relative_position_bias_table": ((169, 4), "float32"),
        "l.weight": ((32, 64), "float32"), "l.weight_integer": ((32, 64), "int8"),
        "l.weight_scaling_factor": ((32,), "float32"), "m.ids": ((2, 8), "int32"), "m.scales": ((8,), "float32"),
    },
    "a cast to eight bits, without scales": {"l.weight": ((32, 64), F8)},
}  # fmt: skip


def made(layout: Layout) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(1, 100, shape).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
        for name, (shape, dtype) in layout.items()
    }


def shapes(layout: Layout) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (shape, np.dtype(getattr(ml_dtypes, dtype, dtype))) for name, (shape, dtype) in layout.items()}


def write(folder: Path, layout: Layout, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(made(layout), folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "whatever", "bits": 4}}])
@pytest.mark.parametrize("what", KINDS)
def test_each_kind_is_known_by_its_tensors(what: str, config: dict[str, Any]) -> None:
    kind, layout = KINDS[what]
    beside = {"model.embed.weight": ((8, 64), BF16), "model.norm.scale": ((64,), BF16)}
    found = recognize(shapes(beside | layout), config)
    assert found is not None
    assert found.kind == kind
    assert found.by.partition(", ")[0] in layout


@pytest.mark.parametrize("what", FLOATS)
def test_float_models_are_not_taken_for_quantized(what: str) -> None:
    assert recognize(shapes(FLOATS[what]), {}) is None


def test_the_whole_can_be_told_in_time() -> None:
    # Words that are asked of their neighbours, very often.
    many = {f"m.{i}.absmax": ((4, 4), np.dtype("float32")) for i in range(100_000)} | shapes(FLOATS["weight norm"])
    assert recognize(many, {}) is None


@pytest.mark.parametrize(
    "entry",
    [
        {"quantization_config": {"quant_method": "vptq"}},
        {"text_config": {"quantization_config": {"quant_method": "vptq"}}},
        {"compression_config": {"format": "vptq"}},
        {"quantization": {"bits": 4, "quant_method": "vptq"}},
    ],
)
def test_codes_of_an_unknown_kind_are_known_by_the_config(tmp_path: Path, entry: dict[str, Any]) -> None:
    layout: Layout = {"l.lattice": ((32, 4), "int64"), "l.points": ((1, 16, 8), "float16")}
    assert recognize(shapes(layout), {}) is None
    found = recognize(shapes(layout), entry)
    assert found is not None
    assert (found.kind, "l.lattice, int64 [32, 4]" in found.by) == ("vptq", True)
    # Weights that somebody has dequantized are weights.
    folder = write(tmp_path / "hf", {"l.weight": ((32, 64), BF16), "ids": ((1, 8), "int64")}, entry)
    done = huggingface.to_table(folder, tmp_path / "m.parquet", QuantizationConfig("int8"))
    assert list(done.quantized) == ["l.weight"]
    (note,) = done.notes
    assert "says vptq, but all weights are plain numbers" in note


def quantizing(folder: Path, out: Path) -> dict[str, Callable[[], object]]:
    config, gptq = QuantizationConfig("int8"), QuantizationConfig("int4", solver="gptq")
    one = ConversionConfig(str(folder), str(out / "m.parquet"), config)
    bits = replace(one, quantization=gptq, allocate=AllocationConfig(target_bpw=4.0))
    return {
        "convert": lambda: aq.convert(one),
        "shards": lambda: aq.convert(replace(one, output=str(out))),
        "dry run": lambda: dry_run(one),
        "fp16": lambda: huggingface.to_table(folder, out / "m.parquet", QuantizationConfig("fp16")),
        "allocate": lambda: dry_run(bits),
    }


@pytest.mark.parametrize("what", ["convert", "shards", "dry run", "fp16", "allocate"])
def test_nothing_is_written_of_what_would_be_rounded_twice(tmp_path: Path, what: str) -> None:
    folder = write(tmp_path / "hf", KINDS["quip"][1], {"quantization_config": {"quant_method": "quip"}})
    wanted = r"hf: is quantized already \(QuIP#, known by l\.Qidxs, int64 \[32, 8\]\).*convert the float original"
    with pytest.raises(aq.FormatError, match=wanted):
        quantizing(folder, tmp_path / "out")[what]()
    assert listing(tmp_path) == ["hf", "hf/config.json", "hf/model.safetensors"]


def test_a_checkpoint_of_orbax_is_looked_at_too(tmp_path: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    from aq_jax.converters import orbax

    tensors = made(KINDS["qwix"][1])
    array = {name.rpartition(".")[2]: array for name, array in tensors.items()}
    ocp.save(tmp_path / "run", {"l": {"kernel": {"array": array}}})
    with pytest.raises(aq.FormatError, match="is quantized already"):
        orbax.to_table(tmp_path / "run", tmp_path / "m.parquet", QuantizationConfig("int8"))
    assert not (tmp_path / "m.parquet").exists()


def test_a_plain_table_is_a_copy_that_goes_back_and_is_not_quantized(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", KINDS["quip"][1], {"quantization_config": {"quant_method": "quip"}})
    done = huggingface.to_table(folder, tmp_path / "v1" / "m.parquet")
    assert done.notes == [
        "quantized already (QuIP#, known by l.Qidxs, int64 [32, 8]): codes and scales are kept as they are"
    ]
    assert huggingface.write_folder(tmp_path / "v1" / "m.parquet", tmp_path / "back").notes == done.notes
    assert (tmp_path / "back" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    before, after = (safetensors.numpy.load_file(each / "model.safetensors") for each in (folder, tmp_path / "back"))
    assert list(before) == list(after)
    assert all((before[n].dtype, before[n].tobytes()) == (a.dtype, a.tobytes()) for n, a in after.items())
    with pytest.raises(aq.FormatError, match=r"v1: is quantized already \(QuIP#"):
        aq.quantize_file(tmp_path / "v1" / "m.parquet", tmp_path / "v2.parquet", "int8")
    assert not (tmp_path / "v2.parquet").exists()
