"""Scales that are trained begin as they were, weigh on the loss as plain factors, and are stored as computed with."""

from __future__ import annotations

import bert_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from aq_jax import QTensor, QuantizationConfig, dequantize, quantize
from aq_jax.calibration.distill import Distiller, distillation_loss, training_batch
from aq_jax.calibration.latent import stored_scale
from aq_jax.calibration.layer_inputs import token_mask
from aq_jax.calibration.layerwise import copy_vectors, get_weight, set_weight
from aq_jax.calibration.row_scales import unit_values, with_scales
from aq_jax.nn.compiled import split_module
from aq_jax.nn.models.bert import NAMES, Bert, BertConfig
from aq_jax.nn.sentences import SentenceSettings
from aq_jax.nn.weights import abstract_model, fill

FIELDS = {**bert_oracle.CONFIG, "num_hidden_layers": 1, "vocab_size": 60, "max_position_embeddings": 16}
SAID = SentenceSettings()
EACH = [("tcq1.5", False), ("tcq3", True)]


def coded(w: Array, quant_type: str, rotate: bool) -> QTensor:
    q = quantize(w, QuantizationConfig(quant_type, rotate=rotate))
    assert isinstance(q, QTensor)
    return q


@pytest.mark.parametrize(("quant_type", "rotate"), EACH)
def test_they_begin_as_they_were_and_are_stored_as_computed_with(quant_type: str, rotate: bool) -> None:
    q = coded(jax.random.normal(jax.random.key(0), (6, 32)).at[2].set(0.0), quant_type, rotate)
    units, log_scale = unit_values(q), jnp.log(q.scale)
    np.testing.assert_allclose(units * stored_scale(log_scale), dequantize(q), rtol=1e-5, atol=1e-6)
    for before, after in zip(jax.tree.leaves(q), jax.tree.leaves(with_scales(q, log_scale)), strict=True):
        np.testing.assert_array_equal(before, after)
    gains = np.float32([-0.3, -0.1, 0, 0.1, 0.2, 0.3])[:, None]
    moved = with_scales(q, log_scale + gains)
    np.testing.assert_array_equal(moved.codes, q.codes)
    np.testing.assert_allclose(moved.scale / q.scale, np.exp(gains), rtol=2**-8)
    assert not (np.asarray(moved.scale).view(np.uint32) & 0xFFFF).any()  # two bytes are stored
    np.testing.assert_allclose(units * stored_scale(log_scale + gains), dequantize(moved), rtol=1e-5, atol=1e-6)
    bounds = with_scales(q, log_scale.at[0].set(-999.0).at[1].set(999.0)).scale
    np.testing.assert_array_equal(bounds[:2, 0], np.float32([2.0**-126, 2.0**126]))


@pytest.mark.slow
def test_the_loss_and_its_gradients_are_those_of_plain_factors() -> None:
    """A table has a factor for each row, a linear one for each output."""
    shape, weights = BertConfig.from_json(FIELDS, "test"), bert_oracle.weights(FIELDS)
    model, student = (
        fill(abstract_model(lambda rngs: Bert(shape, rngs=rngs)), weights, NAMES, "float32", "test") for _ in "ab"
    )
    kinds = {student.table: EACH[0], "layers.0.down.kernel": EACH[1]}
    solved = {path: coded(get_weight(model, path), *kind) for path, kind in kinds.items()}
    for path, q in solved.items():
        set_weight(student, path, dequantize(q))
    before = {path: get_weight(student, path) for path in solved}
    distiller = Distiller(model, student, solved, list(solved), SAID)
    ids = np.random.default_rng(0).integers(5, 60, (4, 7))
    texts = training_batch((ids, np.array([7, 5, 3, 0])))
    start = distiller.start(model, copy_vectors(student)).weights
    assert not start.latents
    for path, weight in before.items():
        np.testing.assert_array_equal(get_weight(student, path), weight)
    goal = distiller.teacher_hidden(distiller.leaves[0], texts)
    loss, found = jax.jit(jax.value_and_grad(distiller.loss))(start, distiller.leaves[1], goal, texts)

    structure, leaves = split_module(student)

    def plain(gains: dict[str, Array]) -> Array:
        scaled = structure.merge(leaves)
        for path, gain in gains.items():
            set_weight(scaled, path, before[path] * jnp.exp(gain))
        x = scaled.begin(texts.ids)
        hidden = scaled.end(scaled.layers[0](x, token_mask(x, texts.lengths)))
        return distillation_loss([hidden], goal, texts.lengths, SAID)

    zeros = {path: jnp.zeros((len(weight), 1)) for path, weight in before.items()}
    wanted_loss, wanted = jax.jit(jax.value_and_grad(plain))(zeros)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-4)
    for path, gradient in wanted.items():
        np.testing.assert_allclose(
            found.log_scales[path], gradient, rtol=1e-3, atol=1e-3 * float(jnp.abs(gradient).max())
        )
