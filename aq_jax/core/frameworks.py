"""Hand arrays from NumPy to JAX and torch, and back. torch is imported only where a torch tensor is made or read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from aq_jax.core.prepared import Prepared
from aq_jax.core.qtensor import QTensor
from aq_jax.core.torch_tensors import from_torch, is_torch, to_torch, torch_module
from aq_jax.errors import AqError, ConfigError
from aq_jax.store import DTYPES
from aq_jax.store.casts import find_lost, saturated

Framework = Literal["jax", "torch", "numpy"]
FRAMEWORKS = ("jax", "torch", "numpy")


def check_framework(framework: str) -> None:
    """Refuse a framework that is not one of FRAMEWORKS.

    Raises:
        ConfigError: naming it.
    """
    if framework not in FRAMEWORKS:
        raise ConfigError(f"framework = {framework!r}: wanted one of {', '.join(FRAMEWORKS)}")


def to_framework(array: np.ndarray, framework: Framework, name: str) -> Any:
    """Hand an array over without a copy where the framework allows: nobody may write to it afterwards.

    JAX copies what is not aligned to 64 bytes. torch, which knows no read-only tensors, is given a copy of memory
    that is not writable.

    Raises:
        ImportError: if torch is asked for and not installed.
        AqError: if the framework cannot hold the values: an int64 beyond int32 while JAX's x64 mode is off, say.
    """
    if framework == "numpy":
        return array
    if framework == "torch":
        return to_torch(array, name)
    import jax

    return jax.device_put(to_jax_dtype(array, name))


def to_jax_dtype(array: np.ndarray, name: str) -> np.ndarray:
    """Convert an array to the dtype that JAX gives it; a value that does not fit is refused instead of wrapped.

    Raises:
        AqError: naming the first such value.
    """
    import jax

    target = jax.dtypes.canonicalize_dtype(array.dtype)
    advice = "which JAX takes while x64 is off; set jax_enable_x64, or load with framework='numpy'"
    return checked_cast(array, target, name, advice)


def checked_cast(array: np.ndarray, dtype: np.dtype, name: str, advice: str) -> np.ndarray:
    """Cast an array to a dtype that holds all of its values, if need be rounded.

    Args:
        array, dtype: The array and the dtype.
        name: The array's name, for errors.
        advice: The end of an error: why it is that dtype, and what to do.

    Raises:
        AqError: naming the first value that would wrap, or become an infinity or NaN.
    """
    if array.dtype == dtype:
        return array
    cast = np.empty(array.shape, dtype)
    found = find_lost(array.reshape(-1), dtype, cast.reshape(-1))
    if found is not None:
        at = tuple(int(i) for i in np.unravel_index(found, array.shape))
        raise AqError(f"{name}: {array.dtype} value {array[at]} at {list(at)} does not fit {dtype}, {advice}")
    return cast


def to_numpy(value: Any, name: str) -> np.ndarray:
    """View an array of any of the three frameworks, or nested lists, in NumPy; what is not in host memory is copied.

    Raises:
        AqError: for anything else, for a masked array, and for a shape without values.
    """
    value = unwrap_variable(value)
    if is_torch(value):
        return from_torch(value, name)
    refuse_masked(value, name)
    if isinstance(value, Mapping):
        raise AqError(f"{name}: is a {type(value).__name__}; wanted an array or a QTensor: names are flat, as 'a.b'")
    array = value if hasattr(value, "dtype") else _from_lists(value, name)
    # Asked before it is made an array: keys of jax.random have a dtype, but cannot become one.
    if getattr(array.dtype, "name", None) not in DTYPES:
        raise AqError(
            f"{name}: {type(value).__name__} of dtype {array.dtype} cannot be stored; wanted one of {', '.join(DTYPES)}"
        )
    try:
        found = np.asarray(array)
    except TypeError:  # which JAX raises for what is being traced
        found = None
    if found is None or found.dtype != array.dtype:
        raise AqError(
            f"{name}: {type(value).__name__} of dtype {array.dtype} cannot be stored: it has a shape and no values; "
            "wanted an array: call the function that makes it, outside of jax.jit and jax.eval_shape"
        )
    return to_native_byte_order(found)


def to_jax(value: Any, name: str) -> Any:
    """Make a JAX array of an array of any of the three frameworks, or of nested lists; a traced one stays as it is.

    Raises:
        AqError: as for `to_numpy`.
    """
    import jax

    value = unwrap_variable(value)
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, jax.ShapeDtypeStruct):
        raise AqError(
            f"{name}: is a ShapeDtypeStruct, which has a shape and no values; wanted an array: to find the shape "
            "of a result, use jax.eval_shape"
        )
    refuse_masked(value, name)
    if is_torch(value):
        return jax.numpy.asarray(from_torch(value, name))
    try:
        return jax.numpy.asarray(
            to_native_byte_order(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else value
        )
    except (TypeError, ValueError) as error:
        raise AqError(f"{name}: {type(value).__name__} is no array: {str(error)[:200]}") from None


def refuse_masked(value: Any, name: str) -> None:
    """Refuse a NumPy array with a mask, which would be lost.

    Raises:
        AqError: naming it.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise AqError(f"{name}: is a masked array, whose mask would be lost; wanted one without: value.filled(0), say")


def to_native_byte_order(array: np.ndarray) -> np.ndarray:
    """Convert an array to this machine's byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _from_lists(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise AqError(f"{name}: {type(value).__name__} is no array: {str(error)[:200]}") from None


def is_variable(value: Any) -> bool:
    """Tell whether a value is a variable of Flax NNX, such as nnx.Param, without importing Flax."""
    # Another thread may be importing it.
    return isinstance(value, getattr(sys.modules.get("flax.nnx"), "Variable", ()))


def unwrap_variable(value: Any) -> Any:
    """Take the value out of a variable of Flax NNX; return anything else as it is."""
    return value.get_value() if is_variable(value) else value


def identity_key(value: Any) -> object:
    """Make a key that two values share if they are the same: the object's id, or the memory of a torch tensor.

    torch makes new objects for the same memory. Of a QTensor and a prepared weight the arrays count, since a variable
    of Flax NNX makes a new object around them whenever it is asked.
    """
    if isinstance(value, QTensor):
        return (
            tuple(identity_key(part) for part in (value.codes, value.scale, value.zero_point)),
            value.spec,
            value.length,
        )
    if isinstance(value, Prepared):
        import jax

        return tuple(map(id, jax.tree.leaves(value))), value.like
    if not is_torch(value) or not value.numel() or value.layout != torch_module().strided or value.is_meta:
        return id(value)
    memory = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
    return (*memory, value.dtype, value.device, value.is_conj(), value.is_neg())


def floating_dtype(dtype: Any) -> np.dtype | None:
    """Find the dtype that floating tensors are to be converted to, by any of its names; None stays None.

    Raises:
        ConfigError: if it is unknown, or not floating, or E8M0, which has neither zero nor sign.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.") if not isinstance(dtype, type | np.dtype) else np.dtype(dtype).name
    known = [known for known in DTYPES if "float" in known and known != "float8_e8m0fnu"]
    if name not in known:
        raise ConfigError(f"dtype = {dtype!r}: wanted None or a floating dtype: {', '.join(known)}")
    return DTYPES[name]


def cast_floating(array: np.ndarray, dtype: np.dtype | None, name: str, dequantized: bool) -> np.ndarray:
    """Cast a floating array to another floating dtype; arrays of other dtypes, and dtype None, change nothing.

    Args:
        array: The array.
        dtype: What `floating_dtype` gives.
        name: The array's name, for errors.
        dequantized: Whether its values are levels: those beyond the dtype's largest number become that number.

    Raises:
        AqError: naming the first value that the dtype does not hold, if they are no levels.
    """
    if dtype is None or "float" not in array.dtype.name:
        return array
    if dequantized:
        return saturated(array, dtype)
    return checked_cast(array, dtype, name, "which dtype asks for; wanted a wider dtype, or None")
