"""List what a place holds, of any known format, from its headers alone."""

from __future__ import annotations

import math
import os

from aq_jax.converters.formats import open_source, recognize, resolve
from aq_jax.store.inspection import Inspection, Layer, inspect_table

_TABLES = ("table", "shards")


def inspect(location: str | os.PathLike[str]) -> Inspection:
    """List the tensors of a table, or of weights of any of `FORMATS`: shape, type, bits. No tensor is read.

    Args:
        location: A path, a URL, `package:NAME/FOLDER` inside an installed package, or `hf:ORG/NAME`, which is fetched.

    Raises:
        FormatError: if it is of no known format, or damaged.
        IntegrityError: if a table's metadata and its rows do not belong together.
        OSError: if it does not exist, or cannot be read.

    >>> import numpy as np, safetensors.numpy, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> safetensors.numpy.save_file({"w": np.ones((4, 8), np.float16)}, folder + "/model.safetensors")
    >>> found = inspect(folder)
    >>> found.format, [(layer.name, layer.shape, layer.quant_type, layer.bits) for layer in found.layers]
    ('huggingface', [('w', (4, 8), 'float16', 16.0)])
    """
    found = resolve(location)
    if (name := recognize(location, found, first=_TABLES)) in _TABLES:
        return inspect_table(found)
    with open_source(found, packed=True, first=(name,)) as source:
        layers = []
        for tensor, (shape, dtype) in source.shapes.items():
            params, size = math.prod(shape), source.nbytes(tensor)
            said = source.row_metadata.get(tensor, {}).get("dtype", dtype.name)
            kind = source.quantized.get(tensor, dtype.name)
            layers.append(
                Layer(tensor, shape, said, kind, params, size, size * 8 / params if params else 0.0, None, None)
            )
        states = [state for _, state in source.file_states() if isinstance(state, dict)]
        total = sum(state["size"] for state in states) if states else sum(layer.bytes for layer in layers)
        return Inspection(os.fspath(location), 0, total, tuple(layers), dict(source.aliases), {}, name)
