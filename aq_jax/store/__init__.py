"""Tables of weights in Parquet and Arrow IPC: written whole, read lazily, checked throughout. No jax, no torch.

docs/format.md describes the format.
"""

from aq_jax.store.decode import aligned_copy, aligned_empty, decode, dequantize_rows, raw_array
from aq_jax.store.digest import row_digest
from aq_jax.store.layout import pieces
from aq_jax.store.partial import PartialTensor
from aq_jax.store.reader import TableReader, open_table
from aq_jax.store.row_rules import check
from aq_jax.store.rows import Row, RowInfo, cut_grids
from aq_jax.store.schema import DTYPES, V1, V2, parse_dtype
from aq_jax.store.writer import TableWriter, check_table, write_table

__all__ = [
    "DTYPES",
    "V1",
    "V2",
    "PartialTensor",
    "Row",
    "RowInfo",
    "TableReader",
    "TableWriter",
    "aligned_copy",
    "aligned_empty",
    "check",
    "check_table",
    "cut_grids",
    "decode",
    "dequantize_rows",
    "open_table",
    "parse_dtype",
    "pieces",
    "raw_array",
    "row_digest",
    "write_table",
]
