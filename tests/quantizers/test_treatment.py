"""What becomes of a tensor: one decision, by name, shape and dtype, and everything else that follows it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import aq_jax as aq
from aq_jax import Override, QTensor, QuantizationConfig, QuantSpec
from aq_jax.cli import main
from aq_jax.quantizers.treatment import treat

FLOAT = np.dtype(np.float32)
INT8 = QuantizationConfig("int8")
INT4 = QuantizationConfig("int4", group_size=16, solver="absmax")


def test_floating_tensors_of_two_axes_are_quantized() -> None:
    for dtype in (FLOAT, np.dtype(ml_dtypes.bfloat16)):
        assert treat(INT8, "w", (2, 2), dtype).spec == QuantSpec(8, per_channel=True)
    for shape, dtype in (((2,), FLOAT), ((2, 2), np.dtype(np.int32)), ((2, 2), np.dtype(ml_dtypes.float8_e8m0fnu))):
        found = treat(INT8, "w", shape, dtype)
        assert (found.spec, found.half, found.vector) == (None, False, False)
    assert treat(QuantizationConfig("fp16"), "bias", (2,), FLOAT).half
    assert not treat(QuantizationConfig("fp16"), "n", (2,), np.dtype(np.int32)).half
    assert treat(QuantizationConfig("none"), "w", (2, 2), FLOAT).spec is None


VECTORS = {
    "layers.norm.scale": (4, 32), "blocks.ln_1.weight": (4, 32), "h.ln_f.w": (4, 32), "attn.query_ln.scale": (4, 8),
    "encoder.LayerNorm.weight": (4, 32), "dense.bias": (4, 32), "mlp.experts.gate_up_proj_bias": (4, 64),
    "attention.query.bias": (4, 2, 16),
}  # fmt: skip
WEIGHTS = {
    "adaLN_modulation.1.weight": (64, 32), "layers.norm_conv.kernel": (4, 3, 32), "biased.kernel": (8, 32),
    "bias.kernel": (8, 32), "norm1.linear.kernel": (8, 32), "MiniLM.embed": (8, 32), "vuln_x": (8, 32),
}  # fmt: skip


def test_stacked_norms_and_biases_are_known_by_their_names() -> None:
    for name, shape in VECTORS.items():
        assert treat(INT4, name, shape, FLOAT).vector, name
        assert treat(INT4, name, shape, FLOAT).spec is None, name
    for name, shape in WEIGHTS.items():
        assert not treat(INT4, name, shape, FLOAT).vector, name
        assert treat(INT4, name, shape, FLOAT).spec is not None, name


def test_a_tree_says_what_it_keeps() -> None:
    w = np.ones((4, 32), np.float32)
    with pytest.warns(UserWarning, match=r"^quantize_tree: kept as they are, being norms .*: layers\.norm\.scale; an"):
        tree = aq.quantize_tree({"layers": {"norm": {"scale": w}, "dense": {"kernel": w}}}, INT4)
    assert tree["layers"]["norm"]["scale"] is w
    assert isinstance(tree["layers"]["dense"]["kernel"], QTensor)


def test_an_override_with_a_quant_type_quantizes_a_norm_and_another_does_not() -> None:
    asked = QuantizationConfig("int4", group_size=16, overrides=(Override(r"norm\.scale$", "int8"),))
    assert treat(asked, "layers.norm.scale", (4, 32), FLOAT).spec == QuantSpec(8, group_size=16)
    other = QuantizationConfig("int4", group_size=16, overrides=(Override("norm", group_size=8),))
    assert treat(other, "layers.norm.scale", (4, 32), FLOAT).vector


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_experts_have_a_grid_a_row_as_matrices_have(tmp_path: Path, suffix: str) -> None:
    """The oracle is each expert's matrix, quantized alone."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(3, 8, 16)) * np.exp(3 * rng.normal(size=(3, 8, 1)))).astype(np.float32)
    name = "mlp.experts.up_proj"
    stacked = aq.quantize_tree({name: w, "conv.kernel": w}, INT8)
    q = stacked[name]
    assert q.spec == QuantSpec(8, group_size=16)
    for i in range(3):
        alone = aq.quantize(w[i], INT8)
        for leaf in ("codes", "scale", "zero_point"):
            np.testing.assert_array_equal(getattr(q, leaf)[i], getattr(alone, leaf))
    assert stacked["conv.kernel"].spec == QuantSpec(8, per_channel=True)
    assert stacked["conv.kernel"].scale.shape == (3,)
    assert aq.quantize(w, INT8, name).spec == q.spec
    np.testing.assert_array_equal(aq.fake_quant(jnp.asarray(w), INT8, name), aq.dequantize(q))
    values = np.asarray(aq.dequantize(q), np.float64)
    cosines = (values * w).sum(-1) / np.sqrt((values**2).sum(-1) * (w.astype(np.float64) ** 2).sum(-1))
    assert cosines.min() > 0.999
    # What decoding is told keeps its meaning: one grid an index of axis 0, whatever the name.
    old = QTensor(q.codes, jnp.ones(3), jnp.zeros(3), QuantSpec(8, per_channel=True), 16)
    aq.save(tmp_path / f"old{suffix}", {name: old, "new": q})
    back = aq.load(tmp_path / f"old{suffix}", packed=True)
    assert back[name].spec == old.spec
    assert jax.tree.structure(back["new"]) == jax.tree.structure(q)


MODEL = {
    "layers.dense.kernel": (2, 8, 32), "layers.norm.scale": (2, 32), "layers.dense.bias": (2, 8),
    "mlp.experts.down": (2, 8, 32), "head.weight": (8, 32),
}  # fmt: skip
KEPT = ("layers.norm.scale", "layers.dense.bias")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(1)
    save_file({name: rng.normal(size=s).astype(np.float32) for name, s in MODEL.items()}, folder / "model.safetensors")
    return folder


def config(source: Path, output: Path, shards: bool = False) -> Path:
    path = output.parent / "c.toml"
    rows = "[shards]\nsize = 100\nworkers = 1\n" if shards else ""
    path.write_text(f'source = "{source}"\noutput = "{output}"\n[quantization]\nquant_type = "int8"\n{rows}')
    return path


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_every_road_decides_alike(
    source: Path, tmp_path: Path, shards: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / ("m" if shards else "m.parquet")
    file = config(source, output, shards)
    assert main(["convert", str(file), "--dry-run"]) == 0
    assert f"kept as they are, being norms or biases by their names, though of two axes or more: {KEPT[0]}" in (
        " ".join(capsys.readouterr().out.split())
    ).replace(f"{KEPT[1]}, {KEPT[0]}", f"{KEPT[0]}, {KEPT[1]}")
    assert main(["convert", str(file), "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    planned = {row["name"]: row["quant_type"] for row in report["rows"]}
    assert [all(name in note for name in KEPT) for note in report["notes"]] == [True]
    assert main(["convert", str(file), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    notes = [note for note in done["notes"] if "norms or biases" in note]
    assert all(any(name in note for note in notes) for name in KEPT)
    with aq.WeightLoader(output) as loader:
        found = {name: loader.describe(name) for name in MODEL}
    assert {name: row.quant_type for name, row in found.items()} == planned
    assert {name for name, row in found.items() if not row.quantized} == set(KEPT)
    assert (found["mlp.experts.down"].quant_axis, found["mlp.experts.down"].group_size) == (0, 32)
    assert (found["layers.dense.kernel"].quant_axis, found["layers.dense.kernel"].group_size) == (0, 0)
    # In memory, too, and in the estimate of memory.
    with pytest.warns(UserWarning, match="norms or biases"):
        tree = aq.quantize_tree({name: jnp.asarray(aq.load(output)[name]) for name in KEPT}, INT8)
    assert not any(isinstance(leaf, QTensor) for leaf in tree.values())
    named, other = (treat(INT8, name, (1 << 14, 64), FLOAT).peak_bytes() for name in ("norm.scale", "w.scale"))
    assert named > other


def test_modules_keep_biases_of_two_axes() -> None:
    attention = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="key.bias, query.bias, value.bias"):
        state = aq.quantize_tree(nnx.state(attention, nnx.Param), INT8)
    assert isinstance(state["query"]["kernel"].get_value(), QTensor)
    assert state["query"]["bias"].get_value().dtype == FLOAT
