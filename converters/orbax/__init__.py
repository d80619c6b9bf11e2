"""Convert trees of arrays and QTensors to Orbax checkpoints and back, and checkpoints to tables and back.

Orbax stores no static fields, and does not check the bytes of arrays. So a checkpoint has two checkpointables:
`aq_jax_arrays`, a flat dictionary of arrays, codes as uint8; and `aq_jax_metadata`, JSON:

    format, version, writer     "aq_jax.orbax", "1.0", who wrote it
    tree                        the name of a tensor, null, or {"dict" | "list" | "tuple": [[key, tree], ...]}
    tensors                     name -> {"array"}, or {"codes", "scale", "zero_point", "spec", "length"}, each array as
                                {"shape", "dtype", "digest"}; "row" is what a table knows beside that
    config                      of the table that the tensors came from
    digest                      BLAKE3 over all other entries, as JSON with sorted keys and no spaces

The digest of an array is BLAKE3 over its bytes, row-major and little-endian. An array of no elements is in the metadata
alone. The key of an array is the name of its tensor, percent-encoded; for the parts of a QTensor followed by
":codes", ":scale", ":zero_point".
"""

from aq_jax.converters.orbax.checkpoint import load, save
from aq_jax.converters.orbax.source import from_table, to_table

__all__ = ["from_table", "load", "save", "to_table"]
