"""Where the weights of a model go, and that models spread over devices compute what those of one device do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from aq_jax.nn.architecture import Architecture
from aq_jax.nn.models import FAMILIES
from aq_jax.nn.parallel import partition_spec, shardings
from aq_jax.store import RowInfo

TESTS = Path(__file__).parent.parent
P = PartitionSpec


def run(expression: str) -> None:
    """The tests of eight_devices_models.py that match, in a process with eight devices."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", expression]
    done = subprocess.run(
        [*command, str(TESTS / "nn" / "eight_devices_models.py")],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


def test_on_eight_devices() -> None:
    run("not slow")


@pytest.mark.slow
def test_more_and_minilm_on_eight_devices() -> None:
    run("slow")


def info(name: str, *shape: int, quant_type: str = "none") -> RowInfo:
    return RowInfo(name, shape, "float32", 0, 0, 0, quant_type)


def test_each_linear_of_a_llama_has_its_axis() -> None:
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    config = SimpleNamespace(tie_word_embeddings=False)
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
