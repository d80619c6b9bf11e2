"""Packed bytes against a bit stream made of one Python integer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aq_jax.codes import bits_jax
from aq_jax.codes.runs import fills_bytes, run_of

# Few lengths: every new one is compiled. Multiples of 8 are whole bytes at every width.
LENGTHS = (8, 24)
WIDTHS = (8, 7, 6, 5, 4, 3, 2)
# Where each width is compiled for several shapes: one that crosses bytes at either end, and one that does not.
SOME = [bits if bits in (7, 3, 2) else pytest.param(bits, marks=pytest.mark.slow) for bits in WIDTHS]
# One program for each shape, where operations one by one would be several; that they come to the same is tested below.
pack, unpack, unpack_float = (
    jax.jit(f, static_argnums=1) for f in (bits_jax.pack, bits_jax.unpack, bits_jax.unpack_float)
)


@st.composite
def codes_and_bits(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.sampled_from(WIDTHS))
    length = draw(st.sampled_from(LENGTHS))
    qmin, qmax = oracle.code_range(bits)
    return draw(st.lists(st.integers(qmin, qmax), min_size=length, max_size=length)), bits


@given(codes_and_bits())
def test_pack_agrees_with_the_bit_by_bit_oracle(case: tuple[list[int], int]) -> None:
    codes, bits = case
    packed = pack(np.array(codes, np.int8), bits)
    assert np.asarray(packed).tobytes() == oracle.pack(codes, bits)
    # Solvers hand over codes as float32.
    assert np.array_equal(pack(np.array(codes, np.float32), bits), packed)


@given(codes_and_bits())
def test_unpack_agrees_with_the_bit_by_bit_oracle(case: tuple[list[int], int]) -> None:
    codes, bits = case
    data = np.frombuffer(oracle.pack(codes, bits), np.int8 if bits == 8 else np.uint8)
    unpacked = unpack(data, bits)
    assert unpacked.dtype == jnp.int8
    assert unpacked.tolist() == codes
    floats = unpack_float(data, bits)
    assert floats.dtype == jnp.float32
    assert floats.tolist() == codes


# The layout as it is drawn, in literal bytes: what files hold, whatever the code says.
DRAWN = [
    pytest.param(2, [0, 1, -2, -1], [0b01_00_11_10], id="2 bits: u3 u2 u1 u0"),
    pytest.param(4, [-8, 7, 0, 1], [0b1111_0000, 0b1001_1000], id="4 bits: the first code is the low nibble"),
    pytest.param(
        3, [-4, -3, -2, -1, 0, 1, 2, 3], [0b10_001_000, 0b1_100_011_0, 0b111_110_10], id="3 bits: codes cross bytes"
    ),
    pytest.param(
        5,
        [-16, -15, -14, -13, -12, -11, -10, -9],
        [0b001_00000, 0b1_00010_00, 0b0100_0001, 0b10_00101_0, 0b00111_001],
        id="5 bits: eight codes in five bytes",
    ),
    pytest.param(6, [-32, 31, -1, -31], [0b11_000000, 0b1111_1111, 0b000001_01], id="6 bits: four codes, three bytes"),
    pytest.param(8, [-128, -1, 0, 127], [0x80, 0xFF, 0x00, 0x7F], id="8 bits: signed bytes"),
]


@pytest.mark.parametrize(("bits", "codes", "octets"), DRAWN)
def test_the_drawn_layout(bits: int, codes: list[int], octets: list[int]) -> None:
    packed = np.asarray(pack(np.array(codes, np.int8), bits))
    assert [f"{b:08b}" for b in packed.tobytes()] == [f"{b:08b}" for b in octets]
    assert unpack(packed, bits).tolist() == codes


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_survives_in_every_place(bits: int) -> None:
    qmin, qmax = oracle.code_range(bits)
    run, _ = run_of(bits)
    codes = np.array([[q] * i + [other] + [q] * (run - 1 - i) for q in (qmin, qmax) for other in range(qmin, qmax + 1)
                       for i in range(run)], np.int8)  # fmt: skip
    assert np.array_equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", SOME)
@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0)], ids=str)
def test_rows_are_packed_on_their_own(bits: int, lead: tuple[int, ...], rng: np.random.Generator) -> None:
    qmin, qmax = oracle.code_range(bits)
    codes = rng.integers(qmin, qmax + 1, (*lead, 16)).astype(np.int8)
    packed = pack(codes, bits)
    assert packed.shape == (*lead, 2 * bits)
    for row, data in zip(codes.reshape(-1, 16), np.asarray(packed).reshape(-1, 2 * bits), strict=True):
        assert data.tobytes() == oracle.pack(row.tolist(), bits)
    assert np.array_equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_of_length_zero(bits: int) -> None:
    packed = pack(np.zeros((3, 0), np.int8), bits)
    assert packed.shape == (3, 0)
    assert unpack(packed, bits).shape == (3, 0)


@pytest.mark.parametrize(
    ("length", "bits", "whole"),
    [(1, 8, True), (3, 4, False), (2, 4, True), (3, 2, False), (4, 2, True), (4, 3, False), (8, 3, True), (0, 3, True)],
)
def test_which_rows_are_whole_bytes(length: int, bits: int, whole: bool) -> None:
    assert fills_bytes(length, bits) is whole
    if not whole:
        with pytest.raises(ValueError, match=f"{length} codes of {bits} bits are not a whole number of bytes"):
            bits_jax.pack(jnp.zeros(length, jnp.int8), bits)


@pytest.mark.parametrize("bits", SOME)
def test_jit_and_vmap_change_nothing(bits: int, rng: np.random.Generator) -> None:
    qmin, qmax = oracle.code_range(bits)
    codes = jnp.asarray(rng.integers(qmin, qmax + 1, (4, 8)), jnp.int8)
    packed = bits_jax.pack(codes, bits)
    assert np.array_equal(jax.jit(bits_jax.pack, static_argnums=1)(codes, bits), packed)
    assert np.array_equal(jax.vmap(lambda row: bits_jax.pack(row, bits))(codes), packed)
    assert np.array_equal(jax.vmap(lambda row: bits_jax.unpack(row, bits))(packed), codes)
