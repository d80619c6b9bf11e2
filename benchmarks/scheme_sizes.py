"""Print how large tables are beside checkpoints of other programs: the figures of docs/formats.md, section Size.

`python -m benchmarks.scheme_sizes` writes a 4096 x 4096 matrix as each program stores it, of random codes on the grids
of normal weights, and converts it into a table of each kind.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

import aq_jax as aq
from aq_jax.codes.levels import NF4
from aq_jax.config import ConversionConfig

SIZE = 4096
WORDS = SIZE // 8
Arrays = dict[str, np.ndarray]
_rng = np.random.default_rng(0)
WEIGHT = 0.02 * _rng.standard_normal((SIZE, SIZE), np.float32)


class Checkpoint(NamedTuple):
    """A checkpoint as a program stores it.

    Args:
        name: The program, and what is special.
        tensors: The tensors of a layer.
        entry: The entry of config.json.
        metadata: The metadata of the file.
    """

    name: str
    tensors: Arrays
    entry: dict[str, Any]
    metadata: dict[str, str] | None = None


def grids(group: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Choose a scale and a zero point of unsigned codes of four bits for each group of a row."""
    parts = WEIGHT.reshape(SIZE, -1, group)
    low, high = parts.min(-1), parts.max(-1)
    scales = (high - low) / 15
    return scales.astype(dtype), np.clip(np.rint(-low / scales), 0, 15).astype(np.uint32)


def codes(*shape: int) -> np.ndarray:
    """Draw words of eight codes of four bits."""
    return _rng.integers(0, 2**32, shape, np.uint32)


def nibbles(numbers: np.ndarray) -> np.ndarray:
    """Put eight numbers of the last axis into a word."""
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8) << np.arange(0, 32, 4, dtype=np.uint32)
    return np.bitwise_or.reduce(eights, -1).view(np.int32)


def transposed(group: int) -> Iterator[Checkpoint]:
    """GPTQ and AWQ."""
    scales, zeros = grids(group, np.float16)
    gptq = {"qweight": codes(WORDS, SIZE).view(np.int32), "qzeros": nibbles(zeros.T), "scales": scales.T,
            "g_idx": np.arange(SIZE, dtype=np.int32) // group}  # fmt: skip
    entry = {"quant_method": "gptq", "bits": 4, "sym": False, "desc_act": False, "checkpoint_format": "gptq_v2"}
    yield Checkpoint("GPTQ", gptq, entry)
    symmetric = gptq | {"qzeros": nibbles(np.full_like(zeros.T, 8))}
    yield Checkpoint("GPTQ, symmetric", symmetric, entry | {"sym": True})
    awq = {"qweight": codes(SIZE, WORDS).view(np.int32), "qzeros": gptq["qzeros"], "scales": scales.T}
    yield Checkpoint("AWQ", awq, {"quant_method": "awq", "bits": 4, "version": "gemm"})


def by_rows(group: int, dtype: Any) -> Iterator[Checkpoint]:
    """compressed-tensors, MLX, and HQQ."""
    kind, (scales, zeros) = np.dtype(dtype).name, grids(group, dtype)
    for symmetric in (True, False):
        weights = {"num_bits": 4, "strategy": "group", "group_size": group, "symmetric": symmetric}
        packed = {"weight_packed": codes(SIZE, WORDS).view(np.int32), "weight_scale": scales,
                  "weight_shape": np.array([SIZE, SIZE])}  # fmt: skip
        packed |= {} if symmetric else {"weight_zero_point": np.ascontiguousarray(nibbles(zeros.T).T)}
        config = {"config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}
        what = f"compressed-tensors{', symmetric' if symmetric else ''}, {kind}"
        yield Checkpoint(what, packed, {"quant_method": "compressed-tensors"} | config)
    low = WEIGHT.reshape(SIZE, -1, group).min(-1)
    mlx = {"weight": codes(SIZE, WORDS), "scales": scales, "biases": low.astype(dtype)}
    yield Checkpoint(f"MLX, {kind}", mlx, {"bits": 4, "group_size": group})
    floats = (-low / scales.astype(np.float32)).astype(dtype)
    hqq = {"W_q": codes(floats.size // 2, group // 4).view(np.uint8), "scale": scales.reshape(-1, 1),
           "zero": floats.reshape(-1, 1), "packing": np.frombuffer(b"4bit_u8", np.uint8), "axis": np.int32(1),
           "shape": np.array([SIZE, SIZE]), "nbits": np.int32(4), "group_size": np.int32(group)}  # fmt: skip
    yield Checkpoint(f"HQQ, {kind}", hqq, {"quant_method": "hqq"})


def torchao(bits: int, group: int) -> Checkpoint:
    """Bytes of codes, and bytes of zero points."""
    half = 1 << (bits - 1)
    scales, zeros = grids(group, ml_dtypes.bfloat16)
    tensors = {"qdata": _rng.integers(-half, half, (SIZE, SIZE), np.int8), "scale": scales,
               "zero_point": (zeros.astype(np.int32) - 8).astype(np.int8)}  # fmt: skip
    data = {"target_dtype": {"_data": f"int{bits}"}, "dtype": {"_data": "bfloat16"}}
    return _torchao(f"{bits} bits", "IntxUnpackedToInt8Tensor", tensors, data, group)


def torchao_int4(group: int) -> Checkpoint:
    """Codes of four bits, and offsets."""
    scales, zeros = grids(group, ml_dtypes.bfloat16)
    offsets = (8 - zeros.astype(np.float32)) * scales.astype(np.float32)
    tensors = {"qdata": codes(SIZE, WORDS).view(np.int8), "scale": scales.T,
               "zero_point": offsets.T.astype(ml_dtypes.bfloat16)}  # fmt: skip
    return _torchao("Int4Tensor", "Int4Tensor", tensors, {}, group)


def _torchao(what: str, kind: str, tensors: Arrays, data: dict[str, Any], group: int) -> Checkpoint:
    text = json.dumps({"_type": kind, "_data": data | {"block_size": [1, group]}})
    named = {f"_weight_{leaf}": array for leaf, array in tensors.items()}
    return Checkpoint(f"torchao, {what}", named, {"quant_method": "torchao"}, {"a.weight": text})


def bitsandbytes() -> Iterator[Checkpoint]:
    """nf4 in blocks of 64, nested and not, and int8."""
    entry = {"quant_method": "bitsandbytes"}
    scales = np.abs(WEIGHT.reshape(-1, 64)).max(1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [SIZE, SIZE]}
    plain = {"weight": codes(WORDS * SIZE).view(np.uint8).reshape(-1, 1), "weight.quant_map": np.array(NF4, np.float32)}
    name = "weight.quant_state.bitsandbytes__nf4"

    def text(**more: Any) -> Arrays:
        return {name: np.frombuffer(json.dumps(state | more).encode(), np.uint8)}

    yield Checkpoint("bitsandbytes, nf4", plain | text() | {"weight.absmax": scales}, entry)
    mean = float(scales.mean())
    away = (scales - mean).reshape(-1, 256)
    largest = np.abs(away).max(1)
    levels = _dynamic_levels()
    found = np.searchsorted((levels[1:] + levels[:-1]) / 2, away / largest[:, None]).astype(np.uint8)
    nested = {"weight.absmax": found.reshape(-1), "weight.nested_absmax": largest, "weight.nested_quant_map": levels}
    numbers = text(nested_blocksize=256, nested_offset=mean, nested_dtype="float32")
    yield Checkpoint("bitsandbytes, nf4, nested", plain | numbers | nested, entry)
    int8 = {"weight": _rng.integers(-127, 128, (SIZE, SIZE), np.int8), "SCB": np.abs(WEIGHT).max(1)}
    yield Checkpoint("bitsandbytes, int8", int8, entry)


def _dynamic_levels() -> np.ndarray:
    """List bitsandbytes' levels of scales: a sign, a decimal exponent in unary, and a fraction in the other bits."""
    edges = (10.0 ** (i - 6) * np.linspace(0.1, 1, 2**i + 1) for i in range(7))
    above = np.concatenate([(edge[1:] + edge[:-1]) / 2 for edge in edges])
    return np.sort(np.concatenate([-above, [0, 1], above])).astype(np.float32)


def checkpoints() -> Iterator[tuple[int, Checkpoint]]:
    """List the groups' lengths and the checkpoints."""
    for group in (128, 64, 32):
        yield from ((group, found) for found in transposed(group))
        for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
            yield from ((group, found) for found in by_rows(group, dtype))
        yield group, torchao_int4(group)
        yield group, torchao(8, group)
    yield 32, torchao(4, 32)
    yield from ((64, found) for found in bitsandbytes())


def main() -> int:
    """Print a line a checkpoint: by how much each table is larger than its file."""
    print("group                                              .parquet   .arrow")
    for group, (name, tensors, entry, metadata) in checkpoints():
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source"
            source.mkdir()
            arrays = {f"a.{leaf}": np.require(array, requirements="C") for leaf, array in tensors.items()}
            safetensors.numpy.save_file(arrays, source / "model.safetensors", metadata)
            key = "quantization_config" if "quant_method" in entry else "quantization"
            (source / "config.json").write_text(json.dumps({key: entry}))
            before, more = (source / "model.safetensors").stat().st_size, []
            for suffix in ("parquet", "arrow"):
                done = aq.convert(ConversionConfig(str(source), f"{folder}/{suffix}/m.{suffix}"))
                more.append(Path(done.path).stat().st_size / before - 1)
            print(f"{group:<6}{name:44} {more[0]:+8.1%} {more[1]:+8.1%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
