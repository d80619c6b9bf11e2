"""Check where the weights of a model go; tests/test_eight_devices.py has devices, and computes."""

from __future__ import annotations

from types import SimpleNamespace

import jax
from jax.sharding import AxisType, PartitionSpec

from aq_jax.nn.architecture import Architecture
from aq_jax.nn.models import FAMILIES
from aq_jax.nn.parallel import partition_spec, shardings
from aq_jax.store import RowInfo

P = PartitionSpec


def info(name: str, *shape: int, quant_type: str = "none") -> RowInfo:
    return RowInfo(name, shape, "float32", 0, 0, 0, quant_type)


def test_each_linear_of_a_llama_has_its_axis() -> None:
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    config = SimpleNamespace(tied=False, layer=SimpleNamespace(norms="before"))
    at = "model.layers.0"
    wanted = {f"{at}.self_attn.{name}_proj.weight": P("model", None) for name in "qkv"}
    wanted |= {f"{at}.self_attn.{name}_proj.bias": P("model") for name in "qkv"}
    wanted |= {f"{at}.mlp.{name}_proj.weight": P("model", None) for name in ("gate", "up")}
    wanted |= {f"{at}.self_attn.o_proj.weight": P(None, "model"), f"{at}.mlp.down_proj.weight": P(None, "model")}
    wanted |= {"lm_head.weight": P("model", None)}
    everywhere = ("model.embed_tokens.weight", "model.norm.weight", f"{at}.input_layernorm.weight", "unknown")
    wanted |= dict.fromkeys([*everywhere, f"{at}.mlp.down_proj.bias"], P())
    tensors = {name: info(name, *(8 for _ in range(1 if name.endswith("bias") else 2))) for name in wanted}
    found = shardings(tensors, Architecture(FAMILIES["llama"], config, {}), mesh)
    assert {name: sharding.spec for name, sharding in found.items()} == wanted


def test_codes_must_divide_as_well_as_weights() -> None:
    """Eight columns of two bits are two bytes: eight devices cannot have one each."""
    name = "encoder.layer.0.output.dense.weight"
    for quant_type, columns, wanted in (
        ("none", 8, P(None, "model")),
        ("int2", 8, P()),
        ("int2", 32, P(None, "model")),
        ("int3", 64, P(None, "model")),
        ("int3", 8, P()),
        ("int8", 8, P(None, "model")),
        ("int4", 24, P()),
    ):
        assert partition_spec(1, info(name, 4, columns, quant_type=quant_type), 8) == wanted, (quant_type, columns)
