"""A width that nobody knows but this script, on two devices: from a weight to every place where codes are used.

tests/codes/test_open_table.py runs it. If anything else had to change for such a width, the table would not be open.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import aq_jax as aq
from aq_jax.codes import CODES, Affine
from aq_jax.converters import orbax


def main(folder: Path) -> None:
    for code in (Affine(7), Affine(7, rotated=True)):
        CODES[code.name] = code
    w = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)), jnp.float32)
    for rotate in (False, True):
        config = aq.QuantizationConfig("int7", group_size=32, rotate=rotate)
        q = aq.quantize(w, config)
        assert (q.spec.quant_type, q.codes.shape, q.codes.dtype) == (f"int7{'h' * rotate}", (16, 56), np.uint8)
        value = np.asarray(aq.dequantize(q))
        assert 1e-3 < np.abs(value - w).max() < 0.04  # between what six and eight bits give
        np.testing.assert_allclose(aq.qdot(x, q), x @ value.T, rtol=0, atol=1e-4)
        assert np.abs(aq.qdot(x, q, "int8") - x @ value.T).max() < 0.3
        np.testing.assert_allclose(aq.qembed(q, jnp.array([5, 1])), value[[5, 1]], rtol=0, atol=1e-6)
        odd = aq.quantize(w[:, :63], aq.QuantizationConfig("int7", per_channel=True))  # rows of no whole bytes
        for suffix in ("parquet", "arrow"):
            table = folder / f"{rotate}.{suffix}"
            aq.save(table, {"w": q, "odd": odd})
            for framework in ("numpy", "jax", "torch") if "torch" in sys.argv else ("numpy", "jax"):
                found = aq.load(table, framework)
                np.testing.assert_allclose(np.asarray(found["w"]), value, rtol=0, atol=1e-6)
                np.testing.assert_array_equal(np.asarray(found["odd"]), aq.dequantize(odd))
            packed = aq.load(table, packed=True)
            assert jax.tree.structure(packed["w"]) == jax.tree.structure(q)
            mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
            for spec in (PartitionSpec("x"), PartitionSpec(None, "x")):
                with aq.WeightLoader(table) as loader:
                    shards = loader.load_sharded("w", NamedSharding(mesh, spec), packed=True)
                    assert len(shards.codes.sharding.device_set) == 2
                    np.testing.assert_array_equal(shards.codes, q.codes)
                    np.testing.assert_allclose(aq.dequantize(shards), value, rtol=0, atol=1e-6)
        orbax.save(folder / f"{rotate}.orbax", {"w": q})
        again = orbax.load(folder / f"{rotate}.orbax")["w"]
        assert jax.tree.structure(again) == jax.tree.structure(q)
        np.testing.assert_array_equal(again.codes, q.codes)
        source = folder / f"{rotate}.model"
        source.mkdir()
        safetensors.numpy.save_file({"w": w, "b": w[0]}, source / "model.safetensors")
        here = aq.ShardsConfig(workers=1)  # other processes would have to be told of the width, too
        for output, shards in ((f"{rotate}.converted.parquet", None), (f"{rotate}_shards", here)):
            aq.convert(aq.ConversionConfig(str(source), str(folder / output), config, shards=shards))
            found = aq.load(folder / output, packed=True)["w"]
            np.testing.assert_array_equal(found.codes, q.codes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
