"""Sizes of other programs' checkpoints as QTensors, and so in a table that compresses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import aq_jax as aq
from aq_jax.converters import open_source
from benchmarks.scheme_checkpoints import GROUPS, Programs

# The codes of some, which keep their grids as they are.
KINDS = {
    "GPTQ": "int4_f16i",
    "compressed-tensors, float32": "int4_f32i",
    "compressed-tensors, symmetric, float32": "int4_f32",
    "MLX, bfloat16": "int4_bf16m",
    "HQQ, float16": "int4_f16u",
    "torchao, Int4Tensor": "int4_bf16a",
    "GPTQ, 2 bits": "int2_f16p",
    "compressed-tensors, float8, bfloat16": "f8_e4m3_bf16",
    "bitsandbytes, nf4, nested": "nf4_nested",
}


@pytest.mark.parametrize("group", GROUPS)
def test_a_weight_is_at_most_5_percent_larger_than_its_source(group: int, tmp_path: Path) -> None:
    for checkpoint in Programs(512).checkpoints(group):
        folder = tmp_path / checkpoint.name
        folder.mkdir()
        checkpoint.write(folder)
        held = sum(array.nbytes for leaf, array in checkpoint.tensors.items() if leaf not in ("g_idx", "weight_shape"))
        with open_source(folder, packed=True) as source:
            q = source.read("a.weight")
            assert isinstance(q, aq.QTensor)
            assert source.nbytes("a.weight") <= 1.05 * held, checkpoint.name
        assert q.nbytes <= 1.05 * held, checkpoint.name
        assert q.spec.quant_type == KINDS.get(checkpoint.name, q.spec.quant_type)
