"""Codes that nobody knows but this script, on two devices: from a weight to every place where codes are used.

tests/codes/test_open_table.py runs it. If anything else had to change for such a code, the table would not be open.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import aq_jax as aq
from aq_jax.calibration.row_scales import check_trainable
from aq_jax.codes import CODES, Affine, Elementwise, Grid, bits_jax
from aq_jax.codes.bits import pack_codes, unpack_codes
from aq_jax.converters import orbax
from aq_jax.core.bitstream import from_stream
from aq_jax.io import qtensors as loading
from aq_jax.nn import quantize_module
from aq_jax.store import pieces
from aq_jax.store.inspection import inspect_table
from aq_jax.store.verify import verify_table

LEVELS = np.float32([-1, -0.7, -0.52, -0.39, -0.28, -0.18, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1])


@dataclass(frozen=True)
class Codebook(Elementwise):
    """Sixteen levels that are not evenly spaced, a scale a group, and no zero points."""

    name = "toy16"
    bits = 4

    def encode(self, w: Any, grid: Grid) -> Any:
        xp = w.__array_namespace__()
        x = w * (1 / grid.scale)[..., None]
        found = xp.searchsorted(xp.asarray((LEVELS[1:] + LEVELS[:-1]) / 2), x)
        return xp.where(x == x, found - 8, -1).astype(xp.float32)

    def decode(self, codes: Any, scale: Any, zero_point: Any) -> Any:
        xp = codes.__array_namespace__()
        return xp.asarray(LEVELS)[codes.astype(xp.int32) + 8] * scale[..., None]


@dataclass(frozen=True)
class Tiled(Codebook):
    """The same levels, tiles of four rows one after the other, each column by column: no row's codes are together."""

    name = "tiled16"
    max_level = 0  # no quantizer of grids lays its codes so

    def cut_step(self, group: int, shape: Sequence[int]) -> int:
        return 4 * shape[-1]

    def read_step(self, shape: Sequence[int]) -> int:
        return 4 * shape[-1]

    def codes_like(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        return (*shape[:-2], shape[-2] // 4, 2 * shape[-1]), "uint8"

    def rows(self, shape: tuple[int, ...]) -> int:
        return shape[-2]

    def shape(self, codes: tuple[int, ...], length: int, rows: int | None) -> tuple[int, ...]:
        assert rows is not None
        return (*codes[:-2], rows, length)

    def from_stream(self, stream: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return stream.reshape(self.codes_like(shape)[0])

    def to_stream(self, codes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.ascontiguousarray(codes).reshape(-1)

    def row_start(self, row: int, shape: tuple[int, ...]) -> int:
        return 4 * row * shape[-1]

    def axes(self, ndim: int) -> tuple[int | None, ...]:
        return (*range(ndim - 1), None)

    def refuses_shards(self, shape: tuple[int, ...], parts: Sequence[int]) -> str:
        return "cuts columns of tiles, which cannot be cut" if parts[-1] > 1 or shape[-2] // 4 % parts[-2] else ""

    def read(self, data: Any, scales: Any, zero_points: Any, group: int, shape: Any, out: np.ndarray) -> None:
        codes = unpack_codes(data, 4, out.size).reshape(-1, shape[-1], 4).swapaxes(1, 2)
        self.fill(codes.reshape(-1, group), scales, None, out.reshape(-1, group))

    def values(self, q: Any) -> Any:
        codes = bits_jax.unpack_float(q.codes, 4).reshape(*q.codes.shape[:-1], q.length, 4).swapaxes(-1, -2)
        return self.decode(codes.reshape(q.shape), q.scale[..., 0], None)

    def take(self, table: Any, ids: Any, inside: Any) -> Any:
        return jnp.where(inside[..., None], jnp.take(self.values(table), ids, axis=0, mode="clip"), jnp.nan)


def seven_bits(w: np.ndarray, value: np.ndarray) -> None:
    """Between what six and eight bits give."""
    assert 1e-3 < np.abs(value - w).max() < 0.04


def nearest_level(w: np.ndarray, value: np.ndarray) -> None:
    """Each group of 32 on the levels times its largest magnitude, found the slow way."""
    groups = w.reshape(-1, 32)
    scale = np.abs(groups).max(1, keepdims=True)
    code = np.abs((groups / scale)[..., None] - LEVELS).argmin(-1)
    np.testing.assert_allclose(value.reshape(-1, 32), LEVELS[code] * scale, rtol=1e-6, atol=0)


@dataclass(frozen=True)
class Case:
    """A code, what it makes of weights, and what a config may ask of it besides, or what is said then."""

    kind: str
    quant_type: str
    check: Callable[[np.ndarray, np.ndarray], None]
    rotate: bool = False
    solver: str | None = None
    refused: Mapping[str, tuple[Any, str]] | None = None


REFUSED = {
    "rotate": (True, "toy16 has no rotated form"),
    "symmetric": (False, "toy16 has no zero points; set symmetric = true"),
    "solver": ("gptq", "solver = 'gptq' cannot choose codes of toy16; set solver = 'absmax'"),
}
CASES = (
    Case("int7", "int7", seven_bits, solver="absmax"),
    Case("int7", "int7h", seven_bits, rotate=True, solver="absmax"),
    Case("toy16", "toy16", nearest_level, refused=REFUSED),
)


def main(folder: Path) -> None:
    for code in (Affine(7), Affine(7, rotated=True), Codebook(), Tiled()):
        CODES[code.name] = code
    w = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    for case in CASES:
        config = aq.QuantizationConfig(case.kind, group_size=32, rotate=case.rotate, solver=case.solver)
        here = folder / case.quant_type
        here.mkdir()
        q = aq.quantize(w, config)
        value = np.asarray(aq.dequantize(q))
        in_memory(case, config, w, q, value)
        tables(here, config, w, q, value)
        orbax_checkpoints(here, q)
        conversions(here, config, w, q)
        refusals(case, w, q)
    tiles(folder)


def same(found: Any, q: aq.QTensor) -> None:
    """The same tree of the same arrays."""
    assert jax.tree.structure(found) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, found, q)


def alike(found: aq.QTensor, q: aq.QTensor) -> None:
    """The same, but for what programs differ by that rotate: how they add up the products."""
    if not q.spec.rotation:
        same(found, q)
        return
    assert jax.tree.structure(found) == jax.tree.structure(q)
    np.testing.assert_allclose(found.scale, q.scale, rtol=2e-6, atol=0)
    steps = np.abs(levels(found).astype(int) - levels(q))
    assert steps.max() <= 1
    assert steps.mean() < 0.01


def levels(q: aq.QTensor) -> np.ndarray:
    return unpack_codes(np.asarray(q.codes), q.spec.bits, q.size)


def in_memory(case: Case, config: aq.QuantizationConfig, w: np.ndarray, q: aq.QTensor, value: np.ndarray) -> None:
    case.check(w, value)
    bits, x = q.spec.bits, jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)), jnp.float32)
    assert (q.spec.quant_type, q.codes.shape, q.codes.dtype) == (case.quant_type, (16, 8 * bits), np.uint8)
    assert (q.shape, q.nbytes) == (w.shape, 128 * bits + 128 * (2 if CODES[case.quant_type].zero_points else 1))
    assert (q.zero_point is None) is not CODES[case.quant_type].zero_points
    tree = aq.quantize_tree({"a": w, "b": w[0]}, config)
    alike(tree["a"], q)
    away = 1.01 * float(np.max(q.scale)) if q.spec.rotation else 0
    np.testing.assert_allclose(aq.fake_quant(w, config), value, rtol=0, atol=away)
    batch = jax.vmap(lambda w: aq.quantize(w, config))(jnp.stack([w, 2 * w]))
    np.testing.assert_allclose(jax.vmap(aq.dequantize)(batch)[0], value, rtol=0, atol=away)

    def of(x: jax.Array, q: aq.QTensor) -> tuple[jax.Array, aq.QTensor]:
        return aq.qdot(x, q), q

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (x, q))
    exported = jax.export.deserialize(jax.export.export(jax.jit(of))(*shapes).serialize())
    y, again = exported.call(x, q)
    same(again, q)
    for found in (y, aq.qdot(x, q)):
        np.testing.assert_allclose(found, x @ value.T, rtol=0, atol=1e-4)
    np.testing.assert_allclose(aq.qdot(x, q, "bfloat16"), x @ value.T, rtol=0, atol=0.3)
    np.testing.assert_allclose(aq.qembed(q, jnp.array([5, 1])), value[[5, 1]], rtol=0, atol=1e-6)
    flat = aq.quantize(w, aq.QuantizationConfig(case.kind, group_size=48, solver="absmax"))  # groups cross rows
    rows = np.asarray(aq.dequantize(flat))[[2, 0]]
    np.testing.assert_allclose(aq.qembed(flat, jnp.array([2, 0])), rows, rtol=0, atol=1e-6)
    layer = quantize_module(nnx.Linear(64, 16, rngs=nnx.Rngs(0)), config)
    assert layer(x).shape == (3, 16)


def tables(folder: Path, config: aq.QuantizationConfig, w: np.ndarray, q: aq.QTensor, value: np.ndarray) -> None:
    odd = aq.quantize(
        w[:, :63], aq.QuantizationConfig(config.quant_type, per_channel=True, solver="absmax")
    )  # rows of no whole bytes
    one = aq.quantize(w, aq.QuantizationConfig(config.quant_type, per_channel=False, solver="absmax"))
    for suffix, limit in (("parquet", None), ("pieces.arrow", 512)):
        table = folder / f"m.{suffix}"
        loading.pieces = pieces if limit is None else functools.partial(pieces, limit=limit)
        aq.save(table, {"w": q, "odd": odd, "one": one})
        loading.pieces = pieces
        assert verify_table(table).ok
        layers = {layer.name: layer for layer in inspect_table(table).layers}
        assert (layers["w"].quant_type, layers["w"].params) == (q.spec.quant_type, w.size)
        for framework in ("numpy", "jax", "torch") if "torch" in sys.argv else ("numpy", "jax"):
            found = aq.load(table, framework)
            np.testing.assert_allclose(np.asarray(found["w"]), value, rtol=0, atol=1e-6)
            np.testing.assert_array_equal(np.asarray(found["odd"]), aq.dequantize(odd))
            np.testing.assert_array_equal(np.asarray(found["one"]), aq.dequantize(one))
        packed = aq.load(table, packed=True)
        for name, wanted in {"w": q, "odd": odd, "one": one}.items():
            same(packed[name], wanted)
        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
        for spec in (PartitionSpec("x"), PartitionSpec(None, "x")):
            with aq.WeightLoader(table) as loader:
                shards = loader.load_sharded("w", NamedSharding(mesh, spec), packed=True)
                assert len(shards.codes.sharding.device_set) == 2
                same(shards, q)
                floats = loader.load_sharded("w", NamedSharding(mesh, spec))
                np.testing.assert_allclose(floats, value, rtol=0, atol=1e-6)
    with aq.WeightLoader(folder / "m.pieces.arrow") as loader:
        assert len(loader._table.pieces("w")) > 1


def orbax_checkpoints(folder: Path, q: aq.QTensor) -> None:
    orbax.save(folder / "orbax", {"w": q})
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    same(orbax.load(folder / "orbax")["w"], q)
    shards = orbax.load(folder / "orbax", NamedSharding(mesh, PartitionSpec("x")))["w"]
    assert len(shards.codes.sharding.device_set) == 2
    same(shards, q)
    orbax.to_table(folder / "orbax", folder / "orbax.parquet")
    same(aq.load(folder / "orbax.parquet", packed=True)["w"], q)


def conversions(folder: Path, config: aq.QuantizationConfig, w: np.ndarray, q: aq.QTensor) -> None:
    source = folder / "model"
    source.mkdir()
    safetensors.numpy.save_file({"w": w, "b": w[0]}, source / "model.safetensors")
    aq.save(folder / "float.parquet", {"w": w})
    aq.quantize_file(folder / "float.parquet", folder / "quantized.arrow", config)
    alike(aq.load(folder / "quantized.arrow", packed=True)["w"], q)
    alone = aq.ShardsConfig(workers=1)  # other processes would have to be told of the code, too
    for output, shards in (("converted.parquet", None), ("shards", alone)):
        aq.convert(aq.ConversionConfig(str(source), str(folder / output), config, shards=shards))
        assert verify_table(folder / output).ok
        alike(aq.load(folder / output, packed=True)["w"], q)


def tiles(folder: Path) -> None:
    """A code that lays a matrix out in its own way: the number of rows is not told by its bytes."""
    rng = np.random.default_rng(2)
    codes, scale = rng.integers(-8, 8, (16, 64)), np.exp(rng.normal(size=16)).astype(np.float32)
    value = LEVELS[codes + 8] * scale[:, None]
    stream = pack_codes(codes.reshape(4, 4, 64).swapaxes(1, 2), 4)
    spec = aq.QuantSpec(4, per_channel=True, code="tiled16")
    q = jax.device_put(from_stream(stream, scale, np.empty(0, np.float32), (16, 64), spec))
    assert (q.shape, q.codes.shape, q.rows) == ((16, 64), (4, 128), 16)
    np.testing.assert_array_equal(aq.dequantize(q), value)
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), q, q)
    assert batch.shape == (2, 16, 64)
    np.testing.assert_array_equal(jax.vmap(aq.dequantize)(batch)[1], value)
    x = jnp.ones((1, 64), jnp.float32)
    np.testing.assert_allclose(aq.qdot(x, q), x @ value.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(aq.qembed(q, jnp.array([5])), value[[5]])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), q)
    exported = jax.export.deserialize(jax.export.export(jax.jit(lambda q: q))(shapes).serialize())
    same(exported.call(q), q)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    rows, columns = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), (None, "x")))
    for suffix, limit in (("parquet", None), ("pieces.arrow", 1024)):
        path = folder / f"tiled.{suffix}"
        loading.pieces = pieces if limit is None else functools.partial(pieces, limit=limit)
        aq.save(path, {"w": q})
        loading.pieces = pieces
        assert verify_table(path).ok
        np.testing.assert_array_equal(aq.load(path, "numpy")["w"], value)
        same(aq.load(path, packed=True)["w"], q)
        with aq.WeightLoader(path) as loader:
            assert len(loader._table.pieces("w")) == (1 if limit is None else 4)
            same(loader.load_sharded("w", rows, packed=True), q)
            for sharding in (rows, columns):
                np.testing.assert_array_equal(loader.load_sharded("w", sharding), value)
            with pytest.raises(ValueError, match="cuts columns of tiles"):
                loader.load_sharded("w", columns, packed=True)
    orbax.save(folder / "tiled.orbax", {"w": q})
    same(orbax.load(folder / "tiled.orbax", rows)["w"], q)
    with pytest.raises(ValueError, match="cannot choose codes of tiled16"):
        aq.quantize(value, "tiled16")


def refusals(case: Case, w: np.ndarray, q: aq.QTensor) -> None:
    x = jnp.ones((3, 64), jnp.float32)
    if case.refused is None:
        assert np.abs(aq.qdot(x, q, "int8") - x @ np.asarray(aq.dequantize(q)).T).max() < 0.3
        return
    refused = {"qdot": (lambda: aq.qdot(x, q, "int8"), "integer products need evenly spaced levels")}
    for key, (value, text) in case.refused.items():
        asked = functools.partial(aq.QuantizationConfig, case.kind, **{key: value})
        refused[key] = (lambda asked=asked: aq.quantize(w, asked()), text)
    training = "training needs evenly spaced levels, or one scale a row, which toy16 does not have"
    refused["training"] = (lambda: check_trainable(q.spec.coding, "w"), training)
    for call, text in refused.values():
        with pytest.raises(ValueError, match=re.escape(text)):
            call()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
