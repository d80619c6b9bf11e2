"""Tables to arrays and back: rows <-> JAX, torch, NumPy and QTensor."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from aq_jax.config import Compression, QuantSpec
from aq_jax.core.bitstream import from_stream, to_stream
from aq_jax.core.frameworks import (
    Framework,
    aligned_copy,
    as_dtype,
    canonical,
    check_framework,
    identity,
    to_framework,
    to_numpy,
    torch_module,
    unwrapped,
)
from aq_jax.core.prepared import Prepared, to_qtensor
from aq_jax.core.qtensor import QTensor, scale_shape
from aq_jax.core.sharding import build, own_rows, parts, qtensor_shardings
from aq_jax.errors import FormatError
from aq_jax.store import DTYPES, Parts, Row, RowInfo, TableReader, TableWriter, decode, open_table, pieces

if TYPE_CHECKING:
    import jax
    from jax.sharding import Sharding

_NO_BYTES = np.empty(0, np.uint8)
_NO_FLOATS = np.empty(0, np.float32)


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
        self._reader = open_table(path)
        self._closed = False
        self._verify = verify

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
        self._closed = True

    @property
    def _table(self) -> TableReader:
        if self._closed:
            raise ValueError(f"{self._reader.path} is closed")
        return self._reader

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied tensors: name -> the name under which the tensor is stored."""
        return self._table.aliases

    @property
    def config(self) -> Mapping[str, Any]:
        """What the table says of how it was made; nothing for tables of other writers.

        >>> import tempfile
        >>> save(path := tempfile.mkdtemp() + "/m.parquet", {"w": np.ones(2)}, config={"made": "by hand"})
        >>> with WeightLoader(path) as loader:
        ...     loader.config
        {'made': 'by hand'}
        """
        metadata = self._table.metadata
        return metadata.config if metadata else {}

    @property
    def bytes_read(self) -> int:
        """How many bytes of data, scales and zero points were read so far, uncompressed; if read twice, counted twice.

        >>> import tempfile
        >>> save(path := tempfile.mkdtemp() + "/m.parquet", {"bias": np.ones(3, np.float32), "w": np.ones((2, 4))})
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
        return self._pieces(name)[0]

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

        >>> import tempfile
        >>> save(path := tempfile.mkdtemp() + "/m.arrow", {"bias": np.ones(3, np.float32)})
        >>> with WeightLoader(path) as loader:
        ...     loader.get_layer("bias", framework="numpy", dtype="float16")
        array([1., 1., 1.], dtype=float16)
        """
        check_framework(framework)
        if framework == "torch":
            torch_module()  # before anything is read
        rows = self._read(name)
        array = as_dtype(decode(rows), dtype)
        if copy and not array.flags.writeable:
            array = aligned_copy(array)
        return to_framework(array, framework, name)

    def get_quantized(self, name: str, *, copy: bool = True) -> Any:
        """One tensor as a packed QTensor of JAX arrays; an unquantized one as the JAX array that it is.

        Args:
            name: of the tensor, or an alias.
            copy: as in `get_layer`.

        Raises:
            KeyError, IntegrityError, ValueError: as `get_layer`.

        >>> import tempfile
        >>> import aq_jax as aq
        >>> save(path := tempfile.mkdtemp() + "/m.arrow", {"w": aq.quantize(np.ones((2, 8), np.float32), "int8")})
        >>> with WeightLoader(path) as loader:
        ...     loader.get_quantized("w")
        QTensor(int8[2, 8], QuantSpec(bits=8, per_channel=True, group_size=0, rotation=0))
        """
        import jax

        return jax.device_put(self._packed(name, copy))

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

        >>> import jax, tempfile
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> save(path := tempfile.mkdtemp() + "/m.arrow", {"w": np.arange(8.0).reshape(4, 2)})
        >>> mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> with WeightLoader(path) as loader:
        ...     loader.load_sharded("w", NamedSharding(mesh, PartitionSpec("x")), dtype="float32").sharding.spec
        P('x',)
        """
        as_dtype(_NO_FLOATS, dtype)  # refused before anything is read
        info = self._pieces(name)[0]
        if packed and info.quantized:
            return self._sharded_codes(info, sharding)
        parts(sharding, info.shape, name)
        inner = math.prod(info.shape[1:])
        ranges = [(start * inner, stop * inner) for start, stop in own_rows(sharding, info.shape)]
        found = Parts(self._table, info.layer_name, ranges, self._verify)

        def rows(start: int, stop: int) -> np.ndarray:
            array = as_dtype(found.values(start * inner, stop * inner), dtype)
            part = name if not start else f"{name}, from row {start} on"
            return canonical(array.reshape(stop - start, *info.shape[1:]), part)

        kept = np.empty(0, np.float32 if info.quantized else DTYPES[info.dtype])
        return build(info.shape, canonical(as_dtype(kept, dtype), name).dtype, sharding, rows)

    def _sharded_codes(self, info: RowInfo, sharding: Sharding) -> QTensor:
        name, shape, spec = info.layer_name, info.shape or (1,), spec_of(info)
        code, laid = spec.coding, qtensor_shardings(sharding, info.shape, spec, info.layer_name)
        (codes, dtype), grids = code.codes_like(shape), scale_shape(shape, spec)

        def elements(start: int, stop: int) -> tuple[int, int]:
            return code.element(start, shape), code.element(stop, shape)

        inner, beside = math.prod(shape[1:]), math.prod(grids[1:])
        groups = [(start * beside, stop * beside) for start, stop in own_rows(laid[1], grids)]
        ranges = [elements(*own) for own in own_rows(laid[0], codes)]
        found = Parts(self._table, name, ranges, self._verify, groups=groups)
        one = grids_of(found.rows) if info.quant_axis < 0 else None

        def rows(start: int, stop: int) -> np.ndarray:
            first, last = elements(start, stop)
            if dtype == "int8":
                return found.codes(first, last).reshape(stop - start, *codes[1:])
            return code.lay(found.stream(first, last), ((last - first) // max(inner, 1), *shape[1:]))

        def grid(which: int) -> jax.Array:
            def rows(start: int, stop: int) -> np.ndarray:
                values = one or found.grids(start * beside, stop * beside)
                return values[which].reshape(stop - start, *grids[1:])

            return build(grids, np.dtype(np.float32), laid[1], rows)

        zeros = grid(1) if code.zero_points else None
        return QTensor(
            build(codes, np.dtype(dtype), laid[0], rows), grid(0), zeros, spec, shape[-1], code.rows(shape)
        )  # fmt: skip

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

        >>> import tempfile
        >>> tied = np.ones(2, np.float32)
        >>> save(path := tempfile.mkdtemp() + "/m.arrow", {"embed": tied, "head": tied})
        >>> with WeightLoader(path) as loader:
        ...     weights = loader.load_weights("numpy")
        >>> list(weights), weights["head"] is weights["embed"]
        (['embed', 'head'], True)
        """
        check_framework(framework)
        if shardings is not None:
            if framework != "jax":
                raise FormatError(f"shardings are of JAX arrays; framework={framework!r} has none")
            self._check_names(shardings)
            out = {
                name: self.load_sharded(name, shardings[name], packed=packed, dtype=dtype) for name in self._table.names
            }
        elif packed:
            if framework != "jax":
                raise FormatError(f"packed=True gives QTensors, which are JAX arrays; framework={framework!r} has none")
            import jax

            # One transfer for all leaves: each costs more than its bytes do. A list, because JAX sorts dictionaries.
            values = jax.device_put([as_packed(self._packed(name, copy), dtype) for name in self._table.names])
            out = dict(zip(self._table.names, values, strict=True))
        else:
            out = {name: self.get_layer(name, framework, dtype=dtype, copy=copy) for name in self._table.names}
        return out | {alias: out[stored] for alias, stored in self._table.aliases.items()}

    def _check_names(self, shardings: Mapping[str, Sharding]) -> None:
        """Nothing is placed by guess."""
        lacking = [name for name in self._table.names if name not in shardings]
        unknown = sorted(set(shardings) - {*self._table.names, *self._table.aliases})
        untied = [
            f"{alias} (that of {stored} is another)"
            for alias, stored in self._table.aliases.items()
            if alias in shardings and stored in shardings and shardings[alias] != shardings[stored]
        ]
        wrong = [
            f"{what}: {_some(names)}"
            for what, names in (
                ("lack a sharding", lacking), ("are no layers", unknown), ("are tied, and want one sharding", untied)
            )
            if names
        ]  # fmt: skip
        if wrong:
            raise FormatError(f"{self._table.path}: shardings must name every layer, and no other; " + "; ".join(wrong))

    def _pieces(self, name: str) -> list[RowInfo]:
        stored = self._table.aliases.get(name, name)
        try:
            return self._table.pieces(stored)
        except KeyError:
            near = difflib.get_close_matches(str(name), self.get_layer_names(), 1, cutoff=0.0)
            hint = f"; the nearest is {near[0]!r}" if near else "; the table is empty"
            raise KeyError(f"{self._table.path}: no layer {name!r}{hint}") from None

    def _read(self, name: str) -> list[Row]:
        return [self._table.read(info.position, self._verify) for info in self._pieces(name)]

    def _packed(self, name: str, copy: bool) -> Any:
        """A QTensor of NumPy leaves, or an array, ready for one transfer."""
        rows = self._read(name)
        keep = aligned_copy if copy else np.asarray
        if not rows[0].quantized:
            array = canonical(decode(rows), name)
            return array if array.flags.writeable else keep(array)
        return packed_tensor(rows, keep)


def packed_tensor(rows: Sequence[Row], keep: Callable[[np.ndarray], np.ndarray] = np.asarray) -> QTensor:
    """The QTensor of NumPy leaves that quantized rows hold; `keep` is what each array goes through."""
    data = rows[0].data if len(rows) == 1 else np.concatenate([row.data for row in rows])
    scales, zeros = grids_of(rows)
    return from_stream(keep(data), keep(scales), keep(zeros), rows[0].shape, spec_of(rows[0]))


def as_packed(value: Any, dtype: Any) -> Any:
    return value if isinstance(value, QTensor) else as_dtype(value, dtype)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def grids_of(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points of a tensor, of all its rows.

    Raises:
        FormatError: if it has one grid, and the rows have several.
    """
    scales, zeros = (np.concatenate(a) for a in ([r.scales for r in rows], [r.zero_points for r in rows]))
    if rows[0].quant_axis < 0:  # every piece repeats the one grid of the tensor
        if (scales != scales[0]).any() or (zeros != zeros[:1]).any():
            raise FormatError(f"{rows[0].layer_name}: pieces of one grid have scales {scales.tolist()}; wanted one")
        scales, zeros = scales[:1], zeros[:1]
    return scales, zeros


def spec_of(row: Row | RowInfo) -> QuantSpec:
    """The numerics of a quantized row."""
    assert row.code is not None  # noqa: S101
    channels = row.quant_axis == 0 and not row.group_size
    return QuantSpec(row.code.bits, channels, row.group_size, row.rotation, row.code.plain)


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
        path: a table, or a folder of them.
        framework: "jax", "torch" or "numpy".
        packed: quantized tensors as QTensors (framework "jax" only).
        dtype: what floating tensors are converted to.
        copy: as in `WeightLoader.get_layer`.
        verify: compare every row with its digest (see `WeightLoader.load_sharded` for rows that are read in part).
        shardings: where the tensors go, by name, as in `WeightLoader.load_weights`.

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


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    config: Mapping[str, object] | None = None,
    compression: Compression = "none",
) -> None:
    """Write arrays and QTensors to a table: V1 if nothing is quantized, else V2.

    A value that stands under several names (the same object, or torch tensors over the same memory) is stored once
    and comes back under all of them. A QTensor is recorded as float32, whatever it was made from; `quantize_file`
    and `convert` record the dtype that a tensor had.

    Args:
        path: .parquet or .arrow; appears whole, or not at all.
        tensors: JAX, NumPy or torch arrays, or QTensors, by name; also as variables of Flax NNX. Of what `prepare` made
            the QTensor is stored.
        config: kept in the table's metadata.
        compression: "zstd" compresses the weights too (.parquet only).

    Raises:
        AqError: for a value that is no tensor, a masked array, and a shape without values.
        FormatError: for a file name, a tensor name or a shape that the format does not have.
        ValueError: for a batch of QTensors whose groups cross rows.

    >>> import jax.numpy as jnp, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/m.parquet"
    >>> aq.save(path, {"w": aq.quantize(jnp.ones((2, 8)), "int8"), "bias": jnp.zeros(2)}, config={"made": "by hand"})
    >>> list(aq.load(path))
    ['w', 'bias']
    """
    # Once: of a mapping that makes its values when asked, an object's id would mean nothing.
    tensors = {name: unwrapped(value) for name, value in tensors.items()}
    quantized = any(isinstance(value, QTensor | Prepared) for value in tensors.values())
    seen: dict[object, str] = {}
    with TableWriter(path, version=2 if quantized else 1, config=config, compression=compression) as table:
        for name, value in tensors.items():
            if (stored := seen.setdefault(identity(value), name)) != name:
                table.alias(name, stored)
                continue
            if isinstance(value, QTensor | Prepared):
                rows = packed_rows(name, to_qtensor(value))
            else:
                rows = plain_rows(name, to_numpy(value, name))
            for row in rows:
                table.write(as_v2(row) if quantized else row)


def plain_rows(name: str, array: np.ndarray, dtype: str | None = None, quant_type: str | None = None) -> Iterator[Row]:
    """The rows of a tensor that is stored as it is: one, or several of at most 1 GiB."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype == np.bool_ and flat.view(np.uint8).max(initial=0) > 1:  # which nobody could load again
        raise FormatError(f"{name}: holds bytes other than 0 and 1, which are no bool; wanted those, or dtype uint8")
    for start, stop in pieces(array.shape, array.dtype.name):
        data = flat[start:stop].view(np.uint8) if stop > start else _NO_BYTES
        yield Row(name, array.shape, dtype or array.dtype.name, data, stop - start, quant_type)


def as_v2(row: Row) -> Row:
    """A plain row as a V2 table holds it."""
    return row if row.quant_type else Row(row.layer_name, row.shape, row.dtype, row.data, row.num_params, "none")


def packed_rows(name: str, q: QTensor, dtype: str = "float32") -> Iterator[Row]:
    """The rows of a QTensor that was made of a tensor of this dtype: its codes as one bit stream, flattened."""
    arrays = {part: getattr(q, part) for part in ("codes", "scale", "zero_point")}
    parts = {part: to_numpy(array, f"{name}.{part}") for part, array in arrays.items() if array is not None}
    stream, scales, zeros = to_stream(dataclasses.replace(q, **parts))
    spec, size = q.spec, q.spec.group_elements(q.shape)
    cuts = pieces(q.shape, dtype, spec.quant_type, spec.quant_axis, spec.group_size)
    for start, stop in cuts:
        # One grid a tensor is repeated in each piece; and channels have one each even if they are empty.
        grids = slice(start // size, -(-stop // size)) if spec.quant_axis == 0 and len(cuts) > 1 else slice(None)
        data = stream[slice(*spec.coding.span(start, stop, q.shape))]
        yield Row(
            name, q.shape, dtype, data, stop - start, spec.quant_type,
            scales[grids], zeros[grids], spec.quant_axis, spec.group_size, spec.rotation,
        )  # fmt: skip
