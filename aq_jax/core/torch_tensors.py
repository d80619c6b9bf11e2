"""Hand NumPy arrays to torch, and back. torch is imported only where a torch tensor is made or read."""

from __future__ import annotations

import types
from typing import Any

import numpy as np

from aq_jax.errors import AqError
from aq_jax.store import DTYPES, aligned_copy

# NumPy has no names for these, so torch takes and gives their bits.
_BITS_OF = {1: np.uint8, 2: np.int16}


def is_torch(value: Any) -> bool:
    """Tell whether a value is a torch tensor, or of a subclass, without importing torch."""
    return any(kind.__module__.partition(".")[0] == "torch" for kind in type(value).__mro__)


def torch_module() -> types.ModuleType:
    """Import torch.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise ImportError("framework='torch' needs torch; install it with: pip install 'aq-jax[torch]'") from None
    return torch


def to_torch(array: np.ndarray, name: str) -> Any:
    """Hand an array over to torch; see `to_framework`."""
    torch = torch_module()
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = aligned_copy(array)
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    dtype = getattr(torch, array.dtype.name, None)
    if dtype is None:
        raise AqError(f"{name}: torch has no dtype {array.dtype.name}; load with framework='numpy'")
    return torch.from_numpy(array.view(_BITS_OF[array.dtype.itemsize])).view(dtype)


def from_torch(tensor: Any, name: str) -> np.ndarray:
    """View a tensor's values in NumPy; see `to_numpy`."""
    torch = torch_module()
    dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout != torch.strided or tensor.is_meta:
        raise AqError(
            f"{name}: {tensor.layout} {tensor.dtype} tensor on {tensor.device} has no plain values to store; "
            f"wanted a dense tensor of one of {', '.join(DTYPES)}"
        )
    tensor = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    if dtype.isbuiltin == 1:
        return tensor.numpy()
    bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.uint8)
    return bits.numpy().view(dtype)
