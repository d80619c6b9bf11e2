"""Write embeddings of texts to a NumPy file, or to a Parquet table that SQL and data frames read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Real

from aq_jax.errors import ConfigError
from aq_jax.store.files import atomic_write, check_writable

SUFFIXES = (".npy", ".parquet")


_COLUMNS = ["text", "embedding"]


def check_embeddings_path(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()) -> Path:
    """Check that embeddings can be written to a path, and return it.

    Args:
        path: The path.
        inputs: The files that the embeddings are made from.

    Raises:
        ConfigError: for another suffix, for a folder, for one of the inputs, and for a .parquet file that exists and
            holds no embeddings.
        OSError: for a folder that cannot be written to.

    >>> check_embeddings_path("emb.npy").suffix
    '.npy'
    """
    if Path(path).suffix not in SUFFIXES:
        raise ConfigError(f"{path}: wanted a name that ends in {' or '.join(SUFFIXES)}")
    if Path(path).is_dir():
        raise ConfigError(f"{path}: is a folder; wanted the name of a file")
    for each in inputs:
        if os.path.exists(path) and os.path.exists(each) and os.path.samefile(path, each):
            raise ConfigError(f"{path}: is the file {each} that is read; write the embeddings to another")
    if Path(path).suffix == ".parquet" and Path(path).exists() and not _has_embeddings(Path(path)):
        raise ConfigError(
            f"{path}: already exists and holds no embeddings (columns {' and '.join(_COLUMNS)}), which it would be "
            "replaced by; name another file, or remove it"
        )
    check_writable(Path(path))
    return Path(path)


def _has_embeddings(path: Path) -> bool:
    """Return whether a file is as `write_embeddings` writes it, or empty."""
    try:
        with path.open("rb") as file:
            return not os.fstat(file.fileno()).st_size or pq.read_schema(file).names == _COLUMNS
    except pa.ArrowException:  # no Parquet
        return False


def write_embeddings(
    path: str | os.PathLike[str], texts: Sequence[str], embeddings: Real[np.ndarray, "texts width"]
) -> None:
    """Write one embedding a text: .npy holds the array, .parquet the columns `text` and `embedding`.

    Args:
        path: The path of the file, which appears whole, or not at all.
        texts: The texts in the order of the embeddings; .npy does not hold them.
        embeddings: The embeddings, in float32 or integers.

    Raises:
        ConfigError, OSError: as `check_embeddings_path`.

    >>> import tempfile
    >>> write_embeddings(path := tempfile.mkdtemp() + "/e.parquet", ["a", "b"], np.ones((2, 3), np.float32))
    >>> pq.read_table(path).to_pylist()[0]
    {'text': 'a', 'embedding': [1.0, 1.0, 1.0]}
    """
    target = check_embeddings_path(path)
    values = np.ascontiguousarray(embeddings)
    with atomic_write(target) as temporary:
        if target.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, values)
        else:
            column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
            lines = pa.array([text.encode("utf-8", "replace").decode() for text in texts], pa.string())
            table = pa.table([lines, column], _COLUMNS)
            with temporary.open("wb") as file:  # pyarrow itself opens only names in UTF-8
                pq.write_table(table, file)
