"""The decoder computes what llama2.c and transformers compute, with a cache and without."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import llama2c_oracle as oracle
import numpy as np
import pytest
import small_llama
from flax import nnx

import aq_jax as aq
from aq_jax.converters import huggingface
from aq_jax.nn import QEmbed, QLinear
from aq_jax.nn.compiled import BoundProgram
from aq_jax.nn.generator import Generator
from aq_jax.nn.load import load_model
from aq_jax.nn.models.llama import Llama, LlamaConfig

TOKENS = [1, 270, 259, 270, 3, 264, 0, small_llama.VOCAB - 1, 262, 2, 80, 5]


def load(path: Path, activations: Any = None) -> Generator:
    found = load_model(path, activations)
    assert isinstance(found, Generator)
    return found


def whole(model: Llama, ids: jax.Array) -> jax.Array:
    """[tokens, vocabulary], all at once."""
    return model.logits(model.extend(ids[None], model.empty_cache(1, len(ids)), 0)[0])[0]


def logits(model: Llama, tokens: list[int] = TOKENS) -> np.ndarray:
    return np.asarray(BoundProgram(model, whole)(np.array(tokens, np.int32)))


# ------------------------------------------------------------------------------------------------ whose logits


@pytest.mark.parametrize(("shared", "kv_heads"), [(True, 4), (False, 2)], ids=["shared", "own"])
def test_logits_are_those_of_llama2c(tmp_path: Path, shared: bool, kv_heads: int) -> None:
    path = small_llama.make(tmp_path, shared=shared, kv_heads=kv_heads, seed=kv_heads)
    wanted = oracle.logits(tmp_path / small_llama.BIN, TOKENS)
    found = logits(load(path).model)
    assert found.dtype == np.float32
    assert wanted.std() > 0.3
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)


VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2},
    # 8 pairs of a head, of which some turn as they are, some slower, and some between.
    "llama3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}  # fmt: skip
# In a process of its own: transformers sets up warnings of its own when it is imported.
TRANSFORMERS = """
import json, sys
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
variants, tokens, out = json.loads(sys.argv[1])
for name, fields in variants.items():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(1 if "norm" in key else 0, 0.3 if weight.ndim == 1 else weight.shape[1] ** -0.5)
        found = model(torch.tensor([tokens])).logits[0].numpy()
    model.save_pretrained(f"{out}/{name}", safe_serialization=True)
    np.save(f"{out}/{name}.npy", found)
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What LlamaForCausalLM saves and computes of each of the variants."""
    if importlib.util.find_spec("torch") is None or sys.modules.get("torch", ...) is None:
        pytest.skip("needs torch")
    folder = tmp_path_factory.mktemp("transformers")
    small_llama.make(folder / "tokenizer")
    shape = {
        "vocab_size": small_llama.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    given = [{name: shape | fields for name, fields in VARIANTS.items()}, TOKENS * 3, str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS, json.dumps(given)],
        env={"PATH": "", "HOME": str(folder), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in VARIANTS:
        shutil.copy(folder / "tokenizer" / "tokenizer.json", folder / name)
    return folder


@pytest.mark.slow  # importing torch and transformers takes longer than all other tests here
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(theirs: Path, tmp_path: Path, name: str) -> None:
    huggingface.to_table(theirs / name, tmp_path / "m.parquet")
    model = load(tmp_path / "m.parquet").model
    assert model.config.tie_word_embeddings == (name == "tied")
    assert bool(model.config.rope_scaling) == (name == "llama3")
    assert model.config.head_dim == (16 if name == "llama3" else 8)
    wanted = np.load(theirs / f"{name}.npy")
    assert wanted.std() > 0.3
    np.testing.assert_allclose(logits(model, TOKENS * 3), wanted, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ the cache


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return load(small_llama.make(tmp_path_factory.mktemp("model"))).model


def test_single_steps_after_a_prompt_are_the_whole_and_rows_do_not_mix(model: Llama) -> None:
    def forward(model: Llama, ids: jax.Array, start: jax.Array, *cache: jax.Array) -> Any:
        hidden, filled = model.extend(ids, list(zip(cache[::2], cache[1::2], strict=True)), start)
        return model.logits(hidden), jax.tree.leaves(filled)

    run = BoundProgram(model, forward)
    ids = np.array([TOKENS, TOKENS[::-1]], np.int32)
    # More room than there are tokens, and what lies there is never seen.
    cache = [np.full(x.shape, 1e3, np.float32) for x in jax.tree.leaves(model.empty_cache(2, 16))]
    found = []
    for at in [slice(0, 5), *(slice(i, i + 1) for i in range(5, len(TOKENS)))]:
        out, cache = run(ids[:, at], np.int32(at.start), *cache)
        found.append(out)
    assert run.compiles == 2
    alone = BoundProgram(model, whole)
    for row, tokens in zip(np.concatenate(found, axis=1), ids, strict=True):
        np.testing.assert_allclose(row, alone(tokens), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ quantized weights


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_quantized_weights_compute_as_what_they_stand_for(tmp_path: Path, shared: bool) -> None:
    how = aq.QuantizationConfig("int4", group_size=16, solver="absmax") if shared else aq.QuantizationConfig("int8")
    path = small_llama.make(tmp_path / "quantized", how, shared=shared)
    plain = tmp_path / "plain" / "m.parquet"
    shutil.copytree(path.parent, plain.parent)
    plain.unlink()
    aq.save(plain, aq.load(path, "numpy"))
    wanted = logits(load(plain).model)

    exact = load(path, "float32").model
    linear = [getattr(exact.layers[1], name) for name in ("query", "key", "value", "out", "gate", "up", "down")]
    assert {type(layer) for layer in linear} == {QLinear}
    # A shared head is the embedding, as it is packed.
    assert type(exact.embed) is QEmbed
    assert hasattr(exact, "head") == (not shared)
    np.testing.assert_allclose(logits(exact), wanted, atol=1e-5, rtol=1e-5)

    usual = load(path).model
    assert usual.layers[0].activations == ("float32" if shared else "int8")
    if not shared:
        error = logits(usual) - wanted
        assert 1e-4 < error.std() / wanted.std() < 0.03


# ------------------------------------------------------------------------------------------------ the config

FIELDS: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


def test_a_config_of_few_fields_has_the_defaults_of_transformers() -> None:
    found = LlamaConfig.from_json(FIELDS | {"rope_scaling": None, "head_dim": None}, "config.json")
    assert found == LlamaConfig(100, 32, 48, 2, 4, 4, 8, 64)
    assert (found.rms_norm_eps, found.rope_theta, found.rope_scaling, found.tie_word_embeddings) == (
        1e-6,
        1e4,
        (),
        False,
    )


@pytest.mark.parametrize(
    "said",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},  # transformers 4
        {"rope_theta": 500000, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},  # 5
    ],
)
def test_rotations_are_said_in_three_ways(said: dict[str, Any]) -> None:
    found = LlamaConfig.from_json(FIELDS | said, "config.json")
    assert (found.rope_theta, found.rope_scaling) == (5e5, (8.0, 1.0, 4.0, 32.0))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    **{f"no {name}": ({name: None}, f"config.json: no {name}; wanted a positive integer") for name in FIELDS},
    "yarn": ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; wanted 'default' or 'llama3'"),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'; wanted 'default'"),
    "half of llama3": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "has no number low_freq_factor, high"),
    "a list of rotations": ({"rope_scaling": [1, 2]}, r"config.json: rope_scaling is \[1, 2\]; wanted an object"),
    "gelu": ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu'; wanted 'silu'"),
    "slices": ({"pretraining_tp": 2}, "pretraining_tp is 2; wanted 1"),
    "a string": ({"hidden_size": "32"}, "hidden_size is '32'; wanted a positive integer"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0; wanted a positive integer"),
    "more heads than width": ({"num_attention_heads": 64}, "head_dim is 0; wanted a positive integer"),
    "heads that are not shared evenly": (
        {"num_key_value_heads": 3},
        "num_attention_heads 4, num_key_value_heads 3, head",
    ),
    "odd heads": ({"head_dim": 7}, "head_dim 7; wanted a number of heads .*, and an even head_dim"),
    "a theta that is none": ({"rope_theta": "10000"}, "rope_theta is '10000'; wanted a positive number"),
}


@pytest.mark.parametrize("what", WRONG)
def test_configs_that_are_not_computed_are_refused(what: str) -> None:
    fields, message = WRONG[what]
    with pytest.raises(aq.FormatError, match=message):
        LlamaConfig.from_json(FIELDS | fields, "config.json")


def test_what_older_checkpoints_hold_beside_weights_is_left_out(tmp_path: Path) -> None:
    path = small_llama.make(tmp_path)
    tensors = aq.load(path, "numpy")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    path.unlink()
    aq.save(path, tensors | extra)
    found = dict(nnx.to_flat_state(nnx.state(load(path).model)))
    np.testing.assert_array_equal(found["norm", "scale"].get_value(), tensors["model.norm.weight"])
    path.unlink()
    aq.save(path, {name: w for name, w in tensors.items() if name != "lm_head.weight"} | {"stranger": np.ones(1)})
    with pytest.raises(aq.FormatError, match=r"2 tensors do not fit .*head.kernel: no tensor .*; stranger: matches no"):
        load_model(path)
