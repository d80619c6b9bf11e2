"""Tables to arrays and back, in three frameworks, bit for bit."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import aq_jax as aq
from aq_jax.codes import CODES
from aq_jax.config import QuantizationConfig, widths
from aq_jax.converters import orbax
from aq_jax.io import dense, qtensors
from aq_jax.store import Row, pieces, write_table

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")

FRAMEWORKS = ("jax", "numpy", "torch")
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int32", "int8", "uint8", "bool")
SHAPES = ((3, 5), (), (0, 4), (4, 0), (1,), (2, 3, 4))


@pytest.fixture(params=["parquet", "arrow"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"m.{request.param}"


def bits(array: Any) -> bytes:
    """The bytes of an array of any framework."""
    if isinstance(array, torch.Tensor):
        array = array.contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.asarray(array).tobytes()


def sample(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    numbers = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 3
    return np.asarray(numbers > 0 if dtype == "bool" else abs(numbers)).astype(
        np.dtype(getattr(ml_dtypes, dtype, dtype))
    )


def to(framework: str, array: np.ndarray) -> Any:
    """An array handed over without the library's own code."""
    if framework == "jax":
        return jnp.array(array)
    if framework == "numpy":
        return array
    name = array.dtype.name
    if hasattr(ml_dtypes, name):
        raw = torch.tensor(array.reshape(-1).view(np.uint8 if array.itemsize == 1 else np.int16))
        return raw.view(getattr(torch, name)).reshape(array.shape)
    return torch.tensor(array)


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


# Row layouts (groups divide a row) and flat ones; rows that are no whole bytes at each width; one grid a tensor.
LAYOUTS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((6, 16), {"per_channel": True}),
    ((6, 16), {"per_channel": False, "group_size": 8}),
    ((6, 16), {"per_channel": False, "group_size": 48}),
    ((5, 7), {"per_channel": True}),
    ((5, 7), {"group_size": 12}),
    ((3, 3, 5), {"per_channel": True}),
    ((4, 8), {"group_size": 8, "symmetric": False}),
    ((5, 7), {"group_size": 16, "symmetric": False}),
    ((0, 8), {"per_channel": True}),
]
CASES = [
    (kind, shape, options)
    for kind in widths()
    for shape, options in LAYOUTS
    if not CODES[kind].matrices and (CODES[kind].zero_points or options.get("symmetric", True))
]
CASES += [(kind, (5, 7), {"per_channel": False}) for kind in ("int8", "int4", "int3")]


@pytest.fixture(scope="module")
def quantized() -> dict[str, aq.QTensor]:
    """A QTensor of every kind, compiled in one program, with solvers that are cheap to compile."""
    configs = [
        QuantizationConfig(quant_type=kind, solver="absmax" if options.get("symmetric", True) else "minmax", **options)
        for kind, _, options in CASES
    ]
    weights = [np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, (_, shape, _) in enumerate(CASES)]
    all_of_them = jax.jit(lambda ws: [aq.quantize(w, config) for w, config in zip(ws, configs, strict=True)])
    return {f"{i}.{case[0]}": q for i, (case, q) in enumerate(zip(CASES, all_of_them(weights), strict=True))}


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("source", FRAMEWORKS)
def test_every_dtype_and_shape_comes_back_bit_for_bit_in_every_framework(path: Path, source: str) -> None:
    arrays = {f"{dtype}{list(shape)}": sample(dtype, shape) for dtype in DTYPES for shape in SHAPES}
    aq.save(path, {name: to(source, array) for name, array in arrays.items()})
    for framework in FRAMEWORKS:
        loaded = aq.load(path, framework)  # type: ignore[arg-type]
        assert list(loaded) == list(arrays)
        for name, array in arrays.items():
            found = loaded[name]
            assert str(found.dtype).removeprefix("torch.") == array.dtype.name, (framework, name)
            assert tuple(found.shape) == array.shape, (framework, name)
            assert bits(found) == array.tobytes(), (framework, name)


def test_the_tree_definition_is_that_which_was_saved(path: Path, quantized: dict[str, aq.QTensor]) -> None:
    """Also of an asymmetric tensor whose zero points all happen to be 0."""
    whole = np.tile(np.arange(-8, 8, dtype=np.float32), (4, 1))
    zeros = aq.quantize(whole, QuantizationConfig("int4", group_size=16, symmetric=False, solver="minmax"))
    assert not np.asarray(zeros.zero_point).any()
    tree = quantized | {"zeros": zeros}
    aq.save(path, tree)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with aq.WeightLoader(path) as loader:
        for name, q in tree.items():
            for found in (loader.get_quantized(name), loader.load_sharded(name, one, packed=True)):
                assert jax.tree.structure(found) == jax.tree.structure(q), name
                for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(q), strict=True):
                    assert np.array_equal(ours, theirs), name
    orbax.save(path.with_name("c"), tree)
    assert jax.tree.structure(orbax.load(path.with_name("c"))) == jax.tree.structure(tree)


def abstract(kind: str) -> Any:
    if kind == "a QTensor of shapes":
        return jax.eval_shape(lambda w: aq.quantize(w, "int8"), jnp.ones((2, 8)))
    return jax.ShapeDtypeStruct((2, 8), np.dtype("bfloat16" if kind == "of bfloat16" else "float32"))


REFUSED: dict[str, tuple[Any, str]] = {
    "a mask": (np.ma.masked_equal(np.ones((2, 8), np.float32), 1), "^w: is a masked array, whose mask would be lost"),
    "a shape": (
        abstract("a shape"),
        "^w: ShapeDtypeStruct of dtype float32 cannot be stored: it has a shape and no values; wanted",
    ),
    "of bfloat16": (
        abstract("of bfloat16"),
        "^w: ShapeDtypeStruct of dtype bfloat16 cannot be stored: it has a shape and no",
    ),
    "a QTensor of shapes": (
        abstract("a QTensor of shapes"),
        r"^w\.codes: ShapeDtypeStruct of dtype int8 cannot be stored: .* no val",
    ),
    "a parameter of shapes": (
        nnx.Param(abstract("a shape")),
        "^w: ShapeDtypeStruct of dtype float32 cannot be stored: .* no values",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tables_and_checkpoints_refuse_alike(kind: str, path: Path) -> None:
    value, message = REFUSED[kind]
    for write in (aq.save, orbax.save):
        with pytest.raises(aq.AqError, match=message):
            write(path, {"w": value})
    with pytest.raises(aq.AqError, match=r"^w: .*Tracer of dtype float32 cannot be stored: it has a shape"):
        jax.jit(lambda w: aq.save(path, {"w": w}))(jnp.ones(2))
    assert not any(path.parent.iterdir())


def test_variables_of_flax_are_what_they_hold(path: Path) -> None:
    q = aq.quantize(np.ones((2, 8), np.float32), "int8")
    bias = jnp.arange(3.0)
    tree = {"w": nnx.Param(q), "bias": nnx.BatchStat(bias), "tied": q, "list": nnx.Param(np.ones(2))}
    aq.save(path, tree)
    orbax.save(path.with_name("c"), tree)
    for found in (aq.load(path, packed=True), orbax.load(path.with_name("c"))):
        assert jax.tree.structure(found["w"]) == jax.tree.structure(q)
        assert found["tied"] is found["w"]
        assert np.array_equal(found["bias"], bias)
        assert found["list"].tolist() == [1, 1]


def test_arrays_in_any_memory_order_are_stored_by_value(path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    whole = torch.arange(24.0).reshape(4, 6)
    aq.save(
        path,
        {
            "turned": base.T,
            "strided": base[::2, ::-1],
            "big_endian": base.astype(">f4"),  # a file of bytes in the wrong order would look well
            "torch": whole.T[1:],
            "bfloat16": whole.to(torch.bfloat16).T,
            "conjugate": torch.tensor([1 + 2j]).conj(),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        },
    )
    found = aq.load(path, "numpy")
    assert np.array_equal(found["turned"], base.T)
    assert np.array_equal(found["strided"], base[::2, ::-1])
    assert np.array_equal(found["big_endian"], base)
    assert found["big_endian"].dtype == np.float32
    assert np.array_equal(found["torch"], base.T[1:])
    assert np.array_equal(found["bfloat16"].astype(np.float32), base.T)
    assert found["conjugate"].tolist() == [1 - 2j]
    assert found["parameter"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "value",
    [
        "text",
        None,
        object(),
        np.zeros(2, np.longdouble),
        np.zeros(2, "i4,f4"),
        np.zeros(2, "datetime64[s]"),
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_what_is_no_tensor_is_refused_by_name(path: Path, value: object) -> None:
    with pytest.raises(aq.AqError, match=r"^some\.name: .* (cannot be stored|has no plain values to store)"):
        aq.save(path, {"some.name": value})
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("tensors", "config", "wanted"),
    [
        ({1: np.ones(2)}, None, "found the tensor name 1; wanted a non-empty string"),
        (dict.fromkeys(("a", 1), np.ones(2)), None, "found the tensor name 1; wanted a non-empty string"),
        ({"a": np.ones(2)}, "text", "config is 'text'; wanted a dict of plain JSON"),
    ],
)
def test_names_and_configs_that_cannot_be_are_refused(path: Path, tensors: Any, config: Any, wanted: str) -> None:
    with pytest.raises(aq.FormatError, match=wanted):
        aq.save(path, tensors, config=config)
    assert list(path.parent.iterdir()) == []


def test_jax_values_that_have_no_bytes_of_their_own_are_refused_by_name(path: Path) -> None:
    for value in (jnp.zeros(2, jnp.int4), jax.random.key(0)):
        with pytest.raises(aq.AqError, match=r"^some\.name: .* cannot be stored"):
            aq.save(path, {"some.name": value})


def test_integers_beyond_32_bits_are_refused_in_jax_and_exact_elsewhere(path: Path) -> None:
    big = np.array([[1, 2], [3, 2**31]])
    aq.save(path, {"ids": big, "small": np.array([-(2**31), 2**31 - 1]), "wide": np.array([1.0, 1e300])})
    with aq.WeightLoader(path) as table:
        with pytest.raises(aq.AqError, match=r"ids: int64 value 2147483648 at \[1, 1\] does not fit int32"):
            table.get_layer("ids")
        with pytest.raises(aq.AqError, match=r"ids: .* at \[1, 1\]"):
            table.get_quantized("ids")
        with pytest.raises(aq.AqError, match=r"wide: float64 value 1e\+300 at \[1\] does not fit float32"):
            table.get_layer("wide")
        small = table.get_layer("small")
        assert (small.dtype, small.tolist()) == (np.int32, [-(2**31), 2**31 - 1])
        assert table.get_layer("ids", "numpy").tolist() == big.tolist()
        found = table.get_layer("ids", "torch")
        assert (found.dtype, found.tolist()) == (torch.int64, big.tolist())
        with jax.enable_x64(True):
            assert table.get_layer("ids").tolist() == big.tolist()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_qtensors_come_back_leaf_for_leaf(tmp_path: Path, quantized: dict[str, aq.QTensor], compression: str) -> None:
    path = tmp_path / "m.parquet"
    aq.save(path, quantized, compression=compression)  # type: ignore[arg-type]
    with aq.WeightLoader(path) as table:
        together = table.load_weights(packed=True)
        assert list(together) == list(quantized)
        for name, q in quantized.items():
            for found in (together[name], table.get_quantized(name), table.get_quantized(name, copy=False)):
                assert jax.tree.structure(found) == jax.tree.structure(q), name
                for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(q), strict=True):
                    assert isinstance(a, jax.Array)
                    assert (a.shape, a.dtype) == (b.shape, b.dtype), name
                    assert bits(a) == bits(b), name


def test_quantized_rows_are_float32_and_equal_in_every_framework(path: Path, quantized: dict[str, aq.QTensor]) -> None:
    aq.save(path, quantized)
    loaded = {framework: aq.load(path, framework) for framework in FRAMEWORKS}  # type: ignore[arg-type]
    for name, q in quantized.items():
        assert loaded["torch"][name].dtype == torch.float32
        assert loaded["jax"][name].dtype == jnp.float32
        wanted = bits(aq.dequantize(q))
        assert {bits(loaded[framework][name]) for framework in FRAMEWORKS} == {wanted}, name


def test_a_batch_of_qtensors_that_is_no_tensor_is_refused_and_leaves_nothing(path: Path) -> None:
    flat = QuantizationConfig("int4", group_size=24, solver="absmax")  # groups that cross rows of 64
    batch = jax.vmap(lambda w: aq.quantize(w, flat))(jnp.ones((3, 6, 64)))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[aq.quantize(jnp.ones((6, 64)), flat)] * 2)
    channels = jax.vmap(lambda w: aq.quantize(w, "int8"))(jnp.ones((3, 6, 64)))
    for q, message in ((batch, "save them one by one"), (stacked, "save them one by one"), (channels, "scales holds")):
        with pytest.raises(ValueError, match=message):
            aq.save(path, {"fine": np.ones(2), "w": q})
        assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("shape", [(4, 0), (3, 0, 4)], ids=str)
def test_empty_qtensors_come_back(path: Path, shape: tuple[int, ...]) -> None:
    kinds: list[dict[str, Any]] = [{"per_channel": True}, {"per_channel": False}, {"group_size": 24}]
    empty = {
        f"{kind}{i}": aq.quantize(jnp.ones(shape), QuantizationConfig(kind, solver="absmax", **options))
        for kind in ("int8", "int3")
        for i, options in enumerate(kinds)
    }
    aq.save(path, empty)
    packed = aq.load(path, packed=True)
    assert jax.tree.structure(packed) == jax.tree.structure(empty)
    for name, value in aq.load(path).items():
        assert value.shape == packed[name].shape == shape
        assert [leaf.shape for leaf in jax.tree.leaves(packed[name])] == [x.shape for x in jax.tree.leaves(empty[name])]


def test_saved_again_a_table_is_the_same_file(tmp_path: Path, quantized: dict[str, aq.QTensor]) -> None:
    tensors = {**quantized, "plain": np.arange(3)}
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    aq.save(first, tensors)
    aq.save(second, aq.load(first, packed=True) | {"plain": np.arange(3)})
    assert first.read_bytes() == second.read_bytes()


def test_get_quantized_gives_unquantized_rows_as_they_are(path: Path) -> None:
    aq.save(path, {"q": aq.quantize(matrix(2, 8), "int8"), "bias": np.arange(3, dtype=np.float16), "n": np.arange(2)})
    with aq.WeightLoader(path) as table:
        assert isinstance(table.get_quantized("q"), aq.QTensor)
        bias = table.get_quantized("bias")
        assert isinstance(bias, jax.Array)
        assert (bias.dtype, bias.tolist()) == (np.float16, [0, 1, 2])
        assert table.get_quantized("n").dtype == np.int32


# ------------------------------------------------------------------------------------------------ tied tensors


def test_one_object_under_two_names_is_stored_once_and_comes_back_as_one(path: Path) -> None:
    for value in (matrix(4, 8), torch.ones(3), jnp.ones(3), aq.quantize(matrix(4, 8), "int4")):
        aq.save(path, {"embed": value, "other": np.zeros(1), "head": value})
        with aq.WeightLoader(path) as table:
            assert table.get_layer_names() == ["embed", "other", "head"]
            assert dict(table.aliases) == {"head": "embed"}
            assert len(table._table.infos) == 2
            for framework in FRAMEWORKS:
                loaded = table.load_weights(framework)  # type: ignore[arg-type]
                assert loaded["head"] is loaded["embed"]
            assert bits(table.get_layer("head", "numpy")) == bits(table.get_layer("embed", "numpy"))
            packed = table.load_weights(packed=True)
            assert packed["head"] is packed["embed"]
            assert table.describe("head").layer_name == "embed"


def test_a_state_dict_of_torch_has_its_ties(path: Path) -> None:
    """It makes a new tensor for each name, over the same memory."""
    embed, head = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4)
    head.weight = embed.weight
    aq.save(path, torch.nn.ModuleDict({"embed": embed, "head": head}).state_dict())
    with aq.WeightLoader(path) as table:
        assert dict(table.aliases) == {"head.weight": "embed.weight"}
        assert len(table._table.infos) == 2
        loaded = table.load_weights("torch")
    assert loaded["head.weight"] is loaded["embed.weight"]
    assert torch.equal(loaded["embed.weight"], embed.weight)


def test_equal_arrays_are_not_tied(path: Path) -> None:
    z = torch.tensor([1 + 2j])
    aq.save(path, {"a": np.ones(3), "b": np.ones(3), "up": z.imag, "down": z.conj().imag, "row": z, "turned": z.conj()})
    with aq.WeightLoader(path) as table:
        assert not table.aliases


class MadeWhenAsked(Mapping[str, np.ndarray]):
    """Values that live only while they are used: the next one is likely to have the same id."""

    def __iter__(self) -> Any:
        return (f"t{i}" for i in range(20))

    def __len__(self) -> int:
        return 20

    def __getitem__(self, name: str) -> np.ndarray:
        return np.full(1, int(name[1:]))


def test_values_that_are_made_when_asked_for_are_not_taken_for_tied(path: Path) -> None:
    aq.save(path, MadeWhenAsked())
    assert [int(a[0]) for a in aq.load(path, "numpy").values()] == list(range(20))


# ------------------------------------------------------------------------------------------------ what can be asked


def test_dtype_converts_floating_tensors_only(path: Path) -> None:
    tensors = {"w": matrix(2, 4), "ids": np.arange(3), "flag": np.array([True]), "q": aq.quantize(matrix(2, 8), "int8")}
    aq.save(path, tensors)
    cases = {
        "numpy": ("float16", np.float16, np.dtype("float16"), "torch.float16"),
        "jax": ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")),
        "torch": (torch.bfloat16, "bfloat16"),
    }
    for framework, spellings in cases.items():
        for dtype in spellings:
            loaded = aq.load(path, framework, dtype=dtype)  # type: ignore[arg-type]
            wanted = "float16" if framework == "numpy" else "bfloat16"
            assert [str(loaded[n].dtype).removeprefix("torch.") for n in ("w", "q")] == [wanted] * 2
            assert str(loaded["ids"].dtype).removeprefix("torch.") in ("int64", "int32")
            assert str(loaded["flag"].dtype).removeprefix("torch.") == "bool"
    packed = aq.load(path, packed=True, dtype="float16")
    assert packed["w"].dtype == np.float16
    assert isinstance(packed["q"], aq.QTensor)
    for dtype in ("int32", "nonsense", torch.int8, np.bool_, "float8_e8m0fnu"):
        for packed in (False, True):
            with pytest.raises(aq.ConfigError, match="wanted None or a floating dtype"):
                aq.load(path, packed=packed, dtype=dtype)


def test_dtype_makes_no_infinities(path: Path) -> None:
    """A plain number that it does not hold is refused; a level, as `dequantize` has it, becomes its largest number."""
    q = aq.quantize(np.full((2, 8), -1e6, np.float32), "int8")
    aq.save(path, {"w": np.array([[1, -1], [0, 1e6]], np.float32), "q": q})
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with aq.WeightLoader(path) as loader:
        for dtype in ("float16", "float8_e4m3fn"):
            roads = [
                *(functools.partial(loader.get_layer, framework=framework) for framework in ("jax", "torch", "numpy")),
                functools.partial(loader.load_sharded, sharding=one_device),
            ]
            for load in roads:
                with pytest.raises(aq.AqError, match=rf"^w: float32 value 1000000\.0 at \[1, 1\] does not fit {dtype}"):
                    load("w", dtype=dtype)
                assert bits(load("q", dtype=dtype)) == bits(aq.dequantize(q, dtype))
            for packed in (False, True):
                with pytest.raises(aq.AqError, match=r"^w: float32 value"):
                    loader.load_weights(packed=packed, dtype=dtype)
        assert loader.get_layer("w", dtype="bfloat16").tolist() == [[1, -1], [0, 999424]]


def test_unknown_layers_name_the_nearest(path: Path) -> None:
    aq.save(path, {"encoder.layer.0.weight": np.ones(2), "pooler.bias": np.ones(2)})
    with aq.WeightLoader(path) as table:
        calls = (table.get_layer, table.get_quantized, table.describe)
        for call in calls:
            with pytest.raises(KeyError, match=r"no layer 'pooler.bais'; the nearest is 'pooler.bias'"):
                call("pooler.bais")
            with pytest.raises(KeyError, match="no layer 3; the nearest is"):
                call(3)
    aq.save(path, {})
    with aq.WeightLoader(path) as table:
        assert table.get_layer_names() == []
        assert table.load_weights() == {}
        with pytest.raises(KeyError, match="the table is empty"):
            table.get_layer("x")


def test_a_closed_loader_gives_no_more_and_takes_nothing_back(path: Path) -> None:
    weights = matrix(40, 50)
    aq.save(path, {"w": weights, "q": aq.quantize(matrix(2, 8), "int8")})
    with aq.WeightLoader(path) as table:
        views = [table.get_layer("w", framework, copy=False) for framework in FRAMEWORKS]  # type: ignore[arg-type]
    gc.collect()
    for view in views:
        assert bits(view) == weights.tobytes()
    for call in (table.get_layer, table.get_quantized, table.describe):
        with pytest.raises(ValueError, match="is closed"):
            call("w")
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    properties = (lambda: table.aliases, lambda: table.bytes_read, lambda: table.partly_read)
    for ask in (
        table.load_weights, table.get_layer_names, table.__enter__, lambda: table.load_sharded("w", one), *properties
    ):  # fmt: skip
        with pytest.raises(ValueError, match="is closed"):
            ask()
    table.close()  # twice is once


def test_what_cannot_be_given_is_refused_before_anything_is_read(path: Path) -> None:
    aq.save(path, {"w": np.ones(2)})
    with aq.WeightLoader(path) as table:
        for call in (lambda f: table.get_layer("w", f), table.load_weights):
            with pytest.raises(aq.ConfigError, match="framework = 'tensorflow': wanted one of jax, torch, numpy"):
                call("tensorflow")
        for framework in ("torch", "numpy"):
            with pytest.raises(aq.FormatError, match="packed=True gives QTensors, which are JAX arrays"):
                table.load_weights(framework, packed=True)  # type: ignore[arg-type]


def test_damage_is_seen_unless_it_is_asked_not_to_be(tmp_path: Path) -> None:
    path = tmp_path / "m.arrow"
    marker = np.frombuffer(b"these bytes are found in the file", np.uint8)
    aq.save(path, {"w": marker, "other": np.arange(3)})
    damaged = path.read_bytes().replace(b"these bytes", b"those bytes")
    path.write_bytes(damaged)
    with pytest.raises(aq.IntegrityError, match=r"row 0 \(w\)"):
        aq.load(path, "numpy")
    assert bytes(aq.load(path, "numpy", verify=False)["w"]) == b"those bytes are found in the file"
    with aq.WeightLoader(path) as table:
        assert table.get_layer("other", "numpy").tolist() == [0, 1, 2]


def test_a_folder_of_shards_is_one_model(tmp_path: Path) -> None:
    aq.save(tmp_path / "a.parquet", {"a": np.ones(2)})
    aq.save(tmp_path / "b.arrow", {"b": aq.quantize(matrix(2, 8), "int8")})
    assert list(aq.load(tmp_path)) == ["a", "b"]


# ------------------------------------------------------------------------------------------------ who owns the memory


def spoil(array: Any) -> None:
    """Write over an array wherever its framework lets us."""
    if isinstance(array, torch.Tensor):
        array.view(torch.uint8).fill_(255)
    elif isinstance(array, np.ndarray):
        array.reshape(-1).view(np.uint8)[:] = 255


def owned(path: Path) -> dict[str, np.ndarray]:
    # Large enough, and of such sizes, that some rows of an .arrow file lie at multiples of 64 bytes.
    arrays = {f"w{i}": matrix(16, 16, i) for i in range(4)} | {"odd": np.arange(7, dtype=np.uint8)}
    aq.save(path, arrays | {"q": aq.quantize(matrix(4, 16), "int8")})
    return arrays


@pytest.mark.parametrize("copy", [True, False])
def test_writing_to_what_was_loaded_changes_nothing_else(path: Path, copy: bool) -> None:
    arrays = owned(path)
    before = path.read_bytes()
    with aq.WeightLoader(path) as table:
        in_jax = table.load_weights("jax", copy=copy)
        packed = table.load_weights(packed=True, copy=copy)
        wanted = {name: bits(value) for name, value in in_jax.items()}
        leaves = [bits(leaf) for leaf in jax.tree.leaves(packed)]
        frameworks = ("torch", "numpy") if copy else ("torch",)
        for framework in frameworks:
            for value in table.load_weights(framework, copy=copy).values():  # type: ignore[arg-type]
                spoil(value)
        again = table.load_weights("numpy", copy=copy)
        assert all(bits(again[name]) == array.tobytes() for name, array in arrays.items())
        assert {name: bits(value) for name, value in again.items()} == wanted
        assert {name: bits(value) for name, value in in_jax.items()} == wanted
        assert [bits(leaf) for leaf in jax.tree.leaves(packed)] == leaves
    assert path.read_bytes() == before


@pytest.mark.parametrize("packed", [False, True])
def test_torch_cannot_write_into_the_file_through_a_jax_array(path: Path, packed: bool) -> None:
    """torch takes JAX arrays by DLPack and writes to them: with copy=True, no JAX array may share the file's memory."""
    arrays = owned(path)
    with aq.WeightLoader(path) as table:
        loaded = table.load_weights(packed=packed)
        for name in arrays:
            spoil(torch.from_dlpack(loaded[name]))
        again = table.load_weights("numpy")
        assert all(bits(again[name]) == array.tobytes() for name, array in arrays.items())


def test_views_of_the_file_are_read_only(path: Path) -> None:
    owned(path)
    with aq.WeightLoader(path) as table:
        view = table.get_layer("w1", "numpy", copy=False)
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 0
        assert table.get_layer("w1", "numpy").flags.writeable


def test_the_saved_file_does_not_follow_the_arrays(path: Path) -> None:
    array, tensor = np.ones(4, np.float32), torch.ones(4)
    aq.save(path, {"a": array, "t": tensor})
    array[:], tensor[:] = 2, 2
    assert aq.load(path, "numpy")["a"].tolist() == [1, 1, 1, 1]
    assert aq.load(path, "numpy")["t"].tolist() == [1, 1, 1, 1]


def test_a_table_can_be_saved_over_the_one_its_arrays_are_views_of(path: Path) -> None:
    arrays = owned(path)
    with aq.WeightLoader(path) as table:
        aq.save(path, table.load_weights("numpy", copy=False) | {"new": np.ones(2)})
    found = aq.load(path, "numpy")
    assert "new" in found
    assert all(bits(found[name]) == array.tobytes() for name, array in arrays.items())


# ------------------------------------------------------------------------------------------------ tensors in pieces


def test_tensors_in_pieces_come_back_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch, quantized: dict[str, aq.QTensor]
) -> None:
    plain = {f"{dtype}.plain": sample(dtype, (7, 13)) for dtype in DTYPES}
    aq.save(path.with_name(f"whole{path.suffix}"), {**quantized, **plain})
    for module in (dense, qtensors):
        monkeypatch.setattr(module, "pieces", functools.partial(pieces, limit=64))
    aq.save(path, {**quantized, **plain})
    with aq.WeightLoader(path) as table, aq.WeightLoader(path.with_name(f"whole{path.suffix}")) as whole:
        # One grid a tensor, too, is cut: each piece repeats the grid.
        cut = [name for name in table.get_layer_names() if len(table._table.pieces(name)) > 1]
        per_tensor = [name for name, q in quantized.items() if q.spec.quant_axis < 0]
        assert set(per_tensor) < set(cut)
        assert "float32.plain" in cut
        for framework in FRAMEWORKS:
            for name in table.get_layer_names():
                found, wanted = table.get_layer(name, framework), whole.get_layer(name, framework)  # type: ignore[arg-type]
                assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
                assert bits(found) == bits(wanted), (framework, name)
        a, b = table.load_weights(packed=True), whole.load_weights(packed=True)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert [bits(leaf) for leaf in jax.tree.leaves(a)] == [bits(leaf) for leaf in jax.tree.leaves(b)]


def test_pieces_of_one_grid_that_disagree_are_refused(path: Path) -> None:
    codes, zero = np.zeros(8, np.uint8), np.zeros(1, np.float32)
    rows = [Row("w", (2, 8), "float32", codes, 8, "int8", np.full(1, scale, np.float32), zero) for scale in (0.5, 0.25)]
    write_table(path, rows, version=2)
    with aq.WeightLoader(path) as table, pytest.raises(aq.FormatError, match=r"w: pieces of one grid .*\[0.5, 0.25\]"):
        table.get_quantized("w")


@pytest.mark.parametrize("shape", [(6, 96), (4, 3, 8)])
def test_rotated_tensors_come_back_unrotated(path: Path, shape: tuple[int, ...]) -> None:
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    q = aq.quantize(w, aq.QuantizationConfig("int4", group_size=8, rotate=True))
    aq.save(path, {"w": q})
    with aq.WeightLoader(path) as table:
        assert table.describe("w").quant_type == "int4h"
        assert table.describe("w").rotation == q.spec.rotation == shape[-1] & -shape[-1]
        loaded = table.get_quantized("w")
        assert loaded.spec == q.spec
        np.testing.assert_array_equal(loaded.codes, q.codes)
        np.testing.assert_allclose(table.get_layer("w", "numpy"), aq.dequantize(q), rtol=0, atol=1e-5)
        assert np.linalg.norm(table.get_layer("w", "numpy") - w) < 0.15 * np.linalg.norm(w)


# ------------------------------------------------------------------------------------------------ without torch


def test_without_torch_everything_else_works(tmp_path: Path) -> None:
    """In a process of its own, whose torch cannot be imported."""
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
import aq_jax as aq
aq.save(sys.argv[1], {"w": np.ones((2, 8), np.float32), "q": aq.quantize(np.ones((2, 8), np.float32), "int8")})
assert aq.load(sys.argv[1])["w"].shape == (2, 8)
assert aq.load(sys.argv[1], packed=True)["q"].shape == (2, 8)
for call in (lambda: aq.load(sys.argv[1], "torch"), lambda: aq.WeightLoader(sys.argv[1]).get_layer("w", "torch")):
    try:
        call()
    except ImportError as error:
        assert "pip install 'aq-jax[torch]'" in str(error), error
    else:
        raise SystemExit("torch was loaded")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.parquet")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
