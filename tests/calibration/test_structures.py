"""Models whose layers differ in what is static: each layer runs by its own, as it does when the model is called."""

from __future__ import annotations

import bert_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from aq_jax import quantize
from aq_jax.calibration.distill import Distiller, distillation_loss, training_batch
from aq_jax.calibration.layer_inputs import LayerInputs, token_mask
from aq_jax.calibration.layerwise import copy_vectors, get_weight
from aq_jax.calibration.sensitivity import FloatOutputs, input_hessians
from aq_jax.calibration.text import pad_to_one_shape
from aq_jax.nn.models.bert import NAMES, Bert, BertConfig, Layer
from aq_jax.nn.sentences import SentenceSettings
from aq_jax.nn.weights import abstract_model, fill
from aq_jax.ops import ACTS

CONFIG = BertConfig.from_json(bert_oracle.CONFIG | {"num_hidden_layers": 3, "vocab_size": 60}, "test")
SENTENCES = [[2, *np.random.default_rng(n).integers(5, 60, 3 + n % 9).tolist(), 3] for n in range(8)]
BATCHES = pad_to_one_shape(SENTENCES, 16)
SAID = SentenceSettings()
(IDS, LENGTHS), *_ = (tuple(map(jnp.asarray, batch)) for batch in BATCHES)


class Parallel(Layer):
    """Another order of the linears, and the same input for more of them: other stages."""

    def __call__(self, x: Array, mask: Array) -> Array:
        normed = self.attention_norm(x)
        wide, v = self.up(normed), self.value(normed)
        return self.output_norm(x + self.down(ACTS[self.act](wide)) + self.out(v + self.key(v) + self.query(v)))


def made(heads: tuple[int, ...] = (4, 2, 4), seed: int = 0) -> Bert:
    """Layer 1 has other heads and another function, and layer 2 is of another class."""
    weights = bert_oracle.weights({**bert_oracle.CONFIG, "num_hidden_layers": 3, "vocab_size": 60}, seed)
    model = fill(abstract_model(lambda rngs: Bert(CONFIG, rngs=rngs)), weights, NAMES, "float32", "test")
    for layer, count in zip(model.layers, heads, strict=True):
        layer.heads = count
    model.layers[1].act = "relu"
    last = abstract_model(lambda rngs: Parallel(CONFIG, "float32", rngs))
    nnx.update(last, nnx.state(model.layers[2]))
    model.layers[2] = last
    return model


@pytest.fixture(scope="module")
def model() -> Bert:
    return made()


def hidden(model: Bert) -> list[Array]:
    """Directly: what each layer is given, and what the last one gives."""
    x = [model.begin(IDS)]
    for layer in model.layers:
        x.append(layer(x[-1], token_mask(x[-1], LENGTHS)))
    return x


def means(model: Bert) -> np.ndarray:
    """Of the last hidden states of each sentence, of length 1."""
    last = np.asarray(hidden(model)[-1], np.float64)
    out = np.stack([last[row, :count].mean(0) for row, count in enumerate(map(len, SENTENCES))])
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def hessian(given: Array) -> Array:
    rows = np.asarray(given)[np.asarray(token_mask(given, LENGTHS))]
    return rows.T @ rows


def test_a_inputs_takes_each_layer_as_it_is(model: Bert) -> None:
    inputs, x = LayerInputs(model, model, BATCHES), hidden(model)
    assert inputs.linears_by_input == [["query", "key", "value"], ["out"], ["up"], ["down"]]
    inputs.advance()
    layer = model.layers[1]
    np.testing.assert_allclose(inputs.hessian_sums(0).own, hessian(x[1]), rtol=1e-4, atol=1e-3)
    mask = token_mask(x[1], LENGTHS)
    seen: list[Array] = []
    down, layer.down = layer.down, lambda given: seen.append(given) or down(given)
    try:
        layer(x[1], mask)
    finally:
        layer.down = down
    np.testing.assert_allclose(inputs.hessian_sums(3).own, hessian(seen[0]), rtol=1e-4, atol=1e-3)
    inputs.advance()
    assert inputs.linears_by_input == [["up", "value"], ["down"], ["key", "query"], ["out"]]
    np.testing.assert_allclose(
        inputs.hessian_sums(0).own, hessian(model.layers[2].attention_norm(x[2])), rtol=1e-4, atol=1e-3
    )


def test_moments_of_inputs_are_those_of_each_layer(model: Bert) -> None:
    found, x = input_hessians(model, BATCHES, seed=0), hidden(model)
    tokens = int(LENGTHS.sum())
    for layer, given in ((0, x[0]), (1, x[1])):
        np.testing.assert_allclose(found[f"layers.{layer}.key.kernel"], hessian(given) / tokens, rtol=1e-4, atol=1e-4)
    value = model.layers[2].value(model.layers[2].attention_norm(x[2]))
    np.testing.assert_allclose(found["layers.2.key.kernel"], hessian(value) / tokens, rtol=1e-4, atol=1e-3)


def test_outputs_are_those_of_the_model(model: Bert) -> None:
    outputs, wanted = FloatOutputs(model, BATCHES, SAID), means(model)
    # What another model has otherwise is a program of its own, too.
    for other in (made(seed=1), made(heads=(2, 4, 4))):
        assert outputs.distance(other) == pytest.approx(1 - (wanted * means(other)).sum(1).mean(), rel=1e-4)


def test_training_runs_teacher_and_student_as_they_are(model: Bert) -> None:
    student, path = made(heads=(2, 4, 4)), "layers.0.query.kernel"
    distiller = Distiller(model, student, {path: quantize(get_weight(student, path), "int8")}, [path], SAID)
    weights = distiller.start(student, copy_vectors(student)).weights
    texts = training_batch(BATCHES[0])
    goal = jax.jit(distiller.teacher_hidden)(distiller.leaves[0], texts)
    for found, wanted in zip(goal, hidden(model)[1:], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    loss = jax.jit(distiller.loss)(weights, distiller.leaves[1], goal, texts)
    assert float(loss) == pytest.approx(float(distillation_loss(hidden(student)[1:], goal, LENGTHS, SAID)), rel=0.02)
