"""Commands on files: convert, quantize, dequantize, plan, inspect."""

from __future__ import annotations

import math
import os
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from helpers import listing

import aq_jax as aq
from aq_jax.config import ConversionConfig, Override, QuantizationConfig
from aq_jax.converters.convert import dry_run
from aq_jax.store import DTYPES, Row, open_table, write_table
from aq_jax.store.inspection import inspect_table

BFLOAT16 = DTYPES["bfloat16"]


def matrix(*shape: int, dtype: object = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(dtype)


def model() -> dict[str, np.ndarray]:
    """A model in small: several dtypes, something to leave alone, and a tied pair."""
    embed = matrix(40, 16)
    return {
        "embed.weight": embed,
        "layer.0.weight": matrix(16, 24, seed=1),
        "layer.1.weight": matrix(16, 24, dtype=np.float16, seed=2),
        "layer.2.weight": matrix(16, 24, dtype=BFLOAT16, seed=3),
        "norm.weight": matrix(16, dtype=np.float16),
        "scale": np.array(0.5, np.float32),
        "position_ids": np.arange(32).reshape(1, 32) + 2**40,
        "mask": np.eye(3, dtype=bool),
        "empty": np.zeros((0, 16), np.float32),
        "head.weight": embed,
    }


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    aq.save(tmp_path / "in" / "v1.parquet", model())
    return tmp_path / "in" / "v1.parquet"


def rows(path: Path) -> list[Row]:
    with open_table(path) as table:
        return list(table.rows())


def types(path: Path) -> dict[str, str | None]:
    return {row.layer_name: row.quant_type for row in rows(path)}


CONFIG = QuantizationConfig(
    quant_type="int8",
    mixed_precision_layers=("embed",),
    overrides=(
        Override(r"layer\.1", quant_type="int4", group_size=8, solver="absmax"),
        Override(r"layer\.2", quant_type="none"),
    ),
)


# ------------------------------------------------------------------------------------------------ quantize_file


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_quantized_as_the_config_says_and_back_in_the_dtypes_that_were(v1: Path, suffix: str) -> None:
    v2, back = v1.with_name(f"v2.{suffix}"), v1.with_name(f"back.{suffix}")
    done = aq.quantize_file(v1, v2, CONFIG)
    assert types(v2) == {
        "embed.weight": "fp16",
        "layer.0.weight": "int8",
        "layer.1.weight": "int4",
        "layer.2.weight": "none",
        "norm.weight": "none",
        "scale": "none",
        "position_ids": "none",
        "mask": "none",
        "empty": "int8",
    }
    assert set(done.quantized) == {"layer.0.weight", "layer.1.weight", "empty"}
    assert done.kept == {}
    assert done.source_bytes == sum(a.nbytes for name, a in model().items() if name != "head.weight")
    by_name = {row.layer_name: row for row in rows(v2)}
    assert by_name["layer.1.weight"].dtype == "float16"
    assert by_name["layer.1.weight"].group_size == 8
    assert by_name["layer.0.weight"].solver == "absmax"
    assert by_name["embed.weight"].dtype == "float32"

    aq.dequantize_file(v2, back)
    originals, loaded, quantized = model(), aq.load(back, "numpy"), aq.load(v2, "numpy")
    with aq.WeightLoader(back) as table:
        assert table.describe("norm.weight").quant_type is None  # V1
        assert dict(table.aliases) == {"head.weight": "embed.weight"}
    assert list(loaded) == list(originals)
    for name, original in originals.items():
        assert loaded[name].dtype == original.dtype, name
        assert loaded[name].shape == original.shape, name
        if name.startswith(("embed", "head", "layer.0", "layer.1")):
            assert np.array_equal(loaded[name], quantized[name].astype(original.dtype)), name
            wide = original.astype(np.float64)
            assert np.linalg.norm(loaded[name] - wide) < 0.1 * np.linalg.norm(wide)
        else:
            assert loaded[name].tobytes() == original.tobytes(), name


def test_a_config_may_be_just_a_type(v1: Path) -> None:
    aq.quantize_file(v1, v1.with_name("v2.parquet"), "int8")
    assert types(v1.with_name("v2.parquet"))["embed.weight"] == "int8"


def test_rows_are_the_same_as_those_of_quantize(v1: Path) -> None:
    """Tiles and whole arrays are two roads to one result."""
    config = QuantizationConfig(quant_type="int4", group_size=8, solver="absmax")
    aq.quantize_file(v1, v1.with_name("v2.parquet"), config)
    whole = aq.quantize(model()["layer.0.weight"], config)
    with aq.WeightLoader(v1.with_name("v2.parquet")) as table:
        tiled = table.get_quantized("layer.0.weight")
    assert np.array_equal(tiled.codes, whole.codes)
    assert np.array_equal(tiled.scale, whole.scale)


def test_statistics_are_those_of_the_arrays(v1: Path) -> None:
    aq.quantize_file(v1, v1.with_name("v2.parquet"), CONFIG)
    loaded = aq.load(v1.with_name("v2.parquet"), "numpy")
    for row in rows(v1.with_name("v2.parquet")):
        if not row.quantized:
            assert (row.cosine, row.rel_mse, row.solver) == (None, None, None)
        elif row.num_params:
            w, v = (a[row.layer_name].astype(np.float64).ravel() for a in (model(), loaded))
            assert row.cosine == pytest.approx(w @ v / math.sqrt((w @ w) * (v @ v)), abs=1e-6)
            assert row.rel_mse == pytest.approx(((w - v) @ (w - v)) / (w @ w), rel=1e-3)


def test_the_metadata_says_how_the_table_was_made(v1: Path) -> None:
    aq.quantize_file(v1, v1.with_name("v2.parquet"), CONFIG)
    found = inspect_table(v1.with_name("v2.parquet"))
    assert found.config == {"quantization": CONFIG.to_dict()}
    assert found.aliases == {"head.weight": "embed.weight"}
    assert inspect_table(v1).config == {}


def test_two_runs_give_the_same_bytes(v1: Path) -> None:
    for name in ("a.parquet", "b.parquet", "a.arrow", "b.arrow"):
        aq.quantize_file(v1, v1.with_name(name), CONFIG)
    for suffix in ("parquet", "arrow"):
        a, b = (v1.with_name(f"{n}.{suffix}").read_bytes() for n in "ab")
        assert a == b


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_the_source_may_be_the_output(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m.{suffix}"
    aq.save(path, model())
    aq.quantize_file(path, path, CONFIG)
    assert types(path)["layer.0.weight"] == "int8"
    wanted = aq.load(path, "numpy")
    aq.dequantize_file(path, path)
    assert np.array_equal(aq.load(path, "numpy")["layer.0.weight"], wanted["layer.0.weight"])
    assert listing(tmp_path) == [path.name]


def test_what_is_quantized_already_is_refused_by_name(v1: Path) -> None:
    v2 = v1.with_name("v2.parquet")
    aq.quantize_file(v1, v2, CONFIG)
    before = v2.read_bytes()
    for output in (v2, v1.with_name("v3.parquet")):
        with pytest.raises(aq.FormatError, match=r"layer\.0\.weight: is int8 already, and would be rounded twice"):
            aq.quantize_file(v2, output, "int4")
    assert v2.read_bytes() == before
    assert listing(v1.parent) == ["v1.parquet", "v2.parquet"]


def test_what_is_quantized_already_is_quantized_again_if_asked(v1: Path, tmp_path: Path) -> None:
    v2 = v1.with_name("v2.parquet")
    aq.quantize_file(v1, v2, CONFIG)
    done = aq.quantize_file(v2, tmp_path / "again.parquet", "int4", requantize=True)
    found = "3 tensors were quantized already (2 int8, 1 int4), and are quantized again: their errors add up"
    assert found in done.notes
    aq.dequantize_file(v2, tmp_path / "plain.parquet")
    aq.quantize_file(tmp_path / "plain.parquet", tmp_path / "direct.parquet", "int4")
    packed, wanted = (aq.load(tmp_path / f"{name}.parquet", "numpy") for name in ("again", "direct"))
    jax.tree.map(np.testing.assert_array_equal, packed, wanted)
    config = ConversionConfig(str(v2), str(tmp_path / "shards"), QuantizationConfig("int4"), requantize=True)
    assert {row.name for row in dry_run(config).rows if row.quant_type == "int4"} == set(done.quantized)
    jax.tree.map(np.testing.assert_array_equal, aq.load(aq.convert(config).path, "numpy"), wanted)
    with pytest.raises(aq.ConfigError, match="requantize = true without"):
        ConversionConfig(str(v2), str(tmp_path / "m.parquet"), requantize=True)


def test_a_folder_of_tables_is_a_source(v1: Path) -> None:
    aq.save(v1.with_name("more.arrow"), {"another": matrix(4, 8)})
    output = v1.parent.parent / "v2.parquet"
    aq.quantize_file(v1.parent, output, "int8")
    assert set(types(output)) == {*types(v1), "another"}


def test_integers_that_another_writer_quantized_are_rounded_not_cut_off(tmp_path: Path) -> None:
    codes = np.array([1, 2, 3, 4], np.int8).view(np.uint8)
    scale, zero = np.array([0.9999], np.float32), np.zeros(1, np.float32)
    write_table(tmp_path / "a.parquet", [Row("n", (2, 2), "int64", codes, 4, "int8", scale, zero)], version=2)
    aq.dequantize_file(tmp_path / "a.parquet", tmp_path / "b.parquet")
    found = aq.load(tmp_path / "b.parquet", "numpy")["n"]
    assert (found.dtype, found.tolist()) == (np.int64, [[1, 2], [3, 4]])


def test_dequantized_to_a_folder_it_is_safetensors(v1: Path, tmp_path: Path) -> None:
    aq.quantize_file(v1, v1.with_name("v2.parquet"), CONFIG)
    v1.with_name("config.json").write_text("{}")
    done = aq.dequantize_file(v1.with_name("v2.parquet"), tmp_path / "folder")
    assert done.path == str(tmp_path / "folder" / "model.safetensors")
    assert listing(tmp_path / "folder") == ["config.json", "model.safetensors"]


# ------------------------------------------------------------------------------------------------ bad tensors

BAD = {
    "NaN": (np.nan, r"layer\.bad: 1 of 128 values are not finite \(first at \[3, 2\]\)"),
    "infinity": (np.inf, r"layer\.bad: 1 of 128 values are not finite \(first at \[3, 2\]\)"),
    "no scale": (3e38, r"layer\.bad: the scale of group 3, whose largest value is 3e\+38, is outside"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_tensor_is_named_and_nothing_is_left(tmp_path: Path, what: str) -> None:
    value, message = BAD[what]
    bad = matrix(8, 16)
    bad[3, 2] = value
    # At two bits the scale of a mid-rise grid is larger than half the largest value.
    kind = "int2" if what == "no scale" else "int8"
    config = {"quant_type": kind, "per_channel": True, "solver": "mse" if kind == "int2" else None}
    if kind == "int2":
        bad[3] = [3e38, -3e38] * 8
        config |= {"symmetric": False, "solver": "minmax"}
    aq.save(tmp_path / "v1.parquet", {"fine": matrix(8, 16, seed=1), "layer.bad": bad})
    with pytest.raises(aq.AqError, match=message) as caught:
        aq.quantize_file(tmp_path / "v1.parquet", tmp_path / "v2.parquet", QuantizationConfig(**config))
    assert 'on_nonfinite = "keep"' in str(caught.value)
    assert listing(tmp_path) == ["v1.parquet"]

    done = aq.quantize_file(
        tmp_path / "v1.parquet", tmp_path / "v2.parquet", QuantizationConfig(**config, on_nonfinite="keep")
    )
    assert list(done.kept) == ["layer.bad"]
    assert list(done.quantized) == ["fine"]
    assert types(tmp_path / "v2.parquet") == {"fine": kind, "layer.bad": "none"}
    assert aq.load(tmp_path / "v2.parquet", "numpy")["layer.bad"].tobytes() == bad.tobytes()


def test_a_tensor_that_float16_would_spoil_is_kept_in_its_own_dtype(tmp_path: Path) -> None:
    large = matrix(4, 8) * 1e6
    aq.save(tmp_path / "v1.parquet", {"embed.large": large, "embed.small": matrix(4, 8), "embed.tiny": large * 1e-20})
    config = QuantizationConfig(mixed_precision_layers=("embed",))
    done = aq.quantize_file(tmp_path / "v1.parquet", tmp_path / "v2.parquet", config)
    assert types(tmp_path / "v2.parquet") == {"embed.large": "none", "embed.small": "fp16", "embed.tiny": "none"}
    assert list(done.kept) == ["embed.large", "embed.tiny"]
    assert "embed.large: float16 would change it by more than" in done.kept["embed.large"]
    assert aq.load(tmp_path / "v2.parquet", "numpy")["embed.large"].tobytes() == large.tobytes()


# ------------------------------------------------------------------------------------------------ convert and plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with the weights of `v1`."""
    out = tmp_path / "hf"
    out.mkdir()
    # safetensors' NumPy side has no bfloat16, and stores a tied tensor once.
    plain = {name: a for name, a in model().items() if a.dtype != BFLOAT16 and name != "head.weight"}
    safetensors.numpy.save_file(plain, out / "model.safetensors", {"format": "pt", "head.weight": "embed.weight"})
    (out / "config.json").write_text("{}")
    return out


def conversion(folder: Path, output: Path, config: QuantizationConfig | None) -> ConversionConfig:
    return ConversionConfig(str(folder), str(output), config)


def test_converting_is_quantizing_the_same_weights(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    aq.convert(conversion(folder, out / "v1.parquet", None))
    aq.quantize_file(out / "v1.parquet", out / "two_steps.parquet", CONFIG)
    done = aq.convert(conversion(folder, out / "one_step.parquet", CONFIG))
    assert done.path == str(out / "one_step.parquet")
    # Rows have digests over all that their values depend on, and the table one over its rows, aliases and config.
    assert (out / "one_step.parquet").read_bytes() == (out / "two_steps.parquet").read_bytes()
    assert (out / "config.json").exists()


@pytest.mark.parametrize("config", [None, CONFIG, QuantizationConfig(quant_type="int2"), QuantizationConfig("fp16")])
def test_a_plan_is_what_will_be_written(folder: Path, tmp_path: Path, config: QuantizationConfig | None) -> None:
    before = listing(tmp_path)
    wanted = conversion(folder, tmp_path / "out" / "m.arrow", config)
    planned = dry_run(wanted).rows
    assert listing(tmp_path) == before
    aq.convert(wanted)
    with open_table(tmp_path / "out" / "m.arrow") as table:
        found = [(i.layer_name, i.shape, i.quant_type or i.dtype) for i in table.infos]
        # In an .arrow file nothing is compressed: the bound is the number itself.
        sizes = {i.layer_name: i.disk_bytes for i in table.infos}
    assert [(p.name, p.shape, p.quant_type) for p in planned] == found
    assert {p.name: p.bytes for p in planned} == sizes


def test_a_plan_knows_what_float16_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    tensors = {"embed.large": matrix(4, 8) * 1e6, "embed.small": matrix(4, 8)}
    safetensors.numpy.save_file(tensors, tmp_path / "hf" / "model.safetensors")
    config = QuantizationConfig(mixed_precision_layers=("embed",))
    planned = dry_run(conversion(tmp_path / "hf", tmp_path / "m.parquet", config)).rows
    assert {p.name: (p.quant_type, p.bytes) for p in planned} == {
        "embed.large": ("none", 128), "embed.small": ("fp16", 64),
    }  # fmt: skip


def test_progress_is_told_of_every_tensor(v1: Path) -> None:
    told: list[tuple[str, int, int]] = []
    aq.quantize_file(v1, v1.with_name("v2.parquet"), "int8", progress=lambda *what: told.append(what))
    stored = {name: a for name, a in model().items() if name != "head.weight"}
    total = sum(a.nbytes for a in stored.values())
    assert told == [(name, a.nbytes, total) for name, a in stored.items()]


def test_a_stop_from_outside_leaves_nothing(v1: Path) -> None:
    def stop(name: str, size: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aq.quantize_file(v1, v1.with_name("v2.parquet"), "int8", progress=stop)
    assert listing(v1.parent) == ["v1.parquet"]


# ------------------------------------------------------------------------------------------------ inspect


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_inspection_counts_the_bytes_on_disk(v1: Path, compression: str) -> None:
    v2 = v1.with_name("v2.parquet")
    aq.quantize_file(v1, v2, CONFIG, compression=compression)  # type: ignore[arg-type]
    found = inspect_table(v2)
    layers = {layer.name: layer for layer in found.layers}
    assert found.version == 2
    assert found.file_bytes == v2.stat().st_size
    assert found.params == sum(a.size for name, a in model().items() if name != "head.weight")
    # True bits: what the columns take on disk, shared out among the rows (each share is rounded down).
    footer = pq.read_metadata(v2)
    columns = [footer.row_group(g).column(c) for g in range(footer.num_row_groups) for c in range(footer.num_columns)]
    stored = sum(c.total_compressed_size for c in columns if c.path_in_schema in ("data", "scales", "zero_points"))
    total = sum(layer.bytes for layer in found.layers)
    assert stored - 3 * len(layers) <= total <= stored < found.file_bytes
    assert sum(layer.bits * layer.params / 8 for layer in found.layers) == pytest.approx(total)
    layer = layers["layer.1.weight"]
    assert (layer.shape, layer.dtype, layer.quant_type, layer.params) == ((16, 24), "float16", "int4", 384)
    assert layer.cosine is not None
    assert 0.98 < layer.cosine < 1
    assert layers["embed.weight"].cosine is None
    assert layers["empty"].bits == 0


def test_a_table_in_arrow_takes_exactly_its_bytes(v1: Path) -> None:
    aq.quantize_file(v1, v1.with_name("v2.arrow"), CONFIG)
    layers = {layer.name: layer for layer in inspect_table(v1.with_name("v2.arrow")).layers}
    assert layers["layer.0.weight"].bytes == 16 * 24 + 2 * 4 * 16
    assert layers["layer.1.weight"].bits == 4 + 2 * 32 / 8


def test_pieces_are_one_layer(tmp_path: Path) -> None:
    def piece(count: int, cosine: float, error: float) -> Row:
        scale = np.ones(1, np.float32)
        return Row("w", (3, 8), "float32", np.zeros(count, np.uint8), count, "int8", scale, scale - 1,
                   solver="absmax", cosine=cosine, rel_mse=error)  # fmt: skip

    write_table(tmp_path / "m.arrow", [piece(16, 0.9, 0.25), piece(8, 0.95, 0.5)], version=2)
    (layer,) = inspect_table(tmp_path / "m.arrow").layers
    assert (layer.params, layer.bytes, layer.cosine) == (24, 24 + 2 * 8, 0.9)
    assert layer.rel_mse == pytest.approx((16 * 0.25 + 8 * 0.5) / 24)


def test_a_folder_is_inspected_as_one(v1: Path) -> None:
    aq.save(v1.with_name("more.arrow"), {"another": matrix(4, 8)})
    found = inspect_table(v1.parent)
    assert "another" in [layer.name for layer in found.layers]
    assert found.file_bytes == sum(f.stat().st_size for f in v1.parent.iterdir())


def test_what_is_not_there_is_not_there(tmp_path: Path) -> None:
    for call in (inspect_table, lambda p: aq.quantize_file(p, tmp_path / "o.parquet", "int8")):
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "missing.parquet")
    assert os.listdir(tmp_path) == []
