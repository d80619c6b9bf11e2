"""Make QTensors of the codes and grids of other programs, in the code that holds their scales as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aq_jax.codes import CODES, Grid, Levels, Nested
from aq_jax.codes.bits import pack_codes, unpack_codes
from aq_jax.codes.nested import LEVELS
from aq_jax.codes.small_grids import Offset, PlainGrids
from aq_jax.config import QuantSpec
from aq_jax.core.bitstream import from_stream
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import FormatError
from aq_jax.store import DTYPES


@dataclass(frozen=True, slots=True)
class Packed:
    """Codes and grids as a scheme has them.

    Args:
        codes: Signed codes, int8 of the weight's shape; or uint8, the bit stream of the table.
        scales: One scale a group, in the scheme's dtype; of nested ones, their bytes.
        zeros: One zero point a group, of the signed codes: x = (q - zero) * scale; of unsigned ones, where the code
            that the weight gets has such; the numbers that nested scales are made of.
        offsets: One offset a group, the value of the lowest code: x = (q + 2^(b-1)) * scale + offset; or, where the
            code that the weight gets has such, of code 0.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    offsets: np.ndarray | None = None


def spec_of(bits: int, offset: Offset, scales: np.dtype, group: int, shape: tuple[int, ...]) -> QuantSpec:
    """Choose the numerics of a weight: the code that holds its grids as they are, or float32 scales and zero points.

    Args:
        bits: The bits of a code.
        offset: What a group has beside its scale.
        scales: The dtype of the scales.
        group: The elements of the last axis that share a scale; 0 for one of the tensor.
        shape: The weight's shape.

    >>> spec_of(4, "", np.dtype(np.float32), 64, (8, 64)).quant_type  # a zero point a row takes little room
    'int4'
    >>> spec_of(4, "", np.dtype(np.float32), 32, (8, 64)).quant_type
    'int4_f32'
    >>> spec_of(2, "packed_zero_point", np.dtype(np.float16), 32, (8, 64)).quant_type  # two a row are no whole byte
    'int2_f16i'
    """
    per_channel = bool(group) and len(shape) == 2 and group == shape[-1]
    if scales == np.float32 and (per_channel or not group):
        return QuantSpec(bits, per_channel)
    name = PlainGrids(bits, scales.name, offset).name
    spec = QuantSpec(bits, per_channel, 0 if per_channel else group, code=name if name in CODES else "")
    fits = spec.code and not spec.coding.refuses_layout(shape, spec.quant_axis, spec.group_size)
    if offset == "packed_zero_point" and not fits:
        return spec_of(bits, "integer_zero_point", scales, group, shape)
    return spec


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # what is not finite is refused by name
def to_qtensor(packed: Packed, shape: tuple[int, ...], spec: QuantSpec, name: str) -> QTensor:
    """Make a QTensor of NumPy leaves.

    Args:
        packed: The codes and grids.
        shape: The weight's shape.
        spec: The numerics, of `spec_of`.
        name: The weight's name, for errors.

    Raises:
        FormatError: for scales that no code holds, for zero points and offsets that are not finite, or with which
            values would be, and for integers of more than eight bits as zero points.
    """
    code = spec.coding
    if isinstance(code, Nested):
        assert packed.zeros is not None  # noqa: S101
        scales = code.scales(packed.scales, packed.zeros)
        codes, positive = _without_zeros(replace(packed, scales=scales), code.base, spec.group_elements(shape))
        _check_range(np.where(positive > 0, positive, np.nan), name)
        numbers = np.where(positive == scales, packed.scales, packed.zeros[:LEVELS].argmax()).astype(np.uint8)
        return from_stream(_stream(codes, spec.bits), numbers, packed.zeros, shape, spec)
    if spec.code and not isinstance(code, Levels):
        grids = packed.zeros if packed.zeros is not None else packed.offsets
        scales = packed.scales.reshape(-1)
        zeros = np.empty(0) if grids is None else grids.reshape(-1)
        if code.zero_dtype == "int8":
            _check_bytes(zeros, name)
        codes = packed.codes
        if isinstance(code, PlainGrids) and code.packs_zeros:
            zeros = pack_codes(zeros.astype(np.int8), code.bits)
        else:
            zeros = zeros.astype(DTYPES[code.zero_dtype])
            _check_range(zeros, name)
    elif isinstance(code, Levels):
        codes, scales = _without_zeros(packed, code, spec.group_elements(shape))
        scales = scales.astype(DTYPES[code.grid_dtype])
        zeros = np.empty(0, np.float32)
        _check_range(np.where(scales > 0, scales, np.nan), name)
    else:
        codes, scales, zeros = _positive(packed, spec.bits, spec.group_elements(shape))
    _check_range(scales, name)
    _check_values(spec, scales, zeros, name)
    return from_stream(_stream(codes, spec.bits), scales, zeros, shape, spec)


def _stream(codes: np.ndarray, bits: int) -> np.ndarray:
    codes = np.ascontiguousarray(codes)
    return codes.reshape(-1) if codes.dtype == np.uint8 else pack_codes(codes, bits)


def _positive(packed: Packed, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give groups float32 scales above zero: the codes of those below are turned, of those at zero all alike."""
    scales, half = packed.scales.reshape(-1).astype(np.float32), np.float32(1 << (bits - 1))
    if packed.offsets is not None:
        zeros = -packed.offsets.reshape(-1).astype(np.float32) / scales - half
    else:
        zeros = np.zeros_like(scales) if packed.zeros is None else packed.zeros.reshape(-1).astype(np.float32)
    below, nothing = scales < 0, scales == 0
    codes = packed.codes
    if below.any() or nothing.any():
        count = codes.size if codes.dtype != np.uint8 else codes.size * 8 // bits
        flat = unpack_codes(codes.reshape(-1), bits, count) if codes.dtype == np.uint8 else codes.reshape(-1)
        codes = np.where(np.repeat(below, group)[: flat.size], ~flat, flat)  # ~q = -1 - q
        zeros = np.where(below, -1 - zeros, zeros)
        scales = np.abs(scales)
        if nothing.any():
            constant = np.zeros_like(scales) if packed.offsets is None else packed.offsets.reshape(-1)
            value = constant.astype(np.float32)
            codes = np.where(np.repeat(nothing, group)[: codes.size], 1, codes).astype(np.int8)
            # Code 1 less a zero point of 0 is the value, the scale's sign aside.
            scales = np.where(nothing, np.where(value == 0, 1, np.abs(value)), scales)
            zeros = np.where(nothing, np.where(value == 0, 1, np.where(value > 0, 0, 2)), zeros)
    return codes, scales, zeros.astype(np.float32)


def _without_zeros(packed: Packed, code: Levels, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Give groups of nothing but zeros a scale of 1, and codes of the level 0."""
    scales, codes = packed.scales.reshape(-1).astype(np.float32), packed.codes
    if (scales <= 0).any():
        one = np.ones(1, np.float32)
        zero = code.encode(np.zeros((1, 1), np.float32), Grid(one, 0 * one, one, one, "mid_tread")).reshape(())
        flat = codes.reshape(-1)
        starts = np.arange(scales.size) * group
        nothing = (scales == 0) | ((scales < 0) & ~np.logical_or.reduceat(flat != zero, starts))
        codes = np.where(np.repeat(nothing, group)[: flat.size], zero, flat).astype(np.int8)
        scales = np.where(nothing, np.float32(1), scales)
    return codes, scales


def _check_bytes(zeros: np.ndarray, name: str) -> None:
    if zeros.size and (zeros.min() < -128 or zeros.max() > 127):
        raise FormatError(f"{name}: has zero points from {zeros.min()} to {zeros.max()}; wanted -128 to 127")


def _check_range(values: np.ndarray, name: str) -> None:
    wide: Any = np.abs(values.astype(np.float32))
    bad = ~((wide == 0) | ((wide >= SCALE_MIN) & (wide <= SCALE_MAX)))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise FormatError(
            f"{name}: group {at} has the scale or zero point {values[at]}; wanted a number from 2^-126 to 2^126, or 0"
        )


def _check_values(spec: QuantSpec, scales: np.ndarray, zeros: np.ndarray, name: str) -> None:
    """Refuse zero points that are not finite, and groups whose levels reach farther than float32."""
    code = spec.coding
    if isinstance(code, Levels):
        reach: Any = code.max_level * scales.astype(np.float32)
    else:
        scale, zero, minimum = code.float_grids(scales, zeros if code.zero_points else None)
        reach = ((1 << (spec.bits - 1)) + (0 if zero is None else np.abs(zero))) * np.abs(scale)
        reach += 0 if minimum is None else np.abs(minimum)
    finite = np.isfinite(reach)
    if not finite.all():
        at = int(np.flatnonzero(~finite)[0])
        beside = f" and the zero point {zeros[at]}" if zeros.size else ""
        raise FormatError(
            f"{name}: group {at} has the scale {scales[at]}{beside}, whose values float32 does not hold; wanted finite "
            "ones"
        )
