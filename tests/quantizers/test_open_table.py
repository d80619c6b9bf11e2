"""A quantizer that only this test knows, by name and as an object, on every road that a weight can take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import oracle
import pytest
from safetensors.numpy import save_file

import aq_jax as aq
from aq_jax import QUANTIZERS, ConfigError, Override, QTensor, QuantizationConfig
from aq_jax.codes import Code
from aq_jax.conversion.shards import engines
from aq_jax.core.grid import absmax_grid
from aq_jax.quantizers import Grid, GroupStatistics, Quantizer
from aq_jax.quantizers.apply import _quantize
from aq_jax.store.inspection import inspect_table

SHAPE, GROUP = (16, 64), 16


@dataclasses.dataclass(frozen=True)
class Clipped(Quantizer):
    """absmax on a share of the range."""

    share: float
    name = "clipped"
    grids = ("symmetric",)

    def __call__(self, groups: GroupStatistics, code: Code, symmetric: bool) -> tuple[Grid, ...]:
        return (absmax_grid(groups.lo * self.share, groups.hi * self.share, code),)


HALF = Clipped(0.5)  # a power of two, so that compilers have nothing to round


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZERS, HALF.name, HALF)


@pytest.fixture(params=["name", "object"])
def config(request: pytest.FixtureRequest) -> QuantizationConfig:
    solver: Any = HALF.name if request.param == "name" else HALF
    return QuantizationConfig("int4", group_size=GROUP, solver=solver)


@pytest.fixture(scope="module")
def w() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def source(w: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_file({"a.weight": w, "b.weight": w[::-1].copy(), "c.bias": w[0]}, folder / "model.safetensors")
    return folder


def expected(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales): those of the range's half, by NumPy."""
    groups = w.reshape(-1, GROUP)
    scales = np.abs(groups).max(1) * np.float32(0.5) * np.float32(1 / 7)
    codes = np.clip(np.round(groups * (np.float32(1) / scales)[:, None]), -8, 7)
    return codes.astype(int).ravel(), scales


def check(q: Any, w: np.ndarray) -> None:
    codes, scales = expected(w)
    assert isinstance(q, QTensor)
    np.testing.assert_array_equal(oracle.codes_of(q).ravel(), codes)
    np.testing.assert_array_equal(np.asarray(q.scale).ravel(), scales)
    assert not np.asarray(q.zero_point).any()


def test_in_memory(config: QuantizationConfig, w: np.ndarray, tmp_path: Path) -> None:
    q = aq.quantize(w, config)
    check(q, w)
    check(jax.jit(lambda w: aq.quantize(w, config))(w), w)
    np.testing.assert_array_equal(aq.fake_quant(w, config), aq.dequantize(q))  # type: ignore[arg-type]
    tree = aq.quantize_tree({"a": {"kernel": w}, "bias": w[0]}, config)
    check(tree["a"]["kernel"], w)
    aq.save(tmp_path / "m.parquet", tree["a"])
    check(aq.load(tmp_path / "m.parquet", packed=True)["kernel"], w)


@pytest.mark.parametrize(
    "grids", [{"group_size": 24}, {"per_channel": True}, {"per_channel": False}], ids=["groups", "rows", "tensor"]
)
def test_streamed_tiles_agree_with_one_program(grids: dict[str, Any], w: np.ndarray) -> None:
    config = QuantizationConfig("int4", solver=HALF, **grids)
    whole, tiled = aq.quantize(w, config), aq.quantize_tree({"w": w}, config)["w"]
    jax.tree.map(np.testing.assert_array_equal, whole, tiled)


def test_equal_objects_share_a_program_and_others_do_not(w: np.ndarray) -> None:
    def quantize(share: float) -> Any:
        return aq.quantize(w, QuantizationConfig("int4", group_size=GROUP, solver=Clipped(share)))

    quantize(0.5)
    before = _quantize._cache_size()
    quantize(0.5)
    assert _quantize._cache_size() == before
    assert not np.array_equal(quantize(1.0).scale, quantize(0.5).scale)
    assert _quantize._cache_size() == before + 1


def tables(config: QuantizationConfig, source: Path, folder: Path) -> Iterator[Path]:
    """By every road that writes one."""
    aq.convert(aq.ConversionConfig(str(source), str(folder / "plain.parquet")))
    for suffix in (".parquet", ".arrow"):
        aq.quantize_file(folder / "plain.parquet", folder / f"quantized{suffix}", config)
        yield folder / f"quantized{suffix}"
    aq.convert(aq.ConversionConfig(str(source), str(folder / "one.parquet"), config))
    yield folder / "one.parquet"
    shards = aq.ShardsConfig(size=100, workers=1)
    aq.convert(aq.ConversionConfig(str(source), str(folder / "many"), config, shards=shards))
    yield folder / "many"


def test_into_tables(config: QuantizationConfig, w: np.ndarray, source: Path, tmp_path: Path) -> None:
    mixed = dataclasses.replace(config, solver=None, overrides=(Override("weight", solver=config.solver),))
    for which in (config, mixed):
        for path in tables(which, source, tmp_path):
            with aq.WeightLoader(path) as loader:
                assert [loader.describe(f"{name}.weight").solver for name in "ab"] == [HALF.name] * 2
                check(loader.get_quantized("a.weight"), w)
                check(loader.get_quantized("b.weight"), w[::-1])
            said = inspect_table(path).config["quantization"]
            assert (said["solver"] if which is config else said["overrides"][0]["solver"]) == HALF.name
        for path in tmp_path.glob("many/*"):
            path.unlink()


def shards(source: Path, output: Path, solver: Any) -> aq.ConversionConfig:
    policy = QuantizationConfig("int4", group_size=GROUP, solver=solver)
    return aq.ConversionConfig(str(source), str(output), policy, shards=aq.ShardsConfig(size=100, workers=2))


def test_what_cannot_be_sent_to_other_processes_is_refused_by_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass(frozen=True)
    class Local(Clipped):
        name = "local"

    monkeypatch.setattr(engines, "Worker", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ConfigError, match=r"cannot be sent to other processes: .*Local.*; define its class in a modul"):
        aq.convert(shards(source, tmp_path / "out", Local(0.5)))


@pytest.mark.slow
def test_other_processes_get_what_only_this_one_has_in_its_table(source: Path, tmp_path: Path, w: np.ndarray) -> None:
    aq.convert(shards(source, tmp_path / "out", HALF.name))
    check(aq.load(tmp_path / "out", packed=True)["a.weight"], w)


def test_a_folder_is_begun_anew_for_a_quantizer_of_other_numbers(
    source: Path, tmp_path: Path, w: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have one name, and what the first has finished is not taken for the second's."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    def config(share: float) -> aq.ConversionConfig:
        asked = shards(source, tmp_path / "out", Clipped(share))
        return dataclasses.replace(asked, shards=aq.ShardsConfig(size=100, workers=1))

    with monkeypatch.context() as patch:
        patch.setattr("aq_jax.conversion.shards.run.compose_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            aq.convert(config(1.0))
    aq.convert(config(0.5))
    check(aq.load(tmp_path / "out", packed=True)["a.weight"], w)
