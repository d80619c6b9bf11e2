"""The few small tensors of a module of sentence-transformers: safetensors, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from aq_jax.errors import FormatError
from aq_jax.io.tensorfile import read_header
from aq_jax.store import DTYPES
from aq_jax.store.folders import Folder

FILE, PICKLE = "model.safetensors", "pytorch_model.bin"
MOST_HEADER = 1 << 16
FLOATS = ("float64", "float32", "float16", "bfloat16")


def read_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Read a folder's model.safetensors, which must hold tensors of these names and shapes and no others.

    Nothing is allocated before the header was checked, and shapes and size were compared.

    Raises:
        FormatError: if there is no such file, if it is damaged, or holds something else.
    """
    file = folder / FILE
    if not file.is_file():
        if (folder / PICKLE).exists():
            raise FormatError(
                f"{folder / PICKLE}: is a pickle, which can run code when it is read; save it as {FILE}, with "
                "safetensors.torch.save_file, where it comes from"
            )
        raise FormatError(f"{file}: no such file; wanted {', '.join(shapes)}, which the module consists of")
    where = Folder(folder)
    extents, _ = read_header(where, FILE, MOST_HEADER)
    if sorted(extents) != sorted(shapes):
        raise FormatError(f"{file}: holds {str(sorted(extents))[:200]}; wanted {', '.join(shapes)}")
    found = {}
    for name, shape in shapes.items():
        extent = extents[name]
        if extent.shape != shape or extent.dtype not in FLOATS:
            raise FormatError(
                f"{file}: {name} is {extent.dtype} of shape {list(extent.shape)}; wanted floats of {list(shape)}"
            )
        values = np.frombuffer(where.read(FILE, extent.offset, extent.size), DTYPES[extent.dtype])
        with np.errstate(over="ignore"):
            found[name] = values.reshape(shape).astype(np.float32)
        if not np.isfinite(found[name]).all():
            raise FormatError(f"{file}: {name} holds numbers that are not finite, or too large for float32")
    return found
