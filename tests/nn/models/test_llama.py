"""The decoder computes what llama2.c computes, with a cache and without."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llama2c_oracle as oracle
import numpy as np
import pytest
import small_llama
from flax import nnx

import aq_jax as aq
from aq_jax.nn import QEmbed, QLinear
from aq_jax.nn.compiled import BoundProgram
from aq_jax.nn.generator import Generator
from aq_jax.nn.load import load_model
from aq_jax.nn.models.decoder import Decoder

TOKENS = [1, 270, 259, 270, 3, 264, 0, small_llama.VOCAB - 1, 262, 2, 80, 5]


def load(path: Path, activations: Any = None) -> Generator:
    found = load_model(path, activations)
    assert isinstance(found, Generator)
    return found


def whole(model: Decoder, ids: jax.Array) -> jax.Array:
    """[tokens, vocabulary], all at once."""
    return model.logits(model.extend(ids[None], model.empty_cache(1, len(ids)), 0)[0])[0]


def logits(model: Decoder, tokens: list[int] = TOKENS) -> np.ndarray:
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


# ------------------------------------------------------------------------------------------------ the cache


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load(small_llama.make(tmp_path_factory.mktemp("model"))).model


def test_single_steps_after_a_prompt_are_the_whole_and_rows_do_not_mix(model: Decoder) -> None:
    def forward(model: Decoder, ids: jax.Array, start: jax.Array, cache: Any) -> Any:
        hidden, cache = model.extend(ids, cache, start)
        return model.logits(hidden), cache

    run = BoundProgram(model, forward)
    ids = np.array([TOKENS, TOKENS[::-1]], np.int32)
    # More room than there are tokens, and what lies there is never seen.
    cache = jax.tree.map(lambda x: jnp.full_like(x, 1e3), model.empty_cache(2, 16))
    found = []
    for at in [slice(0, 5), *(slice(i, i + 1) for i in range(5, len(TOKENS)))]:
        out, cache = run(ids[:, at], np.int32(at.start), cache)
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


# ------------------------------------------------------------------------------------------------ the names


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


def test_a_tied_head_that_is_another_matrix_is_refused(tmp_path: Path) -> None:
    path = small_llama.make(tmp_path, shared=True)
    tensors = aq.load(path, "numpy")
    words = tensors["model.embed_tokens.weight"]
    coarse = aq.quantize(words, "int2")
    near, other = words * np.float32(1.001), np.roll(words, 1, axis=0)
    half = words.astype(np.float16).astype(np.float32)
    for embedding, head, same in (
        (words, words, True), (words, half, True), (words, near, False), (words, coarse, True), (coarse, near, True),
        (coarse, aq.quantize(other, "int8"), False),
    ):  # fmt: skip
        path.unlink()
        aq.save(path, tensors | {"model.embed_tokens.weight": embedding, "lm_head.weight": head})
        with nullcontext() if same else pytest.raises(aq.FormatError, match=r"lm_head\.weight is another"):
            load_model(path)
