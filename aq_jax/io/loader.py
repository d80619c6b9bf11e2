"""Load tensors from a table by name, as arrays of JAX, torch and NumPy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import jax
from jax.sharding import Sharding

from aq_jax.core.frameworks import Framework, check_framework, to_jax_dtype
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import FormatError
from aq_jax.io.dense import load_dense, read_dense
from aq_jax.io.qtensors import read_packed
from aq_jax.io.sharded import check_names, load_sharded
from aq_jax.store import RowInfo, TableReader, open_table


class WeightLoader:
    """An open table, or a folder of shards, from which tensors are loaded one by one or all together.

    Threads may share one loader. Opening reads names, shapes and digests only.

    Args:
        path: The path of a .parquet or .arrow table of schema V1 or V2, or of a folder of them.
        verify: Whether to compare every row that is read whole with its digest. Of rows that `load_sharded` reads in
            part, only sizes and scales can be checked.

    Raises:
        FileNotFoundError: if there is nothing at that path.
        FormatError: if it is not a table of this format.
        IntegrityError: if rows are missing, or the metadata was changed.

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
        _ = self._table  # raises if it is closed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Arrays that were loaded stay valid; loading more raises ValueError."""
        self._reader.close()

    @property
    def _table(self) -> TableReader:
        return self._reader.ensure_open()

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied tensors: name -> the name under which the tensor is stored."""
        return self._table.aliases

    @property
    def config(self) -> Mapping[str, Any]:
        """The config that made the table; empty for tables of other writers.

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
        """The bytes of data, scales and zero points read so far, uncompressed; bytes read twice count twice.

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
        """List all names in the table's order, tied ones last."""
        return [*self._table.names, *self._table.aliases]

    def describe(self, name: str) -> RowInfo:
        """Describe a tensor without reading it, by its first row without the arrays."""
        return self._table.pieces(name)[0]

    def get_layer(self, name: str, framework: Framework = "jax", *, dtype: Any = None, copy: bool = True) -> Any:
        """Load one tensor: quantized ones as float32, others in their own dtype.

        Args:
            name: The tensor's name, or an alias.
            framework: "jax", "torch" or "numpy".
            dtype: The dtype that floating tensors are converted to. Values of quantized ones beyond its largest number
                become that number.
            copy: Whether the array has its own memory. False lets unquantized tensors alias the file where the
                framework and the alignment allow: NumPy views are read-only, JAX arrays cannot be written to, and
                torch still gets a copy, because it would write through.

        Raises:
            KeyError: for an unknown name, naming the nearest.
            ConfigError: if the framework is unknown, or the dtype is unknown or not floating.
            FormatError: if the row's bytes are not values of its dtype.
            IntegrityError: if the row's bytes were changed.
            AqError: naming the first value of an unquantized tensor that the dtype, or JAX's, does not hold.
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
        """Load one tensor as a packed QTensor of JAX arrays; an unquantized one as a JAX array.

        Args:
            name: The tensor's name, or an alias.
            copy: See `get_layer`.

        Raises:
            KeyError, FormatError, IntegrityError, AqError, ValueError: as for `get_layer`.

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
        """Load one tensor over many devices: this process reads the rows (of axis 0) that its devices hold, each once.

        Rows are contiguous in the file, and are read whole, also where other axes are sharded. Compressed bytes, and
        those in another tool's layout, are read as whole table rows. So are scales and zero points in Parquet, which
        are compressed: a process reads those of every table row of which it needs a part. From Arrow IPC it reads only
        those that its rows need.

        The digest of a table row covers all of its bytes: it is compared only where this process needs all of them.
        Otherwise only sizes and scales are checked, and the tensor's name is in `partly_read`. Check a file once,
        before it is loaded in parts, by `aq-jax verify FILE`.

        Args:
            name: The tensor's name, or an alias.
            sharding: The sharding of an array of the tensor's shape. If devices belong to several processes, all of
                them call this.
            packed: Whether a quantized tensor becomes a QTensor instead of float32. Its codes, scales and zero points
                are sharded on the same axes; scales are replicated along an axis that is not cut into whole groups.
            dtype: See `get_layer`.

        Raises:
            FormatError: naming the tensor, if the sharding does not fit its shape, or cuts through a byte of codes; and
                as for `get_layer`.
            ConfigError, KeyError, IntegrityError, AqError, ValueError: as for `get_layer`.

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
        """Load all tensors by name; tied names share one array.

        Args:
            framework: "jax", "torch" or "numpy".
            packed: Whether quantized tensors become QTensors (framework "jax" only).
            dtype: See `get_layer`.
            copy: See `get_layer`; shards always have memory of their own.
            shardings: The shardings by name (framework "jax" only; see `load_sharded`). All stored names must be there;
                tied names may be, with the sharding of the stored name.

        Raises:
            FormatError: if packed QTensors, or shards, are asked for in another framework than JAX; if shardings lack
                names or have others, and as `load_sharded`.
            ConfigError, IntegrityError, ImportError, AqError, ValueError: as `get_layer`.

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
            out = self._to_jax(lambda name: read_packed(self._table, name, dtype, copy=copy))
        elif framework == "jax":
            out = self._to_jax(lambda name: to_jax_dtype(read_dense(self._table, name, dtype, copy), name))
        else:
            out = {name: self.get_layer(name, framework, dtype=dtype, copy=copy) for name in self._table.names}
        return out | {alias: out[stored] for alias, stored in self._table.aliases.items()}

    def _to_jax(self, read: Callable[[str], Any]) -> dict[str, Any]:
        """Transfer all tensors at once: each transfer costs more than its bytes do."""
        values = jax.device_put([read(name) for name in self._table.names])  # a list, as JAX sorts dictionaries
        return dict(zip(self._table.names, values, strict=True))


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
    """Load all tensors of a table by name; see `WeightLoader.load_weights`.

    Args:
        path, verify: The arguments of `WeightLoader`.
        framework, packed, dtype, copy, shardings: The arguments of `WeightLoader.load_weights`.

    Raises:
        FileNotFoundError, FormatError, IntegrityError, ImportError, ConfigError, AqError: as for `WeightLoader` and its
            methods.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/m.arrow"
    >>> aq.save(path, {"a": np.arange(3)})
    >>> aq.load(path, framework="numpy")
    {'a': array([0, 1, 2])}
    """
    with WeightLoader(path, verify) as loader:
        return loader.load_weights(framework, packed, dtype=dtype, copy=copy, shardings=shardings)
