"""The native kernels of codes: values, codes and grids are XLA's, bit for bit, for every width and every group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from crossed import crossed
from jax import export

import aq_jax as aq
from aq_jax import QuantizationConfig, dequantize, native, quantize
from aq_jax.codes.bits import unpack_codes
from aq_jax.core.bitstream import from_stream
from aq_jax.core.grid import absmax_grid
from aq_jax.core.qtensor import QTensor
from aq_jax.ops.kernels import VARIABLE
from aq_jax.quantizers import native_groups, tiles
from aq_jax.quantizers.absmax import AbsMax
from aq_jax.store import Row, decode

STATUS = native.load()
pytestmark = [
    pytest.mark.skipif(not STATUS.available, reason=f"no native kernels: {STATUS.reason}"),
    pytest.mark.usefixtures("unforced"),
]
WIDTHS = (8, 6, 5, 4, 3, 2)
# (shape, group_size): rows of whole bytes and others, groups that cross rows, of one element, channels, a tensor.
SHAPES = [((3, 40), 8), ((7, 33), 13), ((5, 24), 1), ((3, 7, 16), -1), ((6, 50), 0), ((2, 300), 64), ((4, 48), 20)]


def granularity(size: int) -> dict[str, int | bool]:
    return {"per_channel": True} if size < 0 else {"per_channel": False, "group_size": size}


def coded(shape: tuple[int, ...], size: int, bits: int) -> QTensor:
    """Any codes and grids, among them scales and zero points under which values are subnormal."""
    rng = np.random.default_rng(bits)
    spec = QuantizationConfig(f"int{bits}", solver="absmax", **granularity(size)).spec  # type: ignore[arg-type]
    if not size:
        spec = dataclasses.replace(spec, group_size=0)
    count, groups = int(np.prod(shape)), spec.group_count(shape)
    scale = rng.uniform(1, 2, groups) * 2.0 ** rng.choice([0, -126, 100], groups)
    zero = rng.uniform(-9, 9, groups) * rng.choice([0, 1, 1e-40], groups)
    stream = rng.integers(0, 256, -(-count * bits // 8)).astype(np.uint8)
    return from_stream(stream, scale.astype(np.float32), zero.astype(np.float32), shape, spec)


def bits_of(x: object) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


@pytest.mark.parametrize(("shape", "size", "bits"), crossed(SHAPES, WIDTHS))
def test_values_are_xlas(shape: tuple[int, ...], size: int, bits: int, isas: Callable[[], Iterator[str]]) -> None:
    q = coded(shape, size, bits)
    for dtype in (jnp.float32, jnp.bfloat16) if bits == 4 else (jnp.float32,):
        wanted = bits_of(dequantize(q, dtype, kernel="xla"))
        for isa in isas():
            np.testing.assert_array_equal(bits_of(dequantize(q, dtype, kernel="native")), wanted, isa)


def test_the_loader_decodes_by_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    host = native.host.dequantize
    monkeypatch.setattr(native.host, "dequantize", lambda *args: seen.append(args[1]) or host(*args))
    count, group = 3 * 100_001, 77  # for several threads
    for bits in WIDTHS:
        rng = np.random.default_rng(bits)
        data = rng.integers(0, 256, -(-count * bits // 8)).astype(np.uint8)
        scales, zeros = (rng.uniform(0.5, 1.5, -(-count // group)).astype(np.float32) for _ in range(2))
        row = Row("w", (3, count // 3), "float32", data, count, f"int{bits}", scales, zeros, 0, group)
        at = np.arange(count) // group
        codes = unpack_codes(data, bits, count).astype(np.float32)
        np.testing.assert_array_equal(decode([row]).reshape(-1), (codes - zeros[at]) * scales[at])
    assert seen == list(WIDTHS)


def test_the_loader_does_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    q = coded((7, 33), 13, 5)
    stream, scale, zero = q.spec.coding.to_stream(q.codes, q.shape), q.scale, q.zero_point
    row = Row("w", q.shape, "float32", stream.view(np.uint8), 7 * 33, "int5", scale, zero, 0, 13)
    found = decode([row])
    monkeypatch.setenv(VARIABLE, "xla")
    plain = decode([row])
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(native.host, "_function", lambda name: None)
    np.testing.assert_array_equal(bits_of(decode([row])), bits_of(plain))
    np.testing.assert_array_equal(bits_of(found), bits_of(plain))


def test_decoding_is_mapped_differentiated_and_exported() -> None:
    q = jax.tree.map(jnp.asarray, coded((3, 40), 8, 4))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), q)
    found = jax.vmap(dequantize)(stack)
    np.testing.assert_array_equal(found[0], dequantize(q))
    np.testing.assert_array_equal(found[1], dequantize(q)[::-1])
    np.testing.assert_array_equal(dequantize(stack), found)  # groups that lie in rows

    def loss(scale: jax.Array, zero: jax.Array, kernel: str) -> jax.Array:
        values = dequantize(dataclasses.replace(q, scale=scale, zero_point=zero), kernel=kernel)
        return (values * jnp.arange(40.0)).sum()

    slopes = [jax.grad(loss, (0, 1))(q.scale, q.zero_point, kernel) for kernel in ("native", "xla")]
    jax.tree.map(np.testing.assert_array_equal, *slopes)
    for platforms in (None, ("cpu", "cuda")):
        exported = export.export(jax.jit(dequantize), platforms=platforms)(q)
        assert "aq_dequantize" not in exported.mlir_module()
    assert "aq_dequantize" in jax.jit(dequantize).lower(q).as_text()


# ------------------------------------------------------------------------------------------------ grids and codes


def kinds(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Weights that have ever been rounded differently somewhere, of one shape: each shape is a compilation."""
    rng = np.random.default_rng(len(shape))
    normal = rng.normal(size=shape)
    patches = np.where(np.arange(normal.size).reshape(shape) % 40 < 20, -1.3, 0)
    bad = normal.copy()
    bad.reshape(-1)[::7], bad.reshape(-1)[3::11], bad.reshape(-1)[4::13] = np.nan, np.inf, -np.inf
    found = {
        "normal": normal,
        "offset": normal + 1000,
        "ties": rng.integers(-254, 255, shape) / 2,
        "every magnitude": normal * 10.0 ** rng.uniform(-44, 38, shape),
        "subnormal": normal * 1e-38,
        "largest": np.sign(normal) * 3.3e38,
        "constants and zeros": patches,
        "narrow": 1e5 + rng.integers(0, 2, shape) * 1e-2,
        "not finite": bad,
        "nothing finite": normal * np.nan,
        "negative zeros": -np.zeros(shape),
    }
    with np.errstate(over="ignore"):
        return {kind: w.astype(np.float32) for kind, w in found.items()}


def same(a: Any, b: Any) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in leaves)


@pytest.mark.parametrize(("shape", "size", "bits"), crossed([SHAPES[i] for i in (0, 1, 3, 4, 5)], WIDTHS))
def test_codes_and_grids_are_xlas(
    shape: tuple[int, ...], size: int, bits: int, isas: Callable[[], Iterator[str]]
) -> None:
    for solver, symmetric in (("absmax", True), ("minmax", False)):
        config = QuantizationConfig(f"int{bits}", solver=solver, symmetric=symmetric, **granularity(size))  # type: ignore[arg-type]
        ours, xlas = (jax.jit(partial(quantize, config=config, kernel=kernel)) for kernel in ("native", "xla"))
        assert "aq_quantize" in ours.lower(np.ones(shape, np.float32)).as_text()
        for kind, w in kinds(shape).items():
            wanted = xlas(w)
            for isa in isas():
                assert same(ours(w), wanted), (solver, kind, isa)


@pytest.mark.parametrize("solver", ["absmax", "minmax", "mse"])
def test_tiles_and_whole_arrays_are_one(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same bytes for any number of threads, in one call or several, of float32 or of the bfloat16 that it equals.
    w = np.random.default_rng(0).normal(size=(97, 2400)).astype(ml_dtypes.bfloat16)
    for bits, size, symmetric in ((4, 48, True), (3, 50, False), (8, -1, False), (2, 4800, True), (2, 4, True)):
        if symmetric != (solver == "absmax") and solver != "mse":
            continue
        config = QuantizationConfig(f"int{bits}", solver=solver, symmetric=symmetric, **granularity(size))  # type: ignore[arg-type]
        found = []
        for dtype, tile, threads in ((np.float32, 1 << 21, 1), (w.dtype, 1 << 21, 3), (np.float64, 40_000, 2)):
            monkeypatch.setattr(native_groups, "NATIVE_TILE", tile)
            monkeypatch.setattr(native.host, "cores", lambda threads=threads: threads)
            found.append(tiles.quantize_array(w.astype(dtype), config, "w"))
        q = quantize(w.astype(np.float32), config)
        stream = q.spec.coding.to_stream(np.asarray(q.codes), q.shape).view(np.uint8)
        for each in found:
            assert (each.data.tobytes(), each.scales.tobytes()) == (stream.tobytes(), q.scale.tobytes())
            assert each.zero_points.tobytes() == q.zero_point.tobytes()
            assert (each.cosine, each.rel_mse) == pytest.approx((found[0].cosine, found[0].rel_mse), rel=1e-12)
        v, x = np.asarray(dequantize(q), np.float64), w.astype(np.float64)
        assert found[0].rel_mse == pytest.approx(((x - v) ** 2).sum() / (x**2).sum(), rel=1e-6)
        assert found[0].cosine == pytest.approx((x * v).sum() / np.sqrt((x**2).sum() * (v**2).sum()), rel=1e-6)


@pytest.mark.parametrize(("symmetric", "bits"), crossed([True, False], [2, 4, 8, 3, 5, 6]))
def test_the_search_finds_errors_as_small_as_xlas(
    bits: int, symmetric: bool, isas: Callable[[], Iterator[str]]
) -> None:
    rng = np.random.default_rng(bits)
    normal = rng.normal(size=(48, 300))
    parts = [normal, normal + 5, rng.standard_t(2, size=(48, 300)), normal * 1e30, normal * 1e-30, 0 * normal]
    w = np.concatenate(parts).astype(np.float32)
    w[-1], w[-2, :150] = -0.7, 0.3
    top = np.maximum(np.abs(w).max(1, keepdims=True), 1e-38).astype(np.float64)
    constant = np.flatnonzero(np.ptp(w, axis=1) == 0)
    assert len(constant) > 40
    for size in (20, 64, -1):
        config = QuantizationConfig(f"int{bits}", solver="mse", symmetric=symmetric, **granularity(size))  # type: ignore[arg-type]
        xlas = quantize(w, config, kernel="xla")
        for isa in isas():
            ours = quantize(w, config, kernel="native")
            errors = [float((((np.asarray(dequantize(q), np.float64) - w) / top) ** 2).sum()) for q in (ours, xlas)]
            # At eight bits, what rounding scales to 8 bits costs is chance.
            assert errors[0] == pytest.approx(errors[1], rel=1e-4 if bits < 8 else 1e-3), isa
            if size < 0:
                assert same(*([np.asarray(leaf)[constant] for leaf in jax.tree.leaves(q)] for q in (ours, xlas))), isa


def test_a_long_group_is_searched_by_all_lanes(isa: str) -> None:
    w = np.random.default_rng(0).standard_t(3, size=(3, 5003)).astype(np.float32)
    for symmetric in (True, False):
        config = QuantizationConfig("int4", solver="mse", symmetric=symmetric, per_channel=True)
        ours, xlas = (dequantize(quantize(w, config, kernel=kernel)) for kernel in ("native", "xla"))
        assert float(((ours - w) ** 2).sum()) == pytest.approx(float(((xlas - w) ** 2).sum()), rel=1e-4)


def test_quantizing_is_mapped_differentiated_and_exported() -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 64)), jnp.float32)
    config = QuantizationConfig("int4", solver="minmax", symmetric=False, group_size=32)

    def of(kernel: str) -> Callable[[Any], Any]:
        return lambda w: quantize(w, config, kernel=kernel)

    assert same(jax.vmap(of("native"))(w), jax.vmap(of("xla"))(w))
    slopes = [jax.grad(lambda w, k=k: of(k)(w).scale.sum())(w[0]) for k in ("native", "xla")]
    np.testing.assert_array_equal(*slopes)
    exported = export.export(jax.jit(of("native")))(w[0])
    assert "aq_quantize" not in exported.mlir_module()
    assert same(exported.call(w[0]), of("native")(w[0]))


def test_a_quantizer_of_ones_own_is_computed_as_it_is_written() -> None:
    @dataclasses.dataclass(frozen=True)
    class Half(AbsMax):
        name = "half"

        def __call__(self, groups: Any, code: Any, symmetric: bool) -> Any:
            return (absmax_grid(groups.lo / 2, groups.hi / 2, code),)

    w = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    half, whole = (quantize(w, QuantizationConfig("int8", solver=solver)) for solver in (Half(), "absmax"))
    np.testing.assert_allclose(half.scale, whole.scale / 2, rtol=1e-6)


def test_what_decoding_does_not_take_is_refused_by_name() -> None:
    empty = quantize(np.ones((0, 8), np.float32), "int8")
    with pytest.raises(aq.ConfigError, match=r"^dequantize: kernel 'native': wants elements"):
        dequantize(empty, kernel="native")
