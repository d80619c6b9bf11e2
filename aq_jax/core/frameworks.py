"""NumPy arrays to JAX and torch, and back. torch is imported only where a torch tensor is made or read."""

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

Framework = Literal["jax", "torch", "numpy"]
FRAMEWORKS = ("jax", "torch", "numpy")


def check_framework(framework: str) -> None:
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

    return jax.device_put(canonical(array, name))


def canonical(array: np.ndarray, name: str) -> np.ndarray:
    """The array in the dtype that JAX would give it, with every value checked instead of wrapped."""
    import jax

    target = jax.dtypes.canonicalize_dtype(array.dtype)
    if target == array.dtype:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(target)
    lost = narrow != array if array.dtype.kind in "iu" else np.isinf(narrow) & ~np.isinf(array)
    if lost.any():
        at = [int(i) for i in np.argwhere(lost)[0]]
        raise AqError(
            f"{name}: {array.dtype} value {array[tuple(at)]} at {at} does not fit {target}, which JAX takes while x64 "
            "is off; set jax_enable_x64, or load with framework='numpy'"
        )
    return narrow


def to_numpy(value: Any, name: str) -> np.ndarray:
    """A NumPy view of an array of any of the three frameworks (a copy if it is not in host memory), or of nested lists.

    Raises:
        AqError: if it is none of them, has a mask, or is a shape without values.
    """
    value = unwrapped(value)
    if is_torch(value):
        return from_torch(value, name)
    refuse_mask(value, name)
    if isinstance(value, Mapping):
        raise AqError(f"{name}: is a {type(value).__name__}; wanted an array or a QTensor: names are flat, as 'a.b'")
    array = value if hasattr(value, "dtype") else _from_lists(value, name)
    # Asked before it is made an array: keys of jax.random have a dtype, but cannot become one.
    if getattr(array.dtype, "name", None) not in DTYPES:
        raise AqError(f"{name}: {type(value).__name__} of dtype {array.dtype} is no tensor that can be stored")
    try:
        found = np.asarray(array)
    except TypeError:  # which JAX raises for what is being traced
        found = None
    if found is None or found.dtype != array.dtype:
        raise AqError(
            f"{name}: {type(value).__name__} of dtype {array.dtype} is no tensor that can be stored: it has a shape "
            "and no values; wanted an array: call the function that makes it, outside of jax.jit and jax.eval_shape"
        )
    return native(found)


def to_jax(value: Any, name: str) -> Any:
    """A JAX array of an array of any of the three frameworks, or of nested lists; one that is traced as it is.

    Raises:
        AqError: as `to_numpy`.
    """
    import jax

    value = unwrapped(value)
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, jax.ShapeDtypeStruct):
        raise AqError(
            f"{name}: is a ShapeDtypeStruct, which has a shape and no values; wanted an array: the shape of what is "
            "made of one is found by jax.eval_shape"
        )
    refuse_mask(value, name)
    if is_torch(value):
        return jax.numpy.asarray(from_torch(value, name))
    try:
        return jax.numpy.asarray(native(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else value)
    except (TypeError, ValueError) as error:
        raise AqError(f"{name}: {type(value).__name__} is no array: {str(error)[:200]}") from None


def refuse_mask(value: Any, name: str) -> None:
    """Refuse a NumPy array with a mask, which no other array has.

    Raises:
        AqError: naming it.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise AqError(f"{name}: is a masked array, whose mask would be lost; wanted one without: value.filled(0), say")


def native(array: np.ndarray) -> np.ndarray:
    """The array in this machine's order of bytes."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _from_lists(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise AqError(f"{name}: {type(value).__name__} is no array: {str(error)[:200]}") from None


def is_variable(value: Any) -> bool:
    """Whether it is a variable of Flax NNX, such as nnx.Param; Flax is not imported to see."""
    # Another thread may be importing it.
    return isinstance(value, getattr(sys.modules.get("flax.nnx"), "Variable", ()))


def unwrapped(value: Any) -> Any:
    """What a variable of Flax NNX holds; anything else as it is."""
    return value.get_value() if is_variable(value) else value


def identity(value: Any) -> object:
    """What two values share if they are one: the object or, since torch makes new ones for the same memory, that.

    Of a QTensor and a prepared weight their arrays: a variable of Flax NNX gives others of them whenever it is asked.
    """
    if isinstance(value, QTensor):
        return tuple(identity(part) for part in (value.codes, value.scale, value.zero_point)), value.spec, value.length
    if isinstance(value, Prepared):
        import jax

        return tuple(map(id, jax.tree.leaves(value))), value.like
    if not is_torch(value) or not value.numel() or value.layout != torch_module().strided or value.is_meta:
        return id(value)
    place = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
    return (*place, value.dtype, value.device, value.is_conj(), value.is_neg())


def as_dtype(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Floating arrays in another floating dtype, others as they are; None leaves everything as it is.

    Raises:
        ConfigError: if the dtype is unknown, or not floating.
    """
    if dtype is None:
        return array
    name = str(dtype).removeprefix("torch.") if not isinstance(dtype, type | np.dtype) else np.dtype(dtype).name
    if name not in DTYPES or "float" not in name:
        known = ", ".join(known for known in DTYPES if "float" in known)
        raise ConfigError(f"dtype = {dtype!r}: wanted None or a floating dtype: {known}")
    target = DTYPES[name]
    if "float" not in array.dtype.name or array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        return array.astype(target)
