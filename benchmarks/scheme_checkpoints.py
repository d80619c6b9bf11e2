"""A matrix as other programs store it quantized: random codes on the grids of normal weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from aq_jax.codes.levels import NF4

Arrays = dict[str, np.ndarray]
GROUPS = (128, 64, 32)
MODULE = "a"


class Checkpoint(NamedTuple):
    """A checkpoint of one layer.

    Args:
        name: The program, and what is special.
        tensors: The layer's tensors.
        entry: The entry of config.json.
        metadata: The metadata of the file.
    """

    name: str
    tensors: Arrays
    entry: dict[str, Any]
    metadata: dict[str, str] | None = None

    def write(self, folder: Path) -> Path:
        """Write a folder; return the path of its weights."""
        from safetensors.numpy import save_file

        arrays = {f"{MODULE}.{leaf}": np.require(array, requirements="C") for leaf, array in self.tensors.items()}
        save_file(arrays, folder / "model.safetensors", self.metadata)
        key = "quantization_config" if "quant_method" in self.entry else "quantization"
        (folder / "config.json").write_text(json.dumps({key: self.entry}))
        return folder / "model.safetensors"


class Programs:
    """The programs, which store one square matrix of normal weights.

    Args:
        size: Its rows, and columns.
    """

    def __init__(self, size: int) -> None:
        self._size, self._words, self._rng = size, size // 8, np.random.default_rng(0)
        self._weight = 0.02 * self._rng.standard_normal((size, size), np.float32)

    def checkpoints(self, group: int) -> Iterator[Checkpoint]:
        """List what stores groups of this length: where widths do not matter, of four bits."""
        yield from self._transposed(group)
        for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
            yield from self._by_rows(group, dtype)
        yield self._torchao_int4(group)
        yield self._torchao(8, group)
        if group == 32:
            yield self._torchao(4, group)
        if group == 64:
            yield from self._bitsandbytes()

    def _grids(self, group: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """Choose a scale and a zero point of unsigned codes for each group of a row."""
        parts = self._weight.reshape(self._size, -1, group)
        low, high = parts.min(-1), parts.max(-1)
        scales = (high - low) / 15
        return scales.astype(dtype), np.clip(np.rint(-low / scales), 0, 15).astype(np.uint32)

    def _codes(self, *shape: int) -> np.ndarray:
        """Draw words of eight codes."""
        return self._rng.integers(0, 2**32, shape, np.uint32)

    def _transposed(self, group: int) -> Iterator[Checkpoint]:
        """GPTQ and AWQ."""
        scales, zeros = self._grids(group, np.float16)
        gptq = {"qweight": self._codes(self._words, self._size).view(np.int32), "qzeros": _nibbles(zeros.T),
                "scales": scales.T, "g_idx": np.arange(self._size, dtype=np.int32) // group}  # fmt: skip
        entry = {"quant_method": "gptq", "bits": 4, "sym": False, "desc_act": False, "checkpoint_format": "gptq_v2"}
        yield Checkpoint("GPTQ", gptq, entry)
        two = {"qweight": self._codes(self._size // 16, self._size).view(np.int32),
               "qzeros": self._codes(len(gptq["scales"]), self._size // 16).view(np.int32)}  # fmt: skip
        yield Checkpoint("GPTQ, 2 bits", gptq | two, entry | {"bits": 2})
        symmetric = gptq | {"qzeros": _nibbles(np.full_like(zeros.T, 8))}
        yield Checkpoint("GPTQ, symmetric", symmetric, entry | {"sym": True})
        words = self._codes(self._size, self._words).view(np.int32)
        awq = {"qweight": words, "qzeros": gptq["qzeros"], "scales": scales.T}
        yield Checkpoint("AWQ", awq, {"quant_method": "awq", "bits": 4, "version": "gemm"})

    def _by_rows(self, group: int, dtype: Any) -> Iterator[Checkpoint]:
        """compressed-tensors, MLX, and HQQ."""
        kind, size, (scales, zeros) = np.dtype(dtype).name, self._size, self._grids(group, dtype)
        for symmetric in (True, False):
            weights = {"num_bits": 4, "strategy": "group", "group_size": group, "symmetric": symmetric}
            packed = {"weight_packed": self._codes(size, self._words).view(np.int32), "weight_scale": scales,
                      "weight_shape": np.array([size, size])}  # fmt: skip
            packed |= {} if symmetric else {"weight_zero_point": np.ascontiguousarray(_nibbles(zeros.T).T)}
            config = {"config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}
            what = f"compressed-tensors{', symmetric' if symmetric else ''}, {kind}"
            yield Checkpoint(what, packed, {"quant_method": "compressed-tensors"} | config)
        floats = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": group}
        config = {"config_groups": {"a": {"targets": ["Linear"], "weights": floats}}}
        float8 = {"weight": (self._weight / scales.repeat(group, 1)).astype(ml_dtypes.float8_e4m3fn),
                  "weight_scale": scales}  # fmt: skip
        yield Checkpoint(f"compressed-tensors, float8, {kind}", float8, {"quant_method": "compressed-tensors"} | config)
        low = self._weight.reshape(size, -1, group).min(-1)
        mlx = {"weight": self._codes(size, self._words), "scales": scales, "biases": low.astype(dtype)}
        yield Checkpoint(f"MLX, {kind}", mlx, {"bits": 4, "group_size": group})
        zero = (-low / scales.astype(np.float32)).astype(dtype)
        hqq = {"W_q": self._codes(scales.size // 2, group // 4).view(np.uint8), "scale": scales.reshape(-1, 1),
               "zero": zero.reshape(-1, 1), "packing": np.frombuffer(b"4bit_u8", np.uint8), "axis": np.int32(1),
               "shape": np.array([size, size]), "nbits": np.int32(4), "group_size": np.int32(group)}  # fmt: skip
        yield Checkpoint(f"HQQ, {kind}", hqq, {"quant_method": "hqq"})

    def _torchao(self, bits: int, group: int) -> Checkpoint:
        """Bytes of codes, and bytes of zero points."""
        half = 1 << (bits - 1)
        scales, zeros = self._grids(group, ml_dtypes.bfloat16)
        tensors = {"qdata": self._rng.integers(-half, half, (self._size, self._size), np.int8), "scale": scales,
                   "zero_point": (zeros.astype(np.int32) - 8).astype(np.int8)}  # fmt: skip
        data = {"target_dtype": {"_data": f"int{bits}"}, "dtype": {"_data": "bfloat16"}}
        return _torchao_checkpoint(f"{bits} bits", "IntxUnpackedToInt8Tensor", tensors, data, group)

    def _torchao_int4(self, group: int) -> Checkpoint:
        """Codes of four bits, and offsets."""
        scales, zeros = self._grids(group, ml_dtypes.bfloat16)
        offsets = (8 - zeros.astype(np.float32)) * scales.astype(np.float32)
        tensors = {"qdata": self._codes(self._size, self._words).view(np.int8), "scale": scales.T,
                   "zero_point": offsets.T.astype(ml_dtypes.bfloat16)}  # fmt: skip
        return _torchao_checkpoint("Int4Tensor", "Int4Tensor", tensors, {}, group)

    def _bitsandbytes(self) -> Iterator[Checkpoint]:
        """nf4 in blocks of 64, nested and not, and int8."""
        entry, size, name = {"quant_method": "bitsandbytes"}, self._size, "weight.quant_state.bitsandbytes__nf4"
        scales = np.abs(self._weight.reshape(-1, 64)).max(1)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [size, size]}
        packed = self._codes(self._words * size).view(np.uint8).reshape(-1, 1)
        plain = {"weight": packed, "weight.quant_map": np.array(NF4, np.float32)}

        def text(**more: Any) -> Arrays:
            return {name: np.frombuffer(json.dumps(state | more).encode(), np.uint8)}

        yield Checkpoint("bitsandbytes, nf4", plain | text() | {"weight.absmax": scales}, entry)
        mean = float(scales.mean())
        away = (scales - mean).reshape(-1, 256)
        largest, levels = np.abs(away).max(1), _dynamic_levels()
        found = np.searchsorted((levels[1:] + levels[:-1]) / 2, away / largest[:, None]).astype(np.uint8)
        nested = {"weight.absmax": found.reshape(-1), "weight.nested_absmax": largest,
                  "weight.nested_quant_map": levels}  # fmt: skip
        numbers = text(nested_blocksize=256, nested_offset=mean, nested_dtype="float32")
        yield Checkpoint("bitsandbytes, nf4, nested", plain | numbers | nested, entry)
        codes = self._rng.integers(-127, 128, (size, size), np.int8)
        int8 = {"weight": codes, "SCB": np.abs(self._weight).max(1)}
        yield Checkpoint("bitsandbytes, int8", int8, entry)


def _nibbles(numbers: np.ndarray) -> np.ndarray:
    """Put eight numbers of the last axis into a word."""
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8) << np.arange(0, 32, 4, dtype=np.uint32)
    return np.bitwise_or.reduce(eights, -1).view(np.int32)


def _torchao_checkpoint(what: str, kind: str, tensors: Arrays, data: dict[str, Any], group: int) -> Checkpoint:
    text = json.dumps({"_type": kind, "_data": data | {"block_size": [1, group]}})
    named = {f"_weight_{leaf}": array for leaf, array in tensors.items()}
    return Checkpoint(f"torchao, {what}", named, {"quant_method": "torchao"}, {f"{MODULE}.weight": text})


def _dynamic_levels() -> np.ndarray:
    """List bitsandbytes' levels of scales: a sign, a decimal exponent in unary, and a fraction in the other bits."""
    edges = (10.0 ** (i - 6) * np.linspace(0.1, 1, 2**i + 1) for i in range(7))
    above = np.concatenate([(edge[1:] + edge[:-1]) / 2 for edge in edges])
    return np.sort(np.concatenate([-above, [0, 1], above])).astype(np.float32)
