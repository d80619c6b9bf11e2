"""Codes of small grids, and of nested scales: every road gives the values that the slow reader of the format gives."""

from __future__ import annotations

from pathlib import Path

import independent_reader
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aq_jax as aq
from aq_jax.codes import CODES
from aq_jax.config.quantization import widths
from aq_jax.io.qtensors import join_grids
from aq_jax.store import open_table

STEMS = ("grids", "unsigned", "integers", "addends", "nested")
FILES = [Path(__file__).parents[1] / "golden" / f"{stem}.arrow" for stem in STEMS]
# Each form, and groups that cross rows; records with minimums, and without. Slow: the other halves, and pieces.
COMPILED = (
    "int5_f16z",
    "int3_bf16m",
    "int5_bf16u",
    "int4_f16i",
    "f16.across",
    "q5_k.pieces",
    "q6_k",
    "int4_f32",
    "int4_bf16a",
    "int2_f16p",
    "f8_e4m3_bf16",
    "fp4_nested",
    "nested.many",
)
OTHERS = ("int8_bf16", "int4_f16m", "q2_k", "int3_f32i", "int2_f32p", "p.pieces", "f8_e4m3_f16", "nf4_nested",
          "nested.pieces")  # fmt: skip


@pytest.fixture(scope="module")
def wanted() -> dict[str, np.ndarray]:
    return {name: value for file in FILES for name, value in independent_reader.read_tensors(file).items()}


def file_of(name: str) -> Path:
    for file in FILES:
        with open_table(file) as table:
            if name in table.names:
                return file
    raise KeyError(name)


def test_configs_cannot_ask_for_them() -> None:
    assert all(code.read_only is not (name in widths()) for name, code in CODES.items() if name == code.plain_name)
    with pytest.raises(aq.ConfigError, match="quant_type = 'q4_k': wanted one of int8, int6"):
        aq.QuantizationConfig("q4_k")


@pytest.mark.parametrize("name", [*COMPILED, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_packed_tensors_mean_the_same_bit_for_bit(name: str, wanted: dict[str, np.ndarray]) -> None:
    with aq.WeightLoader(file_of(name)) as loader:
        q = jax.device_put(loader.get_quantized(name))
    value = wanted[name]
    assert np.asarray(aq.dequantize(q)).tobytes() == value.tobytes()
    assert q.codes.nbytes < value.size * 4
    rows = aq.qembed(q, jnp.array([1, 0, len(value)]))
    assert np.asarray(rows[:2]).tobytes() == value[[1, 0]].tobytes()
    assert np.isnan(rows[2]).all()
    x = np.random.default_rng(0).normal(size=(3, value.shape[1])).astype(np.float32)
    np.testing.assert_allclose(
        aq.qdot(x, q), x @ value.T, rtol=0, atol=2e-6 * float(np.abs(x).max() * np.abs(value).sum(1).max())
    )


def test_a_table_of_a_table_has_its_rows(tmp_path: Path) -> None:
    aq.convert(aq.ConversionConfig(str(FILES[4]), str(tmp_path / "m.arrow")))
    with open_table(FILES[4]) as before, open_table(tmp_path / "m.arrow") as after:
        for old, new in ((before.read_tensor(name), after.read_tensor(name)) for name in before.names):
            if len(old) == 1:
                assert old[0].quant_type == new[0].quant_type
                assert all(getattr(old[0], part).tobytes() == getattr(new[0], part).tobytes()
                           for part in ("data", "scales", "zero_points"))  # fmt: skip


def test_torch_gets_the_same(wanted: dict[str, np.ndarray]) -> None:
    pytest.importorskip("torch")
    found = {name: value for file in FILES for name, value in aq.load(file, "torch").items()}
    assert all(found[name].numpy().tobytes() == value.tobytes() for name, value in wanted.items())


@pytest.mark.parametrize("file", [FILES[0], *FILES[2:]], ids=lambda file: file.stem)
def test_they_are_saved_as_they_were(file: Path, tmp_path: Path) -> None:
    packed = aq.load(file, packed=True)
    aq.save(tmp_path / "m.arrow", packed)
    with open_table(file) as before, open_table(tmp_path / "m.arrow") as after:
        for name in before.names:
            rows, again = (table.read_tensor(name) for table in (before, after))
            assert b"".join(row.data.tobytes() for row in rows) == b"".join(row.data.tobytes() for row in again), name
            for grids, found in zip(join_grids(rows), join_grids(again), strict=True):
                assert grids.tobytes() == found.tobytes(), name
