"""Trellis codes against a reader that finds the state of each weight in one large Python integer."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import independent_reader
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import aq_jax as aq
from aq_jax import native
from aq_jax.codes import CODES
from aq_jax.codes.trellis_numpy import level_table
from aq_jax.config import QuantSpec
from aq_jax.core.bitstream import from_stream, to_stream
from aq_jax.core.qtensor import scale_shape
from aq_jax.nn.parallel import partition_spec
from aq_jax.quantizers.treatment import kept_notes, treat
from aq_jax.store import PartialTensor, Row, RowInfo, check, decode, open_table, pieces

KINDS = ("tcq5", "tcq4", "tcq3", "tcq2", "tcq1.5")
# Whole tiles and a short one, a short one of no whole bytes, matrices after one another, and whole tiles of matrices.
SHAPES = ((300, 5), (6, 7), (2, 10, 3), (2, 256, 2))


def row(kind: str, shape: tuple[int, ...], rotation: int = 0, seed: int = 0) -> Row:
    """A row of the table, of random bits."""
    code, count, rng = CODES[kind], int(np.prod(shape)), np.random.default_rng(seed)
    data = rng.integers(0, 256, code.data_bytes(count, shape), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.5, count // shape[-1]).astype(np.float32)
    axis = (0, shape[-1] if len(shape) > 2 else 0)
    return Row("w", shape, "float32", data, count, kind, scales, scales[:0], *axis, rotation)


def tensor(r: Row) -> aq.QTensor:
    assert r.code is not None
    spec = QuantSpec(r.code.bits, not r.group_size, r.group_size, r.rotation, r.code.name)
    return jax.device_put(from_stream(r.data, r.scales, r.zero_points, r.shape, spec))


def wanted(r: Row) -> np.ndarray:
    """The values before a rotation is undone."""
    return independent_reader.decode({f.name: getattr(r, f.name) for f in dataclasses.fields(Row)} | {
        "data": r.data.tobytes(), "scales": r.scales.tobytes(), "zero_points": b"", "shape": list(r.shape)
    }).reshape(r.shape)  # fmt: skip


def unrotated(r: Row) -> np.ndarray:
    return independent_reader.unrotate(wanted(r), r.rotation).reshape(r.shape) if r.rotation else wanted(r)


def close(found: Any, value: Any, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(found, value, rtol=0, atol=rtol * float(np.abs(value).max()))


def kernels() -> tuple[str, ...]:
    return ("xla",) if native.load().reason else ("xla", "native")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_weight_is_that_of_its_state(kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    r = row(kind, shape)
    check(r, "here")
    for kernel in ("xla", "native"):  # where the library has it, in both
        monkeypatch.setenv("AQ_JAX_KERNEL", kernel)
        np.testing.assert_array_equal(decode([r]), wanted(r))
    q = tensor(r)
    assert (q.shape, q.scale.shape, q.by_row) == (shape, scale_shape(shape, q.spec), True)
    np.testing.assert_array_equal(aq.dequantize(q, kernel="xla"), wanted(r))
    if shape == (6, 7):  # where every row has a state that goes on at the beginning
        np.testing.assert_array_equal(aq.qembed(q, jnp.arange(6), kernel="xla"), wanted(r))
    stream, scales, _ = to_stream(q)
    assert stream.tobytes() == r.data.tobytes()
    np.testing.assert_array_equal(scales, r.scales)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_costs_its_bits_and_no_more(kind: str) -> None:
    for shape in ((256, 8), (512, 24), (3, 256, 8)):
        assert 8 * CODES[kind].data_bytes(int(np.prod(shape)), shape) == float(kind[3:]) * np.prod(shape)


def test_levels_are_nearly_normal() -> None:
    for levels, least, most in zip(level_table(2).T, (-117, -106), (114, 108), strict=True):
        assert (levels.min(), levels.max()) == (least, most)
        assert abs(np.mean(levels)) < 0.4
        assert abs(np.std(levels) - 37) < 0.2
        thirds = np.searchsorted(np.sort(levels), np.array([-0.6745, 0.6745]) * np.std(levels)) / levels.size
        np.testing.assert_allclose(thirds, [0.25, 0.75], atol=0.015)


@pytest.mark.parametrize("kind", [pytest.param("tcq3", marks=pytest.mark.slow), "tcq1.5"])
def test_products_and_rows_are_those_of_the_values(kind: str, rng: np.random.Generator) -> None:
    r = row(kind, (300, 8), rotation=4)
    q, w = tensor(r), unrotated(r)
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    ids = jnp.array([[299, 5], [-300, 300]])
    for kernel in kernels():
        close(aq.qdot(x, q, kernel=kernel), x @ w.T)
        close(aq.dequantize(q, kernel=kernel), w)
        found = aq.qembed(q, ids, kernel=kernel)
        close(found[0], w[[299, 5]])
        close(found[1, 0], w[0])
        assert np.isnan(found[1, 1]).all()
        plain = dataclasses.replace(q, spec=dataclasses.replace(q.spec, rotation=0))
        np.testing.assert_array_equal(aq.qembed(plain, ids[0], kernel=kernel), wanted(r)[[299, 5]])
    close(aq.qdot(x, q, "bfloat16"), x @ w.T, 2e-2)
    close(jax.grad(lambda x: (aq.qdot(x, q) ** 2).sum())(x), 2 * (x @ w.T) @ w)
    scales = jax.grad(lambda scale: aq.qdot(x, dataclasses.replace(q, scale=scale)).sum())(q.scale)
    close(scales[:, 0], (x @ (w / r.scales[:, None]).T).sum(0))


def test_integer_products_are_exact(rng: np.random.Generator) -> None:
    """Inputs of whole numbers on their own 256 levels lose nothing."""
    r = row("tcq2", (300, 8))
    x = rng.integers(0, 256, (5, 8)).astype(np.float32)
    x[:, 0], x[:, 1] = 0, 255
    for kernel in kernels():
        found = aq.qdot(x, tensor(r), "int8", kernel=kernel)
        np.testing.assert_allclose(found, x @ wanted(r).astype(np.float64).T, rtol=1e-5, atol=0.05)


def test_a_batch_maps_scans_and_exports(rng: np.random.Generator) -> None:
    rows = [row("tcq3", (258, 8), seed=seed) for seed in range(2)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(tensor, rows))
    values, x = np.stack([wanted(r) for r in rows]), jnp.asarray(rng.normal(size=8), jnp.float32)
    assert batch.shape == (2, 258, 8)
    np.testing.assert_array_equal(aq.dequantize(batch), values)
    for found in (
        jax.vmap(aq.qdot, (None, 0))(x, batch),
        jax.lax.scan(lambda _, q: (None, aq.qdot(x, q)), None, batch)[1],
    ):
        close(found, np.einsum("i,bji->bj", x, values))
    close(jax.vmap(aq.qembed, (0, None))(batch, jnp.array([257, 3])), values[:, [257, 3]])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    exported = jax.export.deserialize(jax.export.export(jax.jit(lambda q: q))(shapes).serialize())
    again = exported.call(batch)
    assert jax.tree.structure(again) == jax.tree.structure(batch)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_keep_the_tree_and_every_framework_reads_them(suffix: str, tmp_path: Path) -> None:
    rows = {str(shape): row(kind, shape) for kind, shape in zip(KINDS, SHAPES, strict=False)}
    rows["rotated"] = row("tcq1.5", (6, 8), rotation=8)
    aq.save(path := tmp_path / f"m.{suffix}", {name: tensor(r) for name, r in rows.items()})
    packed = aq.load(path, packed=True)
    for framework in ("numpy", "jax", "torch") if importlib.util.find_spec("torch") else ("numpy", "jax"):
        for name, value in aq.load(path, framework).items():
            close(np.asarray(value), unrotated(rows[name]))
    for name, r in rows.items():
        assert jax.tree.structure(packed[name]) == jax.tree.structure(tensor(r))
        jax.tree.map(np.testing.assert_array_equal, packed[name], tensor(r))


def test_a_tensor_is_cut_at_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are whole tiles, or whole matrices where those are no whole tiles; parts widen to them."""
    from aq_jax.io import qtensors

    rows = {"flat": row("tcq5", (700, 3)), "whole": row("tcq2", (2, 512, 2)), "short": row("tcq5", (3, 10, 5))}
    monkeypatch.setattr(qtensors, "pieces", functools.partial(pieces, limit=100))
    aq.save(path := tmp_path / "m.arrow", {name: tensor(r) for name, r in rows.items()})
    cuts = {"flat": (256 * 3, 256 * 3, 188 * 3), "whole": (512, 512, 512, 512), "short": (50, 50, 50)}
    with open_table(path) as table:
        for name, r in rows.items():
            assert tuple(info.num_params for info in table.pieces(name)) == cuts[name]
            value = wanted(r).reshape(-1)
            np.testing.assert_array_equal(decode(table.read_tensor(name)).reshape(-1), value)
            for start, stop in ((0, 1), (value.size // 2, value.size // 2 + 7), (3, value.size)):
                before = table.bytes_read
                part = PartialTensor(table, name, [(start, stop)])
                np.testing.assert_array_equal(part.values(start, stop), value[start:stop])
                assert name == "flat" or start == 3 or table.bytes_read - before < 6 * r.data.size
    packed = aq.load(path, packed=True)
    for name, r in rows.items():
        jax.tree.map(np.testing.assert_array_equal, packed[name], tensor(r))


def test_where_shards_may_lie() -> None:
    code = CODES["tcq2"]
    assert code.refuses_shards((768, 8), (3, 1)) == ""
    assert "wanted parts of whole tiles" in code.refuses_shards((384, 8), (2, 1))
    assert "a tile of tcq2 has all columns" in code.refuses_shards((768, 8), (1, 2))
    assert code.refuses_shards((4, 6, 8), (2, 1, 1)) == ""
    info = RowInfo("w", (384, 8), "float32", 384 * 8, 0, 0, "tcq2", 0)
    assert partition_spec(0, info, 2) == PartitionSpec()


def test_what_cannot_be_tiled_takes_evenly_spaced_levels() -> None:
    config = aq.QuantizationConfig("tcq1.5", overrides=(aq.Override("tied", quant_type="tcq4"),))
    for name, shape, kind in (("a", (6, 4), "tcq1.5"), ("b", (7, 4), "int2"), ("tied", (1, 2), "int4")):
        assert config.for_tensor(name, shape).quant_type == kind
    treatments = {name: treat(config, name, (7, 3), np.dtype("float32")) for name in ("b", "c")}
    assert kept_notes(treatments) == ["int2 instead of tcq1.5, which their shapes cannot have: b, c"]
    for wrong in ({"group_size": 32}, {"per_channel": False}, {"symmetric": False}):
        with pytest.raises(aq.ConfigError, match=r"tcq2 has (one scale a row|no zero points)"):
            aq.QuantizationConfig("tcq2", **wrong)
