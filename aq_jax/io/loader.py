"""The face of a table for those who want arrays: tensors by name, for JAX, torch and NumPy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
from jax.sharding import Sharding

from aq_jax.core.frameworks import Framework, check_framework
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import FormatError
from aq_jax.io.dense import load_dense
from aq_jax.io.qtensors import read_packed
from aq_jax.io.sharded import check_names, load_sharded
from aq_jax.store import RowInfo, TableReader, open_table


class WeightLoader:
    """An open table, or a folder of shards, from which tensors are loaded one by one or all together.

    Threads may share one loader. Opening reads names, shapes and digests only.

    Args:
        path: a .parquet or .arrow table of schema V1 or V2, or a folder of them.
        verify: compare every row that is read whole with its digest; only sizes and scales can be checked of those that
            `load_sharded` reads in part.

    Raises:
        FileNotFoundError: if there is nothing at that path.
        FormatError: if it is no table of this format.
        IntegrityError: if rows are missing, or metadata is not what was written.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/m.parquet"
    >>> aq.save(path, {"a": np.arange(3.0), "w": aq.quantize(np.ones((2, 8), np.float32), "int8")})
    >>> with aq.WeightLoader(path) as loader:
    ...     loader.get_layer_names(), loader.get_layer("a").tolist(), loader.get_quantized("w").shape
    (['a', 'w'], [0.0, 1.0, 2.0], (2, 8))
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = True) -> None:
        self._reader = open_table(path, verify)

    def __enter__(self) -> Self:
        _ = self._table  # refuses a closed one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Arrays that were loaded stay valid; asking for anything else raises ValueError."""
        self._reader.close()

    @property
    def _table(self) -> TableReader:
        return self._reader.opened()

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied tensors: name -> the name under which the tensor is stored."""
        return self._table.aliases

    @property
    def config(self) -> Mapping[str, Any]:
        """What the table says of how it was made; nothing for tables of other writers.

        >>> import numpy as np, tempfile
        >>> import aq_jax as aq
        >>> aq.save(path := tempfile.mkdtemp() + "/m.parquet", {"w": np.ones(2)}, config={"made": "by hand"})
        >>> with WeightLoader(path) as loader:
        ...     loader.config
        {'made': 'by hand'}
        """
        return self._table.config

    @property
    def bytes_read(self) -> int:
        """How many bytes of data, scales and zero points were read so far, uncompressed; if read twice, counted twice.

        >>> import numpy as np, tempfile
        >>> import aq_jax as aq
        >>> aq.save(path := tempfile.mkdtemp() + "/m.parquet", {"bias": np.ones(3, np.float32), "w": np.ones((2, 4))})
        >>> with WeightLoader(path) as loader:
        ...     _ = loader.get_layer("bias")
        ...     loader.bytes_read
        12
        """
        return self._table.bytes_read

    @property
    def partly_read(self) -> frozenset[str]:
        """The stored names of tensors that `load_sharded` read in part: their digests could not be compared."""
        return self._table.partly_read

    def get_layer_names(self) -> list[str]:
        """All names in the table's order, tied ones last."""
        return [*self._table.names, *self._table.aliases]

    def describe(self, name: str) -> RowInfo:
        """What the table knows of a tensor without reading it: its first row, less the arrays."""
        return self._table.pieces(name)[0]

    def get_layer(self, name: str, framework: Framework = "jax", *, dtype: Any = None, copy: bool = True) -> Any:
        """One tensor: quantized ones as float32, others in their own dtype.

        Args:
            name: of the tensor, or an alias.
            framework: "jax", "torch" or "numpy".
            dtype: what floating tensors are converted to.
            copy: True gives memory of its own. False lets tensors that are stored as they are alias the file where
                the framework and the alignment allow: NumPy views are read-only, JAX arrays cannot be written to,
                torch is still given a copy, because it would write through.

        Raises:
            KeyError: for an unknown name; the nearest is named.
            IntegrityError: if the row's bytes are not those that were written.
            ImportError: if torch is asked for and not installed.
            ValueError: if the loader is closed.

        >>> import numpy as np, tempfile
        >>> import aq_jax as aq
        >>> aq.save(path := tempfile.mkdtemp() + "/m.arrow", {"bias": np.ones(3, np.float32)})
        >>> with WeightLoader(path) as loader:
        ...     loader.get_layer("bias", framework="numpy", dtype="float16")
        array([1., 1., 1.], dtype=float16)
        """
        return load_dense(self._table, name, framework, dtype, copy)

    def get_quantized(self, name: str, *, copy: bool = True) -> Any:
        """One tensor as a packed QTensor of JAX arrays; an unquantized one as the JAX array that it is.

        Args:
            name: of the tensor, or an alias.
            copy: as in `get_layer`.

        Raises:
            KeyError, IntegrityError, ValueError: as `get_layer`.

        >>> import numpy as np, tempfile
        >>> import aq_jax as aq
        >>> aq.save(path := tempfile.mkdtemp() + "/m.arrow", {"w": aq.quantize(np.ones((2, 8), np.float32), "int8")})
        >>> with WeightLoader(path) as loader:
        ...     loader.get_quantized("w")
        QTensor(int8[2, 8], QuantSpec(bits=8, per_channel=True, group_size=0, rotation=0))
        """
        return jax.device_put(read_packed(self._table, name, copy=copy))

    def load_sharded(
        self, name: str, sharding: Sharding, *, packed: bool = False, dtype: Any = None
    ) -> jax.Array | QTensor:
        """One tensor over many devices: this process reads the rows (of axis 0) that its devices hold, each once.

        Rows lie together in the file, and are read whole, also where other axes are sharded. Bytes that are compressed,
        or that another tool has written in a way of its own, are read as whole table rows. So are scales and zero
        points in Parquet, where they are compressed: a process reads those of every table row of which it needs a part.
        Of Arrow IPC, it reads those that its rows need.

        The digest of a table row covers all of its bytes: it is compared where this process needs all of them, and
        cannot be compared where it needs a part. Then sizes and scales are checked, and nothing else is; the tensor's
        name is in `partly_read`. Check a file once, before it is loaded in parts, by `aq-jax verify FILE`.

        Args:
            name: of the tensor, or an alias.
            sharding: of an array of the tensor's shape. Devices may be of several processes, all of which call this.
            packed: a quantized tensor as QTensor instead of float32. Its codes, scales and zero points are sharded on
                the same axes; scales are replicated along an axis that is not cut into whole groups.
            dtype: what floating tensors are converted to.

        Raises:
            FormatError: naming the tensor, if the sharding does not fit its shape, or cuts through a byte of codes.
            ConfigError: if the dtype is unknown, or not floating.
            KeyError, IntegrityError, ValueError: as `get_layer`.

        >>> import jax, numpy as np, tempfile
        >>> import aq_jax as aq
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> aq.save(path := tempfile.mkdtemp() + "/m.arrow", {"w": np.arange(8.0).reshape(4, 2)})
        >>> mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> with WeightLoader(path) as loader:
        ...     loader.load_sharded("w", NamedSharding(mesh, PartitionSpec("x")), dtype="float32").sharding.spec
        P('x',)
        """
        return load_sharded(self._table, name, sharding, packed, dtype)

    def load_weights(
        self,
        framework: Framework = "jax",
        packed: bool = False,
        *,
        dtype: Any = None,
        copy: bool = True,
        shardings: Mapping[str, Sharding] | None = None,
    ) -> dict[str, Any]:
        """All tensors by name; tied names share one array.

        Args:
            framework: "jax", "torch" or "numpy".
            packed: quantized tensors as QTensors (framework "jax" only).
            dtype: what floating tensors are converted to.
            copy: as in `get_layer`; shards always have memory of their own.
            shardings: where the tensors go, by name (framework "jax" only), as `load_sharded` does it; all stored names
                must be there. Tied names may be, if their sharding is that of the stored name.

        Raises:
            FormatError: if packed QTensors, or shards, are asked for in another framework than JAX; if shardings lack
                names or have others, and as `load_sharded`.
            IntegrityError, ImportError, ValueError: as `get_layer`.

        >>> import numpy as np, tempfile
        >>> import aq_jax as aq
        >>> tied = np.ones(2, np.float32)
        >>> aq.save(path := tempfile.mkdtemp() + "/m.arrow", {"embed": tied, "head": tied})
        >>> with WeightLoader(path) as loader:
        ...     weights = loader.load_weights("numpy")
        >>> list(weights), weights["head"] is weights["embed"]
        (['embed', 'head'], True)
        """
        check_framework(framework)
        if shardings is not None:
            if framework != "jax":
                raise FormatError(f"shardings are of JAX arrays; framework={framework!r} has none")
            check_names(self._table, shardings)
            out = {
                name: self.load_sharded(name, shardings[name], packed=packed, dtype=dtype) for name in self._table.names
            }
        elif packed:
            if framework != "jax":
                raise FormatError(f"packed=True gives QTensors, which are JAX arrays; framework={framework!r} has none")
            # One transfer for all leaves: each costs more than its bytes do. A list, because JAX sorts dictionaries.
            values = jax.device_put([read_packed(self._table, name, dtype, copy=copy) for name in self._table.names])
            out = dict(zip(self._table.names, values, strict=True))
        else:
            out = {name: self.get_layer(name, framework, dtype=dtype, copy=copy) for name in self._table.names}
        return out | {alias: out[stored] for alias, stored in self._table.aliases.items()}


def load(
    path: str | os.PathLike[str],
    framework: Framework = "jax",
    packed: bool = False,
    *,
    dtype: Any = None,
    copy: bool = True,
    verify: bool = True,
    shardings: Mapping[str, Sharding] | None = None,
) -> dict[str, Any]:
    """All tensors of a table by name; see `WeightLoader.load_weights`.

    Args:
        path, verify: as `WeightLoader` has them.
        framework, packed, dtype, copy, shardings: as `WeightLoader.load_weights` has them.

    Raises:
        FileNotFoundError, FormatError, IntegrityError, ImportError: as `WeightLoader` and its methods.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/m.arrow"
    >>> aq.save(path, {"a": np.arange(3)})
    >>> aq.load(path, framework="numpy")
    {'a': array([0, 1, 2])}
    """
    with WeightLoader(path, verify) as loader:
        return loader.load_weights(framework, packed, dtype=dtype, copy=copy, shardings=shardings)
