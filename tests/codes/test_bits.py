"""The bit stream, in NumPy, against one that is made bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aq_jax.codes.bits import pack_codes, unpack_codes
from aq_jax.errors import FormatError

WIDTHS = (7, 6, 5, 4, 3, 2)
LENGTHS = (0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 1000)


def oracle_unpack(data: np.ndarray, bits: int, count: int) -> list[int]:
    stream = np.unpackbits(data, bitorder="little").tolist()
    values = [sum(bit << k for k, bit in enumerate(stream[i * bits : (i + 1) * bits])) for i in range(count)]
    return [value - 2 ** (bits - 1) for value in values]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WIDTHS), st.sampled_from(LENGTHS), st.integers(0, 2**32 - 1))
def test_packing_agrees_with_a_bit_by_bit_oracle(bits: int, count: int, seed: int) -> None:
    half = 2 ** (bits - 1)
    codes = np.random.default_rng(seed).integers(-half, half, count).astype(np.int8)
    data = pack_codes(codes, bits)
    assert data.dtype == np.uint8
    assert data.size == -(-count * bits // 8)
    assert oracle_unpack(data, bits, count) == codes.tolist()
    assert np.unpackbits(data, bitorder="little")[count * bits :].sum() == 0
    assert (unpack_codes(data, bits, count) == codes).all()


def test_spare_bits_are_ignored() -> None:
    assert unpack_codes(np.array([0xFF], np.uint8), 3, 1).tolist() == [3]
    assert unpack_codes(np.array([0xFF, 0xFF], np.uint8), 3, 5).tolist() == [3] * 5


def test_int8_codes_are_signed_bytes() -> None:
    codes = np.array([-128, -1, 0, 127], np.int8)
    assert pack_codes(codes, 8).tolist() == [128, 255, 0, 127]
    assert (unpack_codes(pack_codes(codes, 8), 8, 4) == codes).all()


def test_a_code_too_large_is_refused() -> None:
    with pytest.raises(FormatError, match="codes range from -2 to 2; 2 bits hold -2 to 1"):
        pack_codes(np.array([-2, 2], np.int8), 2)
