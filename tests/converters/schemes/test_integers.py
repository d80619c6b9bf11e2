"""GPTQ, AWQ and MLX: what config.json says, what is refused by name, and parity with the programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from schemes import group, write

import aq_jax as aq
from aq_jax.converters import open_source

Arrays = dict[str, np.ndarray]
RUNS = np.arange(64, dtype=np.int32) // 32
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
MLX = {"group_size": 32, "bits": 4}


def gptq(zero: int = 0x77777777) -> Arrays:
    """64 inputs, 16 outputs, four bits; zero points of 8, stored as 7."""
    words = np.random.default_rng(0).integers(0, 2**31, (8, 16)).astype(np.int32)
    return {
        "a.qweight": words, "a.qzeros": np.full((2, 2), zero, np.int32), "a.scales": np.ones((2, 16), np.float16),
        "a.g_idx": RUNS,
    }  # fmt: skip


def awq() -> Arrays:
    words = np.random.default_rng(0).integers(0, 2**31, (64, 2)).astype(np.int32)
    return {"a.qweight": words, "a.qzeros": words[:2], "a.scales": np.ones((2, 16), np.float16)}


def mlx() -> Arrays:
    words = np.random.default_rng(0).integers(0, 2**32, (16, 8)).astype(np.uint32)
    grids = np.ones((16, 2), np.float16)
    return {"a.weight": words, "a.scales": grids, "a.biases": grids}


def offsets(scale: float, offset: float) -> Arrays:
    """One group's scale and offset, in float32; the others have ones."""
    grids = {name: np.ones((16, 2), np.float32) for name in ("a.scales", "a.biases")}
    grids["a.scales"][1, 0], grids["a.biases"][1, 0] = scale, offset
    return mlx() | grids


def declared(entry: dict[str, Any]) -> dict[str, Any]:
    return {"quantization_config" if "quant_method" in entry else "quantization": entry}


def compressed_tensors() -> Arrays:
    words = np.random.default_rng(0).integers(0, 2**31, (16, 8)).astype(np.int32)
    return {
        "a.weight_packed": words, "a.weight_shape": np.int64([16, 64]), "a.weight_scale": np.ones((16, 2), np.float16),
        "a.weight_zero_point": words[:2, :2],
    }  # fmt: skip


@pytest.mark.parametrize("what", ["gptq", "awq", "compressed-tensors"])
def test_zero_points_of_four_bits_make_a_weight_less_than_5_percent_larger(what: str, tmp_path: Path) -> None:
    """In groups of 32, the shortest in use."""
    groups = group({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False})
    tensors, config = {
        "gptq": (gptq(0x12345678), declared(GPTQ | {"sym": False})),
        "awq": (awq(), declared(AWQ)),
        "compressed-tensors": (compressed_tensors(), groups),
    }[what]
    write(tmp_path, tensors, config)
    held = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith(("g_idx", "weight_shape")))
    with open_source(tmp_path, packed=True) as source:
        assert source.quantized == {"a.weight": "int4_f16i"}
        assert source.nbytes("a.weight") <= 1.05 * held
        q = source.read("a.weight")
    assert isinstance(q, aq.QTensor)
    assert q.nbytes <= 1.05 * held


def test_symmetric_layers_have_no_zero_points_and_old_files_are_known(tmp_path: Path) -> None:
    """AutoGPTQ's quantize_config.json has no quant_method, and biases of zeros stand beside each of its layers."""
    write(tmp_path, gptq() | {"a.bias": np.zeros(16, np.float16), "b.bias": np.zeros(3, np.float16)}, {})
    old = {key: value for key, value in GPTQ.items() if key != "quant_method"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(old))
    with open_source(tmp_path, packed=True) as source:
        q = source.read("a.weight")
        assert sorted(source.shapes) == ["a.weight", "b.bias"]
        assert source.notes == ["left out, being zeros: a.bias"]
    assert isinstance(q, aq.QTensor)
    assert (q.spec.quant_type, q.zero_point, q.spec.group_size) == ("int4_f16", None, 32)
    words = gptq()["a.qweight"].view(np.uint32)
    codes = (words[:, None] >> (4 * np.arange(8, dtype=np.uint32))[:, None] & 15).reshape(64, 16).T
    np.testing.assert_array_equal(np.asarray(aq.dequantize(q)), codes.astype(np.float32) - 8)


def test_biases_of_a_model_that_has_them_stay(tmp_path: Path) -> None:
    more = {f"b.{leaf[2:]}": value for leaf, value in gptq().items()}
    biases = {"a.bias": np.zeros(16, np.float16), "b.bias": np.ones(16, np.float16)}
    write(tmp_path, gptq() | more | biases, declared(GPTQ))
    with open_source(tmp_path) as source:
        assert {"a.bias", "b.bias"} < set(source.shapes)


def test_an_entry_of_the_original_hides_no_weights(tmp_path: Path) -> None:
    """MLX's converter keeps what the original's config.json said of codes that are gone."""
    stale = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    write(tmp_path, mlx(), stale | {"quantization": MLX})
    with open_source(tmp_path, packed=True) as source:
        assert set(source.quantized) == {"a.weight"}


REFUSED: dict[str, tuple[Arrays, dict[str, Any], str]] = {
    "groups that are no runs": (gptq() | {"a.g_idx": RUNS[::-1]}, GPTQ, "no runs of inputs .desc_act."),
    "desc_act": (gptq() | {"a.g_idx": RUNS[::-1]}, GPTQ | {"desc_act": True}, "no runs of inputs .desc_act."),
    "symmetric with zero points": (gptq(0x77777776), GPTQ, "says sym, but a.qzeros has others than 8"),
    "marlin": (gptq(), GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; wanted one of gptq"),
    "planar": (gptq(), GPTQ | {"checkpoint_format": "gptq_p"}, "checkpoint_format is 'gptq_p'"),
    "a form that is no text": (gptq(), GPTQ | {"checkpoint_format": ["gptq"]}, "checkpoint_format is .* wanted a text"),
    "five bits": (gptq(), GPTQ | {"bits": 5}, "weights have 5 bits; wanted 2, 3, 4, 8"),
    "other bits": (gptq(), GPTQ | {"bits": 8}, "has 8 rows of words; wanted 16 for 64 inputs of 8 bits"),
    "no bits": (gptq(), {"quant_method": "gptq"}, "bits is 'None'; wanted an integer"),
    "groups of no whole size": (
        {k: v for k, v in gptq().items() if k != "a.g_idx"} | {"a.scales": np.ones((3, 16), np.float16)}, GPTQ,
        "a.scales has 3 rows",
    ),
    "groups of another size": (
        {k: v for k, v in gptq().items() if k != "a.g_idx"}, GPTQ | {"group_size": 48},
        "a.qweight has 2 groups of 64 inputs, and config.json says group_size = 48",
    ),
    "awq in groups of another size": (awq(), AWQ | {"group_size": -1}, "2 groups of 64 inputs, and .* group_size = -1"),
    "another kernel's layout": (awq(), AWQ | {"version": "gemv"}, "version is 'gemv', the layout of another kernel"),
    "awq of three bits": (awq(), AWQ | {"bits": 3}, "have 3 bits; wanted 4"),
    "another mode": (mlx(), MLX | {"mode": "mxfp4"}, "in mode 'mxfp4'"),
    "a layer's own bits": (mlx(), MLX | {"a": {"bits": 3}}, "wanted rows of words, whole groups of 32"),
    "an offset that is no number": (offsets(1, np.nan), MLX, "a.weight: group 2 has the scale 1.0 and .* point nan"),
    "an offset of too many scales": (offsets(2e-38, 1e5), MLX, "a.weight: group 2 has .* the zero point -inf"),
    "values that float32 does not hold": (offsets(5e37, 1), MLX, "a.weight: group 2 has the scale 4.*; wanted finite"),
    "mlx without scales": ({"a.weight": mlx()["a.weight"]}, MLX, "a.scales is missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_table_cannot_hold_is_refused_by_name(what: str, tmp_path: Path) -> None:
    tensors, entry, text = REFUSED[what]
    write(tmp_path, tensors, declared(entry))
    with pytest.raises(aq.FormatError, match=text), open_source(tmp_path, packed=True) as source:
        source.read("a.weight")


def test_a_layers_own_numbers_go_first_in_mlx(tmp_path: Path) -> None:
    own = {"a.weight": mlx()["a.weight"], "a.scales": np.ones((16, 1), np.float16), "a.biases": np.ones((16, 1), "f2")}
    write(tmp_path, own, declared(MLX | {"bits": 8, "a": {"bits": 4, "group_size": 64}, "b": False}))
    with open_source(tmp_path) as source:
        assert (source.shapes["a.weight"][0], source.quantized) == ((16, 64), {"a.weight": "int4_f16m"})


@pytest.mark.slow
def test_mlx_dequantizes_alike(tmp_path: Path, rng: np.random.Generator) -> None:
    mx = pytest.importorskip("mlx.core")
    for bits in (2, 3, 4, 5, 6, 8):
        w = mx.array(rng.normal(size=(40, 256)).astype(np.float32)).astype(mx.float16)
        words, scales, biases = mx.quantize(w, group_size=64, bits=bits)
        arrays = {"a.weight": words, "a.scales": scales, "a.biases": biases}
        write(
            tmp_path,
            {name: np.array(value) for name, value in arrays.items()},
            declared({"group_size": 64, "bits": bits}),
        )
        wanted = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), group_size=64, bits=bits)
        with open_source(tmp_path) as source:
            np.testing.assert_array_equal(source.read("a.weight"), np.array(wanted).astype(np.float16))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_dequantizes_alike(bits: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    size, shape = 128, (96, 384)
    draw = torch.Generator().manual_seed(bits)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = torch.randn(shape, generator=draw)
    scales = torch.rand((shape[0], 3), generator=draw) / 2**bits + 0.01
    zeros = torch.randint(1, 2**bits, scales.shape, generator=draw).float()
    layer = module.TorchLinear(bits, size, False, False, shape[1], shape[0], dtype=torch.float16)
    layer.pack_original(linear, scales, zeros, torch.arange(shape[1], dtype=torch.int32) // size)
    layer.qzero_format(format=2)
    layer._init_wf_unsqueeze_buffers()
    arrays = {f"a.{leaf}": getattr(layer, leaf).numpy() for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    entry = {"quant_method": "gptq", "bits": bits, "sym": False, "desc_act": False, "checkpoint_format": "gptq_v2"}
    write(tmp_path, arrays, declared(entry))
    with open_source(tmp_path) as source:
        np.testing.assert_array_equal(source.read("a.weight"), layer.dequantize_weight().T.numpy())
