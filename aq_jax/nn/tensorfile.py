"""The few small tensors of a module of sentence-transformers: safetensors, in float32."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors

from aq_jax.errors import FormatError

FILE, PICKLE = "model.safetensors", "pytorch_model.bin"
MOST_HEADER = 1 << 16
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Read a folder's model.safetensors, which must hold tensors of these names and shapes and no others.

    Nothing is allocated before the library has checked the header, and shapes and size were compared.

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
    try:
        with safetensors.safe_open(file, framework="numpy") as handle:  # checks bounds, overlaps, sizes
            names = sorted(handle.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(f"{file}: not a safetensors file: {str(error)[:300]}") from None
    if names != sorted(shapes):
        raise FormatError(f"{file}: holds {str(names)[:200]}; wanted {', '.join(shapes)}")
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > MOST_HEADER:
            raise FormatError(f"{file}: its header has {size} bytes; {MOST_HEADER} are read")
        header, found = json.loads(opened.read(size)), {}
        for name, shape in shapes.items():
            entry = header[name]
            if tuple(entry["shape"]) != shape or entry["dtype"] not in DTYPES:
                raise FormatError(
                    f"{file}: {name} is {entry['dtype']} of shape {entry['shape']}; wanted floats of {list(shape)}"
                )
            dtype = np.dtype(DTYPES[entry["dtype"]])
            opened.seek(8 + size + entry["data_offsets"][0])
            values = np.frombuffer(opened.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            found[name] = np.ascontiguousarray(values, np.float32)
            if not np.isfinite(found[name]).all():
                raise FormatError(f"{file}: {name} holds numbers that are not finite, or too large for float32")
    return found
