"""The small functions between NumPy, JAX and torch; whole tables are in test_loader.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from aq_jax.core.frameworks import cast_floating, check_framework, to_framework, to_jax_dtype, to_numpy
from aq_jax.errors import AqError, ConfigError
from aq_jax.store import DTYPES, aligned_copy

torch = pytest.importorskip("torch")


def test_a_copy_is_aligned_whatever_it_is_a_copy_of() -> None:
    source = np.arange(100, dtype=np.uint8)[3:99].view(np.float32)
    for array in (source, source.reshape(4, 6).T, source[:0], source[0].reshape(())):
        copy = aligned_copy(array)
        assert copy.ctypes.data % 64 == 0 or not copy.size
        assert copy.flags.writeable
        assert copy.flags.c_contiguous
        assert copy.shape == array.shape
        assert np.array_equal(copy, array, equal_nan=True)


def test_jax_takes_aligned_memory_over_without_a_copy() -> None:
    array = aligned_copy(np.arange(1024, dtype=np.float32))
    assert to_framework(array, "jax", "w").unsafe_buffer_pointer() == array.ctypes.data


def test_torch_is_given_a_copy_of_memory_that_is_not_to_be_written_to() -> None:
    array = np.arange(4, dtype=np.float32)
    assert to_framework(array, "torch", "w").data_ptr() == array.ctypes.data
    array.flags.writeable = False
    tensor = to_framework(array, "torch", "w")
    tensor.fill_(7)
    assert array.tolist() == [0, 1, 2, 3]


def test_frameworks_are_named() -> None:
    for name in ("jax", "torch", "numpy"):
        check_framework(name)
    with pytest.raises(ConfigError, match="framework = 'JAX': wanted one of jax, torch, numpy"):
        check_framework("JAX")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_table_goes_to_torch_and_back_or_is_refused_by_name(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(DTYPES[dtype]) if dtype != "bool" else np.eye(2, 3, dtype=bool)
    if not hasattr(torch, dtype):
        with pytest.raises(AqError, match=f"w: torch has no dtype {dtype}; load with framework='numpy'"):
            to_framework(array, "torch", "w")
        return
    tensor = to_framework(array, "torch", "w")
    assert str(tensor.dtype) == f"torch.{dtype}"
    back = to_numpy(tensor, "w")
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


CANONICAL = [
    (np.array([2**31 - 1, -(2**31)]), "int32", None),
    (np.array(2**31), "int32", "w: int64 value 2147483648 at [] does not fit int32"),
    (np.array([0, 2**32 - 1], np.uint64), "uint32", None),
    (np.array([[0, 2**32]], np.uint64), "uint32", "w: uint64 value 4294967296 at [0, 1] does not fit uint32"),
    (np.array([0.1, np.inf, -np.inf]), "float32", None),
    (np.array([0.1, -1e39]), "float32", "w: float64 value -1e+39 at [1] does not fit float32"),
    (np.array([1e39j]), "complex64", "w: complex128 value 1e+39j at [0] does not fit complex64"),
    (np.array([], np.int64), "int32", None),
]


@pytest.mark.parametrize(("array", "target", "error"), CANONICAL)
def test_values_are_checked_before_jax_narrows_them(array: np.ndarray, target: str, error: str | None) -> None:
    if error is None:
        narrow = to_jax_dtype(array, "w")
        assert narrow.dtype == target
        assert np.array_equal(narrow, array.astype(target))
    else:
        with pytest.raises(AqError) as caught:
            to_jax_dtype(array, "w")
        assert str(caught.value).startswith(error)
        assert "jax_enable_x64" in str(caught.value)
    with jax.enable_x64(True):
        assert to_jax_dtype(array, "w") is array


def test_an_array_that_is_on_a_device_or_wants_a_gradient_is_read() -> None:
    assert to_numpy(torch.ones(2, requires_grad=True), "w").tolist() == [1, 1]
    assert to_numpy(jnp.ones(2, jnp.bfloat16), "w").dtype == ml_dtypes.bfloat16

    class Wrapped(torch.Tensor):
        """transformers and torchao have tensors of classes of their own."""

    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True).as_subclass(Wrapped)
    assert to_numpy(half, "w").dtype == ml_dtypes.bfloat16


def test_a_narrower_dtype_refuses_what_it_does_not_hold_but_of_levels_takes_its_largest_number() -> None:
    half = np.dtype(np.float16)
    large = np.array([[1, np.inf], [np.nan, -1e6]], np.float32)
    with pytest.raises(
        AqError, match=r"^w: float32 value -1000000\.0 at \[1, 1\] does not fit float16, which dtype asks"
    ):
        cast_floating(large, half, "w", dequantized=False)
    assert cast_floating(large[:1], half, "w", dequantized=False).tolist() == [[1, np.inf]]
    with pytest.raises(AqError, match=r"^w: float32 value inf at \[0\] does not fit float8_e4m3fn"):
        cast_floating(large[0, 1:], DTYPES["float8_e4m3fn"], "w", dequantized=False)
    assert cast_floating(large[1, 1:], half, "w", dequantized=True).tolist() == [-65504]
    same = np.ones(1, np.float16)
    for dequantized in (False, True):
        assert cast_floating(large, None, "w", dequantized) is large
        assert cast_floating(same, half, "w", dequantized) is same
        assert cast_floating(np.ones(1, ml_dtypes.bfloat16), DTYPES["float32"], "w", dequantized).dtype == np.float32
