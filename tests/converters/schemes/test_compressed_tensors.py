"""compressed-tensors: what config.json decides, what is refused by name, and parity with the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from schemes import group, write

import aq_jax as aq
from aq_jax.converters import open_source

INT4 = {"num_bits": 4, "strategy": "group", "group_size": 16}


def layer(name: str, order: np.ndarray | None = None) -> dict[str, np.ndarray]:
    codes = np.random.default_rng(len(name)).integers(0, 2**31, (8, 4)).astype(np.int32)
    found = {
        f"{name}.weight_packed": codes, f"{name}.weight_scale": np.full((8, 2), 0.5, np.float16),
        f"{name}.weight_shape": np.array([8, 32]),
    }  # fmt: skip
    return found if order is None else found | {f"{name}.weight_g_idx": order.astype(np.int32)}


def test_names_go_before_patterns_and_patterns_before_classes(tmp_path: Path) -> None:
    tensors = layer("a") | layer("b.c") | layer("b.d") | {"e.weight": np.ones((8, 32), np.float32)}
    groups = {
        "classes": {"targets": ["Linear"], "weights": INT4},
        "patterns": {"targets": ["re:b"], "weights": INT4 | {"group_size": 32, "strategy": "channel"}},
        "names": {"targets": ["b.d"], "weights": INT4 | {"group_size": 8}},
    }
    tensors["b.c.weight_scale"] = np.ones((8, 1), np.float16)
    tensors["b.d.weight_scale"] = np.ones((8, 4), np.float16)
    entry = {"config_groups": groups, "quant_method": "compressed-tensors", "ignore": ["re:.*e$"]}
    write(
        tmp_path, tensors | {"a.input_scale": np.ones(1, np.float32)}, {"text_config": {"quantization_config": entry}}
    )
    with open_source(tmp_path, packed=True) as source:
        found = {name: source.read(name) for name in source.shapes}
        assert source.notes == ["left out, being of activations, or of weights that are plain: a.input_scale"]
    sizes = {name: (q.spec.per_channel, q.spec.group_size) for name, q in found.items() if isinstance(q, aq.QTensor)}
    assert sizes == {"a.weight": (False, 16), "b.c.weight": (True, 0), "b.d.weight": (False, 8)}
    assert isinstance(found["e.weight"], np.ndarray)


RUNS = np.arange(32) // 16
REFUSED: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "groups that are no runs": (layer("a", RUNS[::-1]), group(INT4), "no runs of inputs"),
    "actorder": (layer("a"), group(INT4 | {"actorder": "group"}), "ordered by activation"),
    "nvfp4": (layer("a"), group(INT4, format="nvfp4-pack-quantized"), "are nvfp4-pack-quantized, which no table holds"),
    "seven bits": (layer("a"), group(INT4 | {"num_bits": 7}), "have 7 bits"),
    "bits of text": (layer("a"), group(INT4 | {"num_bits": "4"}), "wanted an integer"),
    "groups of nothing": (layer("a"), group(INT4 | {"group_size": 0}), "a scale a group, of 0"),
    "groups that divide nothing": (layer("a"), group(INT4 | {"group_size": 24}), "in groups of 24"),
    "other groups": (layer("a"), group(INT4 | {"group_size": 8}), r"float16 \[8, 2\]; wanted .* \[8, 4\]"),
    "ignored and packed": (layer("a"), group(INT4, ignore=["a"]), "config.json ignores a, which has weight_packed"),
    "a pattern that takes for ever": (layer("a"), group(INT4, ignore=[r"re:(?=a+)+\1"]), "is not understood"),
    "too many patterns": (layer("a"), group(INT4, ignore=["re:a"] * 101), "more than 100 patterns"),
    "names that are none": (layer("a"), group(INT4, ignore=[1]), "ignore in config.json lists names"),
    "rotated weights": (layer("a"), group(INT4, transform_config={"config_groups": {"a": {}}}), "weights are rotated"),
    "a preset": (
        layer("a"), {"quantization_config": {"config_groups": {"W4A16": ["Linear"]}}}, "of a preset are not known"),
    "fused experts of another scheme": (
        layer("a") | {
            "b.experts.up_proj": np.ones((4, 8, 8), ml_dtypes.float8_e4m3fn),
            "b.experts.up_proj_scale": np.ones((4, 8, 1), np.float32),
        }, group(INT4), "others in another way .*, known by b.experts.up_proj, float8_e4m3fn"),
    "no groups": (layer("a"), {"quantization_config": {"quant_method": "compressed-tensors", "bits": 4}}, "_groups"),
    "a weight of bytes without scales": (
        {"a.weight": np.ones((4, 8), np.int8)}, group({"num_bits": 8, "strategy": "channel"}), "_scale is missing",
    ),
    "an axis of nothing": (
        {"a.weight": np.ones((4, 0), np.int8), "a.weight_scale": np.ones((4, 1), np.float32)},
        group({"num_bits": 8, "strategy": "channel"}), "a.weight has shape .4, 0.; wanted two axes",
    ),
    "a shape that lies": (layer("a") | {"a.weight_shape": np.array([8, 2**40])}, group(INT4), "says .8, 109951162777"),
    "a scale that is no number": (
        layer("a") | {"a.weight_scale": np.full((8, 2), np.inf, np.float16)}, group(INT4), "group 0 has the scale"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_table_cannot_hold_is_refused_by_name(what: str, tmp_path: Path) -> None:
    tensors, config, text = REFUSED[what]
    write(tmp_path, tensors, config)
    with pytest.raises(aq.FormatError, match=text), open_source(tmp_path, packed=True) as source:
        source.read("a.weight")


def test_what_runs_on_rounded_inputs_and_caches_is_noted(tmp_path: Path) -> None:
    int8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    config = group(INT4, transform_config={}, kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor"})
    groups = config["quantization_config"]["config_groups"]
    groups["a"]["input_activations"] = int8
    groups["cache"] = {"targets": ["re:.*attn"], "weights": None, "input_activations": int8}
    write(tmp_path, layer("a") | layer("b"), config)
    with open_source(tmp_path) as source:
        inputs, cache = source.notes
    assert "inputs are quantized while the model runs (8 bits, int, token)" in inputs
    assert "keys and values are quantized while the model runs (8 bits, float, tensor)" in cache


def test_scales_beside_plain_weights_are_left_out(tmp_path: Path) -> None:
    dense = {"d.weight": np.ones((8, 32), np.float16), "d.weight_scale": np.ones((8, 2), np.float16)}
    write(tmp_path, layer("a") | dense, group(INT4))
    with open_source(tmp_path) as source:
        assert set(source.shapes) == {"a.weight", "d.weight"}
        assert source.notes == ["left out, being of activations, or of weights that are plain: d.weight_scale"]


def test_parts_that_are_tied_are_a_weight_that_is(tmp_path: Path) -> None:
    """Tensors that share their memory, as safetensors' `save_model` notes them."""
    tensors = layer("model.embed_tokens")
    tied = {name.replace("model.embed_tokens", "lm_head"): name for name in tensors}
    write(tmp_path / "whole", tensors, group(INT4), tied)
    aq.dequantize_file(tmp_path / "whole", tmp_path / "plain")
    found = safetensors.numpy.load_file(tmp_path / "plain" / "model.safetensors")
    assert found["lm_head.weight"].tobytes() == found["model.embed_tokens.weight"].tobytes()
    tied.popitem()
    write(tmp_path / "part", tensors, group(INT4), tied)
    with pytest.raises(
        aq.FormatError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight, of which .* is not"
    ):
        aq.dequantize_file(tmp_path / "part", tmp_path / "none")


def test_groups_that_are_runs_are_read(tmp_path: Path) -> None:
    write(tmp_path, layer("a", RUNS), group(INT4))
    with open_source(tmp_path) as source:
        assert list(source.shapes) == ["a.weight"]


def test_scales_below_zero_and_at_zero_keep_every_value(tmp_path: Path) -> None:
    """A code that has no such scales turns the group's codes, or makes them all alike."""
    scales = np.array([[-0.5, 0], [1, -2]] * 4, np.float32)
    zeros = np.tile(np.arange(8, dtype=np.int8)[:, None], (1, 2))
    write(
        tmp_path,
        layer("a") | {"a.weight_scale": scales, "a.weight_zero_point": zeros},
        group(INT4 | {"symmetric": False}),
    )
    words = layer("a")["a.weight_packed"].view(np.uint8)
    codes = np.stack([words & 15, words >> 4], -1).reshape(8, 2, 16).astype(np.float32) - 8
    with open_source(tmp_path) as source:
        np.testing.assert_array_equal(
            source.read("a.weight"), ((codes - zeros[..., None]) * scales[..., None]).reshape(8, 32)
        )


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_values_equal_those_of_the_library(bits: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rng = np.random.default_rng(bits)
    for rows, columns, size, symmetric in ((33, 64, 32, True), (70, 96, 48, False), (8, 160, 160, False)):
        args = QuantizationArgs(num_bits=bits, strategy="group", group_size=size, symmetric=symmetric)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        scale = torch.tensor(rng.uniform(0.01, 1, (rows, columns // size)), dtype=torch.bfloat16)
        zero = torch.tensor(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), scale.shape), dtype=torch.int8)
        state = {"weight": torch.randn(rows, columns).to(torch.bfloat16), "weight_scale": scale}
        state |= {} if symmetric else {"weight_zero_point": zero}
        packed = PackedQuantizationCompressor.compress(state, scheme)
        wanted = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        packed["weight_scale"] = packed["weight_scale"].view(torch.int16)
        arrays = {f"a.{leaf}": part.numpy() for leaf, part in packed.items()}
        arrays["a.weight_scale"] = arrays["a.weight_scale"].view(ml_dtypes.bfloat16)
        write(tmp_path, arrays, group(args.model_dump(mode="json")))
        with open_source(tmp_path) as source:
            assert np.array_equal(source.read("a.weight").astype(np.float32), wanted.float().numpy())
