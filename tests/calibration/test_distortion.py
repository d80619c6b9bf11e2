"""What codes do to samples, and the bits that grids take, against a file that `inspect` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import aq_jax as aq
from aq_jax import QuantizationConfig, QuantSpec, quantizers
from aq_jax.calibration.distortion import SAMPLE, StoredSizes, sample_rows, sampled
from aq_jax.config import Compression
from aq_jax.quantizers.treatment import Treatment, treat
from aq_jax.store.inspection import inspect_table

POLICIES = [
    QuantizationConfig("int3", group_size=128, symmetric=False, solver="mse", rotate=True),
    QuantizationConfig("int2", group_size=128, solver="mse"),
    QuantizationConfig("int8"),
    QuantizationConfig("tcq2", rotate=True),
]


def weights(seed: int, rows: int = 640) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, 256)) * rng.gamma(4, size=(rows, 1))).astype(np.float32)


def treated(policy: QuantizationConfig, w: np.ndarray) -> Treatment:
    return treat(policy, "w", w.shape, w.dtype)


@pytest.mark.parametrize(("suffix", "compression"), [(".parquet", "none"), (".parquet", "zstd"), (".arrow", "none")])
def test_sizes_are_those_of_a_file(tmp_path: Path, suffix: str, compression: Compression) -> None:
    tensors = {f"{i}.{n}": (policy, weights(n)) for i, policy in enumerate(POLICIES) for n in range(3)}
    found = [(treated(policy, w), sampled(sample_rows(w), treated(policy, w), "w")) for policy, w in tensors.values()]
    sizes = StoredSizes(found, suffix, compression)
    predicted = sum(sizes.bits(treatment) for treatment, _ in found)
    path = tmp_path / f"m{suffix}"
    aq.save(path, {name: aq.quantize(w, policy) for name, (policy, w) in tensors.items()}, compression=compression)
    stored = 8 * sum(layer.bytes for layer in inspect_table(path).layers)
    assert stored <= predicted <= stored * (1.006 if compression == "none" else 1.012)
    codes = sum(8 * treatment.columns["data"] for treatment, _ in found)
    raw = sum(8 * sum(treatment.columns.values()) for treatment, _ in found)
    assert predicted == raw if suffix == ".arrow" else predicted < (raw + codes) / 2


def test_distortions_are_those_of_the_whole_tensor() -> None:
    w = weights(0, 2000)
    assert sample_rows(w).size == SAMPLE < w.size
    for policy in POLICIES:
        near = np.asarray(aq.dequantize(cast(aq.QTensor, aq.quantize(w, policy))))
        wanted = np.square(near - w).sum() / np.square(w).sum()
        assert sampled(sample_rows(w), treated(policy, w), "w").distortion == pytest.approx(wanted, rel=0.1)
    half, none = (sampled(w, treated(QuantizationConfig(kind), w), "w") for kind in ("fp16", "none"))
    assert 0 < half.distortion < 1e-6
    assert (none.distortion, none.columns) == (0.0, {})


@dataclass(frozen=True)
class OnlyCalibrated(quantizers.Calibrated):
    """A quantizer of weights whose inputs must be known, and that nothing takes the place of."""

    name = fallback = "only"

    def check(self, spec: QuantSpec, shape: tuple[int, ...], where: str) -> None:
        pass

    def prepare_hessian(self, hessian: Any, damping: float, rotation: int) -> Any:
        return np.asarray(hessian)

    def solve(self, w: Any, hessian: Any, spec: QuantSpec, symmetric: bool, quick: bool = False) -> Any:
        np.testing.assert_array_equal(hessian, np.eye(w.shape[1]))
        assert quick
        return aq.quantize(w, QuantizationConfig("int3", group_size=spec.group_size, solver="mse"))


def test_what_only_a_calibrated_quantizer_does_is_done_under_white_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantizers.QUANTIZERS, "only", OnlyCalibrated())
    w, by_mse = weights(0)[:64], QuantizationConfig("int3", group_size=128, solver="mse")
    found = sampled(w, treated(QuantizationConfig("int3", group_size=128, solver="only"), w), "w")
    wanted = sampled(w, treated(by_mse, w), "w")
    assert found.distortion == pytest.approx(wanted.distortion, rel=1e-5)
    assert found.columns == wanted.columns
