"""Shards on eight devices, in a process that test_eight_devices.py starts: their number is fixed when JAX starts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import aq_jax as aq
from aq_jax.codes import CODES
from aq_jax.config import QuantSpec, widths
from aq_jax.core.qtensor import scale_shape
from aq_jax.core.sharding import build_sharded, qtensor_shardings
from aq_jax.io import dense, qtensors
from aq_jax.nn.architecture import Architecture
from aq_jax.nn.models import FAMILIES
from aq_jax.nn.parallel import shardings as shardings_of_model
from aq_jax.store import RowInfo, aligned_empty, pieces

P = PartitionSpec


@pytest.fixture(scope="module", autouse=True)
def eight() -> None:
    assert jax.device_count() == 8


@pytest.fixture(scope="module")
def line() -> Mesh:
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def grid() -> Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))


def random_qtensor(shape: tuple[int, ...], spec: QuantSpec, seed: int) -> aq.QTensor:
    """Any codes on any grid, made without a compiler."""
    rng = np.random.default_rng(seed)
    (codes, dtype), grids = spec.coding.codes_like(shape), scale_shape(shape, spec)
    half = 2 ** (spec.bits - 1)
    values = rng.integers(0, 256, codes, np.uint8) if dtype == "uint8" else rng.integers(-half, half, codes, np.int8)
    zeros = rng.normal(size=grids).astype(np.float32)
    scales = np.exp(rng.normal(size=grids)).astype(np.float32)
    zero_point = zeros if spec.coding.zero_points else None
    return aq.QTensor(values, scales, zero_point, spec, shape[-1], spec.coding.rows(shape))


# Channels; groups that divide rows or cross them, also with a short end; one grid; rows of no whole bytes; other axes.
LAYOUTS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((16, 64), {"per_channel": True}),
    ((16, 64), {"group_size": 8}),
    ((16, 64), {"group_size": 32}),
    ((16, 64), {"group_size": 48}),
    ((16, 64), {}),
    ((16, 7), {"per_channel": True}),
    ((16, 7), {"group_size": 12}),
    ((8, 3, 16), {"per_channel": True}),
    ((8, 16, 8), {"group_size": 8}),
    ((64,), {"group_size": 8}),
    ((0, 8), {"per_channel": True}),
]
QUANTIZED = {
    f"{kind}.{i}": random_qtensor(shape, QuantSpec(bits, **options), i)
    for kind, bits in [(kind, CODES[kind].bits) for kind in widths() if CODES[kind].uniform]
    for i, (shape, options) in enumerate(LAYOUTS)
}
ROTATED = {
    f"rotated.{bits}.{len(shape)}": random_qtensor(shape, QuantSpec(bits, group_size=16, rotation=32), bits)
    for bits in (4, 3, 2)
    for shape in ((16, 64), (256,))
}
PLAIN = {
    "float32": np.arange(16 * 24, dtype=np.float32).reshape(16, 24),
    "float16": np.arange(64, dtype=np.float16),
    "int64": np.arange(-64, 64).reshape(8, 2, 8),
    "bool": np.arange(64).reshape(8, 8) % 3 == 0,
    "scalar": np.float32(7),
    "empty": np.zeros((8, 0, 2), np.float32),
}
ALL = {**QUANTIZED, **ROTATED, **PLAIN}


def write_pieces(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (dense, qtensors):
            patch.setattr(module, "pieces", functools.partial(pieces, limit=200))
        aq.save(path, ALL)


def by_duckdb(path: Path) -> None:
    aq.save(path.with_suffix(".first.parquet"), ALL)
    with duckdb.connect() as connection:
        connection.sql(f"copy (select * from '{path.with_suffix('.first.parquet')}') to '{path}' (format parquet)")


def by_polars(path: Path) -> None:
    aq.save(path.with_suffix(".first.parquet"), ALL)
    pl.read_parquet(path.with_suffix(".first.parquet")).write_ipc(path)


FILES: dict[str, Callable[[Path], None]] = {
    "m.parquet": lambda path: aq.save(path, ALL),
    "m.arrow": lambda path: aq.save(path, ALL),
    "pieces.parquet": write_pieces,
    "pieces.arrow": write_pieces,
    "zstd.parquet": lambda path: aq.save(path, ALL, compression="zstd"),
    "duckdb.parquet": by_duckdb,
    "polars.arrow": by_polars,
}
MANY = {"m.arrow": 6, "pieces.parquet": 4, "pieces.arrow": 6}
"""How many of the shardings are tried on a file; of others, two."""
FEW = ("m.parquet", "pieces.arrow")
"""Where shards are always cut. That parts are read from all of FILES, test_loader_sharded.py asks without devices."""


@pytest.fixture(scope="module", params=[pytest.param(f, marks=() if f in FEW else pytest.mark.slow) for f in FILES])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / request.param
    FILES[request.param](path)
    return path


def shardings(line: Mesh, grid: Mesh) -> list[NamedSharding]:
    return [
        NamedSharding(line, P("x")),
        NamedSharding(line, P(None, "x")),
        NamedSharding(grid, P("x", "y")),
        NamedSharding(grid, P(None, None, ("y", "x"))),
        NamedSharding(grid, P("y")),
        NamedSharding(line, P()),
    ]


def fits(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    try:
        sharding.shard_shape(shape)
    except (ValueError, IndexError):
        return False
    return True


def assert_sharded(found: jax.Array, whole: np.ndarray, rotated: bool = False) -> None:
    """Each device holds its part of the whole, and the array says so."""
    assert found.shape == whole.shape
    assert found.dtype == whole.dtype
    assert len(found.addressable_shards) == 8
    for shard in found.addressable_shards:
        part = np.asarray(shard.data)
        if rotated:  # a product of matrices, whose sums may be added up in another order
            np.testing.assert_allclose(part, whole[shard.index], rtol=0, atol=1e-6 * np.abs(whole).max())
        else:
            assert part.tobytes() == np.ascontiguousarray(whole[shard.index]).tobytes()


def test_shards_are_those_of_the_whole_tensor(path: Path, line: Mesh, grid: Mesh) -> None:
    count = 0
    with aq.WeightLoader(path) as loader:
        whole = {name: np.asarray(loader.get_layer(name)) for name in ALL}
        for sharding in shardings(line, grid)[: MANY.get(path.name, 2)]:
            for name, wanted in whole.items():
                if fits(sharding, wanted.shape):
                    count += 1
                    found = loader.load_sharded(name, sharding)
                    assert isinstance(found, jax.Array)
                    assert found.sharding == sharding
                    assert_sharded(found, wanted, rotated=name in ROTATED)
        assert not loader.partly_read
    assert count > 50


def test_packed_shards_are_those_of_the_whole_tensor(path: Path, line: Mesh, grid: Mesh) -> None:
    count = 0
    with aq.WeightLoader(path) as loader:
        whole = {name: loader.get_quantized(name) for name in ALL}
        for sharding in shardings(line, grid)[: MANY.get(path.name, 2)]:
            for name, wanted in whole.items():
                if not fits(sharding, wanted.shape):
                    continue
                if isinstance(wanted, aq.QTensor) and not fits(sharding, wanted.codes.shape):
                    with pytest.raises(aq.FormatError, match=f"{name}: .* wanted parts of whole bytes, but a row of"):
                        loader.load_sharded(name, sharding, packed=True)
                    continue
                count += 1
                found = loader.load_sharded(name, sharding, packed=True)
                assert jax.tree.structure(found) == jax.tree.structure(wanted), name
                for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                    assert_sharded(a, np.asarray(b))
                if isinstance(wanted, aq.QTensor):
                    assert_on_the_same_axes(found, sharding)
    assert count > 50


def assert_on_the_same_axes(q: aq.QTensor, sharding: NamedSharding) -> None:
    """A device that holds some of the codes holds the grids of these, if not more of them."""
    names = (*sharding.spec, *[None] * (q.ndim - len(sharding.spec)))
    assert tuple(q.codes.sharding.spec) == names
    parts = {name: 1 if name is None else sharding.mesh.shape[name] for name in names if not isinstance(name, tuple)}
    if q.by_row and q.size:
        whole = q.scale.shape[-1] % (8 if isinstance(names[-1], tuple) else parts[names[-1]]) == 0
        assert tuple(q.scale.sharding.spec) == (*names[:-1], names[-1] if whole else None)
    else:
        assert q.scale.sharding.is_fully_replicated
    assert q.zero_point.sharding == q.scale.sharding


def test_shards_of_tiles_are_whole_tiles(line: Mesh, tmp_path: Path) -> None:
    """A matrix is cut where tiles are, or before its rows; its columns never are."""
    flat, experts = QuantSpec(2, per_channel=True, code="tcq2"), QuantSpec(3, group_size=5, code="tcq3")
    tensors = {
        "flat": random_qtensor((2048, 2), flat, 0),
        "experts": random_qtensor((8, 6, 5), experts, 1),
        "short": random_qtensor((512, 8), flat, 2),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qtensors, "pieces", functools.partial(pieces, limit=200))
        aq.save(tmp_path / "m.arrow", tensors)
    rows, columns = NamedSharding(line, P("x")), NamedSharding(line, P(None, "x"))
    with aq.WeightLoader(tmp_path / "m.arrow") as loader:
        for name, sharding in (("flat", rows), ("experts", rows), ("short", rows), ("short", columns)):
            assert_sharded(loader.load_sharded(name, sharding), np.asarray(loader.get_layer(name)))
        for name in ("flat", "experts"):
            found, wanted = loader.load_sharded(name, rows, packed=True), loader.get_quantized(name)
            assert jax.tree.structure(found) == jax.tree.structure(wanted)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                assert_sharded(a, np.asarray(b))
            np.testing.assert_array_equal(aq.dequantize(found), aq.dequantize(wanted))
        with pytest.raises(aq.FormatError, match=r"short: .* cuts the 512 rows into 8 parts; wanted parts of whole ti"):
            loader.load_sharded("short", rows, packed=True)
        with pytest.raises(aq.FormatError, match=r"short: .* into 8 parts; a tile of tcq2 has all columns"):
            loader.load_sharded("short", columns, packed=True)
    name, bert = "encoder.layer.0.intermediate.dense.weight", Architecture(FAMILIES["bert"], None, {})
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    infos = {rows: {name: RowInfo(name, (rows, 8), "float32", 8 * rows, 0, 0, "tcq2", 0)} for rows in (512, 2048)}
    assert shardings_of_model(infos[2048], bert, mesh)[name].spec == P("model", None)
    with pytest.warns(UserWarning, match=f"every device has all of {name}, whose codes have no 8 equal parts"):
        assert shardings_of_model(infos[512], bert, mesh)[name].spec == P()


@pytest.mark.parametrize(
    "name",
    ["q4_k", "q6_k", "q5_k.pieces", "int5_bf16m", "f16.pieces", "f16.across", "i.pieces", "int2_f16p", "p.pieces",
     "f8_e4m3_f16", "fp4_nested", "nested.many", "nested.experts"],
)  # fmt: skip
def test_shards_of_small_grids(name: str) -> None:
    two = Mesh(np.array(jax.devices()[:2]), ("x",))
    count = 0
    late = name.startswith(("int2_f16p", "p.", "f8", "fp4", "nested"))
    file = "integers.arrow" if name.startswith("i.") else "nested.arrow" if late else "grids.arrow"
    with aq.WeightLoader(Path(__file__).parent / "golden" / file) as loader:
        whole, packed = np.asarray(loader.get_layer(name)), loader.get_quantized(name)
        for sharding in (NamedSharding(two, P("x")), NamedSharding(two, P(None, "x"))):
            if not fits(sharding, whole.shape):
                continue
            assert np.asarray(loader.load_sharded(name, sharding)).tobytes() == whole.tobytes()
            if fits(sharding, packed.codes.shape):
                count += 1
                found = loader.load_sharded(name, sharding, packed=True)
                assert jax.tree.structure(found) == jax.tree.structure(packed)
                jax.tree.map(np.testing.assert_array_equal, found, packed)
                assert np.asarray(aq.dequantize(found)).tobytes() == whole.tobytes()
    assert count or name == "f16.across"


def test_what_a_sharded_qtensor_computes_is_what_a_whole_one_does(line: Mesh, tmp_path: Path) -> None:
    aq.save(tmp_path / "m.parquet", {"w": QUANTIZED["int4.2"]})
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
    with aq.WeightLoader(tmp_path / "m.parquet") as loader:
        wanted = aq.qdot(x, loader.get_quantized("w"), "float32")
        for spec in (P("x"), P(None, "x"), P()):
            found = loader.load_sharded("w", NamedSharding(line, spec), packed=True)
            atol = 2e-6 * float(jnp.abs(wanted).max())
            np.testing.assert_allclose(aq.qdot(x, found, "float32"), wanted, rtol=0, atol=atol)
            prepared = aq.prepare(found)
            assert (prepared.kernel, prepared.arrays) == ("xla", None)  # which takes it as it is, in every call
            np.testing.assert_allclose(aq.qdot(x, prepared), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("quant_type", ["int4", "tcq2"])
def test_a_quantized_tensor_lies_where_its_weight_does(quant_type: str) -> None:
    device = jax.devices()[1]
    config = aq.QuantizationConfig(quant_type, solver="viterbi" if quant_type == "tcq2" else "mse")
    q = aq.quantize(jax.device_put(np.eye(16, dtype=np.float32), device), config)
    assert isinstance(q, aq.QTensor)
    assert q.codes.devices() == q.scale.devices() == {device}


@pytest.mark.parametrize("name", ["m.parquet", "m.arrow"])
def test_bytes_are_read_once_and_not_once_a_device(tmp_path: Path, line: Mesh, grid: Mesh, name: str) -> None:
    FILES[name](tmp_path / name)
    for sharding in shardings(line, grid):
        for packed in (False, True):
            with aq.WeightLoader(tmp_path / name) as loader:
                for tensor in ("int8.1", "int4.2", "int2.4", "float32"):
                    before, q = loader.bytes_read, ALL[tensor]
                    if fits(sharding, q.shape):
                        loader.load_sharded(tensor, sharding, packed=packed)
                        assert loader.bytes_read - before == q.nbytes
                assert not loader.partly_read


def test_a_device_of_its_own_and_some_of_the_devices(path: Path) -> None:
    with aq.WeightLoader(path) as loader:
        whole, q = np.asarray(loader.get_layer("int4.1")), loader.get_quantized("int4.1")
        some = NamedSharding(Mesh(np.array(jax.devices()[2:6]), ("x",)), P("x"))
        for sharding in (SingleDeviceSharding(jax.devices()[5]), some):
            found = loader.load_sharded("int4.1", sharding)
            assert (found.sharding, np.asarray(found).tobytes()) == (sharding, whole.tobytes())
            packed = loader.load_sharded("int4.1", sharding, packed=True)
            assert packed.codes.devices() == sharding.device_set
            assert [np.asarray(a).tobytes() for a in jax.tree.leaves(packed)] == [
                np.asarray(a).tobytes() for a in jax.tree.leaves(q)
            ]


def test_dtypes_are_converted_as_elsewhere(tmp_path: Path, line: Mesh) -> None:
    FILES["m.arrow"](tmp_path / "m.arrow")
    rows = NamedSharding(line, P("x"))
    with aq.WeightLoader(tmp_path / "m.arrow") as loader:
        for name in ("float32", "float16", "int64", "int8.0", "bool"):
            for dtype in (None, "bfloat16", jnp.float16):
                wanted = loader.get_layer(name, dtype=dtype)
                assert_sharded(loader.load_sharded(name, rows, dtype=dtype), np.asarray(wanted))
        assert loader.load_sharded("float32", rows, packed=True, dtype="float16").dtype == np.float16
        before = loader.bytes_read
        with pytest.raises(aq.ConfigError, match="wanted None or a floating dtype"):
            loader.load_sharded("float32", rows, dtype="int8")
        assert loader.bytes_read == before


def test_values_that_jax_cannot_hold_are_refused_with_their_row(tmp_path: Path, line: Mesh) -> None:
    big = np.arange(16)
    big[11] = 2**40
    aq.save(tmp_path / "m.parquet", {"ids": big})
    message = r"ids, from row 10 on: int64 value 1099511627776 at \[1\] does not fit"
    with aq.WeightLoader(tmp_path / "m.parquet") as loader, pytest.raises(aq.AqError, match=message):
        loader.load_sharded("ids", NamedSharding(line, P("x")))


def test_shardings_that_do_not_fit_are_refused_by_name(tmp_path: Path, line: Mesh) -> None:
    aq.save(tmp_path / "m.parquet", {"w": np.ones((12, 8)), "q": QUANTIZED["int2.8"], "r": QUANTIZED["int4.1"]})
    with aq.WeightLoader(tmp_path / "m.parquet") as loader:
        for packed in (False, True):
            with pytest.raises(aq.FormatError, match=r"w: shape \[12, 8\] cannot be sharded by .*partitioned 8 times"):
                loader.load_sharded("w", NamedSharding(line, P("x")), packed=packed)
        with pytest.raises(aq.FormatError, match=r"w: shape \[12, 8\] cannot be sharded"):
            loader.load_sharded("w", NamedSharding(line, P(None, None, "x")))
        with pytest.raises(aq.FormatError, match=r"q: .* cuts the 8 columns into 8 parts; .* 2-bit codes has 2"):
            loader.load_sharded("q", NamedSharding(line, P(None, None, "x")), packed=True)
        assert loader.load_sharded("q", NamedSharding(line, P(None, None, "x"))).shape == (8, 16, 8)
        assert loader.bytes_read == QUANTIZED["int2.8"].nbytes


def test_scales_follow_where_whole_groups_fall_on_shards() -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    columns, rows = NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P("x"))
    cases = [
        (columns, 16, P(None, "x")),  # 8 groups a row, 2 a shard
        (columns, 64, P(None, None)),  # 2 groups a row: a shard ends inside one
        (columns, 48, P()),  # groups cross rows
        (rows, 16, P("x", None)),
        (rows, 48, P()),
    ]
    for sharding, size, wanted in cases:
        codes, scales, _ = qtensor_shardings(sharding, (8, 128), QuantSpec(4, group_size=size), "w")
        assert tuple(codes.spec) == (*sharding.spec, *[None] * (2 - len(sharding.spec)))
        assert scales.spec == wanted


# ------------------------------------------------------------------------------------------------ all weights


def test_all_weights_go_where_they_were_sent(tmp_path: Path, line: Mesh) -> None:
    tied = np.ones((8, 4), np.float32)
    tensors = {"embed": tied, "q": QUANTIZED["int4.1"], "bias": np.arange(8.0, dtype=np.float32), "head": tied}
    aq.save(tmp_path / "m.parquet", tensors)
    rows, whole = NamedSharding(line, P("x")), NamedSharding(line, P())
    where = {"embed": rows, "q": rows, "bias": whole}
    for given in (where, where | {"head": rows}):
        for packed in (False, True):
            found = aq.load(tmp_path / "m.parquet", packed=packed, shardings=given)
            assert list(found) == ["embed", "q", "bias", "head"]
            assert found["head"] is found["embed"]
            assert isinstance(found["q"], aq.QTensor) == packed
            for name, array in (("embed", rows), ("bias", whole)):
                assert found[name].sharding == array
                assert np.asarray(found[name]).tobytes() == tensors[name].tobytes()
    assert aq.load(tmp_path / "m.parquet", shardings=where, dtype="float16", copy=False)["q"].dtype == np.float16


def test_nothing_is_placed_by_guess(tmp_path: Path, line: Mesh) -> None:
    tied = np.ones((8, 4), np.float32)
    aq.save(tmp_path / "m.arrow", {"embed": tied, "bias": np.ones(8), "head": tied})
    rows, whole = NamedSharding(line, P("x")), NamedSharding(line, P())
    with aq.WeightLoader(tmp_path / "m.arrow") as loader:
        for given, message in (
            ({"embed": rows}, "lack a sharding: bias"),
            ({}, "lack a sharding: embed, bias"),
            ({"embed": rows, "bias": rows, "bais": rows}, "are no layers: bais"),
            ({"head": rows, "bias": rows}, "lack a sharding: embed"),
            ({"embed": rows, "bias": rows, "head": whole}, r"tied, .*: head \(that of embed is another\)"),
        ):
            with pytest.raises(aq.FormatError, match=message):
                loader.load_weights(shardings=given)
        for framework in ("numpy", "torch"):
            with pytest.raises(aq.FormatError, match="shardings are of JAX arrays"):
                loader.load_weights(framework, shardings={"embed": rows, "bias": rows})  # type: ignore[arg-type]
        assert loader.bytes_read == 0


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("theirs", [True, False])
def test_shards_share_memory_with_nobody(line: Mesh, grid: Mesh, theirs: bool) -> None:
    """Neither with what is read-only, and may be the file's, nor with each other: JAX takes over what is aligned."""
    base = aligned_empty((64, 64), np.float32)
    for sharding in (NamedSharding(line, P("x")), NamedSharding(line, P(None, "x")), NamedSharding(grid, P("y"))):
        base[...] = 1

        def rows(start: int, stop: int) -> np.ndarray:
            part = base[start:stop] if theirs else aligned_empty((stop - start, 64), np.float32)
            part[...] = 1
            part.flags.writeable = not theirs
            return part

        found = build_sharded((64, 64), base.dtype, sharding, rows)
        base[...] = 2
        assert np.array_equal(np.asarray(found), np.ones((64, 64)))
        assert len({shard.data.unsafe_buffer_pointer() for shard in found.addressable_shards}) == 8


@pytest.mark.parametrize("name", ["m.parquet", "m.arrow"])
def test_arrays_do_not_follow_the_file(tmp_path: Path, line: Mesh, name: str) -> None:
    values = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    aq.save(tmp_path / name, {"w": values})
    with aq.WeightLoader(tmp_path / name) as loader:
        found = [loader.load_sharded("w", NamedSharding(line, spec)) for spec in (P("x"), P())]
        with open(tmp_path / name, "r+b") as file:
            content = file.read()
            file.seek(0)
            file.write(b"\xff" * len(content))
    assert all(np.array_equal(np.asarray(array), values) for array in found)
